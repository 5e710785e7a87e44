"""Entropy of attention against the complexity of images: points of one layer, correlation over depth."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from diag.inputs.complexity import COLOUR_ENTROPY, EDGE_DENSITY, MEASURES
from diag.metrics.catalogue import DrawnAs
from diag.results.decimals import fixed
from diag.show.figures.lines import layer_axis, line, rule
from diag.show.figures.page import legend_below, letter, page
from diag.show.figures.style import OKABE_ITO, style

LOOKS = {
    EDGE_DENSITY: DrawnAs("edge density", "blue", "-", "o"),
    COLOUR_ENTROPY: DrawnAs("colour entropy", "orange", "--", "s"),
}


@style()
def complexity_figure(
    points: pd.DataFrame, correlations: pd.DataFrame, *, layer: int | None = None, metric: str = "entropy"
) -> Figure:
    """One line's images as points in one layer, beside ρ over depth with its interval.

    points, correlations: as `diag.studies.attend.complexity.Complexity`, of one model, tower and token set.
    layer: the model's own number; the one with the largest |ρ| if None.
    """
    if layer is None:
        layer = int(correlations["layer"].iloc[correlations["rho"].abs().fillna(0.0).to_numpy().argmax()])
    first, n = correlations.iloc[0], int(correlations["n"].max())
    figure, axes = page(
        3,
        row_height=2.4,
        title=f"{metric.capitalize().replace('_', ' ')} of attention and what there is to see",
        caption=f"{first['model']}, {first['tower']} tower, {first['tokens']} tokens · n = {n} images · "
        "Spearman's ρ, bands and brackets: 95 % bootstrap over images",
        columns=3,
    )
    here = points[points["layer"] == layer]
    for place, (ax, (measure, axis)) in enumerate(zip(axes, MEASURES.items(), strict=False)):
        colour = OKABE_ITO[str(LOOKS[measure].colour)]
        ax.plot(here[measure], here["value"], "o", color=colour, markersize=3, alpha=0.7, gid="images")
        found = correlations[(correlations["layer"] == layer) & (correlations["measure"] == measure)].iloc[0]
        said = "ρ {} [{}, {}]".format(*(fixed(found[name], 2) for name in ("rho", "ci_low", "ci_high")))
        ax.set_title(f"{letter(place)}layer {layer}: {said}", fontsize=7)
        ax.set_xlabel(axis)
        ax.set_ylabel(metric.replace("_", " ") + (" in nats" if metric == "entropy" else ""))
    for measure, look in LOOKS.items():
        curve = correlations[correlations["measure"] == measure].sort_values("layer")
        line(axes[2], curve.rename(columns={"rho": "mean"}), look)
    rule(axes[2])
    axes[2].set_ylim(-1.05, 1.05)
    axes[2].set_ylabel("ρ over images")
    axes[2].set_title(letter(2) + "every layer")
    layer_axis(axes[2], correlations)
    legend_below(figure, *axes[2].get_legend_handles_labels())
    return figure
