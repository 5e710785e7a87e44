"""What a plan needs measured: probes as runs, looks as folders; what is there, and what is missing.

A run holds one model: a plan that gains a model measures that model only, and one that fails is tried again.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diag.errors import UserError, did_you_mean, one_of
from diag.inputs.document import Document, Place
from diag.inputs.outside import mapping_in
from diag.metrics.names import GROUPS, chosen
from diag.models.names import series
from diag.models.names.arguments import merged, read, split
from diag.models.names.spec import written
from diag.results.folder import PLAN, is_finished
from diag.results.profiles import CURVES, SHARES
from diag.run.cache import is_measured
from diag.run.plan import HOW, ProbePlan, specs_of
from diag.studies.attend.plan import AttendPlan
from diag.studies.attend.plan import folder_of as folder_of_look
from diag.studies.writeup.drawing import AttendFigure
from diag.studies.writeup.schema import WriteupPlan, WriteupProbe, items_of
from diag.studies.writeup.tables import ProfileTable

NEVER_READ = "hf:"
"""Inputs that a dry run only names: they may have to be downloaded."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a probe. line: what it is a point of where runs are drawn against what varies."""

    probe: str
    line: str
    plan: ProbePlan

    @property
    def model(self) -> str:
        """The one model of the run, as it was named."""
        return self.plan.models[0]

    @property
    def words(self) -> str:
        """The model, and the length where it is given."""
        return self.model + (f", T = {self.plan.seq_len}" if self.plan.seq_len else "")


def runs_of(plan: WriteupPlan, document: Document) -> dict[str, tuple[PlannedRun, ...]]:
    """The runs of every probe that a figure or table shows, by probe.

    Raises UserError with the line for an unknown series, or a model that its probe lacks.
    """
    shown = [probe for _, _, item in items_of(plan) if (probe := getattr(item, "probe", None))]
    found = {}
    for name in dict.fromkeys(shown):
        try:
            found[name] = tuple(_runs(name, plan.probes[name]))
        except UserError as error:
            raise document.error(("probes", name, "series"), str(error), error.tip) from error
    for place, _, item in items_of(plan):
        known = [run.model for run in found.get(getattr(item, "probe", None) or "", ())]
        named = [("model", model)] if (model := getattr(item, "model", None)) else []
        named += [
            ("pairs", side) for pair in getattr(item, "pairs", ()) for side in (pair.baseline, pair.trained)
        ]
        for key, model in named:
            if model not in known:
                near = did_you_mean(model, known) or f"it has {one_of(dict.fromkeys(known))}"
                raise document.error((*place, key), f"probe '{item.probe}' has no model '{model}'", near)
    return found


def _runs(name: str, probe: WriteupProbe) -> Iterator[PlannedRun]:
    models: Sequence[str] = probe.models or series.members(probe.series or "")
    shared = probe.model_dump(exclude={"models", "series", "seq_len", "image_size", "patch_size"})
    shared |= {"model_args": probe.model_args or (), "intervene": probe.intervene or ()}
    images, patches, lengths = (
        sizes or (None,) for sizes in (probe.image_size, probe.patch_size, probe.seq_len)
    )
    for model, image, patch, length in itertools.product(models, images, patches, lengths):
        base, pairs = split(model)
        named = {"img_size": image, "patch_size": patch}
        sizes = {key: size for key, size in named.items() if size is not None}
        full = base + written(merged(read(pairs, model), sizes, model)) if sizes else model
        line = f"series {probe.series}" if probe.series else re.sub(r"@step\d+$", "", base)
        yield PlannedRun(name, line, ProbePlan(models=(full,), seq_len=length, **shared))


def looks_of(plan: WriteupPlan) -> list[AttendPlan]:
    """The attend plans of all pictures, each once."""
    return list(dict.fromkeys(item.plan for item in plan.figures if isinstance(item, AttendFigure)))


def shows(plan: WriteupPlan) -> list[str]:
    """The names of a plan's figures and tables, in order."""
    return [stem for _, stem, _ in items_of(plan)]


@dataclass(frozen=True)
class Need:
    """One run or look that a dry run lists.

    group: the probe, or "attend". models: name as given -> what it resolves to. length: of the windows.
    state: measured, missing, or unknown where inputs are only named.
    """

    group: str
    models: Mapping[str, str]
    length: int | None
    inputs: str
    state: str


def needs_of(plan: WriteupPlan, document: Document, root: Path) -> list[Need]:
    """Everything that a plan needs, with models resolved and inputs looked at, but nothing measured.

    Data sets on a hub are only named; their runs are found by their plan.
    Raises UserError with the line for a model, metric or input that is not known.
    """
    found = []
    finished = _finished_plans(root)
    for name, runs in runs_of(plan, document).items():
        for run in runs:
            try:
                found.append(_need_of_run(run, root, finished))
            except UserError as error:
                raise document.error(("probes", name), f"probe '{name}': {error}", error.tip) from error
    for place, _, item in items_of(plan):
        if not isinstance(item, AttendFigure):
            _check_metrics(plan, document, place, item)
            continue
        try:
            need = _need_of_look(item.plan, root)
        except UserError as error:
            raise document.error((*place, "attend"), str(error), error.tip) from error
        if need not in found:
            found.append(need)
    return found


def _check_metrics(plan: WriteupPlan, document: Document, place: Place, item: Any) -> None:
    """That metrics are known, and measured by the item's probe. Raises UserError with the line."""
    named = getattr(item, "metrics", None) or ()
    try:
        if isinstance(item, ProfileTable):
            for name in named:
                if name not in (known := (*CURVES, *SHARES)):
                    tip = did_you_mean(name, known) or f"they have {one_of(known)}"
                    raise UserError(f"profiles have no metric '{name}'", tip)
            return
        chosen(named, GROUPS["default"])
        measured = plan.probes[item.probe].metrics if getattr(item, "probe", None) else None
        left_out = [name for name in named if measured is not None and name not in measured]
        if left_out:
            raise UserError(
                f"probe '{item.probe}' does not measure {one_of(left_out)}",
                "add to its metrics:, or leave those out",
            )
    except UserError as error:
        raise document.error((*place, "metrics"), str(error), error.tip) from error


def _need_of_run(run: PlannedRun, root: Path, finished: Sequence[dict[str, Any]]) -> Need:
    chosen(run.plan.metrics, GROUPS["default"])
    (spec,) = specs_of(run.plan)
    sources = [source for source in (run.plan.images, run.plan.texts) if source]
    if any(source.startswith(NEVER_READ) for source in sources):
        what = run.plan.model_dump(mode="json", exclude=set(HOW))
        state = "measured" if what in finished else "unknown"
    else:
        state = "measured" if is_measured(run.plan, root) else "missing"
    inputs = f"at most {run.plan.limit} of {' and '.join(sources) or 'demo'}"
    return Need(run.probe, {run.model: spec.resolved}, run.plan.seq_len, inputs, state)


def _need_of_look(look: AttendPlan, root: Path) -> Need:
    specs = specs_of(look.probe_plan())
    there = is_finished(folder_of_look(look, root))
    where = f"layer {look.layer}" if look.layer is not None else f"depth {look.depth}"
    return Need(
        "attend",
        {spec.given: spec.resolved for spec in specs},
        None,
        f"{look.image or look.text}, {where}",
        "measured" if there else "missing",
    )


def _finished_plans(root: Path) -> list[dict[str, Any]]:
    """What the finished runs in a folder measured: their plans without `HOW`."""
    found = []
    for folder in filter(is_finished, root.glob("*")):
        plan = mapping_in(folder / PLAN).get("plan")
        if isinstance(plan, dict):  # a folder of another version may have none
            found.append({key: value for key, value in plan.items() if key not in HOW})
    return found
