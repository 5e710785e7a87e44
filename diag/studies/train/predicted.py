"""Does what the baseline measures predict what a variant gains? Correlation over pairs of cells.

Two readings, because patch size moves both sides: over all cells, where any two quantities that change
with patch size correlate, and within patch sizes, after their means are taken out. The gain holds the
baseline's own outcome with a minus, so that a metric which goes with a lucky baseline goes with a small gain;
such a correlation is a lead, not a cause. No torch.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy.stats import t as student

from diag.results.bootstrap import RESAMPLES
from diag.results.correlation import FLAT, LEAST_PLACES, chance, pearson, ranks
from diag.studies.train.paired_gains import BASELINE, CASE, LEVEL, grouped

PREDICTORS = ("value_similarity", "excess", "cos_y_vself")
LEAST_SEEDS = 3
"""Below which there is no interval: of two seeds, every resample is one of them twice, or both."""

KEYS = ["task", "variant", "outcome", "unit"]
FOUND = ["value", "ci_low", "ci_high", "p"]
COUNTS = ["n_cells", "n_patch_sizes", "n_seeds"]


def relation_points(pairs: pd.DataFrame, probed: pd.DataFrame) -> pd.DataFrame:
    """A row per pair against the baseline and predictor: what the baseline measured, and the gain.

    pairs: of `pairs`. probed: of `probed_cells`. Columns task, patch_size, variant, outcome, unit,
    seed, gain, predictor, value (mean over layers of the baseline's cell).
    """
    baseline = probed[(probed["variant"] == BASELINE) & probed["metric"].isin(list(PREDICTORS))]
    means = baseline.groupby([*CASE, "seed", "metric"], sort=False, dropna=False)["value"].mean()
    values = means.reset_index().rename(columns={"metric": "predictor"})
    ours = pairs[pairs["against"] == BASELINE].drop(columns="against")
    points = ours.rename(columns={"difference": "gain"}).merge(values, on=[*CASE, "seed"])
    return points.sort_values(
        "predictor", key=lambda names: names.map(PREDICTORS.index), kind="stable", ignore_index=True
    )


def relation(pairs: pd.DataFrame, probed: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Pearson's r and Spearman's ρ of predictor and gain, over all cells and within patch sizes.

    Columns task, variant, outcome, unit, predictor, cells ("all", "within patch sizes"), correlation
    ("pearson", "spearman"), value, ci_low, ci_high, p, n_cells, n_patch_sizes, n_seeds.

    The interval, 95 %, is for *these* patch sizes and other seeds: the bootstrap resamples seeds, each with
    all its cells, and gives a standard error of arctanh(r), which is multiplied with Student's t for so many
    seeds. The plain percentiles of so few clusters are far too narrow (with three seeds they covered 55 to
    79 % in simulation, these 94 to 100 %). NaN with fewer than three seeds. p, within patch sizes only: share
    of random pairings of predictor and gain within each patch size with a correlation at least as large
    (two-sided).
    Patch sizes of a single cell say nothing within, and are left out there.
    """
    rows = []
    for key, part in grouped(relation_points(pairs, probed), [*KEYS, "predictor"]):
        sizes = part["patch_size"].nunique()
        for cells in ("all", "within patch sizes"):
            within = cells != "all"
            chosen = part
            if within:
                count = part.groupby("patch_size", dropna=False)["seed"].transform("size")
                chosen = part[count > 1]
                sizes = chosen["patch_size"].nunique()
            counts = dict(zip(COUNTS, (len(chosen), sizes, chosen["seed"].nunique()), strict=True))
            for correlation in ("pearson", "spearman"):
                found = _related(chosen, within=within, ranked=correlation == "spearman", seed=seed)
                rows.append({**key, "cells": cells, "correlation": correlation, **found, **counts})
    return pd.DataFrame(rows, columns=[*KEYS, "predictor", "cells", "correlation", *FOUND, *COUNTS])


def _related(part: pd.DataFrame, *, within: bool, ranked: bool, seed: int) -> dict[str, float]:
    """A correlation with its interval and p; NaN where it cannot be said."""
    found = dict.fromkeys(FOUND, math.nan)
    patch = part["patch_size"].fillna(0).to_numpy(float)
    groups = (patch[:, None] == np.unique(patch)).astype(float)  # [cell, patch size]
    if len(part) < LEAST_PLACES or (within and len(part) - groups.shape[1] < LEAST_PLACES - 1):
        return found
    given, gain = part["value"].to_numpy(float), part["gain"].to_numpy(float)
    removed = groups if within else None
    once = np.ones((1, len(part)))
    found["value"] = float(_correlations(given, gain, once, removed, ranked)[0])
    if math.isnan(found["value"]):
        return found
    rng = np.random.default_rng(seed)
    seeds, cluster = np.unique(part["seed"].to_numpy(), return_inverse=True)
    if len(seeds) >= LEAST_SEEDS:
        even = np.full(len(seeds), 1 / len(seeds))
        # few seeds have few different resamples: each is computed once
        draws, times = np.unique(
            rng.multinomial(len(seeds), even, size=RESAMPLES), axis=0, return_counts=True
        )
        drawn = _correlations(given, gain, draws[:, cluster].astype(float), removed, ranked)
        known = ~np.isnan(drawn)
        low, high = _interval(found["value"], np.repeat(drawn[known], times[known]), len(seeds), len(part))
        found |= {"ci_low": low, "ci_high": high}
    if within:
        left = [_without_means(x[None], once, groups) for x in (given, gain)]
        one, other = (ranks(x)[0] if ranked else x[0] for x in left)
        found["p"] = chance(found["value"], one, other, rng, groups=patch)
    return found


def _interval(value: float, drawn: np.ndarray, seeds: int, cells: int) -> tuple[float, float]:
    """Student's interval on the arctanh scale, with the bootstrap's error, unbiased for few seeds."""
    most = 1 - 1 / cells**2  # a rank correlation of few cells is often 1, whose arctanh is infinite
    middle, spread = (np.arctanh(np.clip(x, -most, most)) for x in (value, drawn))
    if len(drawn) < 2 or spread.std() == 0:
        return math.nan, math.nan
    reach = student.ppf((1 + LEVEL) / 2, seeds - 1) * spread.std() * (seeds / (seeds - 1)) ** 0.5
    low, high = np.tanh([middle - reach, middle + reach])
    return min(float(low), value), max(float(high), value)


def _correlations(
    given: np.ndarray, gain: np.ndarray, weights: np.ndarray, groups: np.ndarray | None, ranked: bool
) -> np.ndarray:
    """A correlation for each row of weights, `[resample, cell]`: how often a cell was drawn.

    groups: `[cell, group]`, 0 or 1; their means are taken out first. ranked: Spearman's.
    """
    sides = [np.broadcast_to(x, weights.shape) for x in (given, gain)]
    if groups is not None:
        sides = [_without_means(x, weights, groups) for x in sides]
    if ranked:
        sides = [ranks(side, weights) for side in sides]
    return pearson(sides[0], sides[1], weights)


def _without_means(values: np.ndarray, weights: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Values less the weighted mean of their group. What is left of a group of one cell is exactly 0."""
    count = weights @ groups
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(count > 0, ((weights * values) @ groups) / count, 0.0)
    left = values - means @ groups.T
    scale = np.abs(values).max(-1, keepdims=True)
    return np.where(np.abs(left) <= FLAT * scale, 0.0, left)
