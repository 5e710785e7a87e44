"""Sink events over depth: the share of heads with one in every layer, stacked by what the sink does."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from diag.metrics.catalogue import CATALOGUE
from diag.show.figures.lines import depth_curve, headings, layer_axis, lines_of
from diag.show.figures.page import columns_for, legend_below, page
from diag.show.figures.panels import SINK_CLASSES, SINK_METRICS
from diag.show.figures.style import OKABE_ITO, style
from diag.show.figures.tables import caption, check_columns, drawable, profile

BARS = "bars: 95 % bootstrap interval of all events over inputs"
LEAST_HEIGHT = 0.05
"""Where a panel ends at the least: without any event it is not one of noise."""


@style()
def sink_events(layers: pd.DataFrame) -> Figure:
    """A panel per line, a column per layer: the share of heads with a sink event, mean over inputs.

    No-op, broadcast and unclassified are stacked; an open column holds events whose class is not known,
    because the output projection is not. All panels share their limits.
    Raises UserError if the table holds no sink events, or several values for one layer of a line.
    """
    rows = drawable(check_columns(layers), SINK_METRICS, "figures of sink events")
    parts = lines_of(rows)
    titles, room = headings(parts)
    events = rows[rows["metric"] == "sink_event"]
    highest = max(float(np.nanmax(events[["mean", "ci_high"]].to_numpy(), initial=0.0)), LEAST_HEIGHT)
    figure, axes = page(
        len(parts),
        row_height=2.0 + room,
        title="Sink events: heads in which nearly all queries attend to one key",
        caption=caption(rows, bands=BARS).replace("; dotted: over layers that are not measured", ""),
        columns=columns_for(len(parts)),
    )
    unknown = [_stacked(ax, part) for ax, part in zip(axes, parts.values(), strict=True)]
    for ax, title, part in zip(axes, titles, parts.values(), strict=True):
        ax.set_ylim(0, min(1.0, 1.06 * highest))
        ax.set_title(title)
        ax.set_ylabel("share of heads")
        layer_axis(ax, part)
        first, last = ax.get_xlim()
        ax.set_xlim(min(first, part["layer"].min() - 0.6), max(last, part["layer"].max() + 0.6))
    marks = [Patch(facecolor=_colour(name), label=CATALOGUE[name].line.label) for name in SINK_CLASSES]
    if any(unknown):
        marks.append(Patch(facecolor="none", edgecolor="black", label="class not known"))
    legend_below(figure, marks)
    return figure


def _stacked(ax: Axes, part: pd.DataFrame) -> bool:
    """Draws the columns of one line; whether some hold events of no known class."""
    every = depth_curve(part, "sink_event").set_index("layer")
    below = pd.Series(0.0, every.index)
    for name in SINK_CLASSES:
        share = profile(part, name).set_index("layer")["mean"].reindex(every.index).fillna(0.0)
        ax.bar(every.index, share, bottom=below, width=0.8, color=_colour(name), gid=name)
        below += share
    rest = (every["mean"] - below).clip(lower=0.0)
    unknown = rest > 1e-9
    if unknown.any():
        at = every.index[unknown]
        ax.bar(
            at,
            rest[unknown],
            bottom=below[unknown],
            width=0.8,
            facecolor="none",
            edgecolor="black",
            gid="rest",
        )
    known = every[every["ci_low"].notna()]
    if len(known):
        ax.vlines(known.index, known["ci_low"], known["ci_high"], color="black", linewidth=0.8)
    return bool(unknown.any())


def _colour(name: str) -> str:
    colour = CATALOGUE[name].line.colour
    return OKABE_ITO.get(str(colour), str(colour))
