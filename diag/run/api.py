"""The same measurements from Python, in memory: `diag.probe` and `diag.capture`."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn

from diag.attention.call import AttentionCall
from diag.errors import NotFinite, UserError, counted
from diag.inputs.given import as_inputs, kind_of, listed
from diag.inputs.items import sha256
from diag.inputs.texts import is_typed
from diag.measure import loop as measure
from diag.measure.batch_readings import Incidents
from diag.measure.device import device_of, dtype_of
from diag.measure.meaning import understood
from diag.measure.token_values import TokenValues
from diag.models import in_single_precision, load
from diag.models.base import Model, Sample, Tower
from diag.models.cross import CROSS
from diag.models.families.from_module import from_module, refuse_training
from diag.models.families.from_object import Fed, from_object
from diag.models.known import known_layers
from diag.models.untrained import reinitialised, untrained_twin
from diag.results.left_out import emptied
from diag.results.tables import samples_frame, tables
from diag.results.untrained import beside
from diag.run import shards
from diag.run.in_memory import Probe
from diag.run.plan import ProbePlan, specs_of
from diag.run.prepared import Measurement
from diag.variants import variants_in


def probe(
    model: str | nn.Module,
    inputs: Any,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    preprocess: Any = None,
    name: str | None = None,
    checkpoint: str | Path | None = None,
    random_init: bool = False,
    metrics: Sequence[str] | None = None,
    tokens: Sequence[str] | None = None,
    layers: Sequence[int] | str | None = None,
    values: str = "as_computed",
    intervene: Sequence[str] = (),
    null: str | None = None,
    limit: int = 64,
    seq_len: int | None = None,
    batch_size: int = 8,
    exact: bool = False,
    per_token: bool = False,
    device: str = "auto",
    dtype: str = "float32",
    seed: int = 0,
    allow_random: bool = False,
    cross: bool = False,
) -> Probe:
    """Measures a model, named or as an object, on images or texts; or your own module on ready batches.

    model: a name as on the command line, or an `nn.Module` that uses PyTorch attention. A module runs where
        it is, as it is.
    inputs: a folder, a file, "demo", `diag.images(…)`, `diag.texts(…)`, a PIL image or a text, or a list of
        these, or of paths of images; for a model of videos, a folder of frames for each clip, or a list of
        lists of PIL images. For a module alone, an iterable of batches, each a tensor or a dict of tensors
        that the module takes; every row of a batch is one input.
    tokenizer, processor, preprocess: what makes a module's inputs of texts or images, as for a name: a
        tokenizer or processor of transformers, a tokenizer of open_clip, a transform of timm, open_clip or
        torchvision. Models of these libraries have the token sets that they have by name.
    name: what the model is called in the tables. checkpoint, random_init: weights for a name.
    metrics, tokens, layers: names, token sets, and the model's own numbers of layers, where -1 or "last" is
        its last; defaults are the `default` group, the tower's default token sets, and all layers.
    values: "as_computed", or "bias_free": without the constant that biases add to every value.
    batch_size: inputs per forward pass; 0 for as many as memory allows.
    exact: compute every query row, also beyond 2,048 tokens (docs/metrics.md, Sampled rows).
    per_token: keep the numbers of single tokens as well, in `Probe.tokens`: a row for every one of them.
    intervene: what is done to attention, as on the command line: "xsa:8-11", "gated_xsa=0.5".
    null: "untrained", or "untrained=5": beside the model, three (or five) of its architecture with fresh
        weights (docs/nulls.md). A module is initialised by the `reset_parameters` and `init_weights` that its
        parts have; where these leave a parameter, it is refused, by its name.
    allow_random: measure also what is in training mode, or gives other numbers for the same input.
    cross: of a module on ready batches for encoder and decoder, measure cross-attention as well: a tower
        "cross" with the metrics that need no v_i (docs/attend.md).

    Raises UserError for what you can mend, MeasurementError (a UserError) where a layer cannot be seen.

    >>> run = probe("demo:vit-p16", "demo", limit=2, metrics=["cos_y_vself"])
    >>> len(run.layers)
    6
    """
    plan = ProbePlan.checked(
        models=(model if isinstance(model, str) else type(model).__name__,),
        checkpoint=checkpoint,
        random_init=random_init,
        metrics=_listed(metrics),
        tokens=_listed(tokens),
        layers=_listed(layers),
        values=values,
        intervene=_listed(intervene),
        null=null,
        limit=limit,
        seq_len=seq_len,
        batch_size=batch_size,
        exact=exact,
        device=device,
        dtype=dtype,
        seed=seed,
        allow_random=allow_random,
    )
    measurement = Measurement.of(plan)
    _refuse_cross(model, plan, cross, tokenizer or processor or preprocess)
    if plan.seeds and isinstance(inputs, Iterator):
        inputs = list(inputs)  # every twin is given all of them
    fed = Fed(tokenizer, processor, preprocess)
    loaded, towers, samples, given = _prepare(model, inputs, plan, fed, cross=cross)
    loaded = loaded if name is None else replace(loaded, name=name)
    twins = list[dict[str, pd.DataFrame]]()
    for seed in range(plan.seeds):
        twin = _prepare(_twin(model, loaded, plan, seed), inputs, plan, fed)[:3]
        try:
            twins.append(_frames(*twin, measurement.of_untrained(), Incidents(), {}))
        except NotFinite as error:
            raise UserError(
                f"the untrained twin (seed {seed}), not the model: {error}",
                "leave null= out: how its weights begin says nothing about it",
            ) from error
    incidents, skipped = Incidents(tokens=TokenValues() if per_token else None), dict[str, str]()
    of_towers = _frames(loaded, towers, samples, measurement, incidents, skipped)
    frames = [
        beside(frame, [twin[tower] for twin in twins]) if twins else frame
        for tower, frame in of_towers.items()
    ]
    if not frames:
        reason = next(iter(incidents.failed.values()), "there is none")
        raise UserError(f"no input could be read: {reason}", "give images in JPEG, PNG or WebP")
    frame = pd.concat(frames, ignore_index=True)
    if frame["value"].isna().all():
        count = int(frame["n_tokens"].max())
        raise UserError(
            f"none of the metrics has a number ({counted(count, 'token')} per input)",
            "give inputs of more tokens, or other tokens= or metrics=; one alone has nothing to measure",
        )
    meaning = {tower.name: tower.meaning for tower in towers}
    depths = {tower.name: tower.depth for tower in towers}
    empty = emptied(incidents.unprojected, incidents.sinks_unprojected)
    entries = [
        shards.entry_of(loaded, tower, loaded.name, len(samples))
        | {
            "skipped_layers": skipped,
            "emptied": empty,
            "tokenizer": tower.facts.get("tokenizer") or _windows(tower, samples),
        }
        for tower in towers
    ]
    given = given or {"source": "batches", "sha256": _content(samples)}
    manifest = {
        "plan": plan.model_dump(mode="json"),
        "inputs": {tower.input_kind: dict(given) for tower in towers},
        "models": entries,
    }
    each = None if incidents.tokens is None else incidents.tokens.frame()
    return Probe(*tables(frame, seed=seed), frame, incidents.failed, skipped, meaning, depths, manifest, each)


def capture(
    model: str | nn.Module,
    batch: Any,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    preprocess: Any = None,
    checkpoint: str | Path | None = None,
    random_init: bool = False,
    layers: Sequence[int] | str | None = None,
    limit: int = 64,
    seq_len: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> list[AttentionCall]:
    """The attention calls of one forward pass, in order: queries, keys, values, output, mask and scale.

    batch: images or strings as in `probe`, the first `limit` of them in one forward pass; for a module
        without tokenizer, processor or preprocess, a tensor or a dict of tensors, whole.
    `diag.pattern_rows(call, rows)` gives attention weights of chosen query rows, or all of them.

    Raises UserError as `probe` does, and for more inputs than the model takes at once.
    """
    fed = Fed(tokenizer, processor, preprocess)
    own_module = isinstance(model, nn.Module) and not fed
    plan = ProbePlan.checked(
        models=(model if isinstance(model, str) else type(model).__name__,),
        checkpoint=checkpoint,
        random_init=random_init,
        layers=_listed(layers),
        limit=sys.maxsize if own_module else limit,
        seq_len=seq_len,
        device=device,
        dtype=dtype,
    )
    _, towers, samples, _ = _prepare(model, [batch] if own_module else batch, plan, fed, apart=False)
    calls = list[AttentionCall]()
    for tower in towers:
        if tower.max_batch is not None and len(samples) > tower.max_batch:
            raise UserError(
                f"'{plan.models[0]}' takes {tower.max_batch} input at once, {len(samples)} were given",
                f"limit={tower.max_batch}, or diag.probe for all of them",
            )
        calls += measure.capture(tower, tower.encode(samples), plan.layers)
    return calls


def _frames(
    loaded: Model,
    towers: Sequence[Tower],
    samples: Sequence[Sample],
    measurement: Measurement,
    incidents: Incidents,
    skipped: dict[str, str],
) -> dict[str, pd.DataFrame]:
    """Samples by tower, of those that have any. incidents, skipped: what happened is added to them."""
    frames = {}
    for tower in towers:
        asked = measurement.of_cross() if tower.meaning.get(CROSS) else measurement
        if not asked.computed:
            continue
        job = shards.TowerJob.of(loaded, tower, asked)
        if found := list(shards.shard_values(job, samples, incidents)):
            frames[tower.name] = samples_frame(found, asked.ratios, job.constants)
        skipped |= incidents.skipped_layers
    return frames


def _refuse_cross(model: Any, plan: ProbePlan, cross: bool, fed: Any) -> None:
    """Raises UserError where cross-attention is asked of what gives a decoder nothing to read."""
    if cross and (not isinstance(model, nn.Module) or fed is not None):
        raise UserError(
            "cross=True takes what encoder and decoder read, and neither a name nor a processor says it",
            "probe(module, [{'input_ids': …, 'decoder_input_ids': …}], cross=True)",
        )
    if cross and (plan.null or plan.values != "as_computed" or plan.intervene):
        raise UserError(
            "cross=True does not go with null=, values= or intervene=", "measure them in a probe of their own"
        )


def _twin(model: str | nn.Module, loaded: Model, plan: ProbePlan, seed: int) -> nn.Module | Model:
    """An untrained twin of a model. Raises UserError where none can be made."""
    if isinstance(model, nn.Module):
        return reinitialised(model, seed)
    where: dict[str, Any] = {"device": device_of(plan.device), "dtype": dtype_of(plan.dtype)}
    (spec,) = specs_of(plan)
    return untrained_twin(spec, seed, variants_in(loaded.module), **where)


def _prepare(
    model: str | nn.Module | Model,
    inputs: Any,
    plan: ProbePlan,
    fed: Fed,
    *,
    apart: bool = True,
    cross: bool = False,
) -> tuple[Model, Sequence[Tower], Sequence[Sample], Mapping[str, str]]:
    """The model, the towers that take the inputs, these, and what a manifest says of them, unless batches.

    apart, cross: as in `from_module`.
    """
    module = model if isinstance(model, nn.Module) else None
    if module is None and not isinstance(model, str | Model):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise UserError(f"the model is {what}", "give its name as text, or an nn.Module that is built")
    if module is None and fed:
        raise UserError(
            f"'{model}' is a name, and a tokenizer, processor or preprocess is given",
            "a name brings its own: leave it out, or give the model as an object",
        )
    if module is not None and (plan.checkpoint is not None or plan.random_init):
        raise UserError(
            f"the model is an object ({type(module).__name__}), and checkpoint or random_init is given",
            "those are for a name; load the weights into the object before",
        )
    if module is None or fed:
        _refuse_tensors(inputs, plan.models[0])
    if module is None or fed or isinstance(inputs, Image.Image | list | tuple):  # a stream is not read ahead
        inputs = listed(inputs)
    kind, typed = kind_of(inputs), isinstance(inputs, str) and is_typed(inputs)
    if module is not None and not fed:
        if kind is not None or isinstance(inputs, str | Path):
            what = {"vision": "images", "text": "texts"}.get(kind or "", "named")
            raise UserError(
                f"the model is an object ({type(module).__name__}) alone, and its inputs are {what}",
                "give tokenizer= for texts, processor= or preprocess= for images, or batches of tensors",
            )
        if isinstance(inputs, Tensor | Mapping):
            # a loop over it would take rows for batches, and tokens for inputs
            raise UserError(
                f"one batch was given (a {type(inputs).__name__}), where several are due",
                "pass a list of batches, also where it is one: [batch]",
            )
        how: dict[str, Any] = {"allow_random": plan.allow_random, "apart": apart, "cross": cross}
        own = from_module(module, inputs, plan.limit, **how)
        return *own, {}
    if module is not None:
        refuse_training(module, plan.allow_random)
        kind = kind or ("text" if typed else fed.kind)
        loaded, as_made = from_object(module, kind, fed), known_layers(module) is not None
        loaded = replace(loaded, towers={n: in_single_precision(t) for n, t in loaded.towers.items()})
    else:
        (spec,), as_made = specs_of(plan), True
        where: dict[str, Any] = {"device": device_of(plan.device), "dtype": dtype_of(plan.dtype)}
        loaded = model if isinstance(model, Model) else load(spec, **where)
        kind = kind or ("text" if typed and "text" in loaded.towers else next(iter(loaded.towers)))
    tower = next(iter(loaded.takers(kind, plan.tokens)), None) or loaded.tower(kind)
    given = as_inputs(inputs, kind)
    samples = shards.tower_samples(tower, given, limit=plan.limit, seq_len=plan.seq_len)
    found = understood(loaded, tower, samples, allow_random=plan.allow_random, as_made=as_made)
    return loaded, [found], samples, {"source": given.source, "sha256": given.digest}


def _content(samples: Sequence[Sample]) -> str:
    """Identifies ready batches by their numbers."""
    content = hashlib.sha256()
    for sample in samples:
        data = sample.read().data
        for name, x in data.items() if isinstance(data, Mapping) else [("", data)]:
            told = f"{name}\0{x.dtype}{list(x.shape)}\n".encode()
            content.update(told + x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def _windows(tower: Tower, samples: Sequence[Sample]) -> str | None:
    """Tells whether two towers cut their inputs alike where no vocabulary does: by the tokens themselves."""
    if tower.input_kind == "vision":
        return None
    read = [sample.read() for sample in samples] if tower.input_kind == "text" else []
    return sha256(repr(read))[:16]


def _refuse_tensors(inputs: Any, name: str) -> None:
    """Raises UserError for ready tensors, or numbers, where images and texts are due."""
    first = inputs[0] if isinstance(inputs, list | tuple) and inputs else inputs
    first = next(iter(first.values()), None) if isinstance(first, Mapping) else first
    ids = isinstance(first, int) or (isinstance(first, list) and bool(first) and isinstance(first[0], int))
    if isinstance(first, Tensor) or ids:
        what = "numbers" if ids else "tensors"
        raise UserError(
            f"inputs are {what}, and '{name}' makes its own of texts or images",
            "give texts or images; ready batches go with the model as an object alone: probe(model, [batch])",
        )


def _listed(given: Any) -> tuple[Any, ...] | None:
    """What is no list is a list of one: a name, an index, or what the plan will refuse."""
    if given is None:
        return None
    return (given,) if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
