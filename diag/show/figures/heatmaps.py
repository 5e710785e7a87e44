"""Layer x head maps: which heads carry the bias or attend to themselves, and the learned α of gated XSA."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diag.errors import UserError
from diag.metrics.catalogue import CATALOGUE, MetricEntry, capitalised
from diag.show.figures.page import columns_for, letter, page
from diag.show.figures.panels import HEAD_METRICS
from diag.show.figures.style import COLOUR_MAPS, style
from diag.show.figures.tables import caption, check_columns, drawable, label_of, one_selection, shorten
from diag.show.figures.variants import at_patch, patch_word, patches_of, seeds_word


@style()
def head_heatmaps(heads: pd.DataFrame) -> Figure:
    """Maps of the metrics over layers (downwards) and heads (to the right), of one (model, tower, tokens).

    Cosines share one colour range, the excess is centred on zero, weights begin at zero. A place without
    a head, a layer that was not measured and a value that is NaN are left blank, and hatched so that they
    do not pass for a colour.

    Raises UserError if the table holds several selections or none of the metrics.
    """
    rows = drawable(check_columns(heads, ["head"]), HEAD_METRICS, "head heatmaps")
    one_selection(rows, "head heatmaps", index=("layer", "head"))
    first, maps = head_fields(rows)
    blank = any(np.isnan(field).any() for _, field, _ in maps)
    said = caption(rows.assign(ci_low=math.nan), bands="")
    figure, axes = page(
        len(maps),
        row_height=1.0 + float(np.clip(0.085 * len(maps[0][1]), 0.6, 3.0)),
        title=label_of(rows),
        caption=f"{said}\nhatched: no such head, or not measured" if blank else said,
    )
    for place, ((entry, field, limits), ax) in enumerate(zip(maps, axes, strict=True)):
        draw_field(ax, field, entry.scale, limits, first)
        _colour_bar([ax])
        ax.set_title(letter(place) + capitalised(entry.labelled))
    return figure


@style()
def alpha_maps(table: pd.DataFrame) -> Figure:
    """Means over seeds of one task's α, a panel per patch size and variant, all with one range around 0.

    table: columns task, patch_size, variant, layer, head, mean, n. 1 removes the part along the token's own
    value, below 0 adds to it. Layers without an α are blank and hatched.
    Raises UserError if it is empty.
    """
    if table.empty:
        raise UserError("there is no learned α to draw", "train a variant with one: gated_xsa")
    task, variants = str(table["task"].iloc[0]), list(dict.fromkeys(table["variant"]))
    drawn = [
        (patch, variant, part.assign(metric="alpha"))
        for variant in variants
        for patch in patches_of(table)
        if len(part := at_patch(table[table["variant"] == variant], patch))
    ]
    first, shape = extent_of(table)
    fields = [field_of(part, "alpha", first, shape) for _, _, part in drawn]
    limits = colour_range("signed", fields)
    figure, axes = page(
        len(drawn),
        row_height=1.1 + 0.15 * (len(variants) > 1) + float(np.clip(0.085 * shape[0], 0.6, 3.0)),
        title="Learned α: the share of the part along V_self that a head removes",
        caption=f"{task} · means, {seeds_word(table['n'])} · below 0, a head adds to that part",
        columns=columns_for(len(drawn)),
    )
    for place, ((patch, variant, _), field, ax) in enumerate(zip(drawn, fields, axes, strict=True)):
        draw_field(ax, field, "signed", limits, first)
        of = patch_word(patch, task) + (f"\n{shorten(variant, 28)}" if len(variants) > 1 else "")
        ax.set_title(letter(place, len(drawn)) + of)
    _colour_bar(axes, "α")
    return figure


def head_fields(rows: pd.DataFrame) -> tuple[int, list[tuple[MetricEntry, np.ndarray, tuple[float, float]]]]:
    """The first layer, and of each metric that is there the entry, its `field_of` and its colour range.

    rows: without NaN. Metrics of one scale share their range.
    """
    first, shape = extent_of(rows)
    shown = [CATALOGUE[metric] for metric in HEAD_METRICS if (rows["metric"] == metric).any()]
    fields = {entry: field_of(rows, entry.name, first, shape) for entry in shown}
    ranges = {
        scale: colour_range(scale, [fields[entry] for entry in shown if entry.scale == scale])
        for scale in {entry.scale for entry in shown}
    }
    return first, [(entry, field, ranges[entry.scale]) for entry, field in fields.items()]


def extent_of(rows: pd.DataFrame) -> tuple[int, tuple[int, int]]:
    """The first layer, and the numbers of layers and of heads of the layer that has most."""
    first = int(rows["layer"].min())
    return first, (int(rows["layer"].max()) - first + 1, int(rows["head"].max()) + 1)


def field_of(
    rows: pd.DataFrame, metric: str, first: int, shape: tuple[int, int], column: str = "mean"
) -> np.ndarray:
    """The means of a metric as [layer, head], NaN where there is none; row 0 is layer `first`."""
    part = rows[rows["metric"] == metric]
    field = np.full(shape, np.nan)
    field[part["layer"].to_numpy(int) - first, part["head"].to_numpy(int)] = part[column].to_numpy(float)
    return field


def colour_range(scale: str, fields: Sequence[np.ndarray]) -> tuple[float, float]:
    """The colour range of the maps of one scale; never empty, also where every value is zero."""
    low = min(float(np.nanmin(field)) for field in fields)
    high = max(float(np.nanmax(field)) for field in fields)
    if scale == "signed":
        reach = max(abs(low), abs(high), 1e-3)
        return -reach, reach
    low = min(low, 0.0)
    return low, max(high, low + 1e-3)


def draw_field(ax: Axes, field: np.ndarray, scale: str, limits: tuple[float, float], first: int) -> None:
    """A field of `field_of` as a map, hatched where it is NaN. scale: of `COLOUR_MAPS`."""
    layers, heads = field.shape
    ax.imshow(
        field,
        cmap=COLOUR_MAPS[scale],
        vmin=limits[0],
        vmax=limits[1],
        aspect="auto",
        interpolation="none",
        extent=(-0.5, heads - 0.5, first + layers - 0.5, first - 0.5),
    )
    ax.grid(False)
    ax.patch.set(facecolor="white", edgecolor="0.8", hatch="////")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    ax.set_xlabel("head")
    ax.set_ylabel("layer")


def _colour_bar(axes: Sequence[Axes], label: str = "") -> None:
    bar = axes[0].figure.colorbar(axes[0].images[0], ax=axes, pad=0.02, aspect=25, label=label)
    bar.outline.set_linewidth(0.4)
