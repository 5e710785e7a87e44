"""What a plan may say: probes, figures and tables, checked before anything runs.

Every figure or table is a `kind` and, mostly, the name of the probe whose runs it shows. Unknown keys,
kinds and probes are refused with file, line and the nearest name.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from diag.errors import UserError, did_you_mean, one_of
from diag.inputs.document import Document, Place, read_document
from diag.inputs.mistakes import in_words
from diag.metrics.names import metric_names
from diag.results.writing import file_stem
from diag.run.plan import ProbePlan
from diag.studies.attend.plan import AttendPlan
from diag.studies.writeup import drawing, tables
from diag.studies.writeup.captions import PLACEHOLDERS
from diag.studies.writeup.item import Layers, Names, Numbers, Parted, Strict

UNSAID = ("trust_remote_code", "save_activations", "keep_samples", "exact", "sampled_rows", "workers")
"""Fields of a probe that a writeup does not let be said: foreign code is trusted on the command line only,
and no caption tells of the others, how numbers are estimated and kept. A new field may be said."""


class WriteupProbe(ProbePlan):
    """Models measured on one set of inputs: a run for every model and value of `seq_len`.

    image_size, patch_size: added to every model's name as `img_size=` and `patch_size=`; a list gives a
    model per value. The rest as in a probe's plan, but for `UNSAID`; one value stands for a list of one.
    """

    models: Names | None = None  # type: ignore[assignment]
    series: str | None = None
    seq_len: Numbers = ()  # type: ignore[assignment]
    image_size: Numbers = ()
    patch_size: Numbers = ()
    metrics: Parted | None = None
    layers: Layers | None = None
    tokens: Parted | None = None
    intervene: Names | None = None  # type: ignore[assignment]
    model_args: Names | None = None  # type: ignore[assignment]

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        try:
            metric_names(names)
        except UserError as error:
            raise ValueError(str(error)) from error
        return names

    @field_validator(*UNSAID, mode="before")
    @classmethod
    def _not_said(cls, given: object) -> object:
        raise PydanticCustomError("extra_forbidden", "is not for a writeup")


AnyFigure = Annotated[
    drawing.CurvesFigure
    | drawing.HeadsFigure
    | drawing.LedgerFigure
    | drawing.ComparisonFigure
    | drawing.DepthFigure
    | drawing.EntropyFigure
    | drawing.SinksFigure
    | drawing.LengthsFigure
    | drawing.ComplexityFigure
    | drawing.AttendFigure
    | drawing.EffectFigure
    | drawing.TrainedFigure,
    Field(discriminator="kind"),
]
"""Every kind of figure. A new one is a class in `drawing` and a line here."""

AnyTable = Annotated[
    tables.LayerTable
    | tables.ProfileTable
    | tables.DifferenceTable
    | tables.ReproductionTable
    | tables.ResultsTable,
    Field(discriminator="kind"),
]


class WriteupPlan(Strict):
    """A writeup: what is measured, what is drawn, and what captions say."""

    title: str
    about: str = ""
    probes: dict[str, WriteupProbe] = Field(default={})
    figures: tuple[AnyFigure, ...] = ()
    tables: tuple[AnyTable, ...] = ()


def read_plan(file: Path) -> tuple[WriteupPlan, Document]:
    """A plan and the document it is from. Raises UserError with file, line, and what is allowed there."""
    document = read_document(file)
    if not isinstance(document.data, dict):
        raise UserError(
            f"{file}: a plan is a mapping", "begin with title: and figures:, see configs/demo.yaml"
        )
    try:
        plan = WriteupPlan.model_validate(document.data)
    except ValidationError as error:
        raise _refusal(document, error) from error
    _check(plan, document)
    return plan, document


def items_of(plan: WriteupPlan) -> Iterator[tuple[Place, str, Any]]:
    """Every figure and table: its place in the document, the stem of its files, itself."""
    for section, items in (("figures", plan.figures), ("tables", plan.tables)):
        for number, item in enumerate(items):
            stem = item.name or file_stem(item.kind, getattr(item, "probe", None) or "")
            yield (section, number), stem, item


def _check(plan: WriteupPlan, document: Document) -> None:
    """What no single field can tell. Raises UserError."""
    if not plan.figures and not plan.tables:
        raise document.error((), "the plan shows nothing", "give figures: or tables:")
    for name, probe in plan.probes.items():
        if (probe.models is None) == (probe.series is None):
            both = "both models and series" if probe.models else "neither models nor series"
            raise document.error(("probes", name), f"probe '{name}' names {both}", "give one of them")
        if not re.fullmatch(r"[\w.-]+", name):
            raise document.error(
                ("probes", name), f"'{name}' is no name of a probe", "use letters, digits, - and _"
            )
    taken: dict[str, Place] = {}
    for place, stem, item in items_of(plan):
        if item.name is not None and file_stem(item.name) != item.name:
            raise document.error(
                (*place, "name"), f"'{item.name}' is no file name", f"name: {file_stem(item.name)}"
            )
        if stem.lower() in taken:
            first = document.line(taken[stem.lower()])
            raise document.error(
                place,
                f"'{stem}' is the name of two things, the first on line {first}",
                "give one a name: of its own",
            )
        taken[stem.lower()] = place
        _check_item(plan, document, place, item)


def _check_item(plan: WriteupPlan, document: Document, place: Place, item: Any) -> None:
    probe = getattr(item, "probe", None)
    if probe is not None and probe not in plan.probes:
        near = did_you_mean(probe, plan.probes) or f"probes are {one_of(plan.probes) or 'none'}"
        raise document.error((*place, "probe"), f"there is no probe '{probe}'", near)
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(item.caption or "")]
    except ValueError as error:
        where = (*place, "caption")
        raise document.error(where, f"{error} in the caption", "write {{ for a brace") from error
    for field in fields:
        if field is not None and field not in PLACEHOLDERS:
            raise document.error(
                (*place, "caption"),
                f"a caption knows no '{{{field}}}'",
                did_you_mean(field, PLACEHOLDERS)
                or f"it knows {one_of(PLACEHOLDERS)}; write {{{{ for a brace",
            )
    if isinstance(item, drawing.TrainedFigure) and (item.probe is None) == bool(item.pairs):
        raise document.error(
            place, "pairs: and probe: belong together", "give both, or neither for the published ones"
        )
    if isinstance(item, drawing.AttendFigure):
        here = (*place, "attend")
        try:
            look = item.plan
        except ValidationError as error:
            raise _refusal(document, error, here, AttendPlan) from error
        except UserError as error:
            raise document.error(here, str(error), error.tip) from error
        if look.question is not None:
            raise document.error(
                (*here, "question"),
                "a figure is of one target patch or token",
                "leave question and general out",
            )
        if (item.kind == "strip") != (look.tower == "text"):
            raise document.error(
                (*place, "kind"),
                f"'{item.kind}' is not for {'an image' if look.tower == 'vision' else 'a text'}",
                "kind: similarity-map or most-attended" if look.tower == "vision" else "kind: strip",
            )


def _refusal(
    document: Document, error: ValidationError, at: Place = (), model: type[BaseModel] = WriteupPlan
) -> UserError:
    """The first mistake, in words; a mistyped key before the key that it leaves missing."""
    first = min(error.errors(), key=lambda mistake: mistake["type"] != "extra_forbidden")
    place, reason = (*at, *first["loc"]), in_words(first)
    last = str(first["loc"][-1]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        allowed = _allowed(model, first["loc"][:-1])
        return document.error(
            place, f"unknown key '{last}'", did_you_mean(last, allowed) or f"known keys: {', '.join(allowed)}"
        )
    if first["type"] == "missing":
        return document.error(place[:-1], f"'{last}' is missing", f"give {last}:")
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        known = [*kinds(AnyFigure if "figures" in first["loc"] else AnyTable)]
        given = str(first.get("ctx", {}).get("tag", ""))
        message = f"unknown kind '{given}'" if given else "'kind' is missing"
        here = (*place, "kind") if given else place
        near = did_you_mean(given, known) if given else None
        return document.error(here, message, near or f"kind: {one_of(known)}")
    name = next((str(step) for step in reversed(document.known(place)) if isinstance(step, str)), last)
    said = f" {reason}" if reason.startswith("is ") else f": {reason[:1].lower()}{reason[1:]}"
    return document.error(place, f"{name}{said}", f"given: {first['input']!r}")


def kinds(union: Any) -> Mapping[str, type[BaseModel]]:
    """Kind -> model of a union of figures or tables."""
    return {
        kind: model
        for model in get_args(get_args(union)[0])
        for kind in get_args(model.model_fields["kind"].annotation)
    }


def _allowed(model: type[BaseModel], steps: tuple[str | int, ...]) -> list[str]:
    """The keys that are known at a place of pydantic's."""
    if model is WriteupPlan and steps[:1] == ("probes",):
        model = WriteupProbe
    elif model is WriteupPlan and steps[:1] in (("figures",), ("tables",)):
        model = kinds(AnyFigure if steps[0] == "figures" else AnyTable)[str(steps[2])]
        model = drawing.Pair if "pairs" in steps else model
    return keys_of(model)


def keys_of(model: type[BaseModel]) -> list[str]:
    """The keys that a part of a plan may have."""
    return [name for name in model.model_fields if model is not WriteupProbe or name not in UNSAID]
