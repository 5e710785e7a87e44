"""What is kept of any number of inputs: moments in float64, and a sketch of each distribution.

A *cell* is one layer, head, token set and metric; the row with head -1 is the layer, which is the mean
over heads within each input. Moments of two sets of inputs are merged into those of both: moments with the
formulas of Chan, Golub and LeVeque (1979), sketches by adding counts. Moments are merged in the order of
the inputs, always, because rounding depends on the order; counts are whole numbers and do not.

The sketch counts values in logarithmic bins, as in DDSketch (Masson, Rim and Lee 2019), negative ones
apart: a quantile is off by at most `ACCURACY` of itself, or by `TINY` beside zero. No torch here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from diag.results.bootstrap import ratio
from diag.results.layer_values import LayerValues
from diag.results.tables import CONSTANTS, KEYS, SIZES, STATISTICS, WHOLE_LAYER, largest

ACCURACY = 0.005
TINY = 1e-12
HUGE = 1e300
QUANTILES = {"q01": 0.01, "q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "q99": 0.99}

STEP = math.log((1 + ACCURACY) / (1 - ACCURACY))
FIRST = math.floor(math.log(TINY) / STEP)
SHIFT = 20
MIDDLE = 1 << (SHIFT - 1)
"""A cell's place and a bin are one number in a sketch: `place << SHIFT | bin + MIDDLE`."""

COMPACT = 1 << 22
"""So many counts wait before equal bins are added up."""

NUMBERS = ["n", "mean", "m2", "mean_below", "m2_below", "cross", "low", "high"]
"""What a cell holds beside its sketch.

n, mean, m2: how many inputs, their mean, and the sum of squared deviations from it. In the cell of a ratio
these are of its numerator, over inputs that have both parts; mean_below, m2_below and cross are of its
denominator, and the sum of products of both deviations. low, high: the smallest and the largest value.
"""


@dataclass(frozen=True)
class Moments:
    """Moments and sketches of many cells.

    rows: what each cell is, `KEYS` and constants. numbers: `NUMBERS`, `[cell, number]`.
    bins, counts: the sketch, sorted by cell and value, equal ones added up.
    """

    rows: pd.DataFrame
    numbers: np.ndarray
    bins: np.ndarray
    counts: np.ndarray

    def frame(self) -> pd.DataFrame:
        """As one table, a row per cell, the sketch in lists: what `from_frame` reads."""
        ends = np.searchsorted(self.bins >> SHIFT, np.arange(1, len(self.rows)))
        own = (self.bins & ((1 << SHIFT) - 1)) - MIDDLE
        table = pd.concat([self.rows, pd.DataFrame(self.numbers, columns=NUMBERS)], axis=1)
        table["bins"] = pd.Series(np.split(own.astype(np.int32), ends), dtype=object)
        table["counts"] = pd.Series(np.split(self.counts, ends), dtype=object)
        return table

    @staticmethod
    def from_frame(table: pd.DataFrame) -> Moments:
        """What `frame` gave, for example read from a file."""
        places = np.repeat(np.arange(len(table)), [len(bins) for bins in table["bins"]])
        bins = np.concatenate([*table["bins"], np.zeros(0, np.int64)]).astype(np.int64)
        counts = np.concatenate([*table["counts"], np.zeros(0, np.int64)]).astype(np.int64)
        rows = table.drop(columns=[*NUMBERS, "bins", "counts"])
        return Moments(rows, table[NUMBERS].to_numpy(), places << SHIFT | bins + MIDDLE, counts)


def moments_of(
    measured: Sequence[LayerValues], ratios: Mapping[str, tuple[str, str]], constants: Mapping[str, Any]
) -> Moments:
    """The cells of some inputs; what belongs to one layer follows each other in the order of the inputs.

    ratios: metrics to add, each the ratio of two that are there: name -> (numerator, denominator).
    constants: columns that are the same in every row (model, tower …).
    """
    groups: dict[tuple[int, bool, tuple[str, ...]], list[LayerValues]] = {}
    for one in measured:
        groups.setdefault((one.layer, one.of_heads, tuple(one.metrics)), []).append(one)
    found = [_layer_cells(parts, ratios, constants) for parts in groups.values()]
    if len({group[:2] for group in groups}) < len(groups):
        return merged(found)  # batches of one layer have different metrics: a cell may be in two of them
    starts = np.cumsum([0, *(len(part.rows) for part in found)])
    return Moments(
        pd.concat([part.rows for part in found], ignore_index=True),
        np.concatenate([part.numbers for part in found]),
        np.concatenate([part.bins + (start << SHIFT) for part, start in zip(found, starts, strict=False)]),
        np.concatenate([part.counts for part in found]),
    )


def _layer_cells(
    measured: Sequence[LayerValues], ratios: Mapping[str, tuple[str, str]], constants: Mapping[str, Any]
) -> Moments:
    """One layer's cells: its own first, then those of its heads."""
    first = measured[0]
    values = np.concatenate([one.values for one in measured], axis=2)
    present = ~np.isnan(values)
    count = present.sum(3)
    with np.errstate(invalid="ignore"):
        means = np.where(present, values, 0.0).sum(3) / np.where(count > 0, count, np.nan)
    # [token set, metric, head, input], the whole layer as the first head
    every = np.concatenate([means[:, :, None], values.transpose(0, 1, 3, 2)], axis=2)
    heads = [WHOLE_LAYER, *range(values.shape[3])]
    if not first.of_heads:
        every, heads = every[:, :, :1], [WHOLE_LAYER]
    names = list(first.metrics)
    above, below, itself = [every], [np.full(every.shape, np.nan)], [every]
    for name, (one, other) in ratios.items():
        if one not in names or other not in names:
            continue
        x, y = (every[:, names.index(part)][:, None] for part in (one, other))
        both = ~np.isnan(x) & ~np.isnan(y)
        above.append(np.where(both, x, np.nan))
        below.append(np.where(both, y, np.nan))
        itself.append(ratio(x, y))
        names.append(name)
    x, y, drawn = (
        np.concatenate(parts, axis=1).reshape(-1, every.shape[3]) for parts in (above, below, itself)
    )
    # of what may differ between inputs, the largest, as in tables of samples
    sized = {name: max(getattr(one.facts, name) for one in measured) for name in SIZES}
    columns = first.columns(constants) | sized
    of_cells = zip(*itertools.product(first.token_sets, names, heads), strict=True)
    columns |= dict(zip(("tokens", "metric", "head"), map(list, of_cells), strict=True))
    # at once: a column added to a frame costs as much as the numbers of a layer
    rows = pd.DataFrame({name: columns[name] for name in (*KEYS, *CONSTANTS) if name in columns})
    numbers = _numbers(x, y, drawn)
    there = ~np.isnan(drawn)
    places = np.repeat(np.arange(len(rows)), x.shape[1]).reshape(x.shape)[there]
    return Moments(rows, numbers, *_added(places << SHIFT | bins_of(drawn[there]) + MIDDLE))


def _numbers(x: np.ndarray, y: np.ndarray, itself: np.ndarray) -> np.ndarray:
    """`NUMBERS` of cells over `x[cell, input]`; y: denominators of ratios, else NaN."""
    count = (~np.isnan(x)).sum(1)
    mean, mean_below = _mean(x), _mean(y)
    dx, dy = (np.nan_to_num(part - m[:, None]) for part, m in ((x, mean), (y, mean_below)))
    some = ~np.isnan(itself)
    low = np.where(some, itself, np.inf).min(1, initial=np.inf)
    high = np.where(some, itself, -np.inf).max(1, initial=-np.inf)
    sums = (dx**2).sum(1), mean_below, (dy**2).sum(1), (dx * dy).sum(1)
    return np.stack([count, mean, *sums, low, high], axis=1).astype(np.float64)


def _mean(values: np.ndarray) -> np.ndarray:
    """Means over inputs that are there, 0 where there is none."""
    return np.nansum(values, axis=1) / np.maximum((~np.isnan(values)).sum(1), 1)


def merged(parts: Iterable[Moments]) -> Moments:
    """The cells of all inputs together, merged one after the other: give them in the order of the inputs.

    A cell may be missing in some parts. Of sizes that differ, the largest is kept, as in tables of samples.
    Raises ValueError if there is no part.
    """
    waiting = list[tuple[np.ndarray, np.ndarray]]()
    total: Moments | None = None
    for part in parts:
        if total is None:
            total = part
            waiting.append((part.bins, part.counts))
            continue
        rows, places = _aligned(total.rows, part.rows)
        numbers = np.tile(_numbers(*np.full((3, 1, 1), np.nan)), (len(rows), 1))
        numbers[: len(total.numbers)] = total.numbers
        numbers[places] = _together(numbers[places], part.numbers)
        total = Moments(rows, numbers, total.bins[:0], total.counts[:0])
        own = part.bins & ((1 << SHIFT) - 1)
        waiting.append((places[part.bins >> SHIFT] << SHIFT | own, part.counts))
        if sum(len(bins) for bins, _ in waiting) > COMPACT:
            waiting = [_added(*map(np.concatenate, zip(*waiting, strict=True)))]
    if total is None:
        raise ValueError("no cells to merge")
    bins, counts = _added(*map(np.concatenate, zip(*waiting, strict=True)))
    return Moments(largest(total.rows), total.numbers, bins, counts)


def _aligned(rows: pd.DataFrame, more: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """`rows` with the new ones of `more` below, and where each row of `more` is in it."""
    if rows.equals(more):
        return rows, np.arange(len(rows))
    index, other = (pd.MultiIndex.from_frame(part[KEYS]) for part in (rows, more))
    places = index.get_indexer(other)
    new = places < 0
    places[new] = np.arange(len(rows), len(rows) + new.sum())
    found = pd.concat([rows, more[new]], ignore_index=True) if new.any() else rows.copy()
    for name in SIZES:
        if name in found:
            values = found[name].to_numpy(copy=True)
            values[places] = np.maximum(values[places], more[name].to_numpy())
            found[name] = values
    return found, places


def _together(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`NUMBERS` of two sets of inputs as those of both."""
    n, mean, m2, mean_below, m2_below, cross, low, high = range(len(NUMBERS))
    count = a[:, n] + b[:, n]
    share = b[:, n] / np.maximum(count, 1)
    weight = a[:, n] * share
    dx, dy = b[:, mean] - a[:, mean], b[:, mean_below] - a[:, mean_below]
    found = np.empty_like(a)
    found[:, n] = count
    found[:, mean], found[:, mean_below] = a[:, mean] + dx * share, a[:, mean_below] + dy * share
    for place, product in ((m2, dx * dx), (m2_below, dy * dy), (cross, dx * dy)):
        found[:, place] = a[:, place] + b[:, place] + product * weight
    found[:, low], found[:, high] = np.minimum(a[:, low], b[:, low]), np.maximum(a[:, high], b[:, high])
    return found


def _added(bins: np.ndarray, counts: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Equal bins added up, in order."""
    order = np.argsort(bins, kind="stable")
    bins = bins[order]
    counts = np.ones(len(bins), np.int64) if counts is None else counts[order]
    starts = np.flatnonzero(np.diff(bins, prepend=bins[0] - 1)) if len(bins) else np.zeros(0, np.int64)
    return bins[starts], np.add.reduceat(counts, starts) if len(bins) else counts


def bins_of(values: np.ndarray) -> np.ndarray:
    """The bins of values, in the order of the values: 0 around zero, negative ones below. Not for NaN."""
    size = np.abs(values)
    steps = np.ceil(np.log(np.clip(size, TINY, HUGE)) / STEP).astype(np.int64) - FIRST
    return np.where(size <= TINY, 0, np.sign(values).astype(np.int64) * steps)


def values_of(bins: np.ndarray) -> np.ndarray:
    """The value that stands for each bin: off by at most `ACCURACY` of itself from any in it."""
    ends = np.exp((np.abs(bins) + FIRST) * STEP)
    return np.where(bins == 0, 0.0, np.sign(bins) * ends * (1 - ACCURACY))


def quantiles(cells: Moments) -> pd.DataFrame:
    """Smallest and largest value and `QUANTILES` of every cell, over `n` inputs. Heads of layers are -1.

    A quantile is the value of rank floor(q (n - 1)), off by at most `ACCURACY` of itself.
    """
    bounds = np.searchsorted(cells.bins >> SHIFT, np.arange(len(cells.rows) + 1))
    own = values_of((cells.bins & ((1 << SHIFT) - 1)) - MIDDLE)
    found = np.full((len(cells.rows), len(QUANTILES)), np.nan)
    count = np.zeros(len(cells.rows), np.int64)
    for row, (start, end) in enumerate(itertools.pairwise(bounds)):
        until = np.cumsum(cells.counts[start:end])
        if len(until):
            count[row] = until[-1]
            ranks = np.floor(np.array(list(QUANTILES.values())) * (until[-1] - 1))
            found[row] = own[start:end][np.searchsorted(until, ranks, side="right")]
    ends = [NUMBERS.index("low"), NUMBERS.index("high")]
    low, high = np.where(count > 0, cells.numbers[:, ends].T, np.nan)
    columns = np.column_stack([low, np.clip(found, low[:, None], high[:, None]), high])
    spread = pd.DataFrame(columns, columns=["low", *QUANTILES, "high"]).assign(n=count)
    return pd.concat([cells.rows[KEYS], spread], axis=1)


def moment_tables(cells: Moments, ratios: Mapping[str, tuple[str, str]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`(layers, heads)` as `tables` gives them, but for the interval: Student's t, from the moments.

    A ratio is that of its parts' means over inputs; its interval is that of its linearisation (delta method).
    """
    from scipy.special import stdtrit

    n, mean, m2, mean_below, m2_below, cross = cells.numbers.T[:6]
    is_ratio = cells.rows["metric"].isin(list(ratios)).to_numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.where(n > 1, m2 / (n - 1), np.nan)
        slope = ratio(mean, mean_below)
        spread = np.maximum(m2 - 2 * slope * cross + slope**2 * m2_below, 0.0) / (n - 1) / mean_below**2
        center = np.where(is_ratio, slope, np.where(n > 0, mean, np.nan))
        t = np.where(n > 1, stdtrit(np.maximum(n - 1, 1), 0.975), np.nan)  # Student's, at 97.5 %
        half = t * np.sqrt(np.where(is_ratio, np.where(n > 1, spread, np.nan), variance) / n)
    table = pd.DataFrame(
        {
            "mean": center,
            "std": np.where(is_ratio, np.nan, np.sqrt(variance)),
            "ci_low": center - half,
            "ci_high": center + half,
            "n": n.astype(np.int64),
        }
    )
    table = pd.concat([cells.rows, table], axis=1)
    table = table[[*KEYS, *STATISTICS, *(name for name in cells.rows if name not in KEYS)]]
    whole = (table["head"] == WHOLE_LAYER).to_numpy()
    layers, heads = table[whole].drop(columns="head"), table[~whole]
    return layers.reset_index(drop=True), heads.reset_index(drop=True)
