"""Every figure of a grid of trained cells, from its tables. Knows no model, and never loads torch."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from diag.results.writing import file_stem
from diag.show.figures.gain import gain_against_baseline, gain_by_patch
from diag.show.figures.heatmaps import alpha_maps
from diag.show.figures.training_curves import METRICS, compensation_over_layers, curves_over_steps
from diag.show.figures.variants import BASELINE, at_patch, patches_of

INSIDE = ("value_similarity", "cos_y_vself", "excess")
"""Metrics whose change by training is drawn."""


def outcome_figures(tables: Mapping[str, pd.DataFrame]) -> dict[str, tuple[Figure, pd.DataFrame]]:
    """Every figure that the tables allow, with the rows behind it, by file stem, such as `gain-crops`.

    tables: of `diag.studies.train.outcomes`. Figures without rows are left out, so the answer may be empty:
    an unfinished grid has fewer.
    """
    drawn: dict[str, tuple[Figure, pd.DataFrame]] = {}
    for task in dict.fromkeys(tables["outcomes"]["task"]):
        of = {name: table[table["task"] == task] for name, table in tables.items()}
        gains, by_seed = of["gains"], of["gains-by-seed"]
        if (gains["against"] == BASELINE).any():
            keys = [name for name in by_seed if name not in ("seed", "difference")]
            rows = by_seed.merge(gains, on=keys)
            drawn[file_stem("gain", task)] = gain_by_patch(gains, by_seed), rows[rows["against"] == BASELINE]
        points = of["relation-points"]
        for outcome in ("accuracy", "loss"):
            rows = points[points["outcome"] == outcome]
            if len(rows):
                figure = gain_against_baseline(points, of["relations"], outcome=outcome)
                drawn[file_stem("gain-against-baseline", task, outcome)] = figure, rows
        for metric in INSIDE:
            rows = of["compensation"][of["compensation"]["metric"] == metric]
            if len(rows):
                figure = compensation_over_layers(rows, metric=metric)
                drawn[file_stem("compensation", task, metric)] = figure, rows
        if len(of["alpha"]):
            drawn[file_stem("alpha", task)] = alpha_maps(of["alpha"]), of["alpha"]
        curves = of["curves"][of["curves"]["metric"].isin(list(METRICS))]
        for patch in patches_of(curves) if len(curves) else ():
            rows = at_patch(curves, patch)
            size = () if patch != patch else (f"p{patch:g}",)
            drawn[file_stem("steps", task, *size)] = curves_over_steps(rows), rows
    return drawn
