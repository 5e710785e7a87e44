"""What was seen while training: the loss and the monitor's metrics over steps, a line per variant."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diag.errors import UserError
from diag.metrics.catalogue import CATALOGUE
from diag.show.figures.lines import line
from diag.show.figures.page import columns_for, letter, page
from diag.show.figures.style import style
from diag.show.figures.variants import legend_below, legend_height, patch_word, seeds_word, styles_of

METRICS = {
    "loss": ("Training loss", "nats"),
    "cos_y_vself": CATALOGUE["cos_y_vself"].panel,
    "excess": ("Excess over the null", CATALOGUE["excess"].axis),
    "value_similarity": CATALOGUE["value_similarity"].panel,
    "entropy": ("Attention entropy", CATALOGUE["entropy"].unit),  # the loss is a cross entropy
    "self_weight": CATALOGUE["self_weight"].panel,
}
"""Metric -> (title, y label), in the order of the panels; others are left to the table."""


@style()
def curves_over_steps(curves: pd.DataFrame) -> Figure:
    """A panel per metric of one task and patch size; metrics are means over layers.

    curves: columns task, patch_size, variant, metric, step, window, mean, low, high (smallest and
    largest seed), n.
    Raises UserError if it holds none of the metrics.
    """
    shown = [name for name in METRICS if (curves["metric"] == name).any()]
    if not shown:
        raise UserError("there is no curve to draw", f"log or monitor {', '.join(METRICS)}")
    task, patch = str(curves["task"].iloc[0]), float(curves["patch_size"].iloc[0])
    variants = styles_of(list(curves["variant"]))
    window = int(curves.loc[curves["metric"] == "loss", "window"].max()) if "loss" in shown else 1
    smooth = f" · loss: means of {window} steps" if window > 1 else ""
    figure, axes = page(
        len(shown),
        row_height=1.9,
        title="While training" + ("" if math.isnan(patch) else f", {patch_word(patch, task)}"),
        caption=f"{task} · {seeds_word(curves['n'])} · means over layers · bands: smallest to largest "
        f"seed{smooth}",
        extra=legend_height(variants),
        columns=columns_for(len(shown)),
    )
    for place, (metric, ax) in enumerate(zip(shown, axes, strict=True)):
        part = curves[curves["metric"] == metric]
        for name, look in variants.items():
            ours = part[part["variant"] == name].sort_values("step")
            curve = ours.rename(columns={"low": "ci_low", "high": "ci_high"})
            # the loss has many points, and lines that lie close
            line(ax, curve, replace(look, marker="") if metric == "loss" else look, x="step")
        title, label = METRICS[metric]
        ax.set_title(letter(place) + title)
        ax.set_ylabel(label)
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    legend_below(figure, variants)
    return figure
