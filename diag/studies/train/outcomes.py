"""What a grid of trained cells shows: gains over the baseline and the control, and what changed inside.

Tables in, tables out. Every interval is a 95 % t interval over seeds of differences between cells that share
their seed: how sure the difference is for other seeds of this recipe, on these held-out inputs. No torch.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from diag.inputs.tables import COUNT, NAME, OPEN, TEXT, Layout
from diag.studies.train.paired_gains import (
    BASELINE,
    CASE,
    COMPARED,
    OUTCOMES,
    OVER_SEEDS,
    cleaned,
    grouped,
    of_cells,
    over_seeds,
    pairs,
)
from diag.studies.train.predicted import relation, relation_points

_WORDS = (
    *("cell", "task", "variant", "against", "outcome", "unit", "metric", "predictor", "cells"),
    *("correlation", "seeds", "patch_sizes", "initial_sha256", "sha256"),
)
_ENDS = ("", "_low", "_high")
_SHOWN = [
    f"{outcome}{column}"
    for outcome in OUTCOMES
    for column in ("", "_sd", *(f"_{name}{end}" for name in ("gain", "over_control") for end in _ENDS))
]
PLAIN = Layout({}, dict.fromkeys(_WORDS, TEXT))
SHOWN = Layout(
    {"task": NAME, "patch_size": OPEN, "variant": NAME, "n": COUNT, **dict.fromkeys(_SHOWN, OPEN)},
    PLAIN.known,
    rows=True,
)
"""What the tables of a grid hold: all of them, and `outcomes`, which is shown."""

TOKENS = ("patch", "all")
"""Token sets of a probe, of which a cell's first is taken."""
POINTS = 60
"""Of a curve of the training loss, at most: single steps are noise."""


TABLES = (
    *("outcomes", "gains", "gains-by-seed", "trends", "relations", "relation-points"),
    *("compensation", "compensation-means", "alpha", "curves"),
)
"""What `outcome_tables` gives."""


def outcome_tables(
    results: pd.DataFrame,
    layers: pd.DataFrame,
    alphas: pd.DataFrame,
    monitor: pd.DataFrame,
    log: pd.DataFrame,
) -> dict[str, pd.DataFrame]:
    """Every table of a grid, by file stem; one whose data are missing is empty, with its columns.

    results: a row per cell: cell, task, patch_size (NaN for language), variant, seed, accuracy (fraction or
        NaN), loss (nats), steps, parameters, seconds_per_step.
    layers: per-layer table of the probes, with the cell's name as `model`. alphas: cell, layer, head, alpha.
    monitor: cell, step, layer, metric, value. log: cell, step, loss. Rows of other cells are left out.
    Raises UserError where results cannot be paired.
    """
    results = cleaned(results)
    by_seed = pairs(results)
    gained, probed = gains(by_seed), probed_cells(results, layers)
    return {
        "outcomes": outcomes(results, gained),
        "gains": gained,
        "gains-by-seed": by_seed,
        "trends": trends(by_seed),
        "relations": relation(by_seed, probed),
        "relation-points": relation_points(by_seed, probed),
        "compensation": compensation(probed),
        "compensation-means": compensation(probed, over_layers=True),
        "alpha": alpha_table(results, alphas),
        "curves": training_curves(results, monitor, log),
    }


def outcomes(results: pd.DataFrame, gained: pd.DataFrame) -> pd.DataFrame:
    """One row per task, patch size and variant, for a table of results.

    gained: of `gains`.

    Columns n (seeds), lost (of these, without a finite loss), accuracy, accuracy_sd (per cent), loss, loss_sd
    (nats), parameters, seconds_per_step (median), and for each outcome `NAME_gain`, `_low`, `_high` against
    the baseline, `NAME_over_control`, `_low`, `_high` against the control; NaN where there is no such pair.
    """
    ends = {"": "mean", "_low": "ci_low", "_high": "ci_high"}
    columns = [*CASE, "variant", "n", "lost"]
    for outcome in OUTCOMES:
        compared = [f"{outcome}_{name}{end}" for name in ("gain", "over_control") for end in ends]
        columns += [outcome, f"{outcome}_sd", *compared]
    # a key is NaN for language, which no dictionary finds again
    found = {str(list(key.values())): part for key, part in grouped(gained, [*CASE, "variant"])}
    rows = []
    for key, part in grouped(results, [*CASE, "variant"]):
        row: dict[str, object] = {**key, "n": len(part), "lost": int(part["loss"].isna().sum())}
        ours = found.get(str(list(key.values())), gained.head(0))
        for outcome, (_, factor) in OUTCOMES.items():
            spread = over_seeds(factor * part[outcome])
            row |= {outcome: spread["mean"], f"{outcome}_sd": spread["sd"]}
            for name, baseline in (("gain", True), ("over_control", False)):
                chosen = ours[(ours["outcome"] == outcome) & (ours["against"].eq(BASELINE) == baseline)]
                first = chosen.iloc[0] if len(chosen) else dict.fromkeys(ends.values(), math.nan)
                row |= {f"{outcome}_{name}{end}": float(first[column]) for end, column in ends.items()}
        for name in ("parameters", "seconds_per_step"):
            row[name] = part[name].median() if name in part else math.nan
        rows.append(row)
    return pd.DataFrame(rows, columns=[*columns, "parameters", "seconds_per_step"])


def gains(by_seed: pd.DataFrame) -> pd.DataFrame:
    """Paired differences over seeds, per task, patch size and variant, against the baseline and the control.

    by_seed: of `pairs`. Columns as of `pairs`, then mean, sd, ci_low, ci_high, n, seeds. Accuracy in
    percentage points, above 0 is better; loss in nats, below 0 is better.
    """
    rows = [
        {**key, **over_seeds(part["difference"]), "seeds": ", ".join(map(str, part["seed"]))}
        for key, part in grouped(by_seed, COMPARED)
    ]
    return pd.DataFrame(rows, columns=[*COMPARED, *OVER_SEEDS, "seeds"])


def trends(by_seed: pd.DataFrame) -> pd.DataFrame:
    """Does a difference grow with smaller patches? Its change per halving of the patch size, over seeds.

    by_seed: of `pairs`. For each seed the slope of the difference against −log2(patch size), by least
    squares; then mean, sd, 95 % t interval and n over seeds. Seeds that lack one of the patch sizes are left
    out, because a slope over other patch sizes is another quantity where the relation is no straight line.
    Columns task, variant, against, outcome, unit, mean, sd, ci_low, ci_high, n, patch_sizes.
    """
    keys = [name for name in COMPARED if name != "patch_size"]
    rows = []
    for key, part in grouped(by_seed.dropna(subset=["patch_size"]), keys):
        wide = part.pivot(index="seed", columns="patch_size", values="difference")
        wide = wide[sorted(wide.columns, reverse=True)]
        if wide.shape[1] > 1:
            at = -np.log2(wide.columns.to_numpy(float))
            at -= at.mean()
            slopes = wide.dropna().to_numpy(float) @ at / (at @ at)
            sizes = ", ".join(f"{size:g}" for size in wide.columns)
            rows.append({**key, **over_seeds(slopes), "patch_sizes": sizes})
    return pd.DataFrame(rows, columns=[*keys, *OVER_SEEDS, "patch_sizes"])


def probed_cells(results: pd.DataFrame, layers: pd.DataFrame) -> pd.DataFrame:
    """What the probe says of each cell: columns cell, task, patch_size, variant, seed, layer, metric, value.

    results: of `cleaned`. Of several token sets, the patch tokens of an image model, else all tokens.
    """
    columns = ["model", "layer", "metric", "mean"]
    if layers.empty:
        layers = pd.DataFrame(columns=columns)
    if "tokens" in layers:
        place = layers["tokens"].map({name: place for place, name in enumerate(TOKENS)}).fillna(len(TOKENS))
        layers = layers[place == place.groupby(layers["model"]).transform("min")]
    rows = of_cells(results, layers[columns], "model").rename(columns={"mean": "value"})
    return rows.drop(columns="model").assign(value=rows["value"].astype(float)).dropna(subset=["value"])


def compensation(probed: pd.DataFrame, *, over_layers: bool = False) -> pd.DataFrame:
    """Each metric of the baseline and of a variant trained with its seed: does training make up for a change?

    probed: of `probed_cells`. over_layers: of means over layers, not layer by layer.
    Columns task, patch_size, variant, metric, layer, baseline, changed (means over the paired seeds), then
    mean, sd, ci_low, ci_high, n of the paired difference changed − baseline.
    """
    keys = [*CASE, "variant", "metric", *([] if over_layers else ["layer"])]
    if over_layers:
        probed = probed.groupby([*keys, "seed"], sort=False, dropna=False)["value"].mean().reset_index()
    baseline = probed[probed["variant"] == BASELINE].rename(columns={"value": "baseline"})
    shared = [name for name in keys if name != "variant"]
    both = probed[probed["variant"] != BASELINE].merge(
        baseline[[*shared, "seed", "baseline"]], on=[*shared, "seed"]
    )
    rows = [
        {
            **key,
            "baseline": part["baseline"].mean(),
            "changed": part["value"].mean(),
            **over_seeds(part["value"] - part["baseline"]),
        }
        for key, part in grouped(both, keys)
    ]
    return pd.DataFrame(rows, columns=[*keys, "baseline", "changed", *OVER_SEEDS])


def alpha_table(results: pd.DataFrame, alphas: pd.DataFrame) -> pd.DataFrame:
    """The learned α of every layer and head: mean, sd, 95 % t interval and n over seeds."""
    keys = [*CASE, "variant", "layer", "head"]
    ours = alphas if alphas.empty else of_cells(results, alphas)
    rows = [{**key, **over_seeds(part["alpha"])} for key, part in grouped(ours, keys)] if len(ours) else []
    return pd.DataFrame(rows, columns=[*keys, *OVER_SEEDS])


def training_curves(results: pd.DataFrame, monitor: pd.DataFrame, log: pd.DataFrame) -> pd.DataFrame:
    """What was seen while training: the loss, and each metric of the monitor as its mean over layers.

    Columns task, patch_size, variant, metric ("loss" for the training loss), step, window (steps that a point
    averages), mean, low, high (smallest and largest seed), n.
    """
    keys = [*CASE, "variant", "metric", "step", "window"]
    parts = []
    if not log.empty:
        window = max(1, math.ceil(log["step"].max() / POINTS))
        place = (log["step"] - 1).clip(lower=0) // window
        binned = log.assign(metric="loss", window=window, step=(place + 1) * window, value=log["loss"])
        parts.append(binned[["cell", "metric", "step", "window", "value"]])
    if not monitor.empty:
        parts.append(monitor.assign(window=1)[["cell", "metric", "step", "window", "value"]])
    if not parts:
        return pd.DataFrame(columns=[*keys, "mean", "low", "high", "n"])
    rows = of_cells(results, pd.concat(parts, ignore_index=True))
    by_seed = rows.groupby([*keys, "seed"], sort=False, dropna=False)["value"].mean()
    over = by_seed.reset_index().groupby(keys, sort=False, dropna=False)["value"]
    table = over.agg(mean="mean", low="min", high="max", n="count").reset_index()
    return table[table["n"] > 0].reset_index(drop=True)
