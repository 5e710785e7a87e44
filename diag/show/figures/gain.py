"""What a variant gains over the baseline: at each patch size, and against what the baseline measures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diag.errors import UserError
from diag.metrics.catalogue import CATALOGUE, DrawnAs
from diag.results.decimals import fixed
from diag.show.figures.lines import handle, rule
from diag.show.figures.page import legend_below, letter, page
from diag.show.figures.style import OKABE_ITO, Colour, ordered_colours, style
from diag.show.figures.tables import span
from diag.show.figures.variants import (
    BASELINE,
    UNITS,
    at_patch,
    handles_of,
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

PREDICTORS = {
    name: CATALOGUE[name].symbol or CATALOGUE[name].label
    for name in ("value_similarity", "excess", "cos_y_vself")
}
MARKERS = "osD^vP"
SHOWN = 2
"""Predictors that fit side by side, each with its numbers."""


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
                    ".",
                    markersize=4,
                    markeredgewidth=0,
                    color=look.colour,
                    alpha=0.5,
                    gid="seed",
                )
                at = np.full(len(mean), place + off + aside / 2)
                ax.vlines(at, mean["ci_low"], mean["ci_high"], color=look.colour, linewidth=1.2)
                ax.plot(at, mean["mean"], look.marker, markersize=5, color=look.colour, gid="mean")
        ax.set_title(f"{letter(panel, len(outcomes))}{outcome}, {BETTER[outcome]}")
        ax.set_ylabel(f"variant − {BASELINE}: {UNITS[outcome]}")
        ax.set_xticks(range(len(patches)), [patch_word(patch, task) for patch in patches])
        ax.set_xlim(-0.5, len(patches) - 0.5)
        ax.grid(False, axis="x")
    legend_below(figure, handles_of(shown, lines=False))
    return figure


@style()
def gain_against_baseline(points: pd.DataFrame, relations: pd.DataFrame, *, outcome: str) -> Figure:
    """A row of panels per variant, a column per predictor; each point a pair of cells of one seed.

    points: columns task, patch_size, variant, outcome, seed, gain, predictor, value. relations: columns
    variant, outcome, predictor, cells, correlation, value, ci_low, ci_high, p. Pearson's r with its interval
    stands above each panel, over all cells and within patch sizes.
    Raises UserError if there is no point.
    """
    rows = points[points["outcome"] == outcome]
    predictors = [name for name in PREDICTORS if (rows["predictor"] == name).any()][:SHOWN]
    if not predictors:
        raise UserError("there is no pair of cells to draw", "probe the baseline's cells")
    variants, patches = list(dict.fromkeys(rows["variant"])), patches_of(rows)
    task, several = str(rows["task"].iloc[0]), len(patches) > 1
    colours: Sequence[Colour] = ordered_colours(len(patches)) if several else [OKABE_ITO["blue"]]
    looks = [
        DrawnAs(patch_word(patch, task), colour, "", MARKERS[number % len(MARKERS)])
        for number, (patch, colour) in enumerate(zip(patches, colours, strict=True))
    ]
    one = rows[rows["predictor"] == predictors[0]]
    cells = one.groupby("variant", sort=False).size()
    sizes = f", {len(patches)} patch sizes" if several else ""
    warned = "\npatch size moves both sides; r within patch sizes is free of that" if several else ""
    figure, axes = page(
        len(variants) * len(predictors),
        row_height=2.3,
        title="Does what the baseline measures predict the gain?",
        caption=f"{task} · {span(cells)} pairs of cells, {one['seed'].nunique()} seeds{sizes} · "
        "baseline: mean over layers · r: Pearson, 95 % interval over seeds" + warned,
        columns=len(predictors),
    )
    pearson = relations.query("outcome == @outcome and correlation == 'pearson'")
    places = itertools.product(variants, predictors)
    for place, ((variant, predictor), ax) in enumerate(zip(places, axes, strict=True)):
        ours = rows[(rows["variant"] == variant) & (rows["predictor"] == predictor)]
        rule(ax)
        for patch, look in zip(patches, looks, strict=True):
            part = at_patch(ours, patch)
            ax.plot(part["value"], part["gain"], look.marker, markersize=4, color=look.colour)
        found = pearson.query("variant == @variant and predictor == @predictor").set_index("cells")
        ax.set_title(f"{letter(place)}{variant}\n{_said(found, within=several)}", fontsize=7)
        ax.set_xlabel(f"baseline: {PREDICTORS[predictor]}")
        ax.set_ylabel(f"{variant} − {BASELINE}\n{UNITS[outcome]}")
        ax.margins(0.08)
    legend_below(figure, [handle(look) for look in looks])
    return figure


def _said(found: pd.DataFrame, *, within: bool) -> str:
    """`all: r = 0.70 [0.10, 0.94]`, and a line for within patch sizes, with what chance gives."""
    lines = []
    for cells, word in (("all", "all"), ("within patch sizes", "within sizes"))[: 2 if within else 1]:
        rows = found[(found.index == cells) & found["value"].notna()]
        if rows.empty:
            lines.append(f"{word}: too few cells for an r")
            continue
        row = rows.iloc[0]
        said = f"{word}: r = {fixed(row['value'], 2)}"
        if pd.notna(row["ci_low"]):
            said += f" [{fixed(row['ci_low'], 2)}, {fixed(row['ci_high'], 2)}]"
        if pd.notna(row["p"]):
            said += f", p = {row['p']:.2g}"
        lines.append(said)
    return "\n".join(lines).replace("-", "\N{MINUS SIGN}")
