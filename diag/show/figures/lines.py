"""A metric as a line with its interval, over depth or what varies; published values as open points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from diag.errors import UserError
from diag.metrics.catalogue import DrawnAs
from diag.results.caveats import apart
from diag.show.figures.page import columns_for, letter
from diag.show.figures.style import BAND_OPACITY, OKABE_ITO, PUBLISHED, RULE, Colour, paper
from diag.show.figures.tables import LABEL, depth_of, label_of, profile, shorten, span, wrapped

BANDS = "bands: 95 % bootstrap interval over inputs"
NO_BANDS = "more than 5 lines: intervals in the CSV"
OPEN: dict[str, Any] = {"markersize": 4, "markerfacecolor": "none", "markeredgewidth": 0.9}
"""Markers of published values."""
OVER_DEPTH = ("layer", "depth")
"""What `x` is called where a curve is one over layers, or over depth relative to the last."""
PANEL_LINE = 0.13
"""Inches of a further row of words above a panel."""
MARKS = 16
"""At most so many markers on a line, unless told otherwise."""


def headings(parts: Mapping[str, pd.DataFrame]) -> tuple[list[str], float]:
    """The titles of lines' panels, and the inches that they take beyond one row of words.

    A letter, the label and T, short enough for the panel's width: what does not fit behind the name, T and
    caveats, stands in rows below it.
    """
    panels = len(parts)
    width = paper().panel
    if paper().columns > 1 and panels > 1:
        width = 27 if columns_for(panels) == 3 else 42
    titles = []
    for place, (label, rows) in enumerate(parts.items()):
        length = span(rows["n_tokens"]) if "n_tokens" in rows and "T =" not in label else ""
        name, said = apart(label)
        shown = [label + (f" (T = {length})" if length else "")]
        if len(shown[0]) > width - 4:  # the letter's
            below = [f"T = {length}" if length else "", *said]
            shown = [shorten(name, width - 4), *wrapped(below, width)]
        titles.append(letter(place, panels) + "\n".join(shown))
    return titles, PANEL_LINE * max(title.count("\n") for title in titles)


def line(
    ax: Axes,
    curve: pd.DataFrame,
    look: DrawnAs,
    *,
    x: str = "layer",
    marks: int = MARKS,
    bands: bool = True,
) -> None:
    """A mean with its 95 % interval: a band, or a bar where a point is alone. Draws nothing if it is empty.

    curve: columns `x`, mean, ci_low, ci_high, over depth also layer; sorted by x. At most about `marks`
    points are marked. bands: whether the interval is drawn. Where layers between are not there, or the
    metric is undefined in them, the line is broken, because nothing is known of them: every point is marked,
    and a fine dotted line leads over.
    """
    curve = curve[curve["mean"].notna()]
    if curve.empty:
        return
    colour = OKABE_ITO.get(str(look.colour), look.colour)
    runs = runs_of(curve) if x in OVER_DEPTH else [curve]
    if bands and curve["ci_low"].notna().any():
        for run in runs:
            if len(run) == 1:
                ax.vlines(run[x], run["ci_low"], run["ci_high"], color=colour, linewidth=1)
            else:
                ax.fill_between(
                    run[x], run["ci_low"], run["ci_high"], color=colour, alpha=BAND_OPACITY, linewidth=0
                )
    broken = curve
    if len(runs) > 1:
        broken = pd.concat([part for run in runs for part in (run, run.tail(1).assign(mean=np.nan))][:-1])
        ax.plot(curve[x], curve["mean"], ":", color=colour, linewidth=0.6, label="_between", gid="between")
    lone = "x" if len(curve) == 1 else "." if len(runs) > 1 else ""
    ax.plot(
        broken[x],
        broken["mean"],
        color=colour,
        linestyle=look.dashes,
        marker=look.marker or lone,
        markersize=3,
        markevery=1 if len(runs) > 1 else math.ceil(len(curve) / marks),
        label=look.label,
        gid="model",
    )


def runs_of(curve: pd.DataFrame) -> list[pd.DataFrame]:
    """A curve over layers, sorted, cut where layers between are not there."""
    apart = curve["layer"].diff().fillna(1) > 1
    return [part for _, part in curve.groupby(apart.cumsum(), sort=False)]


def handle(look: DrawnAs) -> Line2D:
    """What stands for a line, or for points where it has no dashes, in a legend."""
    return Line2D(
        [], [], color=look.colour, marker=look.marker, linestyle=look.dashes, markersize=4, label=look.label
    )


def lines_drawn(axes: Sequence[Axes], group: str = "model") -> dict[str, Line2D]:
    """What `line` drew, by label, for one legend of all panels; or lines of another group id."""
    found = [one for ax in axes for one in ax.get_lines() if one.get_gid() == group]
    return {str(one.get_label()): one for one in found}


def published_points(
    ax: Axes, values: pd.DataFrame, *, colour: Colour = PUBLISHED, marker: str = "o"
) -> None:
    """Published values as open markers with error bars, above what was measured. Draws nothing if empty.

    values: columns layer, value, uncertainty. They have no label: names of sources are too long for a
    panel's legend, see `published_handle`.
    """
    if values.empty:
        return
    ax.errorbar(
        values["layer"].astype(float),
        values["value"].astype(float),
        yerr=values["uncertainty"].astype(float).fillna(0.0),
        fmt=marker,
        markeredgecolor=colour,
        ecolor=colour,
        elinewidth=0.8,
        gid="published",
        zorder=4,
        **OPEN,
    )


def published_handle(label: str, marker: str = "o") -> Line2D:
    """What stands for published points in a legend."""
    return Line2D([], [], linestyle="", label=label, marker=marker, markeredgecolor=PUBLISHED, **OPEN)


def rule(ax: Axes, at: float = 0) -> None:
    """A thin line beneath all others: where nothing differs."""
    ax.axhline(at, color=RULE, linewidth=0.7, zorder=1)


def layer_axis(ax: Axes, rows: pd.DataFrame, *others: pd.Series) -> None:
    """Whole layers on the x axis, over the whole depth of the model where the rows know it.

    others: layers that are to have room besides.
    """
    layers = pd.concat([depth_of(rows), *(layers.astype(float) for layers in others)])
    first, last = float(layers.min()), float(layers.max())
    margin = 0.5 if first == last else 0.03 * (last - first)
    ax.set_xlim(first - margin, last + margin)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    ax.set_xlabel("layer")


def depth_curve(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One metric over layers, as `tables.profile` has it.

    Raises UserError if a layer has more than one value.
    """
    curve = profile(rows, metric)
    if curve["layer"].duplicated().any():
        raise UserError(
            f"the table holds more than one value of {metric} in one layer of a line",
            "choose a model and a token set, or give runs of other lengths labels of their own",
        )
    return curve


def lines_of(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each line by its label, in order; without a column `label`, by model, tower and tokens."""
    keys = [LABEL] if LABEL in rows else ["model", "tower", "tokens"]
    parts = dict(iter(rows.groupby(keys, sort=False)))
    alone = len({names[0] for names in parts}) == len(parts)
    return {label_of(part, *(() if alone else map(str, names[1:]))): part for names, part in parts.items()}


def finite_range(numbers: pd.DataFrame) -> tuple[float, float]:
    """Smallest and largest of all numbers that are there."""
    array = numbers.to_numpy(float)
    return float(np.nanmin(array)), float(np.nanmax(array))
