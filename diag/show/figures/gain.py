"""What a variant gains over the baseline at each patch size: a dot per seed, the mean and its interval."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diag.errors import UserError
from diag.show.figures.lines import rule
from diag.show.figures.page import letter, page
from diag.show.figures.style import style
from diag.show.figures.variants import (
    BASELINE,
    UNITS,
    at_patch,
    legend_below,
    legend_height,
    patch_word,
    patches_of,
    seeds_word,
    styles_of,
)

SIDE_BY_SIDE = 24
"""Means in a panel from which it takes the width of the page."""
WIDTH = 0.7
"""Of the place of one patch size that its variants fill."""
BETTER = {"accuracy": "above 0: better", "loss": "below 0: better"}


@style()
def gain_by_patch(gains: pd.DataFrame, by_seed: pd.DataFrame) -> Figure:
    """A panel for each outcome of one task, patch sizes from coarse to fine, the variants side by side.

    gains: columns task, patch_size, variant, against, outcome, mean, ci_low, ci_high, n. by_seed: the same
    keys, seed and difference. Only differences from the baseline are drawn, the control among them.
    Raises UserError if there are none.
    """
    rows, dots = (table[table["against"] == BASELINE] for table in (gains, by_seed))
    if rows.empty:
        raise UserError("there is no gain to draw", f"train '{BASELINE}' and another variant with one seed")
    task, patches = str(rows["task"].iloc[0]), patches_of(rows)
    shown = styles_of(list(rows["variant"]))
    outcomes = [name for name in UNITS if (rows["outcome"] == name).any()]
    step = WIDTH / len(shown)
    aside, apart = min(0.2 * step, 0.03 * len(patches)), min(0.1 * step, 0.012 * len(patches))
    figure, axes = page(
        len(outcomes),
        row_height=2.5,
        title="What a variant changes against the baseline of the same seed",
        caption=f"{task} · {seeds_word(rows['n'])} · small: one seed; "
        "large: mean and 95 % t interval over seeds",
        extra=legend_height(shown),
        columns=1 if len(shown) * len(patches) > SIDE_BY_SIDE else 2,
    )
    for panel, (outcome, ax) in enumerate(zip(outcomes, axes, strict=True)):
        rule(ax)
        for number, (name, look) in enumerate(shown.items()):
            off = (number - (len(shown) - 1) / 2) * step
            for place, patch in enumerate(patches):
                ours = [t[(t["variant"] == name) & (t["outcome"] == outcome)] for t in (rows, dots)]
                mean, single = (at_patch(table, patch) for table in ours)
                spread = (np.arange(len(single)) - (len(single) - 1) / 2) * apart
                ax.plot(
                    place + off - aside + spread,
                    single["difference"],
                    linestyle="",
                    marker=".",
                    markersize=4,
                    markeredgewidth=0,
                    color=look.colour,
                    alpha=0.5,
                    gid="seed",
                )
                at = np.full(len(mean), place + off + aside / 2)
                ax.vlines(at, mean["ci_low"], mean["ci_high"], color=look.colour, linewidth=1.2)
                ax.plot(
                    at,
                    mean["mean"],
                    linestyle="",
                    marker=look.marker,
                    markersize=5,
                    color=look.colour,
                    gid="mean",
                )
        ax.set_title(f"{letter(panel, len(outcomes))}{outcome}, {BETTER[outcome]}")
        ax.set_ylabel(f"variant − {BASELINE}: {UNITS[outcome]}")
        ax.set_xticks(range(len(patches)), [patch_word(patch, task) for patch in patches])
        ax.set_xlim(-0.5, len(patches) - 0.5)
        ax.grid(False, axis="x")
    legend_below(figure, shown, lines=False)
    return figure
