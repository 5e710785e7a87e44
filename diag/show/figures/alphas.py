"""The learned α of gated XSA: layer x head maps, one per patch size; how much of V_self each head removes."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diag.errors import UserError
from diag.show.figures.heatmaps import colour_range, draw_field, extent_of, field_of
from diag.show.figures.page import columns_for, letter, page
from diag.show.figures.style import style
from diag.show.figures.tables import shorten
from diag.show.figures.variants import at_patch, patch_word, patches_of, seeds_word


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
    places = [(patch, variant) for variant in variants for patch in patches_of(table)]
    parts = [at_patch(table[table["variant"] == variant], patch) for patch, variant in places]
    drawn = [(place, part) for place, part in zip(places, parts, strict=True) if len(part)]
    first, shape = extent_of(table)
    fields = [field_of(part.assign(metric="alpha"), "alpha", first, shape) for _, part in drawn]
    limits = colour_range("signed", fields)
    figure, axes = page(
        len(drawn),
        row_height=1.1 + 0.15 * (len(variants) > 1) + float(np.clip(0.085 * shape[0], 0.6, 3.0)),
        title="Learned α: the share of the part along V_self that a head removes",
        caption=f"{task} · means, {seeds_word(table['n'])} · below 0, a head adds to that part",
        columns=columns_for(len(drawn)),
    )
    for place, (((patch, variant), _), field, ax) in enumerate(zip(drawn, fields, axes, strict=True)):
        draw_field(ax, field, "signed", limits, first)
        of = patch_word(patch, task) + (f"\n{shorten(variant, 28)}" if len(variants) > 1 else "")
        ax.set_title(letter(place, len(drawn)) + of)
    bar = axes[0].figure.colorbar(axes[0].images[0], ax=axes, pad=0.02, aspect=25, label="α")
    bar.outline.set_linewidth(0.4)
    return figure
