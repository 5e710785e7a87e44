"""What the baseline measures against what a variant gains: every pair of cells, a colour per patch size."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from diag.errors import UserError
from diag.metrics.catalogue import CATALOGUE, DrawnAs
from diag.show.figures.lines import handle, rule
from diag.show.figures.page import letter, page
from diag.show.figures.style import OKABE_ITO, Colour, ordered_colours, style
from diag.show.figures.tables import span
from diag.show.figures.variants import BASELINE, UNITS, at_patch, patch_word, patches_of

PREDICTORS = {
    name: CATALOGUE[name].symbol or CATALOGUE[name].label
    for name in ("value_similarity", "excess", "cos_y_vself")
}
MARKERS = "osD^vP"
SHOWN = 2
"""Predictors that fit side by side, each with its numbers."""


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
        extra=0.35,
        columns=len(predictors),
    )
    places = [(variant, predictor) for variant in variants for predictor in predictors]
    for place, ((variant, predictor), ax) in enumerate(zip(places, axes, strict=True)):
        ours = rows[(rows["variant"] == variant) & (rows["predictor"] == predictor)]
        rule(ax)
        for patch, look in zip(patches, looks, strict=True):
            part = at_patch(ours, patch)
            ax.plot(
                part["value"], part["gain"], linestyle="", marker=look.marker, markersize=4, color=look.colour
            )
        found = relations[
            (relations["variant"] == variant)
            & (relations["outcome"] == outcome)
            & (relations["predictor"] == predictor)
            & (relations["correlation"] == "pearson")
        ].set_index("cells")
        said = _said(found, within=several)
        ax.set_title(f"{letter(place)}{variant}\n{said}", fontsize=7)
        ax.set_xlabel(f"baseline: {PREDICTORS[predictor]}")
        ax.set_ylabel(f"{variant} − {BASELINE}\n{UNITS[outcome]}")
        ax.margins(0.08)
    figure.legend(
        handles=[handle(look) for look in looks], loc="outside lower center", ncols=min(len(looks), 6)
    )
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
        said = f"{word}: r = {row['value']:.2f}"
        if pd.notna(row["ci_low"]):
            said += f" [{row['ci_low']:.2f}, {row['ci_high']:.2f}]"
        if pd.notna(row["p"]):
            said += f", p = {row['p']:.2g}"
        lines.append(said)
    return "\n".join(lines).replace("-", "\N{MINUS SIGN}")
