"""Intervals: one product for all resamples and cells is what drawing inputs one resample at a time gives."""

from __future__ import annotations

import numpy as np
import pytest

from diag.results import bootstrap
from diag.results.bootstrap import RESAMPLES, Bootstrap, drawn, summary

INPUTS = 7


def values() -> np.ndarray:
    """`[input, cell]`: whole ones, one with a gap, and cells of two, one and no inputs."""
    found = np.random.default_rng(3).normal(1.0, 0.4, (INPUTS, 6))
    found[2, 1] = np.nan
    found[2:, 3] = np.nan
    found[1:, 4] = np.nan
    found[:, 5] = np.nan
    return found


def resampled(cells: np.ndarray, seed: int) -> list[np.ndarray]:
    """Each resample, its inputs as often as they were drawn."""
    generator = np.random.default_rng(seed)
    counts = [generator.multinomial(len(cells), [1 / len(cells)] * len(cells)) for _ in range(RESAMPLES)]
    return [np.repeat(cells, count, axis=0) for count in counts]


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:All-NaN", "ignore:Degrees of freedom")
def test_a_summary_is_that_of_its_formula() -> None:
    cells = values()
    means = np.stack([np.nanmean(one, axis=0) for one in resampled(cells, 5)])
    low, high = np.nanpercentile(means, [2.5, 97.5], axis=0)
    several = (~np.isnan(cells)).sum(0) > 1
    found = summary(cells, seed=5)
    np.testing.assert_allclose(found["mean"], np.nanmean(cells, axis=0), rtol=1e-12)
    np.testing.assert_allclose(found["std"][several], np.nanstd(cells, axis=0, ddof=1)[several], rtol=1e-12)
    np.testing.assert_allclose(found["ci_low"], np.where(several, low, np.nan), rtol=1e-12)
    np.testing.assert_allclose(found["ci_high"], np.where(several, high, np.nan), rtol=1e-12)
    assert found["n"].tolist() == [7, 6, 7, 2, 1, 0]
    assert found["std"].isna().tolist() == [False] * 4 + [True] * 2


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN")
def test_a_ratio_is_resampled_as_its_formula_says() -> None:
    above, below = values()[:, [0, 1, 2, 3]], values()[:, [2, 0, 2, 0]]
    below[:, 3] = np.where(np.arange(INPUTS) == 0, 1.0, 0.0)  # resamples without the first input have none
    gone = np.isnan(above) | np.isnan(below)
    both = np.stack([np.where(gone, np.nan, part) for part in (above, below)], axis=1)
    sums = np.stack([np.nansum(one, axis=0) for one in resampled(both, 5)])  # [resample, part, cell]
    low, high = np.nanpercentile(sums[:, 0] / np.where(sums[:, 1] == 0, np.nan, sums[:, 1]), [2.5, 97.5], 0)
    found = Bootstrap(5).ratio_of_means(above, below)
    np.testing.assert_allclose(found[:, 0], np.divide(*np.nansum(both, axis=0)), rtol=1e-12)
    np.testing.assert_allclose(found[:, 2], low, rtol=1e-12)
    np.testing.assert_allclose(found[:, 3], high, rtol=1e-12)
    assert np.isnan(found[:, 1]).all()
    assert found[:, 4].tolist() == [7, 6, 7, 2]
    assert found[2, 2:4].tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(("floats", "cells"), [(1, 1), (50 * INPUTS, 4), (10**6, 4096)])
def test_blocks_are_the_whole(monkeypatch: pytest.MonkeyPatch, floats: int, cells: int) -> None:
    whole, ratios = summary(values(), seed=1), Bootstrap(1).ratio_of_means(values(), values()[:, ::-1])
    monkeypatch.setattr(bootstrap, "FLOATS", floats)
    monkeypatch.setattr(bootstrap, "CELLS", cells)
    at_once = np.random.default_rng(1).multinomial(INPUTS, [1 / INPUTS] * INPUTS, size=RESAMPLES)
    np.testing.assert_array_equal(drawn(INPUTS, 1), at_once)
    np.testing.assert_allclose(summary(values(), seed=1), whole, rtol=1e-12)
    np.testing.assert_allclose(Bootstrap(1).ratio_of_means(values(), values()[:, ::-1]), ratios, rtol=1e-12)
