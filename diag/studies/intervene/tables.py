"""What a sweep says: the cost of changing each layer, and whether the bias predicts it. No torch."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pandas as pd

from diag.results.bootstrap import summary
from diag.studies.intervene.relation import spearman

PREDICTORS = ("cos_y_vself", "excess", "cos_y_vuniform", "self_part", "value_similarity", "self_weight")
"""Metrics of the untouched model that may predict the effect of a change."""

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
    """Does a metric of the untouched model predict, layer by layer, the effect of changing that layer?

    samples: `sweep`'s rows. probed: the untouched model's samples, a value for each input and layer (head).
    One row per intervention, effect, predictor and level ("layer" or "head") with Spearman's ρ, its interval
    over inputs, p, places and n.
    """
    rows = []
    alone = samples[samples["scope"] == "one"]
    for (name, strength, effect), part in alone.groupby(
        ["intervention", "strength", "effect"], sort=False, dropna=False
    ):
        for level, keys in (("layer", ["layer"]), ("head", ["layer", "head"])):
            chosen = part[part["head"] < 0] if level == "layer" else part[part["head"] >= 0]
            if chosen.empty:
                continue
            found = chosen.pivot_table(index="input", columns=keys, values="value", dropna=False)
            for predictor in PREDICTORS:
                metric = probed[probed["metric"] == predictor]
                if metric.empty:
                    continue
                given = metric.pivot_table(index="input", columns=keys, values="value", dropna=False)
                places = found.columns.intersection(given.columns)
                inputs = found.index.intersection(given.index)
                if not len(places) or not len(inputs):
                    continue
                pair = (table.loc[inputs, places].to_numpy(float) for table in (given, found))
                relation = spearman(*pair, seed=seed)
                rows.append(
                    {
                        "intervention": name,
                        "strength": strength,
                        "effect": effect,
                        "predictor": predictor,
                        "level": level,
                        **asdict(relation),
                    }
                )
    return pd.DataFrame(rows)
