"""What the page says, as plain values for the template: tables in, sentences, charts, tables and maps out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from diag.metrics.catalogue import MetricEntry, entry_of
from diag.results.bootstrap import summary
from diag.results.collect import Collection
from diag.results.files import file_stem, free_stem
from diag.show.figures.panels import COMPARISON, CURVES, Panel
from diag.show.figures.style import DASHES
from diag.show.figures.tables import check_columns, compared_metrics, patch_size_of, profile, rows_of, span
from diag.show.report.charts import Chart, ChartLine, chart, limits_of
from diag.show.report.glossary import grouped
from diag.show.report.maps import Map, head_maps, number
from diag.show.report.palette import compared_colours

HINTS = {
    "Alignment bias": (
        "The solid line is the bias. Where it does not rise above the dashed and dotted nulls, "
        "it is geometry: another token's value, or uniform attention, would give as much."
    ),
    "Where it comes from": (
        "An exact split: the self part is the token attending to itself, the context part is other tokens' "
        "values pointing the same way. The two add up to the bias."
    ),
    "Similarity between tokens": (
        "How alike values and outputs are. The partial similarity stands beside the value it takes "
        "where values merely share one direction."
    ),
    "Where attention goes": (
        "Weight on the token itself and on the first token; entropy is 1 where attention is uniform."
    ),
}
"""Title of a panel -> how to read it."""

COMPARED_MARKERS = "osD^vPX"
"""Those of figures that are drawn on a page as well."""

GLANCE = ("cos_y_vself", "self_part", "context_part", "cos_y_vpartner", "cos_y_vuniform", "excess")
"""Columns of the table that puts every line into one row."""


@dataclass(frozen=True)
class NumberCell:
    """A number in a table: for sorting, for reading, and its interval (or `""`)."""

    value: float | None
    text: str
    interval: str


NO_NUMBER = NumberCell(None, "–", "")


@dataclass(frozen=True)
class NumberTable:
    """A table of numbers: rows are `(name, tooltip, cells)`, columns metrics."""

    name: str
    title: str
    metrics: tuple[tuple[str, MetricEntry], ...]
    rows: tuple[tuple[str, str, tuple[NumberCell, ...]], ...]


@dataclass(frozen=True)
class ReportLine:
    """One line of the collection. facts: what explains its numbers. heads: for the view of one head."""

    label: str
    slug: str
    colour: str
    model: str
    facts: tuple[tuple[str, str], ...]
    sentences: tuple[str, ...]
    charts: tuple[Chart, ...]
    tables: tuple[NumberTable, ...]
    maps: tuple[Map, ...]
    heads: Mapping[str, Any]


@dataclass(frozen=True)
class Compared:
    """One metric of all lines: the chart, and its numbers as rows of `(layer, cells)`."""

    chart: Chart
    metric: str
    rows: tuple[tuple[str, tuple[NumberCell, ...]], ...]


def lines_of(collection: Collection, sentences: Mapping[str, Sequence[str]]) -> list[ReportLine]:
    """Every line with all that the page shows of it. sentences: label -> its summary in words."""
    layers, heads = check_columns(collection.layers), check_columns(collection.heads, ["head"])
    taken: set[str] = set()
    found = []
    for place, label in enumerate(collection.labels):
        slug = free_stem(file_stem(label) or "line", taken)
        rows, of_heads = layers[layers["label"] == label], heads[heads["label"] == label]
        found.append(
            ReportLine(
                label=label,
                slug=slug,
                colour=f"line-{place}",
                model=str(rows["model"].iloc[0]),
                facts=facts_of(rows, of_heads),
                sentences=tuple(sentences.get(label, ())),
                charts=tuple(_panels(rows, slug)),
                tables=tuple(_tables(rows, slug)),
                maps=tuple(head_maps(of_heads, f"map-{slug}")),
                heads=packed_heads(of_heads, rows),
            )
        )
    return found


def facts_of(rows: pd.DataFrame, heads: pd.DataFrame) -> tuple[tuple[str, str], ...]:
    """How one line was measured, as far as its rows say so."""
    known = rows[rows["mean"].notna()]
    found = {
        "tower": _agreed(rows, "tower"),
        "tokens": _agreed(rows, "tokens"),
        "tokens per input (T)": span(rows["n_tokens"]) if "n_tokens" in rows else "",
        "inputs (n)": span(known["n"]),
        "layers": str(rows["layer"].nunique()),
        "heads": str(int(heads["head"].max()) + 1) if len(heads) else "",
        "patch size": _agreed(rows, "patch_size"),
        "image size": _agreed(rows, "image_size"),
        "values": _agreed(rows, "values"),
        "first token": "excluded" if "excluded" in set(rows.get("first_token", ())) else "",
        "attention scope": _agreed(rows, "attn_scope").replace("full", ""),
        "intervention": _agreed(rows, "intervention").replace("none", ""),
        "dtype": _agreed(rows, "dtype"),
    }
    return tuple((term, value) for term, value in found.items() if value)


def comparison(lines: Sequence[ReportLine], collection: Collection) -> list[Compared]:
    """Charts over relative depth with one line each; none where there is only one line."""
    if len(lines) < 2:
        return []
    layers = check_columns(collection.layers)
    parts = [layers[layers["label"] == line.label] for line in lines]
    found = []
    for metric in compared_metrics(parts, least=2):
        title, y_label = COMPARISON[metric]
        curves = [
            ChartLine(
                line.label,
                _points(part, metric, relative=True),
                line.colour,
                DASHES[place // len(COMPARED_MARKERS) % len(DASHES)],
                COMPARED_MARKERS[place % len(COMPARED_MARKERS)],
            )
            for place, (line, part) in enumerate(zip(lines, parts, strict=True))
        ]
        there = [curve for curve in curves if not curve.points.empty]
        drawn = chart(
            f"compared-{metric}",
            there,
            title=title,
            hint=entry_of(metric).sentence,
            y_label=y_label,
            limits=limits_of(there),
            relative=True,
            rule=1.0 if metric == "self_weight_ratio" else 0.0,
        )
        found.append(Compared(drawn, metric, _side_by_side(parts, metric)))
    return found


def glance(lines: Sequence[ReportLine], collection: Collection) -> NumberTable | None:
    """One row per line: means over layers, with 95 % bootstrap intervals over inputs."""
    samples = collection.samples
    metrics = [metric for metric in GLANCE if (samples["metric"] == metric).any()]
    if not metrics:
        return None
    rows = []
    for line in lines:
        part = samples[(samples["label"] == line.label) & samples["metric"].isin(metrics)]
        wide = part.pivot_table(index="input_index", columns="metric", values="value", observed=True)
        wide = wide.reindex(columns=metrics)
        cells = [_cell(row) for _, row in summary(wide.to_numpy(dtype=float), seed=0).iterrows()]
        rows.append((line.label, "", tuple(cells)))
    columns = tuple((metric, entry_of(metric)) for metric in metrics)
    return NumberTable("glance", "Means over layers", columns, tuple(rows))


def colours_of(collection: Collection) -> list[str]:
    """The colour of every line, in the order of the labels."""
    layers = collection.layers
    return compared_colours([patch_size_of(layers[layers["label"] == label]) for label in collection.labels])


def packed_heads(heads: pd.DataFrame, layers: pd.DataFrame) -> dict[str, Any]:
    """Numbers of every head as whole numbers, layer by layer, so that 1,200 heads of 21 metrics fit in.

    `scale` times too large; `layer` holds the mean over heads; `null` where there is no number.
    """
    if heads.empty:
        return {}
    numbers = sorted(int(layer) for layer in heads["layer"].unique())
    count = int(heads["head"].max()) + 1
    place = {layer: index * count for index, layer in enumerate(numbers)}
    found: dict[str, Any] = {"layers": numbers, "heads": count, "groups": {}, "metrics": {}}
    for title, metrics in grouped(heads["metric"]).items():
        found["groups"][title] = metrics
        for metric in metrics:
            part = heads[heads["metric"] == metric]
            at = part["layer"].map(place).to_numpy(int) + part["head"].to_numpy(int)
            largest = part[["mean", "ci_low", "ci_high"]].abs().max().max()
            scale = 1000 if pd.isna(largest) or largest < 100 else 10
            packed: dict[str, Any] = {"scale": scale}
            for short, name in (("mean", "mean"), ("low", "ci_low"), ("high", "ci_high")):
                field = np.full(len(numbers) * count, np.nan)
                field[at] = part[name].to_numpy(float)
                if short == "mean" or not np.isnan(field).all():
                    packed[short] = _whole(field, scale)
            over = profile(layers, metric).set_index("layer")["mean"].reindex(numbers)
            packed["layer"] = _whole(over.to_numpy(float), scale)
            found["metrics"][metric] = packed
    return found


def _whole(numbers: np.ndarray, scale: int) -> list[int | None]:
    return [None if not np.isfinite(value) else round(float(value) * scale) for value in numbers]


def _panels(rows: pd.DataFrame, slug: str) -> list[Chart]:
    shown = [panel for panel in CURVES if not rows_of(rows, (line.metric for line in panel.lines)).empty]
    curves = {panel.title: _curves(panel, rows) for panel in shown}
    cosines = [curve for panel in shown if not panel.unit_interval for curve in curves[panel.title]]
    shared = limits_of(cosines) if cosines else (0.0, 1.0)
    return [
        chart(
            f"curves-{slug}-{file_stem(panel.title).lower()}",
            curves[panel.title],
            title=panel.title,
            hint=HINTS.get(panel.title, ""),
            y_label=panel.y_label,
            limits=(0.0, 1.02) if panel.unit_interval else shared,
        )
        for panel in shown
    ]


def _curves(panel: Panel, rows: pd.DataFrame) -> list[ChartLine]:
    return [
        ChartLine(line.label, _points(rows, line.metric), line.colour, line.dashes, line.marker)
        for line in panel.lines
        if not rows_of(rows, [line.metric]).empty
    ]


def _points(rows: pd.DataFrame, metric: str, *, relative: bool = False) -> pd.DataFrame:
    points = profile(rows_of(rows, [metric]), metric)
    # the model's last layer, also where only some were measured
    count = "layer_count" if "layer_count" in rows else "layer"
    last = float(rows[count].max()) - (count == "layer_count")
    return points.assign(x=points["layer"] / max(last, 1.0) if relative else points["layer"])


def _tables(rows: pd.DataFrame, slug: str) -> list[NumberTable]:
    modules = dict(zip(rows["layer"], rows["module"], strict=True)) if "module" in rows else {}
    found = []
    for title, metrics in grouped(rows["metric"]).items():
        cells = {metric: _by_layer(rows, metric) for metric in metrics}
        layers = sorted(int(layer) for layer in rows["layer"].unique())
        found.append(
            NumberTable(
                f"table-{slug}-{file_stem(title).lower()}",
                title,
                tuple((metric, entry_of(metric)) for metric in metrics),
                tuple(
                    (
                        str(layer),
                        str(modules.get(layer, "")),
                        tuple(cells[metric].get(layer, NO_NUMBER) for metric in metrics),
                    )
                    for layer in layers
                ),
            )
        )
    return found


def _by_layer(rows: pd.DataFrame, metric: str) -> dict[int, NumberCell]:
    return {int(row["layer"]): _cell(row) for _, row in profile(rows, metric).iterrows()}


def _cell(row: pd.Series) -> NumberCell:
    """A mean with its interval; `mean`, `ci_low`, `ci_high`."""
    if not np.isfinite(row["mean"]):
        return NO_NUMBER
    known = np.isfinite(row["ci_low"]) and np.isfinite(row["ci_high"])
    interval = f"{number(row['ci_low'])} to {number(row['ci_high'])}" if known else ""
    return NumberCell(round(float(row["mean"]), 6), number(row["mean"]), interval)


def _side_by_side(
    parts: Sequence[pd.DataFrame], metric: str
) -> tuple[tuple[str, tuple[NumberCell, ...]], ...]:
    columns = [_by_layer(part, metric) for part in parts]
    layers = sorted({layer for column in columns for layer in column})
    return tuple((str(layer), tuple(column.get(layer, NO_NUMBER) for column in columns)) for layer in layers)


def _agreed(rows: pd.DataFrame, column: str) -> str:
    """The value that all rows share, a span of several numbers, or nothing."""
    if column not in rows or rows[column].isna().all():
        return ""
    found = list(dict.fromkeys(rows[column].dropna()))
    said = [f"{value:g}" if isinstance(value, float) else str(value) for value in found]
    return ", ".join(said)
