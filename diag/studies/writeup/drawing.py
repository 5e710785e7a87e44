"""Figures of a plan: each kind is one function from its item and the material, listed in `KINDS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from diag.errors import UserError
from diag.metrics.catalogue import entry_of
from diag.results import published
from diag.results.files import file_stem
from diag.show.figures import FIGURES
from diag.show.figures.tables import check_columns, rows_of
from diag.studies.attend.folder import read as read_look
from diag.studies.writeup import schema
from diag.studies.writeup.material import Material, known_metrics, overlay, points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOKS = {
    "similarity-map": "Cosine of every patch's value with the target's, and the target's attention relative "
    "to uniform attention.",
    "most-attended": "The tokens that the target attends to most, their weights and value cosines, and the "
    "target's output as self and context part, and as the part along its own value and the exclusive one.",
    "strip": "Value cosine with the target, and its attention relative to uniform, for every token.",
}


@dataclass(frozen=True)
class DrawnFigure:
    """One figure. stem: of its files. data: the rows behind it. words: caption, where the plan gives none."""

    stem: str
    figure: Figure
    data: pd.DataFrame
    words: str


def figures_of(item: Any, stem: str, material: Material) -> list[DrawnFigure]:
    """The figures of one item. Raises UserError where its runs or metrics are not there."""
    return KINDS[type(item)](item, stem, material)


def _per_line(item: Any, table: pd.DataFrame, stem: str) -> list[tuple[str, str, pd.DataFrame]]:
    """`(stem, label, rows)` of every line that has the kind's metrics."""
    metrics = FIGURES[item.kind].metrics
    parts = [(str(label), rows_of(part, metrics)) for label, part in table.groupby("label", sort=False)]
    parts = [(label, rows) for label, rows in parts if not rows.empty]
    if not parts:
        raise UserError(
            f"probe '{item.probe}' has no metric that {item.kind} show", f"measure {', '.join(metrics)}"
        )
    if len(parts) == 1:
        return [(stem, *parts[0])]
    return [(file_stem(stem, label), label, rows) for label, rows in parts]


def _curves(item: schema.CurvesFigure, stem: str, material: Material) -> list[DrawnFigure]:
    from diag.show.figures.curves import layer_curves

    table = check_columns(material.table(item))
    words = (
        "Alignment bias cos(y, v) with its nulls, its split into self and context part, similarity between "
        "tokens, and where attention goes, over layers."
    )
    drawn = []
    for name, _, rows in _per_line(item, table, stem):
        known = overlay(rows, item.published)
        figure = layer_curves(rows, known)
        drawn.append(DrawnFigure(name, figure, _with(known, rows), words + _said_of(known)))
    return drawn


def _heads(item: schema.HeadsFigure, stem: str, material: Material) -> list[DrawnFigure]:
    from diag.show.figures.heatmaps import head_heatmaps

    table = check_columns(material.table(item, "heads"), ["head"])
    words = "Alignment bias, excess over the partner null, self weight and value similarity of every head."
    return [
        DrawnFigure(name, head_heatmaps(rows), rows, words) for name, _, rows in _per_line(item, table, stem)
    ]


def _comparison(item: schema.ComparisonFigure, stem: str, material: Material) -> list[DrawnFigure]:
    from diag.show.figures.curves import model_comparison

    rows = rows_of(check_columns(material.table(item)), FIGURES["comparison"].metrics)
    known = overlay(rows, item.published)
    words = (
        "Alignment bias, its excess over the partner null, value similarity and self weight over relative "
        "depth."
    )
    return [DrawnFigure(stem, model_comparison(rows, known), _with(known, rows), words + _said_of(known))]


def _depth(item: schema.DepthFigure, stem: str, material: Material) -> list[DrawnFigure]:
    from diag.show.figures.depth import depth_profiles

    table = known_metrics(material.table(item), item.metrics, item.probe)
    known = overlay(table, item.published)
    rows = rows_of(check_columns(table), item.metrics)
    figure = depth_profiles(rows, known, metrics=item.metrics)
    named = [entry_of(name).label for name in item.metrics]
    words = f"{', '.join(named)} over layers".capitalize() + "; the minimum of the first is ringed."
    return [DrawnFigure(stem, figure, _with(known, rows), words + _said_of(known))]


def _with(known: pd.DataFrame | None, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows behind a figure with the published ones, which have a `source` and no n."""
    if known is None:
        return rows
    theirs = known[known["metric"].isin(rows["metric"])].rename(columns={"value": "mean"})
    return pd.concat([rows, theirs], ignore_index=True)


def _said_of(known: pd.DataFrame | None) -> str:
    return "" if known is None else " Open points: published values, not measured here."


def _entropy(item: schema.EntropyFigure, stem: str, material: Material) -> list[DrawnFigure]:
    from diag.show.figures.entropy import METRICS, entropy_over_depth

    rows = known_metrics(check_columns(material.table(item)), METRICS, item.probe)
    words = "Entropy of attention over layers: mean over tokens and heads, 15th percentile over tokens, "
    return [
        DrawnFigure(stem, entropy_over_depth(rows), rows, words + "and the bound ln T of uniform attention.")
    ]


def _lengths(item: schema.LengthsFigure, stem: str, material: Material) -> list[DrawnFigure]:
    from diag.show.figures.lengths import AXES, against

    table = points(
        known_metrics(material.table(item, "samples"), item.metrics, item.probe),
        material.lines[item.probe],
        metrics=item.metrics,
        against=item.against,
        layers=item.layers,
    )
    over = "all layers" if item.layers is None else f"layers {', '.join(map(str, item.layers))}"
    words = f"Means over {over} against {AXES[item.against].partition(',')[0]}."
    return [DrawnFigure(stem, against(table), table, words)]


def _look(item: schema.AttendFigure, stem: str, material: Material) -> list[DrawnFigure]:
    from diag.show.figures.attend import draw_attended

    look = schema.attend_plan_of(item)
    found = read_look(material.looks[look])
    figure, data = draw_attended(found.tokens, found.decomposition, found.pictures, top=look.top)[item.kind]
    return [DrawnFigure(stem, figure, data, LOOKS[item.kind])]


def _effect(item: schema.EffectFigure, stem: str, material: Material) -> list[DrawnFigure]:
    from diag.show.figures.scatter import effect

    table = published.accuracy()
    words = (
        "Published values: change in zero-shot ImageNet top-1 with XSA against the baseline's value "
        "similarity, mean over layers. Open: a second training of a model, at the similarity of the first."
    )
    return [DrawnFigure(stem, effect(table), table, words)]


def _trained(item: schema.TrainedFigure, stem: str, material: Material) -> list[DrawnFigure]:
    from diag.show.figures.scatter import trained_similarity

    if item.probe is None:
        table = published_pairs()
        words = "Published values: value similarity of CLIP models trained on CC12M without and with XSA."
    else:
        rows = known_metrics(material.collection(item).layers, ("value_similarity",), item.probe)
        rows = rows[rows["mean"].notna()]  # one class token has no pairs
        sides = [(pair, side) for pair in item.pairs for side in ("baseline", "trained")]
        named = {"baseline": "baseline", "trained": "XSA-trained"}
        parts = [
            rows[rows["model"] == getattr(pair, side)].assign(pair=pair.name, side=named[side], source="")
            for pair, side in sides
        ]
        table = pd.concat(parts, ignore_index=True)
        if table.duplicated(["pair", "side", "layer"]).any():
            raise UserError(
                f"probe '{item.probe}' measures a model of a pair in several ways",
                "one length, one token set",
            )
        words = "Value similarity of baseline and XSA-trained models."
    return [DrawnFigure(stem, trained_similarity(table), table, f"{words} Dotted: mean over layers.")]


def published_pairs() -> pd.DataFrame:
    """Published value similarity, columns pair, side, layer, mean, ci_low, ci_high, source."""
    models = published.accuracy().drop_duplicates("model")
    parts = [
        published.curves(model + ending).query("metric == 'value_similarity'").assign(pair=label, side=side)
        for label, model in zip(models["label"], models["model"], strict=True)
        for ending, side in (("", "baseline"), ("-xsa", "XSA-trained"))
    ]
    table = pd.concat(parts, ignore_index=True).rename(columns={"value": "mean"})
    return table.assign(ci_low=float("nan"), ci_high=float("nan"))


KINDS: Mapping[type, Callable[[Any, str, Material], list[DrawnFigure]]] = {
    schema.CurvesFigure: _curves,
    schema.HeadsFigure: _heads,
    schema.ComparisonFigure: _comparison,
    schema.DepthFigure: _depth,
    schema.EntropyFigure: _entropy,
    schema.LengthsFigure: _lengths,
    schema.AttendFigure: _look,
    schema.EffectFigure: _effect,
    schema.TrainedFigure: _trained,
}
"""Kind of figure -> how it is drawn. A new kind is a schema, a function and a line here."""
