"""Figures of a plan: each kind is a class, with what a plan may say of it and how it is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from matplotlib.figure import Figure

from diag.errors import UserError
from diag.metrics.catalogue import entry_of
from diag.results import published
from diag.results.writing import file_stem, free_stem
from diag.run.plan import inputs_of
from diag.show.figures import FIGURES, entropy, scatter
from diag.show.figures import write as figure_files
from diag.show.figures.attend import draw_attended
from diag.show.figures.complexity import complexity_figure
from diag.show.figures.curves import layer_curves, model_comparison
from diag.show.figures.depth import depth_profiles
from diag.show.figures.heatmaps import head_heatmaps
from diag.show.figures.ledger import ledger_over_depth
from diag.show.figures.lengths import AXES, against
from diag.show.figures.sinks import sink_events
from diag.show.figures.tables import check_columns, rows_of
from diag.studies.attend.complexity import measured_in, of_values
from diag.studies.attend.folder import read as read_look
from diag.studies.attend.plan import AttendPlan
from diag.studies.writeup.captions import look_settings
from diag.studies.writeup.item import Layers, Names, OfProbe, Panels, Published, Strict, WriteupItem
from diag.studies.writeup.material import Material, known_metrics, overlay, points

LOOKS = {
    "similarity-map": "Cosine of every patch's value with the target's, and the target's attention relative "
    "to uniform attention.",
    "most-attended": "The tokens that the target attends to most, their weights and value cosines, and the "
    "target's output as self and context part, and as the part along its own value and the exclusive one.",
    "strip": "Value cosine with the target, and its attention relative to uniform, for every token.",
}


@dataclass(frozen=True)
class DrawnFigure:
    """One figure. stem: of its files. data: the rows behind it. words: caption, where the plan gives none.

    settings: how it was measured, where the rows do not say so.
    """

    stem: str
    figure: Figure
    data: pd.DataFrame
    words: str
    settings: str = ""

    @property
    def rows(self) -> pd.DataFrame:
        """The rows that were measured, for the caption."""
        return self.data[self.data["n"].notna()] if "n" in self.data else pd.DataFrame()

    def save(self, folder: Path) -> tuple[str, ...]:
        """Writes its files; their endings."""
        return tuple(path.suffix for path in figure_files.save(self.figure, self.data, folder, self.stem))


def _per_line(
    item: CurvesFigure | HeadsFigure | LedgerFigure, table: pd.DataFrame, stem: str
) -> list[tuple[str, pd.DataFrame]]:
    """`(stem, rows)` of every line that has the kind's metrics."""
    metrics = FIGURES[item.kind].metrics
    parts = [(str(label), rows_of(part, metrics)) for label, part in table.groupby("label", sort=False)]
    parts = [(label, rows) for label, rows in parts if not rows.empty]
    if not parts:
        raise UserError(
            f"probe '{item.probe}' has no metric that {item.kind} show", f"measure {', '.join(metrics)}"
        )
    taken = set[str]()  # of labels that read alike as files
    stems = [stem if len(parts) == 1 else free_stem(file_stem(stem, label), taken) for label, _ in parts]
    return [(name, rows) for name, (_, rows) in zip(stems, parts, strict=True)]


def _overlaid(
    stem: str, figure: Figure, rows: pd.DataFrame, known: pd.DataFrame | None, words: str
) -> DrawnFigure:
    """A figure with published values; in the data behind it they have a `source` and no n."""
    if known is None:
        return DrawnFigure(stem, figure, rows, words)
    theirs = known[known["metric"].isin(rows["metric"])].rename(columns={"value": "mean"})
    words += " Open points: published values, not measured here."
    return DrawnFigure(stem, figure, pd.concat([rows, theirs], ignore_index=True), words)


class CurvesFigure(OfProbe, Panels):
    """The four panels of every line, a figure each."""

    kind: Literal["curves"]
    published: Published = False

    def made(self, stem: str, material: Material) -> list[DrawnFigure]:
        table = check_columns(material.table(self))
        words = (
            "Alignment bias cos(y, v) with its nulls, its split into self and context part, similarity "
            "between tokens, and where attention goes, over layers."
        )
        drawn = []
        for name, rows in _per_line(self, table, stem):
            known = overlay(rows, self.published)
            drawn.append(_overlaid(name, layer_curves(rows, known), rows, known, words))
        return drawn


class HeadsFigure(OfProbe, Panels):
    """Layer × head maps of every line, a figure each."""

    kind: Literal["heads"]

    def made(self, stem: str, material: Material) -> list[DrawnFigure]:
        table = check_columns(material.table(self, "heads"), ["head"])
        words = (
            "Alignment bias, excess over the partner null, self weight and value similarity of every head."
        )
        return [
            DrawnFigure(name, head_heatmaps(rows), rows, words) for name, rows in _per_line(self, table, stem)
        ]


class LedgerFigure(OfProbe, Panels):
    """Whose y is, and whose the bias: the two ledgers of every line, a figure each."""

    kind: Literal["ledger"]

    def made(self, stem: str, material: Material) -> list[DrawnFigure]:
        table = check_columns(material.table(self))
        words = (
            "The ledger over layers: signed shares of the attention output, and parts of the alignment bias, "
            "by class of keys; a key is of the first class that fits. The black line is their sum."
        )
        return [
            DrawnFigure(name, ledger_over_depth(rows), rows, words)
            for name, rows in _per_line(self, table, stem)
        ]


class ComparisonFigure(OfProbe, Panels):
    """All lines beside each other over relative depth."""

    kind: Literal["comparison"]
    published: Published = False

    def made(self, stem: str, material: Material) -> list[DrawnFigure]:
        rows = rows_of(check_columns(material.table(self)), FIGURES["comparison"].metrics)
        known = overlay(rows, self.published)
        words = (
            "Alignment bias, its excess over the partner null, value similarity and self weight over "
            "relative depth."
        )
        return [_overlaid(stem, model_comparison(rows, known), rows, known, words)]


class DepthFigure(OfProbe, Panels):
    """Three curves over depth, a panel per line, with the minimum of the first curve marked."""

    kind: Literal["depth"]
    metrics: Names = ("cos_y_vself", "value_similarity", "self_weight")
    published: Published = False

    def made(self, stem: str, material: Material) -> list[DrawnFigure]:
        table = known_metrics(material.table(self), self.metrics, self.probe)
        known = overlay(table, self.published)
        rows = rows_of(check_columns(table), self.metrics)
        figure = depth_profiles(rows, known, metrics=self.metrics)
        named = [entry_of(name).label for name in self.metrics]
        words = f"{', '.join(named)} over layers".capitalize() + "; the minimum of the first is ringed."
        return [_overlaid(stem, figure, rows, known, words)]


class EntropyFigure(OfProbe, Panels):
    """Entropy over depth, a panel per line: mean, 15th percentile and the bound ln T."""

    kind: Literal["entropy"]

    @property
    def metrics(self) -> tuple[str, ...]:
        """What it shows."""
        return entropy.METRICS

    def made(self, stem: str, material: Material) -> list[DrawnFigure]:
        rows = known_metrics(check_columns(material.table(self)), self.metrics, self.probe)
        words = (
            "Entropy of attention over layers: mean over tokens and heads, 15th percentile over tokens, and "
            "the bound ln T of uniform attention."
        )
        return [DrawnFigure(stem, entropy.entropy_over_depth(rows), rows, words)]


class SinksFigure(OfProbe, Panels):
    """Sink events over depth, a panel per line, stacked by what the sink does."""

    kind: Literal["sinks"]

    @property
    def metrics(self) -> tuple[str, ...]:
        """What it shows."""
        return FIGURES[self.kind].metrics

    def made(self, stem: str, material: Material) -> list[DrawnFigure]:
        rows = known_metrics(check_columns(material.table(self)), self.metrics, self.probe)
        words = (
            "Share of heads with a sink event over layers: no-op (the sink's value adds hardly anything), "
            "broadcast (all queries get the same of it), or neither."
        )
        return [DrawnFigure(stem, sink_events(rows), rows, words)]


class LengthsFigure(OfProbe, Panels):
    """Metrics, mean over layers, against what varies between the runs of a probe.

    layers: only the mean over these.
    """

    kind: Literal["lengths"]
    metrics: Names = ("cos_y_vself", "self_specific_fraction", "value_similarity", "self_weight_ratio")
    against: Literal["n_tokens", "patch_tokens", "patch_size", "image_size", "step"] = "n_tokens"
    layers: Layers | None = None

    def made(self, stem: str, material: Material) -> list[DrawnFigure]:
        table = points(
            known_metrics(material.table(self, "samples"), self.metrics, self.probe),
            material.lines[self.probe],
            metrics=self.metrics,
            against=self.against,
            layers=self.layers,
        )
        over = "all layers" if self.layers is None else f"layers {', '.join(map(str, self.layers))}"
        words = f"Means over {over} against {AXES[self.against].partition(',')[0]}."
        return [DrawnFigure(stem, against(table), table, words)]


class ComplexityFigure(OfProbe, Panels):
    """A metric of images against what there is to see in them, a figure per line. layer: of the points."""

    kind: Literal["complexity"]
    metric: str = "entropy"
    layer: int | None = None

    def made(self, stem: str, material: Material) -> list[DrawnFigure]:
        table = known_metrics(material.table(self, "samples"), (self.metric,), self.probe)
        given = [inputs_of(plan).get("vision") for plan in material.runs[self.probe].values()]
        images = {item.id: item for some in given if some is not None for item in some.items}
        seen = measured_in(images.values(), table["input"])
        words = (
            "Each image's edge density and colour entropy against the metric, and Spearman's ρ over layers, "
            "with 95 % bootstrap intervals over images."
        )
        drawn, taken, parts = [], set[str](), list(table.groupby("label", sort=False))
        for label, rows in parts:
            found = of_values(rows, seen)
            figure = complexity_figure(found.points, found.correlations, layer=self.layer, metric=self.metric)
            name = stem if len(parts) == 1 else free_stem(file_stem(stem, label), taken)
            drawn.append(DrawnFigure(name, figure, pd.concat([found.points, found.correlations]), words))
        return drawn


class AttendFigure(WriteupItem):
    """A target and the tokens it attends to. attend: the keys of `attnbias attend`."""

    kind: Literal["similarity-map", "most-attended", "strip"]
    attend: dict[str, Any]

    @cached_property
    def plan(self) -> AttendPlan:
        """The attend plan behind it. Raises ValidationError and UserError."""
        if "trust_remote_code" in self.attend:
            raise UserError(
                "trust_remote_code is not for a writeup", "foreign code is trusted on the command line only"
            )
        return AttendPlan(**self.attend)

    def made(self, stem: str, material: Material) -> list[DrawnFigure]:
        if self.plan not in material.looks:
            raise UserError("its look at a target is not there", "see what failed above")
        found = read_look(material.looks[self.plan])
        drawn = draw_attended(found.tokens, found.decomposition, found.pictures, top=self.plan.top)
        return [DrawnFigure(stem, *drawn[self.kind], LOOKS[self.kind], look_settings(found))]


class EffectFigure(WriteupItem):
    """Published: value similarity against what XSA changed."""

    kind: Literal["effect"]

    def made(self, stem: str, material: Material) -> list[DrawnFigure]:
        table = published.accuracy()
        words = (
            "Published values: change in zero-shot ImageNet top-1 with XSA against the baseline's value "
            "similarity, mean over layers. Open: a second training of a model, at the similarity of the "
            "first."
        )
        return [DrawnFigure(stem, scatter.effect(table), table, words)]


class Pair(Strict):
    """Two models of a probe that differ in their training."""

    name: str
    baseline: str
    trained: str


class TrainedFigure(Panels):
    """Value similarity of baseline and XSA-trained models: the published ones, or pairs of a probe."""

    kind: Literal["trained-similarity"]
    probe: str | None = None
    pairs: tuple[Pair, ...] = ()

    def made(self, stem: str, material: Material) -> list[DrawnFigure]:
        if self.probe is None:
            table = published_pairs()
            words = "Published values: value similarity of CLIP models trained on CC12M without and with XSA."
        else:
            rows = known_metrics(material.collection(self).layers, ("value_similarity",), self.probe)
            rows = rows[rows["mean"].notna()]  # one class token has no pairs
            parts = [
                rows[rows["model"] == model].assign(pair=pair.name, side=side, source="")
                for pair in self.pairs
                for side, model in (("baseline", pair.baseline), ("XSA-trained", pair.trained))
            ]
            table = pd.concat(parts, ignore_index=True)
            if table.duplicated(["pair", "side", "layer"]).any():
                raise UserError(
                    f"probe '{self.probe}' measures a model of a pair in several ways",
                    "one length, one token set",
                )
            words = "Value similarity of baseline and XSA-trained models."
        figure = scatter.trained_similarity(table)
        return [DrawnFigure(stem, figure, table, f"{words} Dotted: mean over layers.")]


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
