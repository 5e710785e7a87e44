"""The ledger as geometry: stacked signed bars over layers, which the template only writes down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.ticker import MaxNLocator

from diag.metrics.catalogue import LEDGER_CLASSES
from diag.results.writing import file_stem
from diag.show.figures.ledger import WIDTH as BAR
from diag.show.figures.ledger import Piece, pieces, totals
from diag.show.figures.panels import LEDGER_COLOURS, LEDGERS, LedgerPanel
from diag.show.figures.tables import depth_of, profile
from diag.show.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, named, scale
from diag.show.report.maps import number

OF_GREYS = {"extra": "extra", "rest": "rest"}
"""Classes whose colour is none of Okabe and Ito's -> the name of their CSS variable, after `ledger-`."""


@dataclass(frozen=True)
class DrawnClass:
    """The bars of one class as one SVG path. data: what tooltips read."""

    label: str
    colour: str
    path: str
    data: dict[str, Any]


@dataclass(frozen=True)
class LedgerChart:
    """One ledger of one line. sums: what the classes of each layer sum to. rule: where zero is."""

    name: str
    title: str
    hint: str
    description: str
    x_label: str
    y_label: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    rule: float
    classes: tuple[DrawnClass, ...]
    sums: str

    @property
    def data(self) -> dict[str, Any]:
        """What tooltips read: positions and numbers."""
        return {"exact": True, "curves": [one.data for one in self.classes]}


def ledger_charts(rows: pd.DataFrame, slug: str) -> list[LedgerChart]:
    """The ledgers of one line; none where they were not measured."""
    found = [(panel, pieces(rows, panel.of)) for panel in LEDGERS]
    return [_chart(panel, parts, rows, slug) for panel, parts in found if parts]


def _chart(panel: LedgerPanel, parts: Sequence[Piece], rows: pd.DataFrame, slug: str) -> LedgerChart:
    layers = sorted({*map(int, depth_of(rows)), *(piece.layer for piece in parts)})
    first, last = layers[0], layers[-1]
    low = min(0.0, *(min(piece.start, piece.end) for piece in parts))
    high = max(0.0, *(max(piece.start, piece.end) for piece in parts))
    margin = 0.04 * (high - low)
    limits = (low - margin if low < 0 else 0.0, high + margin)
    across = scale(first - 0.6, last + 0.6, LEFT, WIDTH - RIGHT)
    up = scale(*limits, HEIGHT - BOTTOM, TOP)
    ticks = [
        tick
        for tick in MaxNLocator(8, integer=True, min_n_ticks=1).tick_values(first, last)
        if first <= tick <= last
    ]
    upwards = [
        tick
        for tick in MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(*limits)
        if limits[0] <= tick <= limits[1]
    ]
    sums = totals(list(parts))
    return LedgerChart(
        name=f"ledger-{slug}-{file_stem(panel.of)}",
        title=panel.title,
        hint=panel.hint,
        description=_described(parts, sums),
        x_label="layer",
        y_label=panel.y_label,
        x_ticks=tuple((round(across(tick), 1), f"{tick:g}") for tick in ticks),
        y_ticks=tuple((round(up(tick), 1), text) for tick, text in named(upwards)),
        rule=round(up(0.0), 1),
        classes=tuple(
            _drawn(panel, name, [piece for piece in parts if piece.name == name], rows, across, up)
            for name in LEDGER_CLASSES
            if any(piece.name == name for piece in parts)
        ),
        sums="".join(
            f"M{across(layer - BAR / 2):.1f} {up(total):.1f}H{across(layer + BAR / 2):.1f}"
            for layer, total in sums.items()
        ),
    )


def _drawn(
    panel: LedgerPanel, name: str, parts: Sequence[Piece], rows: pd.DataFrame, across: Any, up: Any
) -> DrawnClass:
    points = profile(rows, f"{panel.of}_from_{name}")
    colour = f"ledger-{OF_GREYS[name]}" if name in OF_GREYS else LEDGER_COLOURS[name]
    path = "".join(
        f"M{across(p.layer - BAR / 2):.1f} {up(p.start):.1f}H{across(p.layer + BAR / 2):.1f}"
        f"V{up(p.end):.1f}H{across(p.layer - BAR / 2):.1f}z"
        for p in parts
    )
    data: dict[str, Any] = {
        "label": LEDGER_CLASSES[name],
        "colour": colour,
        "layer": [int(layer) for layer in points["layer"]],
        "x": [round(float(across(layer)), 1) for layer in points["layer"]],
    }
    for column in ("mean", "ci_low", "ci_high"):
        numbers = [None if pd.isna(value) else round(float(value), 4) for value in points[column]]
        data[column.removeprefix("ci_")] = numbers
    return DrawnClass(LEDGER_CLASSES[name], colour, path, data)


def _described(parts: Sequence[Piece], sums: dict[int, float]) -> str:
    """For those who do not see it: in each layer, the class that has most, and the sum."""
    said = []
    for layer, total in sums.items():
        most = max((p for p in parts if p.layer == layer), key=lambda p: p.end - p.start)
        said.append(
            f"Layer {layer}: {LEDGER_CLASSES[most.name]} {number(most.end - most.start)} of {number(total)}."
        )
    return " ".join(said)
