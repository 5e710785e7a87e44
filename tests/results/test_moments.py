"""Moments and sketches: as all values at once would give them, however the inputs are cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diag.results import tables as records
from diag.results.bootstrap import Bootstrap
from diag.results.layer_values import LayerFacts, LayerValues
from diag.results.moments import (
    ACCURACY,
    NUMBERS,
    QUANTILES,
    TINY,
    Moments,
    bins_of,
    merged,
    moment_tables,
    moments_of,
    quantiles,
    values_of,
)
from diag.results.tables import samples_frame
from diag.results.writing import write

RATIOS = {"fraction": ("above", "below")}
METRICS = ("above", "below", "other")
CONSTANTS = {"model": "m", "tower": "vision", "seed": 0}
INPUTS = 61


def random(inputs: int = INPUTS) -> np.ndarray:
    """`values[token set, metric, input, head]` with values missing here and there, of several sizes."""
    rng = np.random.default_rng(0)
    values = rng.normal(0.3, 1.0, (2, len(METRICS), inputs, 3)) * np.array([1.0, 1e-3, 1e4])[:, None, None]
    values[rng.random(values.shape) < 0.05] = np.nan
    values[0, 2, :, 1] = np.nan  # nowhere defined
    return values


def made(values: np.ndarray, start: int = 0, n_tokens: int = 17, **fields: Any) -> LayerValues:
    ids = [f"image-{start + i}" for i in range(values.shape[2])]
    facts = LayerFacts(n_tokens, "full", "included", "as captured", 1e-7)
    given = LayerValues(0, "blocks.0", facts, ("patch", "cls"), METRICS, ids, start, values)
    return replace(given, **fields)


def cells_of(*measured: LayerValues) -> Moments:
    return moments_of(measured, RATIOS, CONSTANTS)


def cut(values: np.ndarray, ends: Sequence[int]) -> list[Moments]:
    """Moments of stretches of the inputs."""
    bounds = [0, *ends, values.shape[2]]
    return [cells_of(made(values[:, :, a:b], a)) for a, b in itertools.pairwise(bounds)]


def assert_same(one: Moments, other: Moments, rtol: float = 0.0) -> None:
    pd.testing.assert_frame_equal(one.rows, other.rows)
    np.testing.assert_array_equal(one.bins, other.bins)
    np.testing.assert_array_equal(one.counts, other.counts)
    np.testing.assert_allclose(one.numbers, other.numbers, rtol=rtol, atol=rtol * 1e-3)


def test_tables_of_moments_are_those_of_samples() -> None:
    """Means, spreads and counts are those of all samples at once, to rounding."""
    values = random()
    cells = merged(cut(values, [1, 17, 18, 40]))
    samples = samples_frame([made(values)], RATIOS, CONSTANTS)
    expected = records.tables(samples, RATIOS, seed=0)
    for found, table in zip(moment_tables(cells, RATIOS), expected, strict=True):
        assert list(found) == list(table)
        by = [name for name in records.KEYS if name in table]
        ours, theirs = (part.sort_values(by, ignore_index=True) for part in (found, table))
        pd.testing.assert_frame_equal(ours[by], theirs[by], check_dtype=False, check_categorical=False)
        assert ours["n"].tolist() == theirs["n"].tolist()
        np.testing.assert_allclose(ours["mean"], theirs["mean"], rtol=1e-12)
        np.testing.assert_allclose(ours["std"], theirs["std"], rtol=1e-12)
        assert (ours["n_tokens"] == 17).all()


def test_intervals_are_students() -> None:
    values = random()
    layers, heads = moment_tables(merged(cut(values, [30])), RATIOS)
    own = values[1, 0, :, 2]
    own = own[~np.isnan(own)]
    row = heads[(heads["tokens"] == "cls") & (heads["metric"] == "above") & (heads["head"] == 2)].iloc[0]
    low, high = stats.t.interval(0.95, len(own) - 1, own.mean(), stats.sem(own))
    assert (row["ci_low"], row["ci_high"]) == (pytest.approx(low, rel=1e-10), pytest.approx(high, rel=1e-10))
    missing = heads[(heads["tokens"] == "patch") & (heads["metric"] == "other") & (heads["head"] == 1)].iloc[
        0
    ]
    assert missing["n"] == 0
    assert missing[["mean", "std", "ci_low", "ci_high"]].isna().all()
    assert (layers["head"] if "head" in layers else pd.Series([-1])).eq(-1).all()


def test_the_interval_of_a_ratio_is_that_of_the_bootstrap() -> None:
    """Delta method against resampling, where both are good: many inputs, a denominator far from zero."""
    rng = np.random.default_rng(3)
    below = rng.normal(2.0, 0.4, (1, 1, 3000, 1))
    values = np.concatenate([0.6 * below + rng.normal(0, 0.2, below.shape), below], axis=1)
    measured = made(values, token_sets=("all",), metrics=("above", "below"))
    cells = merged([cells_of(measured)])
    row = moment_tables(cells, RATIOS)[1].set_index("metric").loc["fraction"]
    x, y = values[0, 0, :, 0], values[0, 1, :, 0]
    _, _, low, high, n = Bootstrap(0).ratio_of_means(x[:, None], y[:, None])[0]
    assert row["mean"] == pytest.approx(x.mean() / y.mean(), rel=1e-12)
    assert row["ci_high"] - row["ci_low"] == pytest.approx(high - low, rel=0.05)
    assert np.isnan(row["std"])
    assert row["n"] == n == 3000
    # the mean of ratios would be another number
    assert row["mean"] != pytest.approx((x / y).mean(), rel=1e-5)


def test_merging_is_associative() -> None:
    """Counts exactly, moments to rounding; in one order they are the same to the last bit."""
    a, b, c = cut(random(), [20, 21])
    one, other = merged([merged([a, b]), c]), merged([a, merged([b, c])])
    assert_same(one, other, rtol=1e-12)
    assert_same(merged([a, b, c]), one)
    assert_same(merged([merged([c, a]), b]), one, rtol=1e-12)


def test_batches_of_a_shard_are_one() -> None:
    values = random()
    whole = cells_of(made(values))
    parts = cells_of(made(values[:, :, :8]), made(values[:, :, 8:], 8))
    assert_same(parts, whole)


def test_small_spreads_keep_their_digits() -> None:
    """What sums of squares would lose: a spread of 1e-9 around 1."""
    values = 1 + 1e-9 * np.random.default_rng(0).normal(size=(2, 3, 900, 2))
    _, heads = moment_tables(merged(cut(values, range(16, 900, 16))), RATIOS)
    row = heads[(heads["tokens"] == "patch") & (heads["metric"] == "other") & (heads["head"] == 1)].iloc[0]
    assert row["std"] == pytest.approx(values[0, 2, :, 1].std(ddof=1), rel=1e-6)


def test_a_part_may_lack_layers_and_have_others_sizes() -> None:
    values = random()
    first = cells_of(made(values[:, :, :10], n_tokens=17))
    both = [made(values[:, :, 10:], 10, n_tokens=33), made(values[:, :, 10:], 10, layer=1, n_tokens=9)]
    total = merged([first, cells_of(*both)])
    assert total.rows.groupby("layer")["n_tokens"].unique().map(list).to_dict() == {0: [33], 1: [9]}
    alone = merged(cut(values, [10]))
    kept = (total.rows["layer"] == 0).to_numpy()
    np.testing.assert_array_equal(total.numbers[kept], alone.numbers)
    assert_same(merged([first, merged([cells_of(*both)])]), total)


def test_numbers_of_a_whole_layer_have_no_heads() -> None:
    whole = made(random()[..., :1], ids=["x"] * INPUTS, of_heads=False)
    layers, heads = moment_tables(cells_of(whole), RATIOS)
    assert len(heads) == 0
    assert len(layers) == 2 * 4


def test_metrics_may_differ_between_batches() -> None:
    values = random()
    short = made(values[:, :1, 50:], 50, ids=["x"] * 11, metrics=METRICS[:1])
    cells = cells_of(made(values[:, :, :50]), short)
    n = cells.rows.assign(n=cells.numbers[:, 0]).set_index(["tokens", "head", "metric"])["n"]
    assert n["cls", 0, "above"] == (~np.isnan(values[1, 0, :, 0])).sum()
    assert n["cls", 0, "below"] == (~np.isnan(values[1, 1, :50, 0])).sum()


def test_cells_survive_a_file(tmp_path: Path) -> None:
    cells = merged(cut(random(), [30]))
    write(cells.frame(), tmp_path / "cells.parquet")
    assert_same(Moments.from_frame(pd.read_parquet(tmp_path / "cells.parquet")), cells)


def test_nothing_cannot_be_merged() -> None:
    with pytest.raises(ValueError, match="no cells"):
        merged([])


# --- the sketch


def test_a_bin_stands_for_its_values_within_the_stated_error() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [10.0 ** rng.uniform(-11.9, 200, 20_000), -(10.0 ** rng.uniform(-11.9, 20, 20_000))]
    )
    found = values_of(bins_of(values))
    assert (np.abs(found / values - 1) <= ACCURACY * (1 + 1e-9)).all()
    assert np.abs(found / values - 1).max() > 0.99 * ACCURACY  # the bound is not idle
    small = np.array([0.0, TINY, -TINY, TINY / 3, 5e-324])
    assert (np.abs(values_of(bins_of(small)) - small) <= TINY).all()


def test_bins_follow_the_order_of_their_values() -> None:
    values = np.sort(
        np.random.default_rng(1).normal(size=5000) * 10.0 ** np.random.default_rng(2).integers(-13, 5, 5000)
    )
    assert (np.diff(bins_of(values)) >= 0).all()
    assert (np.diff(values_of(np.arange(-9000, 9000))) > 0).all()


def test_quantiles_are_those_of_all_values_within_the_stated_error() -> None:
    values = random(2000)
    table = quantiles(merged(cut(values, range(100, 2000, 100))))
    head = table[(table["tokens"] == "patch") & (table["head"] == 1)].set_index("metric")
    own = values[0, 0, :, 1]
    own = own[~np.isnan(own)]
    for name, q in QUANTILES.items():
        exact = np.quantile(own, q, method="lower")
        assert abs(head.loc["above", name] - exact) <= ACCURACY * abs(exact) * (1 + 1e-9)
    assert (head.loc["above", "low"], head.loc["above", "high"]) == (own.min(), own.max())
    assert head.loc["above", "n"] == len(own)
    assert head.loc["other"].drop(["model", "tower", "layer", "module", "head", "tokens", "n"]).isna().all()
    assert head.loc["other", "n"] == 0
    with np.errstate(invalid="ignore"):
        both = values[0, 0, :, 1] / values[0, 1, :, 1]
    exact = np.quantile(both[~np.isnan(both)], 0.5, method="lower")
    assert head.loc["fraction", "median"] == pytest.approx(exact, rel=ACCURACY)
    layer = table[(table["tokens"] == "cls") & (table["head"] == -1)].set_index("metric")
    means = np.nanmean(values[1, 1], axis=1)
    assert layer.loc["below", "q95"] == pytest.approx(np.quantile(means, 0.95, method="lower"), rel=ACCURACY)


def test_one_value_is_every_quantile() -> None:
    values = np.full((2, 3, 1, 2), -0.25)
    table = quantiles(merged(cut(values, [])))
    plain = table[table["metric"] != "fraction"]
    assert (plain[["low", *QUANTILES, "high"]] == -0.25).all(axis=None)


def test_the_numbers_are_named() -> None:
    assert cells_of(made(random())).numbers.shape[1] == len(NUMBERS)


# --- inputs from a number on


def test_values_are_cut_at_an_input() -> None:
    values = random()
    measured = made(values, 10)
    assert measured.until(10) is None
    assert measured.until(10 + INPUTS) is measured
    some = measured.until(15)
    assert some is not None
    assert list(some.ids) == [f"image-{i}" for i in range(10, 15)]
    np.testing.assert_array_equal(some.values, values[:, :, :5])
