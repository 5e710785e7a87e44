"""Metrics against what varies between runs: length, patch tokens, patch size, image size, training step."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from diag.errors import UserError
from diag.metrics.catalogue import DrawnAs, entry_of
from diag.show.figures.lines import BANDS, line, lines_drawn
from diag.show.figures.page import legend_below, letter, page
from diag.show.figures.style import LINE_COLOURS, MARKERS, RULE, style
from diag.show.figures.tables import caption, check_columns, shorten

AXES = {
    "n_tokens": "sequence length T, tokens",
    "patch_tokens": "patch tokens",
    "patch_size": "patch size, pixels",
    "image_size": "image size, pixels",
    "step": "training step",
}
TICKS = 7


@style()
def against(points: pd.DataFrame) -> Figure:
    """A panel per metric; a line per `line` of the table over `at`, on a logarithmic axis.

    points: columns line, metric, against (a key of `AXES`, the same in all rows), at, mean, ci_low,
    ci_high, n, and the constants of a run's table for the caption.

    Raises UserError if the table is empty, or has two values for one place of a line.
    """
    rows = check_columns(points.assign(layer=0), ["line", "against", "at"])
    rows = rows[rows["mean"].notna() & rows["at"].notna()]
    if rows.empty:
        raise UserError("there is nothing to draw against", "measure several lengths, sizes or steps")
    repeated = rows[rows.duplicated(["line", "metric", "at"])]
    if not repeated.empty:
        row = repeated.iloc[0]
        raise UserError(
            f"'{row['line']}' has more than one {row['metric']} at {row['against']} {row['at']:g}",
            "draw it against what differs, or choose a model and a token set",
        )
    axis = str(rows["against"].iloc[0])
    lines, metrics = list(dict.fromkeys(rows["line"])), list(dict.fromkeys(rows["metric"]))
    figure, axes = page(
        len(metrics),
        row_height=2.1,
        title=f"Means over layers against {AXES[axis].partition(',')[0]}",
        caption=caption(rows, bands=BANDS, labelled=False),
    )
    for place, (ax, metric) in enumerate(zip(axes, metrics, strict=True)):
        for number, name in enumerate(lines):
            part = rows[(rows["line"] == name) & (rows["metric"] == metric)].sort_values("at")
            colour, marker = LINE_COLOURS[number % len(LINE_COLOURS)], MARKERS[number % len(MARKERS)]
            line(ax, part, DrawnAs(name, colour, "-", marker), x="at")
        title, y_label = entry_of(metric).panel
        ax.set_title(letter(place, len(metrics)) + title)
        ax.set_ylabel(y_label)
        low, high = ax.get_ylim()
        if low < 0 < high:
            ax.axhline(0, color=RULE, linewidth=0.7)
        _axis(ax, rows["at"], axis)
    handles = lines_drawn(axes)
    names = [shorten(name, 96) for name in handles]
    legend_below(figure, list(handles.values()), names)
    return figure


def _axis(ax: Axes, at: pd.Series, axis: str) -> None:
    """Logarithmic, with the measured places as ticks; linear near 0, where a training begins."""
    places = sorted(at.unique())
    if len(places) > 1 and places[0] <= 0:
        ax.set_xscale("symlog", linthresh=max(1.0, min(place for place in places if place > 0)))
    elif len(places) > 1:
        ax.set_xscale("log")
    every = math.ceil(len(places) / TICKS)
    ax.xaxis.set_major_locator(FixedLocator(places[::-1][::every][::-1]))
    ax.xaxis.set_minor_locator(NullLocator())
    # the style draws no mathematics, which the formatter of logarithms writes
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.set_xlabel(AXES[axis])
