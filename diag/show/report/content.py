"""What the page says, as plain values for the template: tables in, sentences, charts, tables and maps out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from diag.metrics.catalogue import CATALOGUE, DrawnAs, MetricEntry, entry_of
from diag.metrics.names import GROUPS
from diag.results.bootstrap import summary
from diag.results.caveats import BETWEEN, apart
from diag.results.collect import Collection
from diag.results.writing import file_stem, free_stem
from diag.show.figures.heatmaps import extent_of, field_of
from diag.show.figures.panels import CURVES
from diag.show.figures.style import DASHES, MOST_BANDS
from diag.show.figures.tables import (
    check_columns,
    compared_metrics,
    depth_of,
    last_layer,
    patch_size_of,
    profile,
    rows_of,
    span,
)
from diag.show.report.charts import Chart, ChartLine, chart, limits_of
from diag.show.report.ledger import LedgerChart, ledger_charts
from diag.show.report.maps import Map, head_maps, number
from diag.show.report.palette import compared_colours
from diag.show.words.ledger import ledger_sentence

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
Rows = list[tuple[str, tuple[NumberCell, ...]]]
"""Layer and cells."""


@dataclass(frozen=True)
class NumberTable:
    """A table of numbers: rows are `(name, tooltip, cells)`, columns metrics."""

    name: str
    title: str
    metrics: tuple[MetricEntry, ...]
    rows: tuple[tuple[str, str, tuple[NumberCell, ...]], ...]


@dataclass(frozen=True)
class ReportLine:
    """One line of the collection. facts: what explains its numbers. heads: for the view of one head.

    whose, ledgers: what leads the page where the ledger was measured.
    """

    label: str
    slug: str
    colour: str
    model: str
    facts: tuple[tuple[str, str], ...]
    sentences: tuple[str, ...]
    whose: str
    ledgers: tuple[LedgerChart, ...]
    charts: tuple[Chart, ...]
    tables: tuple[NumberTable, ...]
    maps: tuple[Map, ...]
    heads: Mapping[str, Any]

    @property
    def named(self) -> str:
        """The model, with the line's caveats."""
        return BETWEEN.join([self.model, *apart(self.label)[1]])


def lines_of(collection: Collection, sentences: Mapping[str, Sequence[str]]) -> list[ReportLine]:
    """Every line with all that the page shows of it. sentences: label -> its summary in words."""
    layers, heads = check_columns(collection.layers), check_columns(collection.heads, ["head"])
    taken: set[str] = set()
    found = []
    for place, label in enumerate(collection.labels):
        slug = free_stem(file_stem(label) or "line", taken)
        rows, of_heads = layers[layers["label"] == label], heads[heads["label"] == label]
        whose = ledger_sentence(rows)
        found.append(
            ReportLine(
                label=label,
                slug=slug,
                colour=f"line-{place}",
                model=str(rows["model"].iloc[0]),
                facts=facts_of(rows, of_heads),
                sentences=tuple(said for said in sentences.get(label, ()) if said != whose),  # it leads
                whose=whose,
                ledgers=tuple(ledger_charts(rows, slug)),
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
        "inputs (n)": span(known["n"].nlargest(1)),
        "n of single metrics": span(known["n"]) if known["n"].nunique() > 1 else "",
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


def comparison(lines: Sequence[ReportLine], collection: Collection) -> list[tuple[Chart, Rows]]:
    """A chart of each metric over relative depth with its numbers by layer; none where there is one line."""
    if len(lines) < 2:
        return []
    layers = check_columns(collection.layers)
    parts = [layers[layers["label"] == line.label] for line in lines]
    looks = []
    for place, line in enumerate(lines):
        turn, marker = divmod(place, len(COMPARED_MARKERS))
        looks.append(DrawnAs(line.label, line.colour, DASHES[turn % len(DASHES)], COMPARED_MARKERS[marker]))
    found, bands = [], len(lines) <= MOST_BANDS
    for metric in compared_metrics(parts, least=2):
        title, y_label = CATALOGUE[metric].panel
        curves = [
            ChartLine(points, look)
            for part, look in zip(parts, looks, strict=True)
            if not (points := _points(part, metric, relative=True)).empty
        ]
        columns = [_by_layer(part, metric) for part in parts]
        drawn = chart(
            f"compared-{metric}",
            curves,
            title=title,
            hint=CATALOGUE[metric].sentence,
            y_label=y_label,
            limits=limits_of(curves, bands=bands),
            relative=True,
            rule=1.0 if metric == "self_weight_ratio" else 0.0,
            bands=bands,
        )
        found.append((drawn, _rows(set().union(*columns), columns)))
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
    return NumberTable("glance", "Means over layers", tuple(map(entry_of, metrics)), tuple(rows))


def colours_of(collection: Collection) -> list[str]:
    """The colour of every line, in the order of the labels."""
    layers = collection.layers
    return compared_colours([patch_size_of(layers[layers["label"] == label]) for label in collection.labels])


def grouped(metrics: Iterable[str]) -> dict[str, list[str]]:
    """The metrics that are there, by the title of their table; those not in the catalogue come last."""
    there = dict.fromkeys(metrics)
    found: dict[str, list[str]] = {}
    for name in sorted(there, key=[*CATALOGUE, *there].index):
        found.setdefault(entry_of(name).place.section, []).append(name)
    return found


def packed_heads(heads: pd.DataFrame, layers: pd.DataFrame) -> dict[str, Any]:
    """Numbers of every head as whole numbers, layer by layer, so that 1,200 heads of 21 metrics fit in.

    `scale` times too large; `layer` holds the mean over heads; `null` where there is no number.
    """
    if heads.empty:
        return {}
    numbers = sorted(int(layer) for layer in heads["layer"].unique())
    first, shape = extent_of(heads)
    groups = grouped(heads["metric"])
    found: dict[str, Any] = {"layers": numbers, "heads": shape[1], "groups": groups, "metrics": {}}
    for metric in itertools.chain.from_iterable(groups.values()):
        part = heads[heads["metric"] == metric]
        largest = part[["mean", "ci_low", "ci_high"]].abs().max().max()
        scale = 1000 if pd.isna(largest) or largest < 100 else 10
        packed: dict[str, Any] = {"scale": scale}
        for column in ("mean", "ci_low", "ci_high"):
            if column == "mean" or part[column].notna().any():
                field = field_of(part, metric, first, shape, column)[np.array(numbers) - first]
                packed[column.removeprefix("ci_")] = _whole(field.ravel(), scale)
        over = profile(layers, metric).set_index("layer")["mean"].reindex(numbers)
        packed["layer"] = _whole(over.to_numpy(float), scale)
        found["metrics"][metric] = packed
    return found


def _whole(numbers: np.ndarray, scale: int) -> list[int | None]:
    return [None if not np.isfinite(value) else round(float(value) * scale) for value in numbers]


def _panels(rows: pd.DataFrame, slug: str) -> list[Chart]:
    curves = {
        panel.title: [
            ChartLine(points, look)
            for metric, look in panel.lines.items()
            if not (points := _points(rows, metric)).empty
        ]
        for panel in CURVES
    }
    shown = [panel for panel in CURVES if curves[panel.title]]
    cosines = [curve for panel in shown if not panel.unit_interval for curve in curves[panel.title]]
    shared = limits_of(cosines) if cosines else (0.0, 1.0)
    return [
        chart(
            f"curves-{slug}-{file_stem(panel.title).lower()}",
            curves[panel.title],
            title=panel.title,
            hint=panel.hint,
            y_label=panel.y_label,
            limits=(0.0, 1.02) if panel.unit_interval else shared,
            layers=list(depth_of(rows)),
        )
        for panel in shown
    ]


def _points(rows: pd.DataFrame, metric: str, *, relative: bool = False) -> pd.DataFrame:
    points = profile(rows_of(rows, [metric]), metric)
    return points.assign(x=points["layer"] / last_layer(rows) if relative else points["layer"])


def _tables(rows: pd.DataFrame, slug: str) -> list[NumberTable]:
    modules = dict(zip(rows["layer"], rows["module"], strict=True)) if "module" in rows else {}
    layers = set(rows["layer"].astype(int))
    return [
        NumberTable(
            f"table-{slug}-{file_stem(title).lower()}",
            title,
            tuple(map(entry_of, metrics)),
            tuple(
                (layer, str(modules.get(int(layer), "")), cells)
                for layer, cells in _rows(layers, [_by_layer(rows, metric) for metric in metrics])
            ),
        )
        for title, metrics in grouped(_filled(rows)).items()
    ]


def _filled(rows: pd.DataFrame) -> list[str]:
    """The metrics of a line, without the classes of a ledger of which its model has no key."""
    known = set(rows["metric"][rows["mean"].notna()])
    return [name for name in rows["metric"].unique() if name in known or name not in GROUPS["ledger"]]


def _by_layer(rows: pd.DataFrame, metric: str) -> dict[int, NumberCell]:
    return {int(row["layer"]): _cell(row) for _, row in profile(rows, metric).iterrows()}


def _cell(row: pd.Series) -> NumberCell:
    """A mean with its interval; `mean`, `ci_low`, `ci_high`."""
    if not np.isfinite(row["mean"]):
        return NO_NUMBER
    known = np.isfinite(row["ci_low"]) and np.isfinite(row["ci_high"])
    interval = f"{number(row['ci_low'])} to {number(row['ci_high'])}" if known else ""
    return NumberCell(round(float(row["mean"]), 6), number(row["mean"]), interval)


def _rows(layers: Iterable[int], columns: Sequence[Mapping[int, NumberCell]]) -> Rows:
    return [
        (str(layer), tuple(column.get(layer, NO_NUMBER) for column in columns)) for layer in sorted(layers)
    ]


def _agreed(rows: pd.DataFrame, column: str) -> str:
    """The values that the rows have, each once; nothing where they have none."""
    found = dict.fromkeys(rows[column].dropna()) if column in rows else ()
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in found)
