"""Sampled query rows: drawn as they should be, without bias, with an honest error."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import (
    key_padding,
    make_call,
    window,
    with_log_normaliser,
    with_other_keys,
    with_pattern,
)
from tiny_towers import Attention, Stack, tower_of
from torch import Tensor, nn

from diag.attention.call import AttentionCall
from diag.attention.containers import SoftmaxStatistics
from diag.attention.positions import TEXT, Geometry
from diag.attention.sampling import RowSample, RowSampling, sample_rows
from diag.attention.softmax_statistics import CallStatistics, softmax_statistics
from diag.inputs import images as inputs
from diag.inputs.texts import texts
from diag.measure.batch_readings import FEW_KEYS, BatchReadings
from diag.measure.loop import measure
from diag.metrics.catalogue import SAMPLING_ERROR
from diag.metrics.default import METRICS, Selection, readings_of
from diag.metrics.pattern_pass import Neighbour
from diag.metrics.pattern_shape import GROUPS, SHAPE_METRICS, shape_readings
from diag.metrics.readings import Reading, condensed, reduce, sampling_error
from diag.models import load
from diag.models.base import Batch, Sample, Tower
from diag.models.names.resolve import parse
from diag.results.layer_values import LayerValues

TOKENS, ROWS = 400, 192
OF_PATTERN = ("entropy", "entropy_p15", "entropy_normalized", "effective_keys")
SAMPLING = RowSampling(rows=ROWS, above=TOKENS - 1)
EXACT = RowSampling(above=None)


# --- which rows are drawn


def everything(tokens: int = TOKENS, batch: int = 1) -> Tensor:
    return torch.ones(batch, tokens, dtype=torch.bool)


def test_rows_are_two_of_each_stratum_and_stand_for_all() -> None:
    sample = sample_rows([everything()], ["a"], SAMPLING)
    assert sample.rows == ROWS
    index, weight, partner = sample.index[0], sample.weight[0], sample.partner[0]
    assert (index.diff() > 0).all()
    assert weight.sum() == TOKENS
    assert (partner[partner] == torch.arange(ROWS)).all()
    bounds = torch.arange(ROWS // 2 + 1) * TOKENS // (ROWS // 2)
    stratum = torch.searchsorted(bounds, index, right=True) - 1
    assert stratum.tolist() == [k for k in range(ROWS // 2) for _ in range(2)]
    assert (stratum[partner] == stratum).all()


def test_every_row_is_drawn_as_often_as_its_weight_says() -> None:
    drawn = torch.zeros(TOKENS)
    times = 400
    for seed in range(times):
        sample = sample_rows([everything()], ["a"], replace(SAMPLING, seed=seed))
        drawn += torch.zeros(TOKENS).index_add(0, sample.index[0], sample.weight[0])
    # a row of weight w is drawn with probability 1/w: on average it stands for itself
    spread = ((TOKENS / ROWS - 1) / times) ** 0.5
    assert (drawn / times - 1).abs().max() < 5 * spread
    assert (drawn / times - 1).square().mean().sqrt() < 1.2 * spread


def test_small_sets_are_taken_whole_and_sets_do_not_mix() -> None:
    tokens = torch.arange(TOKENS)
    prefix, some = (tokens < 5)[None], (tokens >= 5)[None] & (tokens % 3 != 0)
    sample = sample_rows([some, prefix], ["a"], SAMPLING)
    index, weight = sample.index[0], sample.weight[0]
    assert index[:5].tolist() == [0, 1, 2, 3, 4]
    assert (weight[:5] == 1).all()
    assert some[0, index[5:]].all()
    assert weight[5:].sum() == some.sum()


def test_inputs_of_other_lengths_are_filled_up() -> None:
    real = torch.arange(TOKENS) < torch.tensor([[TOKENS], [40], [0]])
    sample = sample_rows([real], ["a", "b", "c"], SAMPLING)
    assert sample.weight.sum(1).tolist() == [TOKENS, 40, 0]
    assert sample.index[1, :40].tolist() == list(range(40))
    alone = sample_rows([real[1:2]], ["b"], SAMPLING)
    assert torch.equal(sample.index[1, :40], alone.index[0])


def test_rows_follow_from_the_seed_and_the_input() -> None:
    def drawn(key: str, seed: int = 0) -> list[int]:
        return sample_rows([everything()], [key], replace(SAMPLING, seed=seed)).index[0].tolist()

    assert drawn("a") == drawn("a")
    assert drawn("a") != drawn("b")
    assert drawn("a") != drawn("a", seed=1)
    together = sample_rows([everything()], ["b", "a"], SAMPLING).index
    assert together[1].tolist() == drawn("a")


def test_short_sequences_are_not_sampled() -> None:
    assert RowSampling().applies(2049)
    assert not RowSampling().applies(2048)
    assert not EXACT.applies(1 << 20)
    assert not RowSampling(rows=4096).applies(4096)


# --- estimates


CALLS: dict[str, AttentionCall] = {
    "full": make_call(tokens=TOKENS, heads=2, batch=1),
    "causal": make_call(tokens=TOKENS, heads=2, batch=1, causal=True),
    "known normaliser": with_log_normaliser(make_call(tokens=TOKENS, heads=2, batch=1, causal=True)),
    "grouped": make_call(tokens=TOKENS, heads=4, kv_heads=2, batch=1, causal=True),
    "padding": make_call(tokens=TOKENS, heads=2, batch=1, mask=key_padding([range(TOKENS - 60)], TOKENS)),
    "window": make_call(tokens=TOKENS, heads=2, batch=1, mask=window(TOKENS, 90, 0)),
    "other keys": with_other_keys(make_call(tokens=TOKENS, heads=2, batch=1, causal=True), 3),
}


def sampled(call: AttentionCall, seed: int = 0, tokens: Tensor | None = None) -> AttentionCall:
    """The call with rows drawn as the loop draws them."""
    rows = Selection(call, tokens).rows[:, 0]
    few = rows & (call.visibility.count[:, 0] <= FEW_KEYS)
    keys = [str(b) for b in range(call.batch)]
    return replace(call, sample=sample_rows([rows, few], keys, replace(SAMPLING, seed=seed)))


def repeated(call: AttentionCall, times: int) -> AttentionCall:
    """A batch of one input over and over: each has rows of its own."""
    names = ("query", "key", "value", "output", "log_normaliser", "outside")
    parts = {name: part for name in names if (part := getattr(call, name)) is not None}
    return replace(call, **{name: part.expand(times, *part.shape[1:]) for name, part in parts.items()})


def of_rows(call: AttentionCall, softmax: SoftmaxStatistics) -> dict[str, Reading]:
    """Readings of drawn rows picked from the statistics of all rows, of one input or of each."""
    sample = call.sample
    assert sample is not None
    entropy, squares = sample.at(softmax.entropy), sample.at(softmax.sum_of_squares)
    statistics = CallStatistics(call, replace(softmax, entropy=entropy, sum_of_squares=squares))
    return readings_of(Selection(call, statistics=statistics), OF_PATTERN)


@pytest.mark.parametrize("case", CALLS)
def test_drawn_rows_are_the_rows_of_the_whole(case: str) -> None:
    whole = CALLS[case]
    call = sampled(whole)
    assert call.sample is not None
    rows = call.sample.at(whole.visibility.count) > 0
    drawn, of_all = softmax_statistics(call), softmax_statistics(whole)
    for name in ("entropy", "sum_of_squares"):
        found, expected = getattr(drawn, name), call.sample.at(getattr(of_all, name))
        assert found.shape == (1, whole.heads, call.sample.rows)
        torch.testing.assert_close(found * rows, expected * rows, rtol=1e-5, atol=1e-5)
    # what needs the log-normaliser only is of all rows
    assert (drawn.row_sum is None) == whole.is_softmax
    for name in ("self_weight", "first_weight", "log_normaliser", "row_sum")[: 3 + (not whole.is_softmax)]:
        torch.testing.assert_close(getattr(drawn, name), getattr(of_all, name))


@pytest.mark.parametrize("case", CALLS)
def test_estimates_have_no_bias_and_an_honest_error(case: str) -> None:
    whole, times = CALLS[case], 200
    known = {name: part for name, part in vars(softmax_statistics(whole)).items() if part is not None}
    softmax = {name: part.expand(times, -1, -1) for name, part in known.items()}
    drawn = of_rows(sampled(repeated(whole, times)), SoftmaxStatistics(**softmax))
    for name, reading in readings_of(Selection(whole), OF_PATTERN).items():
        how = METRICS[name].reduce
        exact = reduce([reading], 1, how)[0]
        found, error = reduce([drawn[name]], times, how), sampling_error([drawn[name]], times, how)
        spread = found.std(0)
        assert (spread > 0).all()
        # a percentile has a bias of its own, small against its error
        allowed = 1.0 if name == "entropy_p15" else 0.25
        assert ((found.mean(0) - exact).abs() < spread * (allowed + 4 / times**0.5)).all(), name
        honest = error.square().mean(0).sqrt() / spread
        assert (honest > (0.5 if name == "entropy_p15" else 0.65)).all(), (name, honest)
        assert (honest < (2.0 if name == "entropy_p15" else 1.35)).all(), (name, honest)
        if name != "entropy_p15":
            covered = ((found - exact).abs() < 2 * error).double().mean(0)
            assert (covered > 0.88).all(), (name, covered)


def test_controls_make_the_error_smaller() -> None:
    """A negative control of the regression: without it the same rows say less."""
    whole = CALLS["causal"]
    reading = of_rows(sampled(whole), softmax_statistics(whole))["entropy"]
    plain = reading._replace(controls=None)
    with_controls, without = (sampling_error([one], 1, "mean") for one in (reading, plain))
    assert (with_controls < 0.5 * without).all()


@pytest.mark.parametrize("how", ["mean", "percentile"])
def test_all_rows_drawn_are_the_exact_number(how: str) -> None:
    whole = CALLS["causal"]
    call = replace(whole, sample=sample_rows([everything()], ["a"], RowSampling(rows=TOKENS)))
    found = of_rows(call, softmax_statistics(whole))
    name = "entropy" if how == "mean" else "entropy_p15"
    exact = reduce([readings_of(Selection(whole), OF_PATTERN)[name]], 1, how)
    torch.testing.assert_close(reduce([found[name]], 1, how), exact, rtol=1e-9, atol=0)
    assert (sampling_error([found[name]], 1, how) == 0).all()


def test_padding_and_numbers_that_are_not_finite() -> None:
    call = CALLS["padding"]
    assert call.query is not None
    broken = call.query.clone()
    broken[:, :, -10:] = torch.nan  # padding: rows that do not count
    whole = replace(call, query=broken)
    found = reduce([readings_of(Selection(sampled(whole)), OF_PATTERN)["entropy"]], 1, "mean")
    assert found.isfinite().all()
    broken = call.query.clone()
    broken[:, :, : TOKENS - 60] = torch.nan
    found = readings_of(Selection(sampled(replace(call, query=broken))), OF_PATTERN)["entropy"]
    assert reduce([found], 1, "mean").isinf().all()


def test_windows_and_calls_pool_their_estimates() -> None:
    calls = [CALLS[name] for name in ("full", "causal")]
    parts = [of_rows(sampled(call), softmax_statistics(call))["entropy"] for call in calls]
    each = [reduce([part], 1, "mean") for part in parts]
    errors = [sampling_error([part], 1, "mean") for part in parts]
    rows = (TOKENS, TOKENS - 1)  # the first row of the causal one does not count
    mean = (rows[0] * each[0] + rows[1] * each[1]) / sum(rows)
    torch.testing.assert_close(reduce(parts, 1, "mean"), mean)
    error = ((rows[0] * errors[0]) ** 2 + (rows[1] * errors[1]) ** 2).sqrt() / sum(rows)
    torch.testing.assert_close(sampling_error(parts, 1, "mean"), error)
    small = [condensed(part, 1, "mean") for part in parts]
    torch.testing.assert_close(reduce(small, 1, "mean"), mean)
    torch.testing.assert_close(sampling_error(small, 1, "mean"), error)


# --- the shape of attention


GEOMETRIES = {"text": TEXT, "image": Geometry(prefix=0, rows=20, cols=20, patch_size=8.0)}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("case", ["full", "causal", "padding", "window"])
def test_shape_metrics_of_drawn_rows(case: str, geometry: str) -> None:
    whole, place = CALLS[case], GEOMETRIES[geometry]
    call = sampled(whole)
    assert call.sample is not None
    names = [name for name in SHAPE_METRICS if not name.startswith("top_")]
    (exact,) = shape_readings([Selection(whole)], names, geometry=place)
    (found,) = shape_readings([Selection(call)], names, geometry=place)
    for name in names:
        if found[name].sample is None:  # sums over rows, and what needs single keys only
            assert_same(reduce([found[name]], 1, "mean"), reduce([exact[name]], 1, "mean"), name)
            continue
        shape = (1, whole.heads, TOKENS)
        values = call.sample.at(exact[name].values.expand(shape))
        counts = call.sample.at(exact[name].weights.expand(shape)) > 0
        assert_same(found[name].values * counts, values * counts, name)
        assert ((found[name].weights > 0) == (counts & (call.sample.weight > 0)[:, None])).all(), name
    drawn = {name for name in names if found[name].sample is not None}
    kept = {"first_key_received", "sink_rate", *GROUPS["nmi"]}
    assert drawn.isdisjoint(kept | {"sink_share", "sink_strength", "received_gini", "sink_value_norm"})
    assert {"attention_distance", "near_share", "norm_weighted_entropy"} <= drawn


def test_overlap_compares_the_same_rows() -> None:
    first, second = (make_call(tokens=TOKENS, heads=2, batch=1, seed=seed) for seed in (1, 2))
    layers = [replace(first, layer=0), replace(second, layer=1)]
    exact = overlaps(layers)
    found = overlaps([sampled(call) for call in layers])
    sample = sampled(layers[0]).sample
    assert sample is not None
    torch.testing.assert_close(found.values, sample.at(exact.values))
    other = overlaps([sampled(layers[0], seed=0), sampled(layers[1], seed=1)])
    assert (other.weights == 0).all()


def overlaps(layers: Sequence[AttentionCall]) -> Reading:
    neighbour = Neighbour(1)
    found = [shape_readings([Selection(call)], GROUPS["overlap"], neighbour=neighbour)[0] for call in layers]
    return found[1]["top_key_overlap"]


def assert_same(found: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(
        found, expected, rtol=2e-5, atol=1e-5, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


# --- in the loop


def samples_of(*lengths: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(5)
    drawn = [2 * torch.randn(length, 16, generator=generator) for length in lengths]
    return [Sample(f"input-{i}", partial(torch.clone, x)) for i, x in enumerate(drawn)]


def long_tower(*, text: bool = False) -> Tower:
    torch.manual_seed(0)
    return tower_of(Stack(Attention(), Attention(kv_heads=2, enable_gqa=True)), text=text)


def table(batches: Iterator[Sequence[LayerValues]]) -> tuple[np.ndarray, tuple[str, ...]]:
    """`[layer, token set, metric, input, head]` and the names of the metrics."""
    found = list(batches)
    values = np.concatenate([np.stack([block.values for block in batch]) for batch in found], 3)
    return values, found[0][0].metrics


@pytest.mark.parametrize("text", [False, True])
def test_the_loop_samples_long_inputs_and_says_how_sure_it_is(text: bool) -> None:
    tower, samples = long_tower(text=text), samples_of(TOKENS, TOKENS, TOKENS)
    sets = tower.token_sets
    exact, plain_names = table(measure(tower, samples, token_sets=sets, sampling=EXACT))
    found, names = table(measure(tower, samples, token_sets=sets, sampling=SAMPLING))
    assert names == (*plain_names, *(name + SAMPLING_ERROR for name in OF_PATTERN))
    errors = found[:, :, len(plain_names) :]
    for place, name in enumerate(plain_names):
        if name not in OF_PATTERN:
            np.testing.assert_allclose(found[:, :, place], exact[:, :, place], rtol=1e-6, err_msg=name)
            continue
        error = errors[:, :, OF_PATTERN.index(name)]
        for number, token_set in enumerate(sets):
            off = np.abs(found[:, number, place] - exact[:, number, place])
            if token_set in ("cls", "registers"):  # all of their rows are there
                np.testing.assert_allclose(off, 0, atol=2e-5)
                assert (error[:, number] == 0).all()
            else:
                assert (error[:, number] > 0).mean() > 0.9
                # few drawn rows say little of how sure a percentile is
                if name == "entropy_p15":
                    assert off.mean() < 3 * error[:, number].mean()
                    continue
                assert (off < 6 * error[:, number] + 1e-5).all(), name


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batches_do_not_change_the_sample(batch_size: int) -> None:
    """Inputs of several lengths: the padding of a batch moves no row either."""
    tower, samples = long_tower(text=True), samples_of(TOKENS, TOKENS + 30, TOKENS + 10)
    together, _ = table(measure(tower, samples, sampling=SAMPLING, batch_size=3))
    apart, _ = table(measure(tower, samples, sampling=SAMPLING, batch_size=batch_size))
    np.testing.assert_allclose(apart, together, rtol=2e-5, atol=2e-5)
    moved, _ = table(measure(tower, samples, sampling=replace(SAMPLING, seed=1)))
    place = list(METRICS).index("entropy")
    assert (np.abs(moved - together)[:, :, place] > 1e-4).any()


def test_shards_do_not_change_the_sample() -> None:
    tower, samples = long_tower(), samples_of(TOKENS, TOKENS)
    together, _ = table(measure(tower, samples, sampling=SAMPLING, batch_size=1))
    parts = [table(measure(tower, [one], sampling=SAMPLING))[0] for one in samples]
    np.testing.assert_array_equal(np.concatenate(parts, 3), together)


def test_at_the_limit_every_row_is_there() -> None:
    tower, samples = long_tower(), samples_of(TOKENS)
    exact, names = table(measure(tower, samples, sampling=EXACT))
    found, at_limit = table(measure(tower, samples, sampling=replace(SAMPLING, above=TOKENS)))
    assert at_limit == names
    np.testing.assert_array_equal(found, exact)


def test_a_pattern_that_is_there_is_not_sampled() -> None:
    call = with_pattern(make_call(tokens=TOKENS, heads=2, batch=1))
    collected = BatchReadings(["entropy"], ["all"], long_tower(text=True), Batch(("a",), None), SAMPLING)
    assert collected.sampled(call, [everything()]) is call


def test_the_sample_is_a_frozen_thing_of_few_numbers() -> None:
    sample = sample_rows([everything()], ["a"], SAMPLING)
    assert isinstance(sample, RowSample)
    assert {tuple(x.shape) for x in (sample.index, sample.weight, sample.partner)} == {(1, ROWS)}


# --- against the spread over inputs


def embedded_vit() -> tuple[Tower, list[Sample], RowSampling]:
    """1,600 patches of 4 pixels."""
    model = load(parse("demo:vit-p4,img_size=160"), device="cpu", dtype=torch.float32)
    tower = model.tower("vision")
    samples = list(itertools.islice(tower.samples(inputs.demo_images(), None), 5))
    return tower, samples, RowSampling(rows=512, above=1024)


def embedded_lm() -> tuple[Tower, list[Sample], RowSampling]:
    """2,304 tokens, nine times its context: positions are stretched."""
    model = load(parse("demo:lm"), device="cpu", dtype=torch.float32)
    tower, tokens = model.tower("text"), 2304
    module: Any = model.module
    learned = module.wpe.weight.data.T[None]
    stretched = F.interpolate(learned, size=tokens, mode="linear")[0].T.contiguous()
    module.wpe = nn.Embedding.from_pretrained(stretched)
    pieces = itertools.islice(tower.samples(texts("demo"), 128), 6 * tokens // 128)
    text = [token for piece in pieces for token in piece.read()]
    windows = [text[i * tokens : (i + 1) * tokens] for i in range(6)]
    return tower, [Sample(f"w{i}", partial(list, own)) for i, own in enumerate(windows)], RowSampling()


@pytest.mark.parametrize("build", [embedded_vit, embedded_lm])
def test_the_error_is_below_a_tenth_of_the_spread_over_inputs(
    build: Callable[[], tuple[Tower, list[Sample], RowSampling]],
) -> None:
    tower, samples, sampling = build()
    names = ["entropy", "entropy_normalized", "effective_keys"]
    found, _ = table(measure(tower, samples, metrics=names, sampling=sampling, batch_size=1))
    numbers, errors = found[:, 0, :3].mean(-1), found[:, 0, 3:].mean(-1)  # [layer, metric, input]
    share = np.sqrt((errors**2).mean(-1)) / numbers.std(-1, ddof=1)
    assert (np.median(share, axis=0) < 0.1).all(), share
    assert (errors > 0).all()
