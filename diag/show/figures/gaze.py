"""Where a question makes a language model look in the image: maps of one layer, entropies over depth."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from diag.metrics.catalogue import DrawnAs
from diag.results.gaze import per_layer
from diag.show.figures.attend import Pictures
from diag.show.figures.lines import layer_axis, line
from diag.show.figures.page import letter
from diag.show.figures.style import OKABE_ITO, PAGE_WIDTH, style
from diag.show.figures.tables import label_of, shorten
from diag.show.figures.token_scales import parts_of

SHOWN = {
    "task": "weight aⱼ, asked",
    "contrast": "contrast aⱼ/(bⱼ + ε)",
    "gaze_shift": "gaze shift",
}
LINES = {
    "entropy": DrawnAs("asked", "blue", "-", "o"),
    "entropy_general": DrawnAs("in general", "orange", "--", "s"),
    "contrast_entropy": DrawnAs("of the contrast", "green", ":", "^"),
}
ROW = 2.15
"""Inches of a model's row."""


@style()
def gaze_maps(gaze: pd.DataFrame, pictures: Pictures, layers: Mapping[str, int]) -> Figure:
    """A row per model: the image, the three maps of the layer that is looked at, entropies over depth.

    gaze: as `diag.results.gaze.LOOKED`. layers: by model. Maps of image tokens whose places are not known are
    one column, in the order of the tokens.
    """
    parts = parts_of(gaze)
    heads = gaze["head"].iloc[0]
    figure = Figure(figsize=(PAGE_WIDTH, ROW * len(parts) + 0.75))
    figure.suptitle("Where the question makes the model look")
    rows = figure.subfigures(len(parts), 1, squeeze=False)
    for place, (row, (model, part)) in enumerate(zip(rows[:, 0], parts.items(), strict=True)):
        depths = per_layer(part)
        layer = layers[model]
        here = part[part["layer"] == layer]
        of = "mean over heads" if heads == "mean" else f"head {heads}"
        said = f"{letter(place, len(parts))}{shorten(label_of(part), 60)} · layer {layer} · {of}"
        row.suptitle(said, fontsize=8)
        axes = row.subplots(1, 5, width_ratios=(1, 1, 1, 1, 1.25))
        _bare(axes[0], "the image")
        axes[0].imshow(pictures[model])
        for ax, (name, title) in zip(axes[1:4], SHOWN.items(), strict=True):
            _map(row, ax, here, name, title)
        _depths(axes[4], depths, layer)
    figure.legend(
        *axes[4].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
    )
    return figure


def _map(row: object, ax: Axes, here: pd.DataFrame, name: str, title: str) -> None:
    values = here[name].to_numpy(float)
    if here["row"].notna().all():
        grid = int(here["row"].max()) + 1, int(here["col"].max()) + 1
    else:
        grid = len(values), 1
    norm = Normalize(0, float(values.max()) or 1.0)
    drawn = ax.imshow(
        values.reshape(grid),
        cmap="Blues",
        norm=norm,
        interpolation="none",
        aspect="auto" if grid[1] == 1 else "equal",
    )
    _bare(ax, title)
    bar = row.colorbar(drawn, ax=ax, orientation="horizontal", shrink=0.9, pad=0.03)  # type: ignore[attr-defined]
    bar.ax.tick_params(labelsize=5.5)
    bar.ax.locator_params(nbins=4)


def _depths(ax: Axes, depths: pd.DataFrame, layer: int) -> None:
    for name, look in LINES.items():
        curve = depths.assign(mean=depths[name], ci_low=np.nan, ci_high=np.nan).sort_values("layer")
        line(ax, curve, look)
    ax.axhline(float(depths["uniform"].iloc[0]), color="black", linestyle="--", linewidth=0.8, label="ln n")
    ax.axvline(layer, color=OKABE_ITO["vermillion"], linewidth=0.6, zorder=1)
    layer_axis(ax, depths)
    ax.set_title("entropy, nats", fontsize=7, fontweight="normal")


def _bare(ax: Axes, title: str) -> None:
    ax.set_title(title, fontsize=7, fontweight="normal")
    ax.grid(False)
    ax.set_xticks([])
    ax.set_yticks([])
