"""Entropy of attention over depth: mean, 15th percentile and bound (Context Broadcasting, Figure 4)."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.figure import Figure

from diag.metrics.catalogue import CATALOGUE
from diag.show.figures.lines import BANDS, depth_curve, headings, layer_axis, line, lines_drawn, lines_of
from diag.show.figures.page import columns_for, legend_below, page
from diag.show.figures.style import style
from diag.show.figures.tables import caption, check_columns, drawable
from diag.show.words.unusual import OTHER_KEYS

METRICS = ("entropy", "entropy_p15")
LINES = {name: CATALOGUE[name].line for name in METRICS}
BOUNDS = {
    "bound": ("bound ln T: uniform attention", "--"),
    "causal": ("bound of the mean: token i sees i keys", ":"),
}
"""Column of `bounds_of` -> its label and dashes."""


@style()
def entropy_over_depth(layers: pd.DataFrame) -> Figure:
    """A panel per line, in nats; all panels share their limits.

    The bound is ln T, T the keys of one softmax. In a causal model (`first_token` is excluded) row i sees
    i keys, so that the mean over tokens is bounded by the mean of ln i, i = 2 … T, which is drawn as well.

    Raises UserError if the table holds no entropy, or several values for one layer of a line.
    """
    rows = drawable(check_columns(layers), list(METRICS), "figures of entropy")
    parts = lines_of(rows)
    titles, room = headings(parts)
    bounds = {label: bounds_of(part) for label, part in parts.items()}
    highest = float(pd.concat([rows["mean"], *(bound["bound"] for bound in bounds.values())]).max())
    figure, axes = page(
        len(parts),
        row_height=2.15 + room,
        title="Entropy of attention",
        caption=caption(rows, bands=BANDS),
        columns=columns_for(len(parts)),
    )
    for ax, title, (label, part) in zip(axes, titles, parts.items(), strict=True):
        bound = bounds[label]
        for column, (word, dashes) in BOUNDS.items():
            if bound[column].notna().any():
                at, ends = bound["layer"], bound[column]
                ax.plot(at, ends, dashes, color="black", linewidth=1, label=word, gid="bound")
        for metric, drawn in LINES.items():
            line(ax, depth_curve(part, metric), drawn)
        ax.set_ylim(0, 1.06 * highest)
        ax.set_title(title)
        ax.set_ylabel("entropy in nats")
        layer_axis(ax, part)
    handles = lines_drawn(axes) | lines_drawn(axes, "bound")
    order = [*(drawn.label for drawn in LINES.values()), *(word for word, _ in BOUNDS.values())]
    words = [word for word in order if word in handles]
    legend_below(figure, [handles[word] for word in words], words)
    return figure


def bounds_of(rows: pd.DataFrame) -> pd.DataFrame:
    """The bounds of each layer: columns layer, bound (ln T), causal (mean of ln i, i = 2 … T; else NaN); NaN
    where keys are other tokens than queries.
    """
    first = rows.sort_values("layer").drop_duplicates("layer")
    lengths = pd.to_numeric(first["n_tokens"]).astype(float)
    causal = (lengths + 1).map(math.lgamma) / (lengths - 1)
    excluded = "first_token" in first and first["first_token"] == "excluded"
    # of keys that are others than the queries there may be more or fewer, which no table says
    own = ~first["value_from"].isin(OTHER_KEYS) if "value_from" in first else lengths > 0
    bounds = {
        "bound": lengths.map(math.log).where(own),
        "causal": causal.where(excluded & (lengths > 1) & own),
    }
    return pd.DataFrame({"layer": first["layer"].astype(float), **bounds}, index=first.index)
