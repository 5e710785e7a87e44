"""Correlation: a weight is a repetition, ties share a rank, and what chance gives."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from diag.results.correlation import chance, pearson, ranks

GENERATOR = np.random.default_rng(0)
FIRST, SECOND = GENERATOR.normal(size=(2, 3, 7)).round(1)
WEIGHTS = GENERATOR.integers(0, 4, (3, 7))


def test_a_weight_is_a_repetition() -> None:
    found = {"r": pearson(FIRST, SECOND, WEIGHTS)}
    found["ρ"] = pearson(ranks(FIRST, WEIGHTS), ranks(SECOND, WEIGHTS), WEIGHTS)
    for row in range(3):
        one, other = (np.repeat(values[row], WEIGHTS[row]) for values in (FIRST, SECOND))
        assert found["r"][row] == pytest.approx(stats.pearsonr(one, other).statistic)
        assert found["ρ"][row] == pytest.approx(stats.spearmanr(one, other).statistic)


def test_without_weights_each_place_counts_once() -> None:
    once = np.ones((3, 7))
    tied = FIRST.round(0)
    np.testing.assert_array_equal(ranks(tied), ranks(tied, once))
    np.testing.assert_array_equal(pearson(FIRST, SECOND), pearson(FIRST, SECOND, once))


def test_what_does_not_vary_or_is_missing_has_none() -> None:
    flat, holed = np.full((1, 5), 0.1), np.array([[1.0, np.nan, 3.0, 4.0, 5.0]])
    rising = np.arange(5.0)[None]
    assert np.isnan(pearson(flat, rising))
    assert np.isnan(pearson(ranks(holed), rising))
    assert np.isnan(chance(np.nan, flat[0], rising[0], GENERATOR))


def test_chance_within_groups_pairs_no_others() -> None:
    """Groups far apart correlate in every pairing within them, and in few across them."""
    groups = np.repeat([0, 1], 5)
    far = 100.0 * groups + GENERATOR.normal(size=10)
    value = 0.99
    assert chance(value, far, far, np.random.default_rng(1), groups=groups) == 1.0
    assert chance(value, far, far, np.random.default_rng(1)) < 0.05
