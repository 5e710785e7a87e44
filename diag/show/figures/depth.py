"""Depth profiles: three curves over layers, the minimum of the first marked; published values as points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from diag.metrics.catalogue import CATALOGUE, DrawnAs, entry_of
from diag.results.decimals import fixed
from diag.show.figures.lines import (
    BANDS,
    depth_curve,
    finite_range,
    headings,
    layer_axis,
    line,
    lines_drawn,
    lines_of,
    published_handle,
    published_points,
    rule,
)
from diag.show.figures.page import columns_for, legend_below, page
from diag.show.figures.panels import CURVES, PROFILE_METRICS
from diag.show.figures.style import OKABE_ITO, RULE, style
from diag.show.figures.tables import caption, check_columns, drawable, rows_of

LABELS = {name: CATALOGUE[name].labelled for name in PROFILE_METRICS} | {
    "value_similarity": "value similarity cos(vᵢ, vⱼ)"
}
COLOURS = tuple(CATALOGUE[name].line.colour for name in PROFILE_METRICS)
MARKERS = "oDs^vP"


@style()
def depth_profiles(
    layers: pd.DataFrame, published: pd.DataFrame | None = None, *, metrics: Sequence[str] = PROFILE_METRICS
) -> Figure:
    """A panel per line with its curves over layers; all panels share their limits.

    layers: per-layer table; a column `label` tells lines apart.
    published: columns label, metric, layer, value, uncertainty, source; drawn as open points in the panel
        of the same label, and marked as published.
    The minimum of the first metric is ringed, with its value and layer.

    Raises UserError if the table holds none of the metrics, or several values for one layer of a line.
    """
    rows = drawable(check_columns(layers), list(metrics), "depth profiles")
    known = _of_lines(published, rows, metrics)
    parts = lines_of(rows)
    titles, room = headings(parts)
    shown = [metric for metric in metrics if not rows_of(rows, [metric]).empty]
    looks = {metric: _look(metric, number) for number, metric in enumerate(shown)}
    low, high = _limits(rows, known)
    said = caption(rows, bands=BANDS)
    if len(known):
        # values, not a second measurement: what they are comes with the figure
        said += f"\nopen points: published values, {', '.join(dict.fromkeys(known['source']))}"
    figure, axes = page(
        len(parts),
        row_height=2.15 + room,
        title="Profiles over depth",
        caption=said,
        columns=columns_for(len(parts)),
    )
    for ax, title, (label, part) in zip(axes, titles, parts.items(), strict=True):
        for metric, look in looks.items():
            theirs = known[(known["label"] == label) & (known["metric"] == metric)]
            # under open points, a line's own markers would look like some of them filled
            line(ax, depth_curve(part, metric), replace(look, marker="") if len(theirs) else look)
            published_points(ax, theirs, colour=look.colour, marker=look.marker)
        ax.set_ylim(low, high)
        _mark_minimum(ax, depth_curve(part, shown[0]))
        ax.set_title(title)
        ax.set_ylabel("cosine, weight")
        # a model with more published than measured layers shows all of them
        layer_axis(ax, part, known.loc[known["label"] == label, "layer"])
        if low < 0:
            rule(ax)
    handles = lines_drawn(axes)
    ring = Line2D([], [], marker="o", markersize=7, markerfacecolor="none", color="black", linestyle="")
    named = {look.label: handles[look.label] for look in looks.values()}
    named[f"minimum of {'the bias' if shown[0] == 'cos_y_vself' else looks[shown[0]].label}"] = ring
    if len(known):
        named["published"] = published_handle("published")
    legend_below(figure, list(named.values()), list(named))
    return figure


def _of_lines(published: pd.DataFrame | None, rows: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    if published is None or published.empty:
        return pd.DataFrame(columns=["label", "metric", "layer", "value", "uncertainty", "source"])
    return published[published["label"].isin(lines_of(rows)) & published["metric"].isin(list(metrics))]


def _limits(rows: pd.DataFrame, known: pd.DataFrame) -> tuple[float, float]:
    low, high = finite_range(rows[["mean", "ci_low", "ci_high"]])
    if len(known):
        low, high = min(low, float(known["value"].min())), max(high, float(known["value"].max()))
    low = min(low, 0.0)
    margin = 0.05 * max(high - low, 0.05)
    # above the curves is room for the words of the minimum
    return (low - margin, high + 3.5 * margin)


def _look(metric: str, number: int) -> DrawnAs:
    names = {name: look.label for panel in CURVES for name, look in panel.lines.items()}
    label = LABELS.get(metric) or names.get(metric) or entry_of(metric).heading
    spare = [name for name in OKABE_ITO if name not in (*COLOURS, "yellow")]
    colour = CATALOGUE[metric].line.colour if metric in PROFILE_METRICS else spare[number % len(spare)]
    return DrawnAs(label, OKABE_ITO[str(colour)], "-", MARKERS[number % len(MARKERS)])


def _mark_minimum(ax: Axes, curve: pd.DataFrame) -> None:
    """A ring around the smallest value; its number and layer above the curves, where they cover none."""
    if len(curve) < 2:
        return
    least = curve.iloc[int(curve["mean"].to_numpy().argmin())]
    low, high = ax.get_ylim()
    top = high - 0.11 * (high - low)
    ax.vlines(least["layer"], least["mean"], top, color=RULE, linewidth=0.6, linestyle=":", zorder=1)
    ax.plot(
        least["layer"],
        least["mean"],
        "o",
        markersize=8,
        markerfacecolor="none",
        markeredgecolor="black",
        markeredgewidth=0.9,
        clip_on=False,
        gid="minimum",
        zorder=4,
    )
    share = (least["layer"] - curve["layer"].min()) / (curve["layer"].max() - curve["layer"].min())
    side = "left" if share < 0.25 else "right" if share > 0.75 else "center"
    said = f"min {fixed(least['mean'])}, layer {least['layer']:.0f}".replace("-", "\N{MINUS SIGN}")
    ax.annotate(said, (least["layer"], top), fontsize=6.5, ha=side, va="bottom", gid="minimum")
