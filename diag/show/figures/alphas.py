"""The learned α of gated XSA: layer x head maps, one per patch size; how much of V_self each head removes."""

from __future__ import annotations

import string

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diag.errors import UserError
from diag.show.figures.heatmaps import COLOURS, colour_range, field_of
from diag.show.figures.lines import columns_for
from diag.show.figures.page import page
from diag.show.figures.style import style
from diag.show.figures.tables import shorten
from diag.show.figures.variants import at_patch, patch_word, patches_of, seeds_word


def alpha_maps(table: pd.DataFrame) -> Figure:
    """Means over seeds of one task's α, a panel per patch size and variant, all with one range around 0.

    table: columns task, patch_size, variant, layer, head, mean, n. 1 removes the part along the token's own
    value, below 0 adds to it. Layers without an α are blank and hatched.
    Raises UserError if it is empty.
    """
    if table.empty:
        raise UserError("there is no learned α to draw", "train a variant with one: gated_xsa")
    task, variants = str(table["task"].iloc[0]), list(dict.fromkeys(table["variant"]))
    places = [(patch, variant) for variant in variants for patch in patches_of(table)]
    parts = [at_patch(table[table["variant"] == variant], patch) for patch, variant in places]
    drawn = [(place, part) for place, part in zip(places, parts, strict=True) if len(part)]
    first = int(table["layer"].min())
    shape = (int(table["layer"].max()) - first + 1, int(table["head"].max()) + 1)
    fields = [field_of(part.assign(metric="alpha"), "alpha", first, shape) for _, part in drawn]
    low, high = colour_range("signed", fields)
    with style():
        figure, axes = page(
            len(drawn),
            row_height=1.1 + 0.15 * (len(variants) > 1) + float(np.clip(0.085 * shape[0], 0.6, 3.0)),
            title="Learned α: the share of the part along V_self that a head removes",
            caption=f"{task} · means, {seeds_word(table['n'])} · below 0, a head adds to that part",
            columns=columns_for(len(drawn)),
        )
        for place, (((patch, variant), _), field, ax) in enumerate(zip(drawn, fields, axes, strict=True)):
            ax.imshow(
                field,
                cmap=COLOURS["signed"],
                vmin=low,
                vmax=high,
                aspect="auto",
                interpolation="none",
                extent=(-0.5, shape[1] - 0.5, first + shape[0] - 0.5, first - 0.5),
            )
            ax.grid(False)
            ax.patch.set(facecolor="white", edgecolor="0.8", hatch="////")
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
            ax.set_xlabel("head")
            ax.set_ylabel("layer")
            letter = f"({string.ascii_lowercase[place % 26]}) " if len(drawn) > 1 else ""
            of = patch_word(patch, task) + (f"\n{shorten(variant, 28)}" if len(variants) > 1 else "")
            ax.set_title(letter + of)
        bar = axes[0].figure.colorbar(axes[0].images[0], ax=axes, pad=0.02, aspect=25, label="α")
        bar.outline.set_linewidth(0.4)
    return figure
