"""Every shape metric against slow dense float64 references, hand-made patterns and exact identities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import (
    CASES,
    OTHER_TOKENS,
    Array,
    dense_pattern,
    dense_visible,
    float64,
    key_padding,
    make_call,
    mean,
    random_mask,
    window,
    with_dense_output,
    with_log_normaliser,
    with_maps,
    with_pattern,
)
from torch import Tensor

from diag.attention import pattern
from diag.attention import positions as geometry_of
from diag.attention.call import AttentionCall
from diag.attention.positions import TEXT, Geometry
from diag.attention.softmax_statistics import CallStatistics
from diag.errors import UserError
from diag.metrics import pattern_pass
from diag.metrics import pattern_shape as shape
from diag.metrics.catalogue import CATALOGUE, RATIOS
from diag.metrics.default import METRICS, Selection, selections_of
from diag.metrics.names import metric_names
from diag.metrics.pattern_pass import Neighbour
from diag.metrics.pattern_shape import GROUPS, SHAPE_METRICS, shape_readings
from diag.metrics.readings import reduce

every_case = pytest.mark.parametrize("case", CASES)
NAMES = list(SHAPE_METRICS)
OVERLAP = list(GROUPS["overlap"])
IMAGE = Geometry(prefix=1, rows=3, cols=4, patch_size=16.0)  # of the 13 tokens of most cases
OF_OTHER_TOKENS = (
    *("first_key_received", "sink_rate", "sink_share", "sink_strength", "received_gini", "sink_value_norm"),
    *("attention_nmi", "row_sum", "norm_weighted_first", "norm_weighted_entropy"),
)
"""Metrics that are defined where keys are not the tokens' own."""
SUMS = ("first_key_received", "previous_weight", "near_share", "prefix_share", "row_sum")
"""Metrics that are sums of weights, whatever their signs."""
SQRT2 = math.sqrt(2)


def measured(
    call: AttentionCall,
    names: Sequence[str] = NAMES,
    tokens: Tensor | None = None,
    *,
    geometry: Geometry = TEXT,
    projection: Tensor | None = None,
    statistics: CallStatistics | None = None,
) -> dict[str, Array]:
    """One number per row of the batch and query head, NaN where undefined."""
    on = Selection(call, tokens, statistics)
    (found,) = shape_readings([on], names, geometry=geometry, projection=projection)
    return {name: reduce([reading], call.batch, "mean").numpy() for name, reading in found.items()}


# --- the slow reference -----------------------------------------------------------------------------


def distance(i: int, j: int, geometry: Geometry) -> float:
    """From token i to token j, both after the prefix."""
    if geometry.cols is None:
        return float(abs(i - j))
    (a, b), (c, d) = (divmod(t - geometry.prefix, geometry.cols) for t in (i, j))
    return geometry.patch_size * math.hypot(a - c, b - d)


def is_near(i: int, j: int, geometry: Geometry) -> bool:
    if geometry.cols is None:
        return abs(i - j) <= 16
    return distance(i, j, geometry) <= geometry.patch_size * 1.5


def gini(x: Array) -> float:
    """Mean absolute difference over twice the mean."""
    return float(np.abs(x[:, None] - x[None]).mean() / (2 * x.mean()))


def entropy(p: Array) -> float:
    return -sum(float(x * np.log(x)) for x in p.flatten() if x > 0)


def reference(
    call: AttentionCall,
    tokens: Tensor | None = None,
    *,
    geometry: Geometry = TEXT,
    projection: Tensor | None = None,
) -> dict[str, Array]:
    """All metrics but the overlap, from the definitions, one number after the other."""
    pattern, visible, value = dense_pattern(call), dense_visible(call), float64(call.value)
    batch, heads, length, _ = call.output.shape
    others = [name for name in NAMES if name not in OF_OTHER_TOKENS] if not call.own_keys else []
    chosen = np.ones((batch, length), dtype=bool) if tokens is None else tokens.expand(batch, -1).numpy()
    result = {name: np.full((batch, heads), np.nan) for name in NAMES}
    for b, h in np.ndindex(batch, heads):
        real: Array = np.any(visible[b], axis=(0, 1))
        keys = [t for t in range(length) if chosen[b, t] and (real[t] if call.own_keys else True)]
        receivers = keys if call.own_keys else list(np.flatnonzero(real))
        f = value[b, h // call.group] * real[:, None]
        f = f if projection is None else f @ float64(projection)[h]
        for name, number in of_one_head(
            pattern[b, h],
            visible[b, h],
            np.linalg.norm(value[b, h // call.group], axis=-1),
            np.linalg.norm(f, axis=-1),
            keys,
            receivers,
            real,
            geometry,
        ).items():
            result[name][b, h] = math.nan if name in others else number
    return result


def of_one_head(
    pattern: Array,
    visible: Array,
    lengths: Array,
    norms: Array,
    keys: list[int],
    receivers: list[int],
    real: Array,
    geometry: Geometry,
) -> dict[str, float]:
    tokens, square = len(pattern), pattern.shape[0] == pattern.shape[1]
    rows = [i for i in keys if visible[i].sum() >= 2]
    first = int(np.flatnonzero(real)[0]) if real.any() else 0
    to_first = [pattern[i, first] for i in keys if visible[i].any()]
    found = {
        "first_key_received": mean(to_first),
        "sink_rate": float(mean(to_first) > 0.3) if to_first else math.nan,
    }
    if rows and len(receivers) > 1:
        received = pattern[np.ix_(rows, receivers)].sum(0)
        found["sink_share"] = received.max() / len(rows)
        if received.max() > 0:
            found["sink_strength"] = math.log10(
                received.max() / max(np.median(received), received.max() / 1e6)
            )
            found["received_gini"] = gini(received)
        if received.max() > 0 and np.median(lengths[receivers]) > 0:
            longest = lengths[receivers][received.argmax()]
            found["sink_value_norm"] = longest / np.median(lengths[receivers])
    if len(rows) > 1:
        joint = pattern[rows] / pattern[rows].sum()
        of_query, of_key = entropy(joint.sum(1)), entropy(joint.sum(0))
        information = of_query + of_key - entropy(joint)
        found["attention_nmi"] = information / math.sqrt(of_query * of_key) if of_key > 1e-6 else 0.0
    columns: dict[str, list[float]] = {}

    def add(name: str, number: float) -> None:
        columns.setdefault(name, []).append(number)

    places = range(geometry.prefix, tokens)
    for i in rows:
        a, seen = pattern[i], visible[i]
        add("row_sum", a.sum())
        if geometry.prefix:
            add("prefix_share", a[: geometry.prefix].sum())
        if square and geometry.cols is None and i > geometry.prefix and real[i - 1]:
            add("previous_weight", a[i - 1])
        if square and i >= geometry.prefix and any(seen[j] for j in places):
            to = np.array([distance(i, j, geometry) for j in places])
            near = np.array([is_near(i, j, geometry) for j in places])
            weights, there = a[geometry.prefix :], seen[geometry.prefix :]
            add("near_share", weights[near].sum())
            add("near_share_uniform", a.sum() * (there & near).sum() / seen.sum())
            add("attention_distance_uniform", to[there].mean())
            if weights.sum() > 0 and (weights >= 0).all():
                if to[there].any():
                    add("attention_distance_ratio", (weights * to).sum() / weights.sum() / to[there].mean())
                add("attention_distance", (weights * to).sum() / weights.sum())
                add("attention_distance_rms", math.sqrt((weights * to**2).sum() / weights.sum()))
        shares = a * norms
        if shares.sum() > 0:
            add("norm_weighted_self", shares[i] / shares.sum() if square else math.nan)
            add("norm_weighted_first", shares[first] / shares.sum())
            add("norm_weighted_entropy", entropy(shares / shares.sum()))
    found |= {name: mean(column) for name, column in columns.items()}
    if (pattern[visible.any(-1)] < 0).any():  # rows are no shares of anything
        found = {name: number for name, number in found.items() if name in SUMS}
    return found


def assert_matches(
    call: AttentionCall,
    tokens: Tensor | None = None,
    *,
    geometry: Geometry = TEXT,
    projection: Tensor | None = None,
) -> None:
    """All metrics, NaN at the same places."""
    found = measured(call, tokens=tokens, geometry=geometry, projection=projection)
    expected = reference(call, tokens, geometry=geometry, projection=projection)
    assert list(found) == NAMES
    for name, numbers in found.items():
        assert numbers.shape == (call.batch, call.heads), name
        np.testing.assert_allclose(numbers, expected[name], rtol=2e-5, atol=2e-5, err_msg=name)


# --- against the reference --------------------------------------------------------------------------


@every_case
def test_metrics_match_the_reference(case: str) -> None:
    assert_matches(CASES[case])


@every_case
def test_metrics_of_an_image_match_the_reference(case: str) -> None:
    """A class token and a grid of 3 × 4 patches, whatever the mask."""
    if CASES[case].tokens == 13:
        assert_matches(CASES[case], geometry=IMAGE)


@pytest.mark.parametrize("case", OTHER_TOKENS)
def test_metrics_of_other_tokens_keys_match_the_reference(case: str) -> None:
    call = OTHER_TOKENS[case]
    assert_matches(call)
    assert_matches(call, random_mask(2, 13, seed=3), geometry=IMAGE)
    found = measured(call)
    defined = {name for name in NAMES if not np.isnan(found[name]).all()}
    assert defined == {*OF_OTHER_TOKENS}


@pytest.mark.parametrize("subset", ["patches", "every other", "random", "two", "one", "none"])
@pytest.mark.parametrize(
    "case",
    ["full", "causal left padding", "mask per head, unseen keys", "group of 2, bias", "zero vectors",
     "full; pattern given", "bias and -inf; log-normaliser given", "bfloat16"],
)  # fmt: skip
def test_token_sets_match_the_reference(case: str, subset: str) -> None:
    call, position = CASES[case], torch.arange(13)
    tokens = {
        "patches": (position >= 1).expand(call.batch, -1),
        "every other": (position % 2 == 0).expand(call.batch, -1),
        "random": random_mask(call.batch, 13, seed=3),
        "two": ((position == 6) | (position == 8)).expand(call.batch, -1),
        "one": (position == 6).expand(call.batch, -1),
        "none": torch.zeros(call.batch, 13, dtype=torch.bool),
    }[subset]
    assert_matches(call, tokens, geometry=IMAGE)


@pytest.mark.parametrize("case", ["full", "group of 2, left padding", "zero vectors", "narrow values"])
def test_norms_through_an_output_projection(case: str) -> None:
    """f(v) = v W_O of each query head; heads that share values differ."""
    call = CASES[case]
    generator = torch.Generator().manual_seed(4)
    projection = torch.randn(call.heads, call.value.shape[-1], 40, generator=generator)
    assert_matches(call, projection=projection)
    without = measured(call, ["norm_weighted_self"])["norm_weighted_self"]
    with_it = measured(call, ["norm_weighted_self"], projection=projection)["norm_weighted_self"]
    assert np.nanmax(np.abs(with_it - without)) > 1e-3


def test_several_token_sets_share_one_pass() -> None:
    """All sets at once give what each gives alone, rows of one being dead for the other included."""
    call = CASES["mask per head, unseen keys"]
    sets = [torch.arange(13)[None] >= 1, torch.arange(13)[None] == 0, None]
    together = shape_readings(selections_of(call, sets), NAMES, geometry=IMAGE)
    for tokens, found in zip(sets, together, strict=True):
        alone = measured(call, tokens=tokens, geometry=IMAGE)
        for name, reading in found.items():
            numbers = reduce([reading], call.batch, "mean").numpy()
            np.testing.assert_allclose(numbers, alone[name], rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("case", ["full", "causal left padding", "mask per head, unseen keys"])
def test_a_group_alone_gives_the_same_numbers(case: str, group: str) -> None:
    everything = measured(CASES[case], geometry=IMAGE)
    for name, numbers in measured(replace(CASES[case]), GROUPS[group], geometry=IMAGE).items():
        assert np.array_equal(numbers, everything[name], equal_nan=True), name


@pytest.mark.parametrize("budget", [1, 13 * 3, 13 * 50])
@pytest.mark.parametrize("geometry", [TEXT, IMAGE], ids=["text", "image"])
@pytest.mark.parametrize("case", [case for case in CASES if CASES[case].tokens == 13][::3])
def test_blocks_do_not_change_the_metrics(
    case: str, geometry: Geometry, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured(replace(CASES[case]), geometry=geometry)
    monkeypatch.setitem(pattern.BLOCK_ELEMENTS, "cpu", budget)
    monkeypatch.setitem(pattern.BLOCK_ROWS, "cpu", 3)
    blocked = measured(replace(CASES[case]), geometry=geometry)
    for name, numbers in blocked.items():
        np.testing.assert_allclose(numbers, whole[name], rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("geometry", [TEXT, Geometry(1, 10, 20, 8.0)], ids=["text", "image"])
def test_long_sequences_in_many_blocks(geometry: Geometry, monkeypatch: pytest.MonkeyPatch) -> None:
    """201 tokens, causal or not, with keys further away than what is near."""
    monkeypatch.setitem(pattern.BLOCK_ROWS, "cpu", 32)
    monkeypatch.setitem(pattern.BLOCK_ELEMENTS, "cpu", 201 * 32)
    for causal in (False, True):
        call = make_call(batch=1, heads=2, tokens=201, causal=causal, seed=70)
        assert_matches(call, geometry=geometry)
        assert_matches(with_log_normaliser(call), geometry=geometry)
        assert_matches(with_pattern(call), geometry=geometry)


def test_the_pass_uses_the_log_normaliser_that_is_there() -> None:
    call = CASES["causal left padding"]
    fresh = measured(call)
    statistics = CallStatistics(call)
    assert statistics.known_log_normaliser is None
    assert statistics.softmax.log_normaliser is not None
    assert statistics.known_log_normaliser is statistics.softmax.log_normaliser
    for name, numbers in measured(call, statistics=statistics).items():
        np.testing.assert_allclose(numbers, fresh[name], rtol=1e-5, atol=2e-6, err_msg=name)
    shifted = replace(call, log_normaliser=statistics.softmax.log_normaliser + math.log(2))
    halved = measured(shifted, ["first_key_received"])["first_key_received"]
    np.testing.assert_allclose(2 * halved, fresh["first_key_received"], rtol=1e-5)


# --- batches, heads, padding ------------------------------------------------------------------------


@every_case
def test_the_order_of_inputs_does_not_matter(case: str) -> None:
    call = CASES[case]
    order = list(reversed(range(call.batch)))
    turned = {
        name: x[order] for name, x in vars(call).items()
        if isinstance(x, Tensor) and not (name in ("mask", "outside") and (x.ndim < 4 or x.shape[0] == 1))
    }  # fmt: skip
    before, after = measured(call), measured(replace(call, **turned))  # type: ignore[arg-type]
    for name in NAMES:
        np.testing.assert_allclose(after[name], before[name][order], rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_equal_repeated_heads(kv_heads: int) -> None:
    call = make_call(kv_heads=kv_heads, causal=True)
    assert call.key is not None
    repeated = replace(
        call,
        key=call.key.repeat_interleave(call.group, 1),
        value=call.value.repeat_interleave(call.group, 1),
    )
    grouped, expected = measured(call), measured(repeated)
    for name in NAMES:
        np.testing.assert_allclose(grouped[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    if kv_heads > 1:  # negative control: the other head's values have other norms
        wrong = measured(replace(call, value=call.value.flip(1)))
        assert np.abs(wrong["norm_weighted_self"] - grouped["norm_weighted_self"]).max() > 1e-3


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("real", [range(9), range(4, 13)])
def test_padding_changes_nothing(causal: bool, real: range) -> None:
    """An input inside a padded batch gives the numbers that it gives alone, whatever the padding holds."""
    short = make_call(batch=1, tokens=9, causal=causal, seed=3)
    padded = make_call(batch=1, tokens=13, causal=causal, mask=key_padding([real], 13), seed=99)
    filled = {}
    for name in ("query", "key", "value", "output"):
        x = torch.full_like(getattr(padded, name), math.nan)
        x[:, :, list(real)] = getattr(short, name)
        filled[name] = x
    found, alone = measured(replace(padded, **filled)), measured(short)  # type: ignore[arg-type]
    for name in NAMES:
        np.testing.assert_allclose(found[name], alone[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["query", "value"])
def test_a_number_that_is_not_finite_shows(where: str, bad: float) -> None:
    """An overflow in a token that counts is not averaged away, and stays with its head."""
    call = CASES["zero vectors, causal"]
    broken = getattr(call, where).clone()
    broken[0, 3, 6, 0] = bad
    before, after = measured(call), measured(replace(call, **{where: broken}))
    of_values = {*GROUPS["norms"], "sink_value_norm"}
    of_visibility = {name for name in NAMES if name.endswith("uniform")} | {*OVERLAP, "prefix_share"}
    shown = of_values if where == "value" else set(NAMES) - of_visibility - {"sink_value_norm"}
    for name in NAMES:
        if name in shown:
            assert np.isinf(after[name][0, 3]), name
        after[name][0, 3] = before[name][0, 3]
        assert np.array_equal(after[name], before[name], equal_nan=True), name


@pytest.mark.parametrize("case", ["full", "causal left padding", "bias and -inf", "full; pattern given"])
def test_the_calls_tensors_are_left_alone(case: str) -> None:
    call = replace(CASES[case])
    before = {name: x.clone() for name, x in vars(call).items() if isinstance(x, Tensor)}
    shape_readings([Selection(call, random_mask(2, 13))], NAMES, neighbour=Neighbour(2))
    for name, x in before.items():
        assert torch.equal(getattr(call, name), x), name


def test_windows_are_pooled_by_token() -> None:
    """Two windows of one input in the batch: every token weighs the same, each softmax has its own sink."""
    call = make_call(batch=2, tokens=13, mask=key_padding([range(13), range(5)], 13), seed=71)
    each = measured(call)
    (found,) = shape_readings([Selection(call)], NAMES)
    for name in set(NAMES) - set(OVERLAP):
        pooled = reduce([found[name]], 1, "mean").numpy()[0]
        weights = np.array([12, 4] if name == "previous_weight" else [13, 5])
        weights = weights if np.isfinite(each[name]).all() else np.array([0, 0])
        expected = weights @ each[name] / weights.sum() if weights.any() else np.full(4, np.nan)
        np.testing.assert_allclose(pooled, expected, rtol=1e-6, atol=1e-7, err_msg=name)


# --- hand-made patterns -----------------------------------------------------------------------------


def pattern_call(
    pattern: Array | Tensor, *, causal: bool = False, lengths: Sequence[float] = ()
) -> AttentionCall:
    """One input, one head, with this pattern; values are unit vectors times `lengths`."""
    tokens = len(pattern)
    value = torch.eye(tokens) * torch.tensor(lengths or [1.0] * tokens)[:, None]
    call = make_call(batch=1, heads=1, tokens=tokens, dim=tokens, causal=causal)
    given = torch.as_tensor(pattern, dtype=torch.float32)[None, None]
    return with_dense_output(replace(call, query=None, key=None, value=value[None, None], pattern=given))


def numbers(call: AttentionCall, geometry: Geometry = TEXT) -> dict[str, float]:
    return {name: x.item() for name, x in measured(call, geometry=geometry).items()}


def test_everyone_attends_to_himself() -> None:
    found = numbers(pattern_call(torch.eye(9)), Geometry(0, 3, 3, 10.0))
    assert found["attention_nmi"] == pytest.approx(1, abs=1e-6)
    assert found["attention_distance"] == found["attention_distance_rms"] == 0
    assert found["sink_strength"] == pytest.approx(0, abs=1e-6)
    assert found["received_gini"] == pytest.approx(0, abs=1e-6)
    assert found["sink_share"] == found["first_key_received"] == pytest.approx(1 / 9)
    assert found["near_share"] == found["norm_weighted_self"] == 1
    assert found["norm_weighted_entropy"] == pytest.approx(0, abs=1e-6)


def test_everyone_attends_to_all_alike() -> None:
    """On a 3 × 3 grid of step 10, over all pairs; neighbourhoods are cut off at the border."""
    found = numbers(pattern_call(torch.full((9, 9), 1 / 9)), Geometry(0, 3, 3, 10.0))
    assert found["attention_nmi"] == pytest.approx(0, abs=1e-6)
    # pairs by distance: 24 × 1, 12 × 2, 16 × √2, 16 × √5, 4 × √8 of 81 ordered ones
    pairs = 24 * 1 + 12 * 2 + 16 * SQRT2 + 16 * math.sqrt(5) + 4 * math.sqrt(8)
    assert found["attention_distance"] == pytest.approx(10 * pairs / 81)
    assert found["attention_distance_uniform"] == pytest.approx(found["attention_distance"])
    # corners have 4, edges 6, the middle 9
    for name in GROUPS["position"][1:3]:
        assert found[name] == pytest.approx((4 * 4 + 4 * 6 + 9) / 81), name
    assert found["sink_strength"] == found["received_gini"] == pytest.approx(0, abs=1e-6)
    assert found["norm_weighted_entropy"] == pytest.approx(math.log(9))


def test_everyone_attends_to_the_first() -> None:
    pattern = torch.zeros(8, 8)
    pattern[:, 0] = 1
    found = numbers(pattern_call(pattern))
    assert found["first_key_received"] == found["sink_share"] == found["sink_rate"] == 1
    assert found["sink_strength"] == 6  # where it ends: the median key receives nothing
    assert found["received_gini"] == pytest.approx(7 / 8)
    assert found["attention_nmi"] == 0
    assert found["attention_distance"] == pytest.approx(3.5)
    assert found["attention_distance_rms"] == pytest.approx(
        np.mean([math.sqrt(i**2) for i in range(8)])
    )  # one key per row: the same
    assert found["previous_weight"] == pytest.approx(1 / 7)
    assert found["norm_weighted_first"] == 1


def test_everyone_attends_to_the_one_before() -> None:
    pattern = torch.zeros(40, 40)
    pattern[range(1, 40), range(39)] = 1
    pattern[0, 0] = 1
    found = numbers(pattern_call(pattern, causal=True))  # row 0 sees itself only: it never counts
    assert found["previous_weight"] == found["attention_distance"] == found["near_share"] == 1
    assert found["attention_nmi"] == pytest.approx(1, abs=1e-6)
    assert found["attention_distance_uniform"] == pytest.approx(np.mean([i / 2 for i in range(1, 40)]))
    seen = [min(i, 16) + 1 for i in range(1, 40)]
    assert found["near_share_uniform"] == pytest.approx(np.mean([n / (i + 2) for i, n in enumerate(seen)]))
    # Gu counts the first row: A_00 and A_10 of 40
    assert found["first_key_received"] == pytest.approx(2 / 40)
    assert found["sink_rate"] == 0


def test_half_to_a_far_key_and_half_to_oneself() -> None:
    """Mean and root mean square of {0, 4}."""
    pattern = 0.5 * torch.eye(5)
    pattern[:, 4] += 0.5
    only_first = torch.tensor([[True, False, False, False, False]])
    (found,) = shape_readings([Selection(pattern_call(pattern), only_first)], GROUPS["distance"])
    found_numbers = [reduce([reading], 1, "mean").item() for reading in found.values()]
    assert found_numbers == pytest.approx([2, math.sqrt(8), 2, 1])


def test_a_sink_of_short_value() -> None:
    """Kobayashi's observation: much weight, little norm."""
    pattern = torch.full((5, 5), 0.1)
    pattern[:, 0] = 0.6
    found = numbers(pattern_call(pattern, lengths=[0.1, 2, 2, 2, 2]))
    assert found["sink_share"] == pytest.approx(0.6)
    assert found["sink_strength"] == pytest.approx(math.log10(6))
    assert found["sink_value_norm"] == pytest.approx(0.05)
    assert found["norm_weighted_first"] == pytest.approx(0.06 / 0.86)


def test_prefix_tokens_take_no_part_in_distances() -> None:
    """Half the attention on the class token: distances are those of the other half, renormalised."""
    pattern = torch.full((10, 10), 1 / 18)
    pattern[:, 0] = 0.5
    grid = Geometry(1, 3, 3, 10.0)
    found = numbers(pattern_call(pattern), grid)
    alone = numbers(pattern_call(torch.full((9, 9), 1 / 9)), replace(grid, prefix=0))
    assert found["prefix_share"] == pytest.approx(0.5)
    assert found["near_share"] == pytest.approx(alone["near_share"] / 2)
    for name in GROUPS["distance"]:
        assert found[name] == pytest.approx(alone[name]), name
    assert math.isnan(found["previous_weight"])  # the patch to the left is not "before"


@pytest.mark.parametrize(("weight", "rate"), [(0.29, 0), (0.31, 1)])
def test_the_sink_rate_is_of_each_head(weight: float, rate: int) -> None:
    """ε = .3 of the mean over all 64 rows, first row included, as in the code of Gu 2024."""
    tokens = 64
    pattern = torch.zeros(tokens, tokens)
    pattern[0, 0] = 1
    for i in range(1, tokens):
        pattern[i, 1 : i + 1] = (1 - (weight * tokens - 1) / (tokens - 1)) / i
        pattern[i, 0] = (weight * tokens - 1) / (tokens - 1)
    call = pattern_call(pattern, causal=True)
    ratios = np.arange(tokens, 0, -1)  # importance of each key: a mean over the rows from it on
    importance = (dense_pattern(call)[0, 0] / ratios).sum(0)
    found = measured(call, ["first_key_received", "sink_rate"])
    assert found["first_key_received"].item() == pytest.approx(importance[0], abs=1e-6)
    assert importance[0] == pytest.approx(weight, abs=1e-6)
    assert found["sink_rate"].item() == rate


# --- geometry ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "prefix", "image_size", "windows", "expected"),
    [
        (197, 1, 224, 1, Geometry(1, 14, 14, 16.0)),
        (200, 4, (224, 224), 1, Geometry(4, 14, 14, 16.0)),
        (98, 0, (224, 112), 1, Geometry(0, 14, 7, 16.0)),
        (49, 0, 224, 64, Geometry(0, 7, 7, 4.0)),  # Swin, first stage
        (49, 0, 224, 1, Geometry(0, 7, 7, 32.0)),  # Swin, last stage
        (50, 1, 224, 1, Geometry(1, 7, 7, 32.0)),
        (198, 1, 224, 1, None),
        (197, 1, "native", 1, None),
        (197, 1, None, 1, None),
        (1, 1, 224, 1, None),
        (50, 0, 224, 2, None),
    ],
)
def test_the_grid_follows_from_the_image_size(
    tokens: int, prefix: int, image_size: object, windows: int, expected: Geometry | None
) -> None:
    found = Geometry.of_image(tokens, prefix, image_size, windows)
    assert found == (Geometry.unknown(prefix) if expected is None else expected)
    assert (found.grid(tokens) is None) == (expected is None)


@pytest.mark.parametrize("case", ["full", "causal left padding", "mask per head"])
def test_without_places_there_is_no_distance(case: str) -> None:
    """A wrong or unknown grid leaves out what needs it, and nothing else."""
    known = measured(CASES[case], geometry=IMAGE)
    for geometry in (Geometry.unknown(1), Geometry(1, 3, 5, 16.0)):
        found = measured(CASES[case], geometry=geometry)
        for name, values in found.items():
            if name in (*GROUPS["distance"], "near_share", "near_share_uniform"):
                assert np.isnan(values).all(), name
            else:
                assert np.array_equal(values, known[name], equal_nan=True), name


def test_patches_of_another_size_scale_the_distance() -> None:
    call = CASES["full"]
    coarse = measured(call, GROUPS["distance"], geometry=IMAGE)
    fine = measured(call, GROUPS["distance"], geometry=replace(IMAGE, patch_size=4.0))
    for name in GROUPS["distance"]:
        factor = 1 if name == "attention_distance_ratio" else 4
        np.testing.assert_allclose(fine[name] * factor, coarse[name], rtol=1e-6, err_msg=name)


# --- neighbouring layers ----------------------------------------------------------------------------


def overlaps(calls: Sequence[AttentionCall], inputs: int, top: int = 4) -> list[dict[str, Array]]:
    """The overlap readings of calls in the order of a forward pass."""
    neighbour = Neighbour(inputs)
    found = [
        shape_readings([Selection(call)], OVERLAP, neighbour=neighbour, top_keys=top)[0] for call in calls
    ]
    return [
        {name: reduce([reading], call.batch, "mean").numpy() for name, reading in part.items()}
        for call, part in zip(calls, found, strict=True)
    ]


@pytest.mark.parametrize(
    "case", ["full", "causal", "causal left padding", "mask per head, unseen keys", "group of 2, bias",
             "long causal", "full; pattern given", "bfloat16, causal, grouped"],
)  # fmt: skip
def test_overlap_matches_the_reference(case: str) -> None:
    one, top = CASES[case], 4
    assert one.key is None or one.query is not None
    other = replace(
        one,
        layer=1,
        query=None if one.query is None else one.query.flip(3),
        pattern=None if one.pattern is None else one.pattern.flip(3),
    )
    none, found = overlaps([one, other], one.batch, top)
    assert np.isnan(none["top_key_overlap"]).all()
    patterns, visible = [dense_pattern(call) for call in (one, other)], dense_visible(one)
    for b, h in np.ndindex(one.batch, one.heads):
        rows = [i for i in range(one.tokens) if visible[b, :, :, i].any() and visible[b, h, i].sum() > top]
        shared = [
            len(set.intersection(*(set(np.argsort(-p[b, h, i], kind="stable")[:top]) for p in patterns)))
            / top
            for i in rows
        ]
        assert found["top_key_overlap"][b, h] == pytest.approx(mean(shared), nan_ok=True)
        chance = mean([top / visible[b, h, i].sum() for i in rows])
        assert found["top_key_overlap_chance"][b, h] == pytest.approx(chance, nan_ok=True)


def test_overlap_of_equal_and_of_disjoint_layers() -> None:
    one = CASES["long"]
    assert one.query is not None
    same, opposite = replace(one, layer=1), replace(one, layer=2, query=-one.query)
    _, equal, disjoint = overlaps([one, same, opposite], 2)
    assert (equal["top_key_overlap"] == 1).all()
    assert (disjoint["top_key_overlap"] == 0).all()  # the four largest of 40 scores, and the four smallest
    assert np.allclose(disjoint["top_key_overlap_chance"], 0.1)


def test_who_is_a_neighbour() -> None:
    """Depths that follow each other, the same tokens, one softmax over each input."""
    one = make_call(tokens=20)
    at = {layer: replace(one, layer=layer) for layer in range(6)}

    def defined(calls: Sequence[AttentionCall], inputs: int = 2) -> list[bool]:
        return [bool(np.isfinite(part["top_key_overlap"]).all()) for part in overlaps(calls, inputs)]

    assert defined([at[0], at[1], at[2]]) == [False, True, True]
    assert defined([at[0], at[2], at[3]]) == [False, False, True]  # a layer left out
    assert defined([at[0], at[1], at[1], at[2], at[3]])[3:] == [False, True]  # window by window
    assert defined([at[0], at[1]], inputs=1) == [False, False]  # two windows of one input
    short = replace(make_call(tokens=9), layer=1)
    assert defined([at[0], short, at[2]]) == [False, False, False]
    assert [np.isnan(x["top_key_overlap"]).all() for x in overlaps([short], 2)] == [True]


def test_too_few_keys_to_choose_from() -> None:
    """With no more than k keys every choice is the same: such rows do not count."""
    call = make_call(tokens=10, causal=True)
    assert all(
        np.isnan(part["top_key_overlap"]).all()
        for part in overlaps([call, replace(call, layer=1)], 2, top=10)
    )
    found = overlaps([call, replace(call, layer=1)], 2, top=9)[1]
    assert np.allclose(found["top_key_overlap_chance"], 0.9)


# --- several maps of one layer


@pytest.mark.parametrize("known", [False, True], ids=["streamed", "with lse"])
@pytest.mark.parametrize("case", ["group of 2", "causal left padding", "random mask", "mask per head"])
def test_of_added_maps_sums_of_weights_are_measured_and_nothing_that_takes_them_for_shares(
    case: str, known: bool
) -> None:
    call = with_maps(CASES[case], -0.4, 0.3, known=known)
    for geometry in (TEXT, IMAGE):
        found, expected = measured(call, geometry=geometry), reference(call, geometry=geometry)
        for name, numbers in found.items():
            if SHAPE_METRICS[name].of_shares:
                assert np.isnan(numbers).all(), name
            else:
                np.testing.assert_allclose(numbers, expected[name], rtol=2e-5, atol=2e-5, err_msg=name)
    sums = {name for name in NAMES if not SHAPE_METRICS[name].of_shares}
    assert sums == {*SUMS}
    assert np.abs(found["row_sum"] - 1).max() > 0.1  # the last map's coefficient differs from row to row


def test_a_row_that_sees_nothing_has_a_sum_of_zero() -> None:
    mask = key_padding([range(13), range(4, 13)], 13) & torch.ones(13, 13, dtype=torch.bool).tril()
    for call in (make_call(mask=mask), with_maps(make_call(mask=mask), -0.5)):
        live = (call.visibility.count > 0).expand(2, 4, 13)
        found = pattern_pass.pattern_pass(CallStatistics(call), ["sum"], [live], live, geometry=TEXT)["sum"]
        assert (~live).any()
        assert (found[~live] == 0).all()
        np.testing.assert_allclose(found, dense_pattern(call).sum(-1), atol=1e-5)


def test_the_sum_of_a_row_is_that_of_the_weights_which_the_model_used() -> None:
    call = with_log_normaliser(make_call())
    assert call.log_normaliser is not None
    # a sink that is no token takes half of every row: what the kernel returns is larger by ln 2
    sink = replace(call, log_normaliser=call.log_normaliser + math.log(2))
    np.testing.assert_allclose(measured(sink, ["row_sum"])["row_sum"], 0.5, rtol=1e-5)
    half = replace(with_pattern(call), pattern=torch.from_numpy(dense_pattern(call) / 2).float())
    np.testing.assert_allclose(measured(half, ["row_sum"])["row_sum"], 0.5, rtol=1e-5)


# --- the table --------------------------------------------------------------------------------------


def test_every_metric_says_what_it_is() -> None:
    assert set(SHAPE_METRICS).isdisjoint(METRICS)
    for name, metric in SHAPE_METRICS.items():
        assert len(CATALOGUE[name].definition.splitlines()) == 1, name
        assert CATALOGUE[name].definition, name
        assert CATALOGUE[name].source, name
        assert CATALOGUE[name].unit, name
        needs = {need.removeprefix("uniform ") for need in metric.needs}
        assert needs, name
        assert needs <= set(pattern_pass.QUANTITIES), name


def test_groups_are_written_out() -> None:
    assert set(GROUPS) == {"sinks", "distance", "nmi", "overlap", "position", "sum", "norms"}
    assert set(GROUPS).isdisjoint({*SHAPE_METRICS, *METRICS})
    assert sorted(name for group in GROUPS.values() for name in group) == sorted(SHAPE_METRICS)
    assert metric_names(["entropy", "nmi", "attention_nmi"]) == ["entropy", "attention_nmi"]
    assert metric_names(["distance"]) == list(GROUPS["distance"])
    assert metric_names(None) == metric_names(["default"]) == [*METRICS, *RATIOS]
    assert metric_names(["nmi", "default"]) == ["attention_nmi", *METRICS, *RATIOS]
    for wrong, right in (("positon", "position"), ("attention_nm", "attention_nmi"), ("entropi", "entropy")):
        with pytest.raises(UserError, match=f"unknown metric '{wrong}'") as caught:
            metric_names([wrong])
        assert caught.value.tip is not None
        assert right in caught.value.tip


def test_what_is_near_is_what_the_definitions_say() -> None:
    assert geometry_of.NEAR_TOKENS == 16
    assert geometry_of.NEAR_PATCHES == 1
    assert shape.SINK == 0.3
    assert shape.TOP_KEYS == 10
    assert "≤ 16" in CATALOGUE["near_share"].definition
    assert "k = 10" in CATALOGUE["top_key_overlap"].definition


# --- memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", [TEXT, Geometry(0, 48, 48, 8.0)], ids=["text", "image"])
def test_no_tensor_is_token_by_token(geometry: Geometry) -> None:
    """2,304 tokens: what is allocated at any time stays far below one T × T pattern of 21 MB per head."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    tokens = 48 * 48
    for causal in (False, True):
        call = make_call_of(tokens, causal)
        with Sizes():
            shape_readings([Selection(call)], NAMES, geometry=geometry, neighbour=Neighbour(1))
    assert 1 << 20 < largest <= 8 * pattern.BLOCK_ELEMENTS["cpu"] / 2


def make_call_of(tokens: int, causal: bool) -> AttentionCall:
    """A call without its dense output."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, tokens, 8, generator=generator) for _ in range(3))
    return AttentionCall(0, "layer", query, key, value, value, None, causal, 0.35)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_metrics_on_cuda() -> None:
    for case, call in CASES.items():
        on_device = {name: x.cuda() for name, x in vars(call).items() if isinstance(x, Tensor)}
        moved = replace(call, **on_device)  # type: ignore[arg-type]
        (found,) = shape_readings([Selection(moved)], NAMES)
        expected = reference(call)
        for name, reading in found.items():
            numbers_of = reduce([reading], call.batch, "mean").cpu().numpy()
            np.testing.assert_allclose(
                numbers_of, expected[name], rtol=1e-4, atol=1e-4, err_msg=f"{case}: {name}"
            )


def test_a_window_mask_of_a_text() -> None:
    """The uniform reference is of the keys that are seen: in a window of 4 to the left, near ones only."""
    call = make_call(tokens=30, mask=window(30, 4, 0), seed=72)
    found = measured(call)
    assert np.allclose(found["near_share"], 1, atol=1e-6)
    assert np.allclose(found["near_share_uniform"], 1)
    expected = np.mean([min(i, 4) / 2 for i in range(1, 30)])
    assert np.allclose(found["attention_distance_uniform"], expected)
