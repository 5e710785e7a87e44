"""Does one number predict another, layer by layer or head by head? Rank correlation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from diag.results.bootstrap import RESAMPLES
from diag.results.correlation import LEAST_PLACES, chance, pearson, ranks


@dataclass(frozen=True)
class Relation:
    """Spearman's ρ over places, of means over inputs.

    ci_low, ci_high: 95 % percentile bootstrap over inputs: how sure ρ is for *these* layers or heads. It says
        nothing about other models.
    p: share of random pairings of places with a |ρ| at least as large (permutation, two-sided): how easily
        as few places as these agree by chance.
    """

    rho: float
    ci_low: float
    ci_high: float
    p: float
    places: int
    n: int


def spearman(first: np.ndarray, second: np.ndarray, *, seed: int = 0) -> Relation:
    """The relation of two quantities, each `[input, place]`, of the same inputs and places.

    Places where either is NaN for all inputs are left out. NaN where fewer than `LEAST_PLACES` places
    are left or one of them does not vary; the interval is NaN with one input.
    """
    if first.shape != second.shape:
        raise ValueError(f"shapes differ: {first.shape} and {second.shape}")
    known = (~np.isnan(first)).any(0) & (~np.isnan(second)).any(0)
    first, second = first[:, known], second[:, known]
    inputs, places = first.shape
    if places < LEAST_PLACES:
        return Relation(math.nan, math.nan, math.nan, math.nan, places, inputs)
    even = np.ones((1, inputs)) / inputs
    one, other = (ranks(_means(values, even)) for values in (first, second))
    rho = float(pearson(one, other)[0])
    generator = np.random.default_rng(seed)
    low = high = math.nan
    if inputs > 1:
        draws = generator.multinomial(inputs, even[0], size=RESAMPLES)
        found = pearson(*(ranks(_means(values, draws)) for values in (first, second)))
        if not np.isnan(found).all():
            low, high = np.nanpercentile(found, [2.5, 97.5])
    p = chance(rho, one[0], other[0], generator)
    return Relation(rho, float(low), float(high), p, places, inputs)


def _means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means over inputs, `[resample, place]`; NaN is missing."""
    present = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ np.where(present, values, 0.0)) / (weights @ present.astype(float))
