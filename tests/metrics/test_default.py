"""Every metric against the dense float64 reference, hand-worked numbers and exact identities."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import (
    CASES,
    OTHER_TOKENS,
    dense_pattern,
    key_padding,
    make_call,
    pairwise,
    random_mask,
    reference,
    with_dense_output,
    with_log_normaliser,
    with_maps,
    with_mixed_heads,
    without,
)
from torch import Tensor

from diag.attention import pattern, value_spread
from diag.attention.call import AttentionCall
from diag.attention.row_sums import row_sums
from diag.attention.softmax_statistics import softmax_statistics
from diag.attention.value_spread import ANCHORS, anchors
from diag.errors import UserError
from diag.metrics import default as metrics
from diag.metrics.catalogue import CATALOGUE, RATIOS
from diag.metrics.default import METRICS, per_input
from diag.metrics.names import chosen

every_case = pytest.mark.parametrize("case", CASES)


TOLERANCE = dict.fromkeys(METRICS, 1e-5) | {"exclusive_output_similarity": 2e-4}
"""Where ‖z‖ is a hundredth of ‖y‖, the float32 rounding of y itself moves the direction of z by 1e-5."""


def anchors_used(call: AttentionCall, tokens: Tensor | None) -> list[list[int]]:
    """The anchors that the metric says it samples, as token positions of each input."""
    batch, _, length, _ = call.output.shape
    keys = call.visibility.keys
    counted = torch.ones(batch, length, dtype=torch.bool) if keys is None else keys.expand(batch, length)
    counted = counted if tokens is None else counted & tokens
    ranks, exist = anchors(counted.sum(-1), ANCHORS)
    return [counted[b].nonzero().flatten()[ranks[b][exist[b]]].tolist() for b in range(batch)]


def assert_matches_reference(call: AttentionCall, tokens: Tensor | None = None) -> None:
    """All metrics, NaN at the same places."""
    measured = per_input(call, tokens=tokens)
    expected = reference(call, tokens, anchors_used(call, tokens))
    assert set(measured) == set(expected) == set(METRICS)
    for name, numbers in measured.items():
        assert numbers.dtype == torch.float64, name
        assert numbers.shape == (call.batch, call.heads), name
        np.testing.assert_allclose(
            numbers.numpy(), expected[name].numpy(), rtol=1e-5, atol=TOLERANCE[name], err_msg=name
        )


# --- against the reference --------------------------------------------------------------------------


@every_case
def test_metrics_match_the_reference(case: str) -> None:
    assert_matches_reference(CASES[case])


@pytest.mark.parametrize("some", [False, True], ids=["all tokens", "some tokens"])
@pytest.mark.parametrize("case", OTHER_TOKENS)
def test_metrics_of_other_tokens_keys_match_the_reference(case: str, some: bool) -> None:
    """Weights and outputs are measured; what needs a value of one's own is undefined."""
    call = OTHER_TOKENS[case]
    tokens = random_mask(2, 13, seed=3) if some else None
    expected = reference(call, tokens)
    measured = per_input(call, tokens=tokens)
    assert set(measured) == set(expected)
    for name, numbers in measured.items():
        np.testing.assert_allclose(
            numbers.numpy(), expected[name].numpy(), rtol=1e-5, atol=1e-5, err_msg=name
        )
    defined = {name for name, numbers in measured.items() if not numbers.isnan().all()}
    assert defined == {
        *("entropy", "entropy_p15", "entropy_normalized", "effective_keys", "first_weight"),
        "output_similarity",
    }


@pytest.mark.parametrize(
    "subset", ["prefix dropped", "one prefix token", "every other", "random", "two", "one", "none"]
)
@every_case
def test_token_sets_match_the_reference(case: str, subset: str) -> None:
    call = CASES[case]
    position = torch.arange(call.tokens)
    keep = {
        "prefix dropped": (position >= 5).expand(call.batch, -1),
        "one prefix token": (position >= 1).expand(call.batch, -1),
        "every other": (position % 2 == 0).expand(call.batch, -1),
        "random": random_mask(call.batch, call.tokens, seed=3),
        "two": ((position == 6) | (position == 8)).expand(call.batch, -1),
        "one": (position == 6).expand(call.batch, -1),
        "none": torch.zeros(call.batch, call.tokens, dtype=torch.bool),
    }[subset]
    assert_matches_reference(call, keep)


@every_case
def test_blocks_do_not_change_the_metrics(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = per_input(replace(CASES[case]))
    monkeypatch.setitem(pattern.BLOCK_ELEMENTS, "cpu", 7)
    monkeypatch.setitem(pattern.BLOCK_ROWS, "cpu", 3)
    blocked = per_input(replace(CASES[case]))
    for name in METRICS:
        torch.testing.assert_close(blocked[name], whole[name], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    "case", ["full", "causal left padding", "mask per head, unseen keys", "zero vectors"]
)
def test_asking_for_one_metric_gives_the_same_number(case: str) -> None:
    everything = per_input(CASES[case])
    for name in METRICS:
        alone = per_input(replace(CASES[case]), [name])
        assert list(alone) == [name]
        assert torch.equal(alone[name].nan_to_num(9), everything[name].nan_to_num(9)), name


def test_one_token_set_may_serve_every_input() -> None:
    call = CASES["causal left padding"]
    tokens = random_mask(1, 13)
    shared, each = per_input(call, tokens=tokens), per_input(call, tokens=tokens.expand(2, -1))
    for name in METRICS:
        torch.testing.assert_close(shared[name], each[name], equal_nan=True)


@pytest.mark.parametrize("case", ["full", "causal left padding", "mask per head, unseen keys"])
def test_the_full_token_set_is_the_default(case: str) -> None:
    call = CASES[case]
    given = per_input(call, tokens=torch.ones(call.batch, call.tokens, dtype=torch.bool))
    for name, numbers in per_input(call).items():
        assert torch.equal(numbers.nan_to_num(9), given[name].nan_to_num(9)), name


@pytest.mark.parametrize(
    "case", ["full", "causal left padding", "bias and -inf", "zero vectors", "group of 2"]
)
def test_the_calls_tensors_are_left_alone(case: str) -> None:
    call = replace(CASES[case])
    tokens = random_mask(call.batch, call.tokens)
    before = {name: x.clone() for name, x in vars(call).items() if isinstance(x, Tensor)} | {
        "tokens": tokens.clone()
    }
    per_input(call, tokens=tokens)
    for name, x in before.items():
        assert torch.equal(tokens if name == "tokens" else getattr(call, name), x), name


# --- padding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("real", [range(9), range(4, 13)])
def test_padding_changes_nothing(causal: bool, real: range) -> None:
    """An input inside a padded batch gives the numbers that it gives alone."""
    short = make_call(batch=1, tokens=9, causal=causal, seed=3)
    padded = make_call(batch=1, tokens=13, causal=causal, mask=key_padding([real], 13), seed=99)
    inside = list(real)
    filled = {}
    for name in ("query", "key", "value", "output"):
        x = getattr(padded, name).clone()
        x[:, :, inside] = getattr(short, name)
        filled[name] = x
    measured, alone = per_input(replace(padded, **filled)), per_input(short)
    for name in METRICS:
        torch.testing.assert_close(measured[name], alone[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_rows_that_see_nothing_may_hold_anything(garbage: float) -> None:
    """Kernels return NaN, or an average of padding, for a fully masked row."""
    call = make_call(causal=True, mask=key_padding([range(13), range(4, 13)], 13))
    expected = per_input(call)
    output = call.output.clone()
    output[1, :, :4] = garbage
    measured = per_input(replace(call, output=output))
    for name in METRICS:
        torch.testing.assert_close(measured[name], expected[name], rtol=0, atol=0)
    lse = with_log_normaliser(call).log_normaliser
    assert lse is not None
    lse[1, :, :4] = garbage
    measured = per_input(replace(call, output=output, log_normaliser=lse))
    for name in METRICS:
        torch.testing.assert_close(measured[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("known", [False, True], ids=["streamed", "with lse"])
@pytest.mark.parametrize("case", ["group of 2", "causal left padding", "random mask", "mask per head"])
def test_of_added_maps_the_metrics_are_those_of_the_sum(case: str, known: bool) -> None:
    call = with_maps(CASES[case], -0.4, 0.3, known=known)
    assert (dense_pattern(call) < -1e-3).any()  # which no softmax gives
    measured, expected = per_input(call), reference(call, anchors=anchors_used(call, None))
    shares = [name for name in METRICS if METRICS[name].of_shares]
    assert shares == [
        *("cos_y_vuniform", "self_weight_ratio", "entropy", "entropy_p15", "entropy_normalized"),
        "effective_keys",
    ]
    for name, numbers in measured.items():
        if name in shares:
            assert numbers.isnan().all(), name
        else:
            found, wanted = numbers.numpy(), expected[name].numpy()
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=TOLERANCE[name], err_msg=name)
    (one, *_) = call.maps  # negative control: one map alone has other numbers
    alone = per_input(call.of_map(one), ["self_weight"])["self_weight"]
    assert (measured["self_weight"] - alone).abs().max() > 0.01


@pytest.mark.parametrize("least", [-0.3, 0.1], ids=["both signs", "positive"])
def test_of_mixed_heads_the_rule_is_that_of_added_maps(least: float) -> None:
    """One head of one input with a negative weight: it alone is undefined where weights are shares."""
    call = with_mixed_heads(make_call(), least)
    negative = (dense_pattern(call) < 0).any((2, 3))
    assert negative.any() == (least < 0)
    assert not negative.all()
    for name, numbers in per_input(call).items():
        undefined = negative if METRICS[name].of_shares else np.zeros_like(negative)
        np.testing.assert_array_equal(numbers.isnan(), undefined, err_msg=name)


def test_a_uniform_row_of_any_sum_is_the_reference_of_rows_of_that_sum() -> None:
    """Half of each row on keys that are no tokens, the other half spread evenly: all references are met."""
    call = replace(make_call(), query=None, key=None, pattern=torch.full((2, 4, 13, 13), 0.5 / 13))
    call = with_dense_output(replace(call, outside=0.3 * torch.randn(2, 4, 13, 16)))
    measured = per_input(call)
    for name in ("self_weight_ratio", "entropy_normalized"):
        np.testing.assert_allclose(measured[name], 1, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(measured["effective_keys"], 13, rtol=1e-5)
    np.testing.assert_allclose(measured["entropy"], 0.5 * math.log(13 / 0.5), rtol=1e-5)
    np.testing.assert_allclose(measured["cos_y_vuniform"], measured["cos_y_vself"], atol=1e-6)
    # negative control: of the values alone the uniform null is another
    alone = per_input(replace(call, outside=None), ["cos_y_vuniform"])["cos_y_vuniform"]
    assert (alone - measured["cos_y_vuniform"]).abs().min() > 1e-4


READS = {
    "output": """cos_y_vself context_part cos_y_vpartner excess removed_energy output_similarity
        exclusive_output_similarity""",
    "value": """cos_y_vself context_part cos_y_vpartner excess cos_y_vuniform value_similarity
        value_similarity_partial value_similarity_partial_reference value_participation_ratio""",
    "query": """self_part self_weight self_weight_ratio entropy entropy_p15 entropy_normalized
        effective_keys first_weight""",
}
"""Which metrics a broken number has to show in."""


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", READS)
def test_a_number_that_is_not_finite_shows(where: str, bad: float) -> None:
    """An overflow in a token that counts is not averaged away, and stays with its head."""
    call = CASES["zero vectors, causal"]
    broken = getattr(call, where).clone()
    broken[0, 3, 6, 0] = bad
    before, after = per_input(call), per_input(replace(call, **{where: broken}))
    for name in METRICS:
        if name in READS[where].split():
            assert after[name][0, 3].isinf(), name
        after[name][0, 3] = before[name][0, 3]
        assert torch.equal(after[name].nan_to_num(9), before[name].nan_to_num(9)), name


@pytest.mark.parametrize(
    ("how", "bad"), [("mean", math.nan), ("mean", math.inf), ("mean", -math.inf), ("percentile", math.nan)]
)
def test_pooling_keeps_what_is_not_finite(how: str, bad: float) -> None:
    values = torch.arange(40.0).reshape(2, 2, 10)
    values[0, 1, 4] = bad
    counts = torch.ones(2, 2, 10, dtype=torch.bool)
    pooled = metrics.reduce([metrics.Reading(values, counts)], 2, how)
    assert pooled[0, 1].isinf()
    assert pooled.isfinite().sum() == 3
    counts[0, 1, 4] = False
    assert metrics.reduce([metrics.Reading(values, counts)], 2, how).isfinite().all()


# --- hand-worked numbers ----------------------------------------------------------------------------


def pattern_call(
    pattern: list[list[float]], values: list[list[float]], causal: bool = False
) -> AttentionCall:
    """One input, one head, with this pattern and these values."""
    call = make_call(batch=1, heads=1, tokens=len(values), dim=len(values[0]), causal=causal)
    call = replace(
        call, query=None, key=None, value=torch.tensor([[values]]), pattern=torch.tensor([[pattern]])
    )
    return with_dense_output(call)


def test_hand_worked_causal_call() -> None:
    """Row 0 sees only itself and never counts; y_1 = (.25, .75), y_2 = (.8, .6)."""
    call = pattern_call(
        [[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.4, 0.2, 0.4]],
        [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]],
        causal=True,
    )
    measured = {name: numbers.item() for name, numbers in per_input(call).items()}
    root = math.sqrt
    cosine = (0.75 / root(0.625), 1.4 / root(2))
    partner = (0.25 / root(0.625), (0.8 + 0.6) / 2)
    own = (0.75 / root(0.625), 0.4 * root(2))
    entropies = (-0.25 * math.log(0.25) - 0.75 * math.log(0.75), -0.8 * math.log(0.4) - 0.2 * math.log(0.2))
    expected = {
        "cos_y_vself": sum(cosine) / 2,
        "removed_energy": (cosine[0] ** 2 + cosine[1] ** 2) / 2,
        "self_part": sum(own) / 2,
        "context_part": (sum(cosine) - sum(own)) / 2,
        "cos_y_vpartner": sum(partner) / 2,
        "excess": (sum(cosine) - sum(partner)) / 2,
        "cos_y_vuniform": (1 / root(2) + 1) / 2,
        "value_similarity": (0 + 1 / root(2) + 1 / root(2)) / 3,
        # without v_0 the other two are parallel, without v_1 too; without v_2 they are opposite
        "value_similarity_partial": (1 + 1 - 1) / 3,
        "value_similarity_partial_reference": (root(2) / 3) / (1 + root(2) / 3),
        "output_similarity": (0.25 * 0.8 + 0.75 * 0.6) / root(0.625),
        "exclusive_output_similarity": 1 / root(2),  # z_1 = (.25, 0), z_2 = (.1, -.1)
        # covariance ((2/3, -1/3), (-1/3, 2/3)) up to a factor
        "value_participation_ratio": (4 / 3) ** 2 / (10 / 9),
        "self_weight": (0.75 + 0.4) / 2,
        "self_weight_ratio": (0.75 * 2 + 0.4 * 3) / 2,
        "entropy": sum(entropies) / 2,
        "entropy_p15": min(entropies) + 0.15 * (max(entropies) - min(entropies)),
        "entropy_normalized": (entropies[0] / math.log(2) + entropies[1] / math.log(3)) / 2,
        "effective_keys": (1 / 0.625 + 1 / 0.36) / 2,
        "first_weight": (0.25 + 0.4) / 2,
    }
    assert set(expected) == set(measured)
    for name, number in expected.items():
        assert measured[name] == pytest.approx(number, abs=1e-6), name


def test_the_only_token_of_a_set_sees_no_partner() -> None:
    """The set limits partners and the uniform null; attention and its context still run over all keys."""
    call = pattern_call([[0.5, 0.5], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]])
    only_first = torch.tensor([[True, False]])
    measured = {name: numbers.item() for name, numbers in per_input(call, tokens=only_first).items()}
    for name in (
        "cos_y_vpartner",
        "excess",
        "value_similarity",
        "output_similarity",
        "exclusive_output_similarity",
    ):
        assert math.isnan(measured[name]), name
    assert measured["cos_y_vself"] == pytest.approx(1 / math.sqrt(2))
    assert measured["cos_y_vuniform"] == pytest.approx(1)
    assert measured["entropy"] == pytest.approx(math.log(2))
    assert measured["effective_keys"] == pytest.approx(2)


@pytest.mark.parametrize("causal", [False, True])
def test_one_token_has_no_statistics(causal: bool) -> None:
    for name, numbers in per_input(make_call(tokens=1, causal=causal)).items():
        assert numbers.isnan().all(), name


def test_the_first_causal_token_never_counts() -> None:
    """Its y is v, so whatever it is, rows must not change; value statistics must."""
    call = make_call(causal=True)
    output = call.output.clone()
    output[:, :, 0] = 50 * torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(1))
    before, after = per_input(call), per_input(replace(call, output=output))
    for name in METRICS:
        assert torch.equal(before[name], after[name]), name
    value = call.value.clone()
    value[:, :, 0] *= -1
    assert (
        per_input(replace(call, value=value))["value_similarity"] - before["value_similarity"]
    ).abs().min() > 1e-3


# --- heads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_equal_repeated_heads(kv_heads: int) -> None:
    call = make_call(kv_heads=kv_heads, causal=True)
    assert call.key is not None
    group = 4 // kv_heads
    repeated = replace(
        call, key=call.key.repeat_interleave(group, 1), value=call.value.repeat_interleave(group, 1)
    )
    grouped, expected = per_input(call), per_input(repeated)
    for name in METRICS:
        torch.testing.assert_close(grouped[name], expected[name], rtol=1e-5, atol=1e-6)


def test_the_wrong_value_head_gives_another_answer() -> None:
    """Negative control of the mapping `h // group`: `h % kv_heads` is off by far more than any tolerance."""
    call = make_call(kv_heads=2, tokens=12)
    wrong = replace(call, value=call.value.repeat(1, 2, 1, 1), key=call.key.repeat(1, 2, 1, 1))  # type: ignore[union-attr]
    right, interleaved = per_input(call), per_input(wrong)
    for name in ("cos_y_vself", "context_part", "cos_y_vpartner", "cos_y_vuniform", "value_similarity"):
        difference = (right[name] - interleaved[name]).abs()
        assert difference[:, 1:3].min() > 1e-2, name  # heads 0 and 3 read the same value head either way
        assert difference[:, [0, 3]].max() < 1e-5, name


# --- exact identities -------------------------------------------------------------------------------


@every_case
def test_the_split_is_exact(case: str) -> None:
    measured = per_input(CASES[case], ["cos_y_vself", "self_part", "context_part"])
    total = measured["self_part"] + measured["context_part"]
    torch.testing.assert_close(total, measured["cos_y_vself"], rtol=1e-6, atol=1e-6, equal_nan=True)


def test_the_context_part_is_the_sum_over_other_tokens() -> None:
    """The definition, Σ_{j≠i} A_ij (v_j·v̂_i)/‖y_i‖ over *all* keys, not the difference."""
    call = make_call(causal=True)
    tokens = (torch.arange(13) >= 6).expand(2, -1)
    pattern, value, output = dense_pattern(call), call.value.double().numpy(), call.output.double().numpy()
    units = value / np.linalg.norm(value, axis=-1, keepdims=True)
    others = pattern * ~np.eye(13, dtype=bool)
    context = ((others @ value) * units).sum(-1) / np.linalg.norm(output, axis=-1)
    measured = per_input(call, ["context_part"], tokens)["context_part"]
    np.testing.assert_allclose(measured.numpy(), context[:, :, 6:].mean(-1), atol=1e-5)


def test_excess_is_the_difference_where_every_row_has_a_partner() -> None:
    measured = per_input(make_call())
    difference = measured["cos_y_vself"] - measured["cos_y_vpartner"]
    torch.testing.assert_close(measured["excess"], difference, rtol=1e-6, atol=1e-6)
    assert RATIOS == {"self_specific_fraction": ("excess", "cos_y_vself")}
    assert {name for pair in RATIOS.values() for name in pair} <= set(METRICS)


def test_what_is_left_after_removal_has_length_sqrt_one_minus_energy() -> None:
    """‖z‖/‖y‖ = √(1 − cos²) row by row, so the removed energy is 1 − ‖z‖²/‖y‖²."""
    call = make_call()
    value, output = call.value.double().numpy(), call.output.double().numpy()
    left = np.empty(output.shape[:3])
    for b, h, i in np.ndindex(*left.shape):
        z = without(output[b, h, i], value[b, h, i])
        left[b, h, i] = (z @ z) / (output[b, h, i] @ output[b, h, i])
    measured = per_input(call, ["removed_energy"])["removed_energy"]
    np.testing.assert_allclose(measured.numpy(), 1 - left.mean(-1), atol=1e-6)


def test_identity_pattern() -> None:
    """Every token attends to itself: the bias is 1, all of it the self part."""
    call = replace(make_call(), query=None, key=None, pattern=torch.eye(13).expand(2, 4, 13, 13))
    measured = per_input(with_dense_output(call))
    for name in ("cos_y_vself", "self_part", "removed_energy", "self_weight", "effective_keys"):
        torch.testing.assert_close(measured[name], torch.ones(2, 4).double(), rtol=0, atol=1e-5)
    for name in ("context_part", "entropy", "entropy_p15", "entropy_normalized"):
        torch.testing.assert_close(measured[name], torch.zeros(2, 4).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(measured["self_weight_ratio"], torch.full((2, 4), 13.0).double())
    torch.testing.assert_close(
        measured["output_similarity"], measured["value_similarity"], rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(measured["first_weight"], torch.full((2, 4), 1 / 13).double())


@pytest.mark.parametrize("causal", [False, True])
def test_uniform_pattern_is_the_uniform_null(causal: bool) -> None:
    call = make_call(causal=causal)
    assert call.query is not None
    measured = per_input(with_dense_output(replace(call, query=torch.zeros_like(call.query))))
    torch.testing.assert_close(measured["cos_y_vself"], measured["cos_y_vuniform"], rtol=1e-5, atol=1e-6)
    ones = torch.ones(2, 4).double()
    torch.testing.assert_close(measured["entropy_normalized"], ones, rtol=1e-5, atol=0)
    torch.testing.assert_close(measured["self_weight_ratio"], ones, rtol=1e-5, atol=0)
    # Negative control: the real pattern is not the uniform one.
    assert (per_input(call)["cos_y_vself"] - per_input(call)["cos_y_vuniform"]).abs().min() > 1e-3


def test_entropy_is_bounded() -> None:
    for call in CASES.values():
        measured = per_input(call, ["entropy", "entropy_p15", "entropy_normalized", "effective_keys"])
        defined = ~measured["entropy"].isnan()
        if not (row_sums(call) > 1).any():
            assert (measured["entropy"][defined] <= math.log(call.tokens) + 1e-6).all()
            assert (measured["entropy_p15"][defined] <= math.log(call.tokens) + 1e-6).all()
        assert (measured["entropy_normalized"].nan_to_num() <= 1 + 1e-6).all()
        assert (measured["effective_keys"][defined] <= call.tokens * (1 + 1e-6)).all()


def test_the_partner_null_of_unrelated_values_is_zero() -> None:
    """Values that share nothing, attention to oneself only: the bias is 1 and the null 0."""
    generator = torch.Generator().manual_seed(5)
    value = torch.randn(2, 4, 40, 64, generator=generator)
    call = replace(make_call(tokens=40, dim=64), value=value, output=value.clone())
    measured = per_input(call)
    assert measured["cos_y_vpartner"].abs().max() < 0.02  # 1/√(64 · 40 · 39) per head is .003
    assert measured["value_similarity"].abs().max() < 0.02
    torch.testing.assert_close(measured["excess"], 1 - measured["cos_y_vpartner"])


def test_the_uniform_null_tends_to_the_root_of_the_value_similarity() -> None:
    """Unit values of mean similarity ρ: cos(ȳ, v) → √ρ."""
    generator = torch.Generator().manual_seed(6)
    noise = torch.randn(1, 4, 400, 64, generator=generator)
    value = torch.nn.functional.normalize(
        noise + 4 * torch.randn(1, 4, 1, 64, generator=generator).sign(), dim=-1
    )
    call = replace(make_call(batch=1, tokens=400, dim=64), value=value)
    measured = per_input(call, ["cos_y_vuniform", "value_similarity"])
    torch.testing.assert_close(
        measured["cos_y_vuniform"], measured["value_similarity"].sqrt(), rtol=2e-3, atol=0
    )


@pytest.mark.parametrize("causal", [False, True])
def test_sums_keep_their_accuracy_over_many_tokens(causal: bool) -> None:
    """A thousand values with a strong common direction, where running float32 sums are long."""
    call = make_call(batch=1, heads=1, tokens=1000, dim=32, causal=causal, seed=8)
    call = replace(call, value=call.value + 20, output=call.output + 20)
    rows = np.arange(1 if causal else 0, 1000)
    units = [x[0, 0].double().numpy() for x in (call.output, call.value)]
    units = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in units]
    cosines = units[0] @ units[1].T
    visible = np.tri(1000, dtype=bool) if causal else np.ones((1000, 1000), dtype=bool)
    partner = [cosines[i, visible[i] & (np.arange(1000) != i)].mean() for i in rows]
    plain = call.value[0, 0].double().numpy()
    uniform = [plain[visible[i]].mean(0) for i in rows]
    uniform = [u @ units[1][i] / np.linalg.norm(u) for i, u in zip(rows, uniform, strict=True)]
    measured = per_input(call, ["cos_y_vpartner", "cos_y_vuniform", "value_similarity"])
    assert measured["cos_y_vpartner"].item() == pytest.approx(np.mean(partner), abs=1e-5)
    assert measured["cos_y_vuniform"].item() == pytest.approx(np.mean(uniform), abs=1e-5)
    assert measured["value_similarity"].item() == pytest.approx(pairwise(units[1]), abs=1e-5)


# --- orthogonal components --------------------------------------------------------------------------


def test_the_literal_orthogonal_similarity_is_zero_for_any_values() -> None:
    """Why it is not a metric: v_j without its part along v_i has cosine 0 with v_i, always."""
    values = make_call(batch=1, heads=1).value[0, 0].double().numpy()
    for i, j in np.ndindex(13, 13):
        if i != j:
            assert abs(without(values[j], values[i]) @ values[i]) < 1e-12


@pytest.mark.parametrize("shared", [0.0, 0.7, 5.0])
def test_centred_similarity_says_nothing(shared: float) -> None:
    """Why it is not a metric: centred vectors have mean cosine -1/(T-1), shared direction or not."""
    generator = np.random.default_rng(0)
    values = generator.standard_normal((40, 64)) + shared * generator.standard_normal(64)
    centred = pairwise(values - values.mean(0))
    assert centred == pytest.approx(-1 / 39, abs=2e-3)
    if shared:
        assert pairwise(values) > 0.3


@pytest.mark.parametrize("similarity", [0.0, 0.3, 0.8])
def test_equicorrelated_values_lie_on_the_partial_reference(similarity: float) -> None:
    """Values with every pairwise cosine equal to ρ have partial similarity exactly ρ/(1+ρ)."""
    tokens = 12
    gram = np.full((tokens, tokens), similarity) + (1 - similarity) * np.eye(tokens)
    values = torch.from_numpy(np.linalg.cholesky(gram)).float().expand(1, 2, tokens, tokens)
    call = replace(make_call(batch=1, heads=2, tokens=tokens, dim=tokens), value=values)
    measured = per_input(call)
    assert measured["value_similarity"].numpy() == pytest.approx(similarity, abs=1e-6)
    for name in ("value_similarity_partial", "value_similarity_partial_reference"):
        assert measured[name].numpy() == pytest.approx(similarity / (1 + similarity), abs=1e-6), name


@pytest.mark.parametrize("causal", [False, True])
def test_sampled_anchors_are_close_to_all_anchors(causal: bool) -> None:
    call = make_call(tokens=40, causal=causal, seed=3)
    sampled = per_input(call, ["value_similarity_partial"])["value_similarity_partial"]
    everyone = reference(call)["value_similarity_partial"]
    assert (sampled - everyone).abs().max() < 0.03
    assert (sampled - everyone).abs().max() > 0  # it is a sample


def test_float64_is_for_the_heads_whose_values_are_nearly_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2 × 4 heads three: one of close values, one with a value twice, one with a zero value."""
    call = make_call(tokens=40, seed=3)
    value = call.value.clone()
    value[0, 1] = value[0, 1, :1] + 1e-2 * value[0, 1]
    anchor = anchors(torch.tensor([40]), ANCHORS)[0][0, 0]
    value[1, 2, anchor + 1] = value[1, 2, anchor]
    value[1, 3, 5] = 0.0
    call = with_dense_output(replace(call, value=value))
    computed = []

    def counted(value: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        computed.append((value.dtype, value.shape[0] * value.shape[1]))
        return partial(value, *others)

    partial = value_spread._partial_cosines
    monkeypatch.setattr(value_spread, "_partial_cosines", counted)
    name = "value_similarity_partial"
    measured = per_input(call, [name])[name]
    assert computed == [(torch.float32, 8), (torch.float64, 3)]
    expected = reference(call, anchors=anchors_used(call, None))[name]
    np.testing.assert_allclose(measured, expected, rtol=0, atol=1e-6)
    monkeypatch.setattr(value_spread, "COARSE", math.inf)  # negative control: float32 alone is not enough
    assert (per_input(call, [name])[name] - expected)[0, 1].abs() > 1e-5


@pytest.mark.parametrize("counts", [[0], [1], [3, 16], [17], [40, 7, 1000]])
def test_anchors_are_tokens_that_count(counts: list[int]) -> None:
    ranks, exist = anchors(torch.tensor(counts), 16)
    for count, rank, there in zip(counts, ranks, exist, strict=True):
        drawn = rank[there].tolist()
        assert len(drawn) == min(count, 16)
        if count <= 16:
            assert drawn == list(range(count))
        else:  # one from each of 16 equal parts
            assert all(int(k * count / 16) <= r < (k + 1) * count / 16 for k, r in enumerate(drawn))
    again, _ = anchors(torch.tensor(counts), 16)
    assert torch.equal(ranks, again)


def test_zero_values_have_cosine_zero_and_still_count() -> None:
    """Two equal values and one zero: the pairs are 1, 0, 0."""
    call = pattern_call([[1 / 3] * 3] * 3, [[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]])
    measured = {name: numbers.item() for name, numbers in per_input(call).items()}
    assert measured["value_similarity"] == pytest.approx(1 / 3)
    assert measured["cos_y_vself"] == pytest.approx(2 / 3)
    assert measured["cos_y_vpartner"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert measured["self_part"] == pytest.approx((0.5 + 0.5 + 0) / 3)


def test_values_that_do_not_vary_fill_no_direction() -> None:
    """0/0 is undefined; rounding of their mean must not be taken for a spread."""
    call = make_call(batch=1, heads=2, causal=True)
    value = call.value[:, :, :1].expand(-1, -1, 13, -1).contiguous()
    measured = per_input(with_dense_output(replace(call, value=value)))
    assert measured["value_participation_ratio"].isnan().all()
    torch.testing.assert_close(measured["value_similarity"], torch.ones(1, 2).double(), rtol=0, atol=1e-5)
    for name in ("value_similarity_partial", "exclusive_output_similarity"):
        assert (measured[name] == 0).all(), name


def test_a_zero_output_counts_as_zero() -> None:
    call = make_call(batch=1, heads=1, tokens=4)
    measured = per_input(replace(call, output=torch.zeros_like(call.output)))
    for name in ("cos_y_vself", "self_part", "context_part", "cos_y_vpartner", "excess", "output_similarity"):
        assert measured[name].item() == 0, name


# --- several calls of one layer ---------------------------------------------------------------------


def two_windows() -> list[AttentionCall]:
    """Two calls of a layer for one input, with 8 and 4 rows that count."""
    return [make_call(batch=1, tokens=tokens, causal=True, seed=tokens) for tokens in (9, 5)]


def test_windows_are_pooled_by_token() -> None:
    """A layer called window by window, or with windows in the batch: every token weighs the same."""
    windows = two_windows()
    names = ["cos_y_vself", "entropy", "cos_y_vpartner"]
    parts = [metrics.readings_of(metrics.Selection(window), names) for window in windows]
    alone = [per_input(window, names) for window in windows]
    for name in names:
        pooled = metrics.reduce([part[name] for part in parts], 1, "mean")
        expected = (8 * alone[0][name] + 4 * alone[1][name]) / 12
        torch.testing.assert_close(pooled, expected, rtol=1e-6, atol=1e-6)

    in_batch = make_call(batch=4, tokens=6, seed=3)  # two inputs of two windows each, input by input
    each = per_input(in_batch, names)
    for name, reading in metrics.readings_of(metrics.Selection(in_batch), names).items():
        pooled = metrics.reduce([reading], 2, "mean")
        torch.testing.assert_close(pooled, each[name].unflatten(0, (2, 2)).mean(1), rtol=1e-6, atol=1e-6)


def test_pooled_percentiles_are_of_all_tokens() -> None:
    """The 15th percentile of a layer's windows is not the mean of theirs."""
    windows = two_windows()
    rows = np.concatenate([softmax_statistics(window).entropy[0, :, 1:].numpy() for window in windows], -1)
    name = "entropy_p15"
    parts = [metrics.readings_of(metrics.Selection(window), [name])[name] for window in windows]
    pooled = metrics.reduce(parts, 1, METRICS[name].reduce)
    np.testing.assert_allclose(pooled[0].numpy(), np.percentile(rows, 15, axis=-1), rtol=1e-5)


# --- names ------------------------------------------------------------------------------------------


def test_every_metric_says_what_it_is() -> None:
    for name, metric in METRICS.items():
        assert CATALOGUE[name].definition, name
        assert metric.reduce in ("mean", "percentile"), name


def test_unknown_metrics_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="unknown metric 'cos_y_vsef'") as caught:
        chosen(["cos_y_vsef"], list(METRICS))
    assert caught.value.tip is not None
    assert "cos_y_vself" in caught.value.tip
    assert chosen(None, ["a", "b"]) == ["a", "b"]
    assert chosen(["b", "a", "b"], ["a", "b"]) == ["b", "a"]
