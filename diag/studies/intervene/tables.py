"""What a sweep says: the cost of changing each layer, and whether the bias predicts it. No torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from diag.inputs.tables import COUNT, NAME, OPEN, PLACE, TEXT, Layout
from diag.results.bootstrap import summary
from diag.results.caveats import COLUMNS
from diag.studies.intervene.relation import spearman

PREDICTORS = ("cos_y_vself", "excess", "cos_y_vuniform", "self_part", "value_similarity", "self_weight")
"""Metrics of the untouched model that may predict the effect of a change."""

_OF_MODEL = dict.fromkeys(("model", "tower", *COLUMNS), TEXT)

LAYOUTS = {
    "sensitivity.csv": Layout(
        {"intervention": NAME, "strength": OPEN, "scope": NAME, "layer": PLACE, "head": PLACE, "effect": NAME}
        | {"mean": OPEN, "std": OPEN, "ci_low": OPEN, "ci_high": OPEN, "n": COUNT},
        _OF_MODEL,
        rows=True,
    ),
    "relations.csv": Layout(
        {"intervention": NAME, "strength": OPEN, "effect": NAME, "predictor": NAME, "level": NAME}
        | {"rho": OPEN, "ci_low": OPEN, "ci_high": OPEN, "p": OPEN, "places": COUNT, "n": COUNT},
        _OF_MODEL,
    ),
}
"""What the tables of a sweep hold, by file; an effect may be infinite."""

CASE = ["intervention", "strength", "scope", "layer", "head", "effect"]


def sensitivity(samples: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Per case and effect: mean, std, 95 % bootstrap interval over inputs, n; from `sweep`'s rows."""
    grouped = samples.groupby(CASE, sort=False, dropna=False)
    cell = grouped.ngroup().to_numpy()
    order, row = np.unique(samples["input_index"].to_numpy(), return_inverse=True)
    matrix = np.full((len(order), cell.max() + 1), np.nan)
    matrix[row, cell] = samples["value"].to_numpy(float)
    keys = grouped.size().reset_index()[CASE]
    return pd.concat([keys, summary(matrix, seed=seed)], axis=1)


def relations(samples: pd.DataFrame, probed: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Does a metric of the untouched model predict, place by place, the effect of changing that place?

    samples: `sweep`'s rows, of whole layers or of heads alone. probed: the untouched model's samples, a value
    for each input and layer (head).
    One row per intervention, effect and predictor with the level ("layer" or "head"), Spearman's ρ, its
    interval over inputs, p, places and n.
    """
    level, places = ("head", ["layer", "head"]) if (samples["head"] >= 0).any() else ("layer", ["layer"])
    shape: Any = {"index": "input", "columns": places, "values": "value", "dropna": False}
    given = {name: probed[probed["metric"] == name] for name in PREDICTORS}
    given = {name: part.pivot_table(**shape) for name, part in given.items() if not part.empty}
    rows = []
    keys = ["intervention", "strength", "effect"]
    for case, part in samples[samples["scope"] == "one"].groupby(keys, sort=False, dropna=False):
        found = part.pivot_table(**shape)
        for predictor, metric in given.items():
            at = found.columns.intersection(metric.columns)
            inputs = found.index.intersection(metric.index)
            if len(at) and len(inputs):
                pair = (table.loc[inputs, at].to_numpy(float) for table in (metric, found))
                said = {**dict(zip(keys, case, strict=True)), "predictor": predictor, "level": level}
                rows.append(said | asdict(spearman(*pair, seed=seed)))
    return pd.DataFrame(rows)
