"""Means, ratios and their 95 % bootstrap intervals over inputs.

A resample is how often each input is drawn: its sums over inputs are a product of these counts with the
values, and those of all resamples and cells are one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

RESAMPLES = 2000

INTERVAL = (0.025, 0.975)

CELLS = 4096
"""Cells of one matrix product; their resampled means are 64 MB."""

FLOATS = 1 << 22
"""Counts of one matrix product, as floating-point numbers 32 MB; of more inputs, resamples go in blocks."""


def drawn(inputs: int, seed: int | Sequence[int], resamples: int = RESAMPLES) -> np.ndarray:
    """How often each input is drawn in each resample, `[resample, input]`."""
    generator, even = np.random.default_rng(seed), np.full(inputs, 1 / inputs)
    counts = np.empty((resamples, inputs), np.int32)
    for part in _blocks(resamples, inputs):
        counts[part] = generator.multinomial(inputs, even, size=len(counts[part]))
    return counts


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, NaN where `below` is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below != 0, above / below, np.nan)


class Bootstrap:
    """Statistics over inputs, with the same resamples for every cell of every table of a run.

    Resamples are drawn once for all tables that are over the same number of inputs.
    """

    def __init__(self, seed: int, resamples: int = RESAMPLES) -> None:
        self.seed, self.resamples = seed, resamples
        self.counts = np.zeros((0, 0), np.int32)

    def summary(self, values: np.ndarray) -> np.ndarray:
        """Of each column of `values[input, cell]`, as `[cell, mean std low high n]`. NaN is missing.

        Deviation: of the sample (n - 1). Interval: 95 % bootstrap of the mean; none (NaN) with one input.
        """
        present = ~np.isnan(values)
        count = present.sum(0)
        found = np.full((values.shape[1], 5), np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(present, values, 0.0).sum(0) / count
            # deviations from the mean keep the digits of small spreads
            deviation = np.where(present, values - mean, 0.0)
            std = np.sqrt((deviation**2).sum(0) / (count - 1))
        found[:, 0], found[:, 1], found[:, 4] = mean, np.where(count > 1, std, np.nan), count
        some = np.flatnonzero(count > 1)
        for cells in (some[start : start + CELLS] for start in range(0, len(some), CELLS)):
            means = self._sums(deviation[:, cells])
            whole = count[cells] == len(values)
            means[whole] /= len(values)
            if not whole.all():
                total = self._sums(present[:, cells[~whole]].astype(float))
                means[~whole] = ratio(means[~whole], total)
            found[cells, 2:4] = _interval(means) + mean[cells, None]
        return found

    def ratio_of_means(self, above: np.ndarray, below: np.ndarray) -> np.ndarray:
        """Ratios of means over inputs, both `[input, cell]`, as `[cell, mean std low high n]`.

        The interval is the 95 % bootstrap over inputs, numerator and denominator resampled together.
        NaN is missing; there is no standard deviation.
        """
        both = ~np.isnan(above) & ~np.isnan(below)
        above, below, count = np.where(both, above, 0.0), np.where(both, below, 0.0), both.sum(0)
        found = np.full((above.shape[1], 5), np.nan)
        found[:, 0], found[:, 4] = ratio(above.sum(0), below.sum(0)), count
        some = np.flatnonzero(count > 1)
        for cells in (some[start : start + CELLS] for start in range(0, len(some), CELLS)):
            ratios = ratio(self._sums(above[:, cells]), self._sums(below[:, cells]))
            found[cells, 2:4] = _interval(ratios)
        return found

    def _sums(self, values: np.ndarray) -> np.ndarray:
        """The sum of each column of `values[input, cell]` in each resample, `[cell, resample]`."""
        inputs, cells = values.shape
        if self.counts.shape != (self.resamples, inputs):
            self.counts = drawn(inputs, self.seed, self.resamples)
        sums = np.empty((cells, self.resamples))
        for part in _blocks(self.resamples, inputs):
            np.matmul(values.T, self.counts[part].T.astype(float), out=sums[:, part])
        return sums


def summary(values: np.ndarray, *, seed: int, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Mean, standard deviation (n - 1), 95 % bootstrap interval and n of each column, `values[input, cell]`.

    NaN is missing. With one input there is no interval (NaN).
    """
    return statistics(Bootstrap(seed, resamples).summary(values))


def statistics(found: np.ndarray) -> pd.DataFrame:
    """What `Bootstrap` finds, as columns of a table."""
    table = pd.DataFrame(found, columns=["mean", "std", "ci_low", "ci_high", "n"])
    return table.astype({"n": np.int64})


def _blocks(resamples: int, inputs: int) -> list[slice]:
    """Resamples in parts of so many counts as one product has; the same generator draws them in turn."""
    rows = max(1, FLOATS // max(1, inputs))
    return [slice(start, min(start + rows, resamples)) for start in range(0, resamples, rows)]


def _interval(resampled: np.ndarray) -> np.ndarray:
    """The ends of the 95 % interval of each row of `[cell, resample]`, which is put in order for it.

    Between two resamples, linear. NaN is missing: as `numpy.nanpercentile`, which takes rows one by one.
    """
    missing = np.isnan(resampled).sum(1)
    last = np.maximum(resampled.shape[1] - missing - 1, 0)[:, None]
    place = last * np.array(INTERVAL)
    below = np.floor(place).astype(int)
    above = np.minimum(below + 1, last)
    if missing.any():
        resampled.sort(axis=1)  # NaN last
    else:
        resampled.partition(np.unique([below, above]), axis=1)
    low, high = (np.take_along_axis(resampled, x, 1) for x in (below, above))
    return low + (high - low) * (place - below)
