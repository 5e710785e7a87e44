"""The measuring side: each model is loaded, its hooks are compared with its calls, its inputs are changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from diag.errors import UserError
from diag.inputs.items import Inputs, Item
from diag.measure.device import device_of, dtype_of
from diag.measure.meaning import understood
from diag.models import load
from diag.models.base import Batch, Model, Sample, Tower
from diag.models.families.from_module import from_module
from diag.models.hooks.other_inputs import other_than
from diag.models.hooks.residual import tolerance
from diag.models.names.spec import ModelSpec
from diag.results.caveats import columns_of
from diag.run.plan import specs_of
from diag.run.progress import Listener, Silent
from diag.studies.audit.folder import HOOKS, LEAKS, Audited, table_of
from diag.studies.audit.hooks import Row, audit_hooks
from diag.studies.audit.leaks import (
    Case,
    Change,
    batch_case,
    changes_of,
    filled_case,
    tail_case,
    text_changes,
    untested,
)
from diag.studies.audit.lens import lens_rows
from diag.studies.audit.plan import DEFAULT_LENGTH, AuditPlan
from diag.studies.audit.unequal import mask_in, padded_case, unequal_cases
from diag.studies.audit.words import IN_BATCH, OTHER_INPUT, PADDING

WINDOWS = 4
CHARACTERS = 64
"""So many windows are asked for at most; so many characters are more than any token has on average."""


@dataclass(frozen=True)
class _Found:
    """What one tower gave. facts: for the manifest and the columns of the tables."""

    facts: dict[str, Any]
    rows: Sequence[Row]
    changes: Sequence[Change]


def measure_models(
    plan: AuditPlan, listener: Listener | None = None, *, given: Mapping[str, Inputs] | None = None
) -> Audited:
    """Carries out a plan, one model at a time. A model that fails beside others is named in `failed`.

    Raises UserError as `diag.studies.audit.audit` does.
    """
    listener, given = listener or Silent(), given or plan.inputs()
    specs, device, dtype = specs_of(plan.probe_plan()), device_of(plan.device), dtype_of(plan.dtype)
    found, failed = list[_Found](), dict[str, str]()
    for spec in specs:
        listener.start(spec.given, 1)
        try:
            found += _of_model(plan, spec, given, device, dtype, listener)
        except UserError as error:
            failed[spec.given] = str(error)
            if len(failed) == len(specs):
                raise
            listener.say(f"{spec.given} failed: {error}")
        listener.advance(1)
    return _audited(found, failed)


def measure_module(module: nn.Module, batches: Sequence[Any]) -> Audited:
    """The same of your own module, on ready batches as `diag.probe` takes them; of the first one, at once."""
    model, towers, samples = from_module(module, list(batches), apart=False)
    found = []
    for tower in towers:
        batch = tower.encode(samples[:1])
        rows = audit_hooks(model, tower, batch, tolerance=_tolerance(model))
        found.append(
            _Found(_facts(model, tower, model.name), rows, list(_changes_of_batch(model, tower, batch)))
        )
    return _audited(found, {})


def _audited(found: Sequence[_Found], failed: Mapping[str, str]) -> Audited:
    def rows(name: str) -> Iterator[dict[str, Any]]:
        for one in found:
            same = {key: one.facts[key] for key in ("model", "tower")}
            for row in one.rows if name == HOOKS else one.changes:
                document = asdict(row)
                yield same | document.pop("found", {}) | document

    return Audited(
        table_of(pd.DataFrame(rows(HOOKS)), HOOKS),
        table_of(pd.DataFrame(rows(LEAKS)), LEAKS),
        [one.facts for one in found],
        failed,
    )


def _of_model(
    plan: AuditPlan,
    spec: ModelSpec,
    given: Mapping[str, Inputs],
    device: torch.device | str,
    dtype: torch.dtype,
    listener: Listener,
) -> list[_Found]:
    # what is compared with the hooks of transformer-lens are the calls of the library's own model
    model = load(replace(spec, family="hf") if spec.family == "tl" else spec, device=device, dtype=dtype)
    for note in (f"{spec.given} → {model.resolved}", *model.notes):
        listener.say(note)
    towers = [(tower, kind) for kind in given for tower in model.takers(kind)]
    if not towers:
        model.tower(next(iter(given)))  # says what it takes
    return [_of_tower(plan, spec, model, tower, given[kind], listener) for tower, kind in towers]


def _of_tower(
    plan: AuditPlan, spec: ModelSpec, model: Model, tower: Tower, given: Inputs, listener: Listener
) -> _Found:
    length = _length(tower, plan.seq_len) if tower.input_kind == "text" else None
    if length is not None:
        given = _beginnings(given, length)
    samples = list(islice(tower.samples(given, length), 3))
    if not samples:
        raise UserError(
            f"'{given.source}' gives no sample for the {tower.name} tower",
            "the text is shorter than one window: give more text, or a smaller --seq-len",
        )
    tower = understood(model, tower, samples[:1])
    batch = tower.encode(samples[:1] if tower.max_batch == 1 else samples[:2])
    rows = audit_hooks(model, tower, batch, tolerance=_tolerance(model))
    facts = _facts(model, tower, spec.given)
    if plan.lens and tower.input_kind == "text" and len(model.towers) == 1:
        more, why = lens_rows(spec, model, tower, batch)
        rows += more
        facts["transformer_lens"] = why or "compared"
        if why:
            listener.say(f"{spec.given}: {why}")
    if length is not None and tower.also:

        def windows(lengths: Sequence[int]) -> list[list[int]]:
            return _windows(tower, given, lengths)

        changes = list(text_changes(model, tower, windows, length))
    else:
        changes = _batch_changes(tower, samples)
        padded = list(_padded_cases(tower, samples, batch))
        for case in padded:
            changes += changes_of(tower, case)
        if not padded:
            changes.append(untested("padded", PADDING, _unpadded(tower)))
    return _Found(facts, rows, changes)


def _padded_cases(tower: Tower, samples: Sequence[Sample], batch: Batch) -> Iterator[Case]:
    """Of a tower that takes no mask by name. batch: of the first sample, where it takes one at a time."""
    if tower.input_kind == "text":
        if len(samples) > 1:
            yield tail_case(*(tower.encode([sample]) for sample in samples[:2]))
        return
    filled = filled_case(batch) if tower.max_batch == 1 else None
    if filled is not None:
        yield filled
    yield from unequal_cases(tower, samples)


def _facts(model: Model, tower: Tower, name: str) -> dict[str, Any]:
    caveats = columns_of(model.facts, tower.facts)
    facts = {"model": name, "resolved": model.resolved, "family": model.family, "tower": tower.name}
    return facts | {"layers": tower.depth, "skipped_layers": dict(tower.skipped), **caveats}


def _tolerance(model: Model) -> float:
    floats = (x.dtype for x in model.module.parameters() if x.is_floating_point())
    return tolerance(next(floats, torch.float32))


def _length(tower: Tower, asked: int | None) -> int | None:
    """Tokens of a text; None where a tower has one length only, as CLIP's text towers may."""
    if not tower.also:
        return asked
    context = tower.facts.get("context") or DEFAULT_LENGTH
    return asked or min(DEFAULT_LENGTH, context)


def _beginnings(given: Inputs, length: int) -> Inputs:
    """Texts cut to what a few windows of so many tokens need: each window has the text tokenised anew."""

    def beginning(read: Callable[[], Any]) -> Any:
        return read()[: CHARACTERS * WINDOWS * length]

    return replace(given, items=[Item(item.id, partial(beginning, item.read)) for item in given.items])


def _windows(tower: Tower, given: Inputs, lengths: Sequence[int]) -> list[list[int]]:
    """Token ids of texts of such lengths, of other content each. Raises UserError for too little text."""
    found = list[list[int]]()
    for place, length in enumerate(lengths):
        windows = list(islice(tower.samples(given, length), place + 1))
        if not windows:
            raise UserError(
                f"'{given.source}' gives no window of {length} tokens",
                "give more text, or a smaller --seq-len",
            )
        ids = list(windows[-1].read())
        found.append(ids if len(windows) > place else ids[:1] + ids[-2:0:-1] + ids[-1:])
    return found


def _unpadded(tower: Tower) -> str:
    """Why there is no padded batch of a tower that takes no mask."""
    if tower.input_kind == "text":
        return "there is one text, where two are needed"
    if tower.max_batch == 1:
        return "one image per batch, as its processor gives each its own size"
    if tower.meaning.get("padded_windows"):
        return "images are brought to one size; what fills its windows up is no input's"
    return "images are brought to one size: nothing is padded"


def _batch_changes(tower: Tower, samples: Sequence[Sample]) -> list[Change]:
    """Two inputs of one size in a batch."""
    if tower.max_batch == 1:
        return [untested(IN_BATCH, OTHER_INPUT, "the tower takes one input at a time")]
    if len(samples) < 3:
        return [untested(IN_BATCH, OTHER_INPUT, f"three inputs are needed, {len(samples)} given")]
    a, b, c = samples[:3]
    case = batch_case(tower.encode([a, b]), tower.encode([a, c]), tower.encode([a]))
    return changes_of(tower, case)


def _changes_of_batch(model: Model, tower: Tower, batch: Batch) -> Iterator[Change]:
    """Of a ready batch: padded and packed where it is one of ids, else its first two inputs."""
    data = batch.data
    if isinstance(data, Mapping) and "input_ids" in data and tower.also:
        ids = data["input_ids"]
        rows = ids if len(ids) > 2 else torch.cat([ids, *(other_than(ids, i) for i in (1, 2))])

        def windows(lengths: Sequence[int]) -> list[list[int]]:
            return [rows[place, :length].tolist() for place, length in enumerate(lengths)]

        yield from text_changes(model, tower, windows, ids.shape[1])
        return
    single = isinstance(data, Tensor)
    tensors: dict[str, Tensor] = {"": data} if single else dict(data)
    if min(map(len, tensors.values())) < 2:
        yield untested(IN_BATCH, OTHER_INPUT, "the batch holds one input")
        return

    def of(rows: Sequence[Mapping[str, Tensor]]) -> Batch:
        parts = {name: torch.cat([x[name] for x in rows]) for name in tensors}
        return Batch(tuple(map(str, range(len(rows)))), parts[""] if single else parts)

    if (real := mask_in(tensors)) is not None:
        other = {
            name: torch.cat([x[:1], other_than(x[1:], 2)]) if x.is_floating_point() and x.ndim > 2 else x
            for name, x in tensors.items()
        }
        case = padded_case(tower, of([tensors]), real, of([other]))
        yield from () if case is None else changes_of(tower, case)
    a, b = ({name: x[row : row + 1] for name, x in tensors.items()} for row in (0, 1))
    c = {name: other_than(x, 2) if x.is_floating_point() else x for name, x in b.items()}
    yield from changes_of(tower, batch_case(of([a, b]), of([a, c]), of([a])))
