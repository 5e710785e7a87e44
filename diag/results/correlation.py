"""Correlation over a few paired numbers: Pearson's r, ranks for Spearman's ρ, and what chance gives as often.

Arrays are `[sample, place]`: a row per resample of the same places (layers, heads, cells). Intervals are made
by whoever knows what is resampled.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

from diag.results.bootstrap import RESAMPLES

LEAST_PLACES = 4
"""Below which no correlation is reported: of three, |ρ| = 1 in one of three by chance."""
FLAT = 1e-9
"""Spread, relative to the numbers themselves, that is rounding and not variation."""


def pearson(first: np.ndarray, second: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The correlation of each row, `[sample]`; NaN where one side does not vary or holds a NaN.

    weights: how often a sample holds each place; once where it is None.
    """
    if weights is None:
        weights = np.ones(np.broadcast_shapes(first.shape, second.shape))
    total = weights.sum(1, keepdims=True)
    centred = [x - (weights * x).sum(1, keepdims=True) / total for x in (first, second)]
    squares = [(weights * x**2).sum(1) for x in centred]
    flat = np.zeros(len(weights), bool)
    for square, x in zip(squares, (first, second), strict=True):
        flat |= np.sqrt(square) <= FLAT * np.abs(x).max(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        # the root of the product: with equal ranks on both sides it is exact, and so is a correlation of 1
        found = (weights * centred[0] * centred[1]).sum(1) / np.sqrt(squares[0] * squares[1])
    return np.where(flat, np.nan, np.clip(found, -1, 1))


def ranks(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Ranks within each row, ties at their mean rank: Spearman's ρ is Pearson's r of them.

    weights: how often a sample holds each place; once where it is None. NaN for a row that holds a NaN.
    """
    if weights is None:
        return rankdata(values, axis=1)
    return np.stack([_weighted_ranks(x, w) for x, w in zip(values, weights, strict=True)])


def chance(
    value: float,
    first: np.ndarray,
    second: np.ndarray,
    generator: np.random.Generator,
    groups: np.ndarray | None = None,
) -> float:
    """Share of random pairings with a correlation at least as large as `value`, two-sided; NaN for NaN.

    first, second: `[place]`, numbers for r, ranks for ρ. groups: `[place]`; places are paired anew within
    their group only.
    """
    if np.isnan(value):
        return float("nan")
    groups = np.zeros(len(second)) if groups is None else groups
    drawn = np.repeat(second[None], RESAMPLES, 0)
    for group in np.unique(groups):
        drawn[:, groups == group] = generator.permuted(drawn[:, groups == group], axis=1)
    found = np.abs(pearson(first[None], drawn))
    return float((1 + (found >= abs(value) - 1e-12).sum()) / (1 + RESAMPLES))  # equal but for rounding counts


def _weighted_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    if np.isnan(values).any():
        return np.full(len(values), np.nan)
    _, place = np.unique(values, return_inverse=True)
    alike = np.bincount(place, weights)  # how often a sample holds each distinct value
    return (np.cumsum(alike) - 0.5 * alike + 0.5)[place]
