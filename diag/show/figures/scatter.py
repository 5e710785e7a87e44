"""What XSA did in published models: its effect against value similarity, and the similarity it leads to."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diag.errors import UserError
from diag.metrics.catalogue import DrawnAs
from diag.results.caveats import BETWEEN, of_table
from diag.results.decimals import fixed
from diag.show.figures.lines import BANDS, finite_range, layer_axis, line, lines_drawn
from diag.show.figures.page import columns_for, legend_below, letter, page
from diag.show.figures.style import LINE_COLOURS, OKABE_ITO, RULE, style

SIDES = (DrawnAs("baseline", "blue"), DrawnAs("XSA-trained", "vermillion", "-", "s"))


@style()
def effect(points: pd.DataFrame) -> Figure:
    """Points of change in accuracy against the value similarity of the baseline.

    points: columns label, training_run, similarity_baseline (mean over layers), change (points of
    top-1 accuracy), source. Later training runs of a model stand at the similarity of its first, open.

    Raises UserError if the table is empty.
    """
    if points.empty:
        raise UserError("there is no published effect to draw", "see diag/results/published_data")
    colours = dict(zip(dict.fromkeys(points["label"]), LINE_COLOURS, strict=False))
    figure, (ax,) = page(
        1,
        row_height=2.4,
        title="Value similarity against XSA's effect",
        caption=f"published values, {', '.join(dict.fromkeys(points['source']))} · "
        f"{points['model'].nunique()} models, {len(points)} trainings: too few for a trend",
    )
    ax.axhline(0, color=RULE, linewidth=0.7)
    for _, point in points.iterrows():
        again, colour = point["training_run"] > 1, colours[point["label"]]
        at = point["similarity_baseline"], point["change"]
        ax.plot(
            *at,
            "o",
            markersize=6,
            markeredgecolor=colour,
            markerfacecolor="none" if again else colour,
            gid="published",
        )
        word = f"{point['label']}, training {point['training_run']}" if again else point["label"]
        ax.annotate(
            f"{word}: {fixed(point['change'], 2, sign=True)}".replace(": -", ": \N{MINUS SIGN}"),
            at,
            xytext=(7, 0),
            textcoords="offset points",
            fontsize=7,
            va="center",
        )
    low, high = float(points["similarity_baseline"].min()), float(points["similarity_baseline"].max())
    margin = max(high - low, 0.05)
    ax.set_xlim(low - 0.1 * margin, high + 0.4 * margin)  # room for the last name
    ax.margins(y=0.12)
    ax.set_xlabel("value similarity of the baseline, mean over layers")
    ax.set_ylabel("top-1 with XSA − without, points")
    return figure


@style()
def trained_similarity(curves: pd.DataFrame) -> Figure:
    """Value similarity over layers of a baseline and its XSA-trained twin, a panel per pair.

    curves: columns pair, side (a label of `SIDES`), layer, mean, ci_low, ci_high (NaN where published),
    source (empty where measured). All panels share their limits.

    Raises UserError if the table is empty.
    """
    if curves.empty:
        raise UserError("there is no pair of models to draw", "give pairs: with name, baseline and trained")
    pairs = list(dict.fromkeys(curves["pair"]))
    sources = [source for source in dict.fromkeys(curves["source"]) if source]
    said = f"published values, {', '.join(sources)}" if sources else BANDS
    _, high = finite_range(curves[["mean", "ci_high"]])
    figure, axes = page(
        len(pairs),
        row_height=2.1,
        title="Value similarity with and without XSA in training",
        caption=BETWEEN.join([said, *of_table(curves[curves["mean"].notna()])]),
        columns=columns_for(len(pairs)),
    )
    for place, (ax, pair) in enumerate(zip(axes, pairs, strict=True)):
        part = curves[curves["pair"] == pair]
        for look in SIDES:
            curve = part[part["side"] == look.label].sort_values("layer")
            line(ax, curve, look)
            _mean(ax, curve, OKABE_ITO[str(look.colour)])
        ax.set_ylim(min(0.0, float(curves["mean"].min())), 1.08 * high)
        ax.set_title(letter(place, len(pairs)) + pair)
        ax.set_ylabel("value similarity")
        layer_axis(ax, part)
    handles = lines_drawn(axes[:1])
    legend_below(figure, list(handles.values()), list(handles))
    return figure


def _mean(ax: Axes, curve: pd.DataFrame, colour: str) -> None:
    """The mean over layers, in small print at the end of its line."""
    if not curve.empty:
        mean = float(curve["mean"].mean())
        ax.axhline(mean, color=colour, linewidth=0.7, linestyle=":", gid="mean")
        ax.annotate(
            fixed(mean),
            (1.0, mean),
            xycoords=("axes fraction", "data"),
            xytext=(2, 0),
            textcoords="offset points",
            fontsize=6,
            va="center",
            color=colour,
        )
