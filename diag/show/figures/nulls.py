"""The bias over depth beside all of its nulls, and what each of them leaves of it."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
from matplotlib.figure import Figure

from diag.metrics.catalogue import CATALOGUE
from diag.results.null_names import NULLS
from diag.show.figures.lines import BANDS, layer_axis, line, lines_drawn, rule
from diag.show.figures.page import legend_below, letter, page
from diag.show.figures.panels import NULL_METRICS
from diag.show.figures.style import style
from diag.show.figures.tables import (
    caption,
    check_columns,
    drawable,
    label_of,
    one_selection,
    profile,
    rows_of,
)


@style()
def null_curves(layers: pd.DataFrame) -> Figure:
    """Two panels of one model over depth: the bias with its nulls, and bias − null for each of them.

    `layers` is the long-form table of one (model, tower, tokens). Nulls that were not measured are left out.
    Of the uniform null the table has no difference with an interval, and the second panel no line.

    Raises UserError if the table holds several selections or none of the metrics.
    """
    rows = drawable(check_columns(layers), NULL_METRICS, "nulls")
    one_selection(rows, "nulls")
    said = caption(rows, bands=BANDS)
    figure, axes = page(2, row_height=2.6, title=label_of(rows), caption=said)
    upper, lower = axes
    line(upper, profile(rows, "cos_y_vself"), replace(CATALOGUE["cos_y_vself"].line, label="alignment bias"))
    for null in NULLS:
        look = replace(CATALOGUE[null.metric].line, label=CATALOGUE[null.metric].heading)
        line(upper, profile(rows, null.metric), look)
        line(lower, profile(rows, null.excess), replace(look, dashes="-"))
    titles = ("The bias and its nulls", "What each null leaves: bias − null")
    for place, (ax, title) in enumerate(zip(axes, titles, strict=True)):
        rule(ax)
        ax.set_title(letter(place) + title)
        ax.set_ylabel("cosine" if place == 0 else "cosine difference")
        layer_axis(ax, rows_of(rows, NULL_METRICS))
    handles = lines_drawn(axes)
    legend_below(figure, list(handles.values()), list(handles))
    return figure
