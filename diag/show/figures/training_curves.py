"""Trained variants as lines: what was seen over steps, and what training changes inside over layers."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diag.errors import UserError
from diag.metrics.catalogue import CATALOGUE, capitalised, entry_of
from diag.show.figures.lines import finite_range, layer_axis, line
from diag.show.figures.page import columns_for, legend_below, letter, page
from diag.show.figures.style import style
from diag.show.figures.variants import (
    BASELINE,
    at_patch,
    handles_of,
    patch_word,
    patches_of,
    seeds_word,
    styles_of,
)

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
    legend_below(figure, handles_of(variants))
    return figure


@style()
def compensation_over_layers(table: pd.DataFrame, *, metric: str) -> Figure:
    """A panel per patch size, with the same limits: means over seeds of the baseline and of each variant.

    table: columns task, patch_size, variant, metric, layer, baseline, changed, ci_low, ci_high, n; the
    interval is that of the paired difference, and is drawn around the variant's line: where its band leaves
    out the baseline, they are told apart. Such layers have a filled marker.
    Raises UserError if the metric is not in the table.
    """
    rows = table[table["metric"] == metric]
    if rows.empty:
        raise UserError(f"no trained pair was probed for {metric}", "probe the cells of the grid")
    task, patches = str(rows["task"].iloc[0]), patches_of(rows)
    shown = styles_of([BASELINE, *rows["variant"]])
    rows = rows.assign(low=rows["baseline"] + rows["ci_low"], high=rows["baseline"] + rows["ci_high"])
    low, high = finite_range(rows[["baseline", "changed"]])
    room = max(high - low, 0.05)  # bands of two seeds reach far beyond, and would flatten the curves
    ends = rows[["low", "high"]].clip(low - room, high + room)
    low, high = finite_range(pd.concat([rows[["baseline", "changed"]], ends], axis=1))
    margin = 0.05 * max(high - low, 0.05)
    name = entry_of(metric).labelled
    figure, axes = page(
        len(patches),
        row_height=2.2,
        title=f"{capitalised(name)} of the baseline and of trained variants",
        caption=f"{task} · {seeds_word(rows['n'])} · bands: 95 % t interval over seeds of the "
        f"paired difference from {BASELINE}; filled: it leaves out 0",
        columns=columns_for(len(patches)),
    )
    for place, (patch, ax) in enumerate(zip(patches, axes, strict=True)):
        part = at_patch(rows, patch)
        own = part.groupby("layer")["baseline"].mean()
        ax.plot(own.index, own, color=shown[BASELINE].colour, marker="o", label=BASELINE, gid="model")
        for variant, look in shown.items():
            ours = part[part["variant"] == variant].sort_values("layer")
            if ours.empty:
                continue
            curve = ours.assign(mean=ours["changed"], ci_low=ours["low"], ci_high=ours["high"])
            line(ax, curve, replace(look, marker=""))
            apart = (ours["ci_low"] > 0) | (ours["ci_high"] < 0)
            for chosen, inside in ((ours[apart], look.colour), (ours[~apart], "white")):
                ax.plot(
                    chosen["layer"],
                    chosen["changed"],
                    look.marker,
                    markersize=3.5,
                    markeredgecolor=look.colour,
                    markeredgewidth=0.8,
                    markerfacecolor=inside,
                )
        ax.set_ylim(low - margin, high + margin)
        ax.set_title(letter(place) + patch_word(patch, task) if len(patches) > 1 else task)
        ax.set_ylabel(name)
        layer_axis(ax, part)
    legend_below(figure, handles_of(shown))
    return figure
