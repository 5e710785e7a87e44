"""Rank correlation: known answers, agreement with scipy, coverage of its interval, what cannot be said."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from diag.results.correlation import LEAST_PLACES
from diag.studies.intervene.relation import spearman


def drawn(inputs: int, places: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(inputs, places))


def test_agreement_and_its_opposite() -> None:
    rising = np.tile(np.arange(8.0), (5, 1)) + 1e-3 * drawn(5, 8)
    for sign in (1, -1):
        found = spearman(rising, sign * np.exp(rising / 3))
        assert (found.rho, found.ci_low, found.ci_high) == (sign, sign, sign)
        assert found.p < 0.01
        assert (found.places, found.n) == (8, 5)


@pytest.mark.parametrize("places", [4, 6, 36])
def test_it_is_scipys_of_the_means(places: int) -> None:
    first, second = drawn(7, places, 1), drawn(7, places, 2)
    first[:, 1] = first[:, 0]  # a tie
    expected = spearmanr(first.mean(0), second.mean(0))
    found = spearman(first, second)
    assert found.rho == pytest.approx(expected.statistic)
    if places == 36:
        assert found.p == pytest.approx(expected.pvalue, abs=0.05)
    assert found.ci_low < found.rho < found.ci_high


def test_unrelated_numbers_have_a_uniform_p() -> None:
    chance = [spearman(drawn(3, 8, seed), drawn(3, 8, seed + 1000)).p for seed in range(200)]
    assert 0.01 < np.mean(np.array(chance) < 0.05) < 0.10
    assert 0.4 < np.mean(chance) < 0.6


def test_the_interval_narrows_with_more_inputs() -> None:
    truth = np.linspace(0, 1, 8)
    widths = []
    for inputs in (10, 1000):
        first, second = truth + 0.8 * drawn(inputs, 8, 1), truth + 0.8 * drawn(inputs, 8, 2)
        found = spearman(first, second)
        widths.append(found.ci_high - found.ci_low)
    assert widths[0] > 0.2
    assert widths[1] < widths[0] / 4


def test_what_cannot_be_said() -> None:
    assert np.isnan(spearman(drawn(5, LEAST_PLACES - 1), drawn(5, LEAST_PLACES - 1, 1)).rho)
    flat = np.ones((5, 6))
    assert np.isnan(spearman(flat, drawn(5, 6)).rho)
    assert np.isnan(spearman(flat, drawn(5, 6)).p)
    single = spearman(drawn(1, 6), drawn(1, 6, 1))
    assert np.isnan(single.ci_low)
    assert not np.isnan(single.rho)
    with pytest.raises(ValueError, match="shapes differ"):
        spearman(drawn(2, 5), drawn(2, 6))


def test_missing_places_and_values() -> None:
    first, second = drawn(6, 7, 3), drawn(6, 7, 4)
    first[:, 2] = np.nan
    second[0, 5] = np.nan
    found = spearman(first, second)
    assert found.places == 6
    kept = [0, 1, 3, 4, 5, 6]
    expected = spearmanr(first[:, kept].mean(0), np.nanmean(second[:, kept], 0)).statistic
    assert found.rho == pytest.approx(expected)


def test_the_same_seed_gives_the_same_interval() -> None:
    first, second = drawn(9, 6, 5), drawn(9, 6, 6)
    assert spearman(first, second, seed=1) == spearman(first, second, seed=1)
    assert spearman(first, second, seed=1) != spearman(first, second, seed=2)
