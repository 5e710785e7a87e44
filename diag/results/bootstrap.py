"""Means, ratios and their 95 % bootstrap intervals over inputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

RESAMPLES = 2000


def drawn(inputs: int, seed: int | Sequence[int], resamples: int = RESAMPLES) -> np.ndarray:
    """How often each input is drawn in each resample, `[resample, input]`."""
    return np.random.default_rng(seed).multinomial(inputs, np.full(inputs, 1 / inputs), size=resamples)


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, NaN where `below` is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below != 0, above / below, np.nan)


def ratio_of_means(above: np.ndarray, below: np.ndarray, *, seed: int) -> np.ndarray:
    """Ratios of means over inputs, both `[input, cell]`, as `[cell, mean std low high n]`.

    The interval is the 95 % bootstrap over inputs, numerator and denominator resampled together.
    NaN is missing; there is no standard deviation.
    """
    both = ~np.isnan(above) & ~np.isnan(below)
    above, below, count = np.where(both, above, 0.0), np.where(both, below, 0.0), both.sum(0)
    found = np.full((above.shape[1], 5), np.nan)
    found[:, 0], found[:, 4] = ratio(above.sum(0), below.sum(0)), count
    if len(above) > 1:
        draws = drawn(len(above), seed)
        ratios = ratio(draws @ above, draws @ below)
        some = (count > 1) & ~np.isnan(ratios).all(0)
        if some.any():
            found[some, 2:4] = np.nanpercentile(ratios[:, some], [2.5, 97.5], axis=0).T
    return found


def summary(values: np.ndarray, *, seed: int, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Mean, standard deviation (n - 1), 95 % bootstrap interval and n of each column, `values[input, cell]`.

    NaN is missing. With one input there is no interval (NaN).
    """
    present = ~np.isnan(values)
    count = present.sum(0)
    filled = np.where(present, values, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = filled.sum(0) / count
        deviation = np.where(present, values - mean, 0.0)
        std = np.sqrt((deviation**2).sum(0) / (count - 1))
    std[count < 2] = np.nan
    low, high = np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    if len(values) > 1:
        draws = drawn(len(values), seed, resamples)
        for start in range(0, values.shape[1], 4096):
            part = slice(start, start + 4096)
            with np.errstate(invalid="ignore", divide="ignore"):
                # deviations from the mean keep the digits of small spreads
                means = (draws @ deviation[:, part]) / (draws @ present[:, part].astype(float))
            some = count[part] > 1
            if not some.any():
                continue
            bounds = np.nanpercentile(means[:, some], [2.5, 97.5], axis=0)
            low[part][some], high[part][some] = bounds + mean[part][some]
    return pd.DataFrame({"mean": mean, "std": std, "ci_low": low, "ci_high": high, "n": count})
