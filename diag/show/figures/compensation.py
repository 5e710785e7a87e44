"""What training with a variant changes inside: a metric of the baseline and of the variants over layers."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
from matplotlib.figure import Figure

from diag.errors import UserError
from diag.metrics.catalogue import capitalised, entry_of
from diag.show.figures.lines import finite_range, layer_axis, line
from diag.show.figures.page import columns_for, letter, page
from diag.show.figures.style import style
from diag.show.figures.variants import (
    BASELINE,
    at_patch,
    legend_below,
    legend_height,
    patch_word,
    patches_of,
    seeds_word,
    styles_of,
)


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
        extra=legend_height(shown),
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
                    linestyle="",
                    marker=look.marker,
                    markersize=3.5,
                    markeredgecolor=look.colour,
                    markeredgewidth=0.8,
                    markerfacecolor=inside,
                )
        ax.set_ylim(low - margin, high + margin)
        ax.set_title(letter(place) + patch_word(patch, task) if len(patches) > 1 else task)
        ax.set_ylabel(name)
        layer_axis(ax, part["layer"].astype(float))
    legend_below(figure, shown)
    return figure
