"""The ledger over depth: whose each output is, and whose its bias, as stacked signed bars."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from diag.metrics.catalogue import LEDGER_CLASSES
from diag.show.figures.lines import layer_axis, rule
from diag.show.figures.page import legend_below, letter, page
from diag.show.figures.panels import LEDGER_COLOURS, LEDGER_METRICS, LEDGERS
from diag.show.figures.style import OKABE_ITO, style
from diag.show.figures.tables import caption, check_columns, drawable, label_of, one_selection

BARS = "bars: means over inputs; negative shares downwards; black: their sum"
WIDTH = 0.84
"""Of a bar, in layers."""


class Piece(NamedTuple):
    """What one class has in one layer: a bar from `start` to `end`, below it where it is negative."""

    name: str
    layer: int
    start: float
    end: float


@style()
def ledger_over_depth(layers: pd.DataFrame) -> Figure:
    """Two panels of one (model, tower, tokens): shares of y, and parts of the bias, by class of keys.

    Raises UserError if the table holds several selections or none of the metrics.
    """
    rows = drawable(check_columns(layers), LEDGER_METRICS, "figures of the ledger")
    one_selection(rows, "figures of the ledger")
    panels = [panel for panel in LEDGERS if pieces(rows, panel.of)]
    there = [
        name for name in LEDGER_CLASSES if any(f"{p.of}_from_{name}" in set(rows["metric"]) for p in panels)
    ]
    figure, axes = page(len(panels), row_height=2.6, title=label_of(rows), caption=caption(rows, bands=BARS))
    for place, (panel, ax) in enumerate(zip(panels, axes, strict=True)):
        _stack(ax, pieces(rows, panel.of))
        ax.set_title(letter(place, len(panels)) + panel.title)
        ax.set_ylabel(panel.y_label)
        layer_axis(ax, rows)
        first, last = ax.get_xlim()
        ax.set_xlim(min(first, rows["layer"].min() - 0.6), max(last, rows["layer"].max() + 0.6))
        rule(ax)
    handles = [
        Patch(facecolor=_colour(name), edgecolor="white", linewidth=0.3, label=LEDGER_CLASSES[name])
        for name in there
    ]
    legend_below(figure, handles)
    return figure


def pieces(rows: pd.DataFrame, of: str) -> list[Piece]:
    """The bars of a ledger, `output` or `bias`: classes in order, away from zero on their side."""
    return list(_pieces(rows, of))


def _pieces(rows: pd.DataFrame, of: str) -> Iterator[Piece]:
    known = rows[rows["mean"].notna()]
    for layer in sorted(known["layer"].astype(int).unique()):
        part = known[known["layer"] == layer]
        means = dict(zip(part["metric"], part["mean"], strict=True))
        up = down = 0.0
        for name in LEDGER_CLASSES:
            if (share := means.get(f"{of}_from_{name}")) is None:
                continue
            if share >= 0:
                yield Piece(name, int(layer), up, up := up + share)
            else:
                yield Piece(name, int(layer), down, down := down + share)


def totals(found: list[Piece]) -> dict[int, float]:
    """What the classes of each layer sum to."""
    sums: dict[int, float] = {}
    for piece in found:
        sums[piece.layer] = sums.get(piece.layer, 0.0) + piece.end - piece.start
    return sums


def _stack(ax: Axes, found: list[Piece]) -> None:
    for name in dict.fromkeys(piece.name for piece in found):
        own = [piece for piece in found if piece.name == name]
        ax.bar(
            [piece.layer for piece in own],
            [piece.end - piece.start for piece in own],
            WIDTH,
            bottom=[piece.start for piece in own],
            color=_colour(name),
            edgecolor="white",
            linewidth=0.3,
            gid=name,
        )
    for layer, total in totals(found).items():
        ax.hlines(total, layer - WIDTH / 2, layer + WIDTH / 2, color="black", linewidth=1.4, gid="sum")


def _colour(name: str) -> str:
    return OKABE_ITO.get(LEDGER_COLOURS[name], LEDGER_COLOURS[name])
