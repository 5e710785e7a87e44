"""Rank correlation of received attention with saliency over depth: heads, their mean map, all layers."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from diag.errors import counted
from diag.metrics.catalogue import DrawnAs
from diag.results.agreement import ALL, GRADIENT, GRADIENT_X_INPUT, SALIENCIES, over_inputs
from diag.results.caveats import of_table
from diag.results.looks import MEAN
from diag.show.figures.lines import BANDS, layer_axis, line, rule
from diag.show.figures.page import columns_for, legend_below, letter, page
from diag.show.figures.style import OKABE_ITO, style
from diag.show.figures.tables import shorten

LOOKS = {
    GRADIENT_X_INPUT: DrawnAs("gradient × input |g·x|", "blue", "-", "o"),
    GRADIENT: DrawnAs("gradient ‖g‖", "orange", "-", "s"),
}
assert LOOKS.keys() == SALIENCIES.keys()
ASIDE = {GRADIENT_X_INPUT: -0.09, GRADIENT: 0.09}
"""Heads of the two stand beside each other."""


@style()
def agreement_over_depth(table: pd.DataFrame) -> Figure:
    """A panel per model and tower: ρ of the mean map of each layer's heads, points for single heads, and a
    dashed line for the mean map of all layers; means over inputs.

    table: as `diag.results.agreement.AGREED`.
    """
    found, n = over_inputs(table), table["input"].nunique()
    said = [f"Spearman's ρ over keys · n = {counted(n, 'input')}", *of_table(table)]
    parts = dict(list(found.groupby(["model", "tower"], sort=False)))
    figure, axes = page(
        len(parts),
        row_height=2.3,
        title="Does attention go to what the answer hangs on?",
        caption=" · ".join([*said, *([BANDS] if n > 1 else [])]),
        columns=columns_for(len(parts)),
    )
    for place, (ax, ((model, tower), part)) in enumerate(zip(axes, parts.items(), strict=True)):
        _panel(ax, part.assign(layer=part["layer"].astype(float)))
        label = shorten(str(model), 30)
        ax.set_title(f"{letter(place, len(parts))}{label}, {tower}")
    heads = Line2D([], [], color="0.4", marker=".", linestyle="", label="single heads")
    whole = Line2D([], [], color="0.4", linestyle="--", label="mean map of all layers")
    lines = [
        Line2D([], [], color=OKABE_ITO[str(look.colour)], marker=look.marker, markersize=3, label=look.label)
        for look in LOOKS.values()
    ]
    legend_below(figure, [*lines, heads, whole])
    return figure


def _panel(ax: Axes, part: pd.DataFrame) -> None:
    rule(ax)
    for kind, look in LOOKS.items():
        rows, colour = part[part["saliency"] == kind], OKABE_ITO[str(look.colour)]
        heads = rows[~rows["head"].isin([MEAN, ALL])]
        at = heads["layer"] + ASIDE[kind]
        ax.plot(at, heads["mean"], ".", color=colour, alpha=0.45, markersize=3.5, gid="heads")
        line(ax, rows[rows["head"] == MEAN].sort_values("layer"), look)
        for level in rows[rows["head"] == ALL]["mean"]:
            ax.axhline(level, color=colour, linestyle="--", linewidth=0.8, gid="all")
    layer_axis(ax, part[part["layer"].notna()])
    ax.set_ylim(-1.05, 1.05)
    ax.set_ylabel("rank correlation ρ")
