"""Does one number predict another, layer by layer or head by head? Rank correlation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

RESAMPLES = 2000
LEAST_PLACES = 4
"""Layers (or heads) below which no correlation is reported: of three, |ρ| = 1 in one of three by chance."""


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
    nothing = float("nan")
    if places < LEAST_PLACES:
        return Relation(nothing, nothing, nothing, nothing, places, inputs)
    even = np.ones((1, inputs)) / inputs
    rho = float(_correlations(_means(first, even), _means(second, even))[0])
    rng = np.random.default_rng(seed)
    low = high = nothing
    if inputs > 1:
        draws = rng.multinomial(inputs, even[0], size=RESAMPLES)
        found = _correlations(_means(first, draws), _means(second, draws))
        if not np.isnan(found).all():
            low, high = np.nanpercentile(found, [2.5, 97.5])
    one, other = _means(first, even), _means(second, even)
    shuffled = rng.permuted(np.repeat(other, RESAMPLES, 0), axis=1)
    chance = np.abs(_correlations(np.repeat(one, RESAMPLES, 0), shuffled))
    p = nothing if np.isnan(rho) else float((1 + (chance >= abs(rho) - 1e-12).sum()) / (1 + RESAMPLES))
    return Relation(rho, float(low), float(high), p, places, inputs)


def _means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means over inputs, `[resample, place]`; NaN is missing."""
    present = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ np.where(present, values, 0.0)) / (weights @ present.astype(float))


def _correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's ρ of each row, ties at their mean rank; NaN where one does not vary or is not known."""
    ranks = [rankdata(x, axis=1) for x in (first, second)]
    centred = [x - x.mean(1, keepdims=True) for x in ranks]
    scale = np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = (centred[0] * centred[1]).sum(1) / scale
    missing = np.isnan(first).any(1) | np.isnan(second).any(1) | (scale == 0)
    return np.where(missing, np.nan, rho)
