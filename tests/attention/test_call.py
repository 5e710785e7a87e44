"""The softmax statistics that stream blocks, against the dense float64 reference."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import (
    CASES,
    OTHER_TOKENS,
    additive,
    dense_pattern,
    dense_scores,
    dense_visible,
    key_padding,
    make_call,
    random_bias,
    random_mask,
    window,
    with_log_normaliser,
    with_maps,
    with_pattern,
)
from torch import Tensor

from diag.attention import pattern
from diag.attention.call import AttentionCall
from diag.attention.pattern import attend, pattern_rows
from diag.attention.row_sums import row_sums, without_constant
from diag.attention.softmax_statistics import softmax_statistics
from diag.attention.visibility import Visibility

STATISTICS = ("entropy", "sum_of_squares", "self_weight", "first_weight")
every_case = pytest.mark.parametrize("case", CASES)


def dense_statistics(call: AttentionCall) -> dict[str, np.ndarray]:
    """Each statistic of each row from the whole float64 pattern, `[batch, head, token]`."""
    pattern, visible = dense_pattern(call), dense_visible(call)
    logarithm = np.log(pattern, out=np.zeros_like(pattern), where=pattern > 0)
    real = visible.any(axis=(1, 2))  # [batch, key]
    first = np.stack([pattern[b, :, :, real[b].argmax()] for b in range(call.batch)])
    of_oneself = np.diagonal(pattern, axis1=-2, axis2=-1)
    return {
        "entropy": -(pattern * logarithm).sum(-1),
        "sum_of_squares": (pattern**2).sum(-1),
        "self_weight": of_oneself if call.own_keys else np.full(call.output.shape[:3], np.nan),
        "first_weight": first,
        "row_sum": pattern.sum(-1),
    }


def visibility_read(call: AttentionCall) -> Visibility:
    """Read off the call's mask anew."""
    return Visibility.of(call.mask, call.causal, call.output)


def assert_statistics_match(call: AttentionCall) -> None:
    """Every statistic of every row that sees a key."""
    expected, meaningful = dense_statistics(call), dense_visible(call).any(-1)
    assert meaningful.any()
    found = softmax_statistics(call)
    assert (found.row_sum is None) == call.is_softmax
    if call.pattern is not None:
        negative = ((dense_pattern(call) < 0).any(-1) & meaningful).any(-1)
        np.testing.assert_array_equal(found.negative, negative)
        expected["entropy"][negative] = found.entropy[found.negative]  # not defined
    for name in STATISTICS if call.is_softmax else (*STATISTICS, "row_sum"):
        measured = getattr(found, name)
        assert measured.dtype == torch.float32, name
        assert measured.shape == call.output.shape[:3], name
        np.testing.assert_allclose(
            measured.numpy()[meaningful], expected[name][meaningful], rtol=1e-5, atol=1e-5, err_msg=name
        )


@every_case
def test_statistics_match_the_dense_reference(case: str) -> None:
    assert_statistics_match(CASES[case])


@pytest.mark.parametrize("case", OTHER_TOKENS)
def test_keys_of_other_tokens(case: str) -> None:
    """Their statistics, chosen rows, sums and outputs; nobody has a weight on itself."""
    call = OTHER_TOKENS[case]
    assert_statistics_match(call)
    expected, rows = dense_pattern(call), torch.tensor([12, 0])
    np.testing.assert_allclose(pattern_rows(call, rows), expected[:, :, rows.numpy()], atol=1e-5)
    np.testing.assert_allclose(
        row_sums(call).expand(2, 4, 13), expected.sum(-1), rtol=1e-5, atol=1e-6, err_msg=case
    )
    tolerance = 1e-5 if call.output.dtype == torch.float32 else 0.05
    np.testing.assert_allclose(attend(call), call.output.float(), rtol=tolerance, atol=tolerance)


@every_case
def test_log_normaliser_matches_the_dense_reference(case: str) -> None:
    call = CASES[case]
    found = softmax_statistics(call).log_normaliser
    if call.pattern is not None:
        assert found is None
        return
    if call.outside is not None:  # other keys are in it
        assert found is call.log_normaliser
        return
    scores, meaningful = dense_scores(call), dense_visible(call).any(-1)
    expected = np.log(np.exp(scores[meaningful]).sum(-1))
    assert found is not None
    np.testing.assert_allclose(found.numpy()[meaningful], expected, rtol=1e-5, atol=1e-5)


@every_case
def test_pattern_rows_match_the_dense_reference(case: str) -> None:
    call = CASES[case]
    expected = dense_pattern(call)  # zero where a row sees nothing
    np.testing.assert_allclose(pattern_rows(call).numpy(), expected, atol=1e-5)
    rows = torch.tensor([call.tokens - 1, 0, call.tokens // 2])
    np.testing.assert_allclose(pattern_rows(call, rows).numpy(), expected[:, :, rows.numpy()], atol=1e-5)


@every_case
def test_attend_rebuilds_the_output(case: str) -> None:
    call = CASES[case]
    value = call.value.double().repeat_interleave(call.group, 1).numpy()
    expected = dense_pattern(call) @ value + (0.0 if call.outside is None else call.outside.double().numpy())
    np.testing.assert_allclose(attend(call).numpy(), expected, rtol=1e-5, atol=1e-5)
    rows = torch.tensor([call.tokens - 1, 0])
    np.testing.assert_allclose(attend(call, rows).numpy(), expected[:, :, rows.numpy()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["full", "causal left padding", "random mask", "group of 2, bias"])
def test_added_maps_have_the_pattern_of_their_sum(case: str) -> None:
    call = with_maps(CASES[case], -0.4, 0.3)
    expected, rows = dense_pattern(call), torch.tensor([call.tokens - 1, 0])
    np.testing.assert_allclose(pattern_rows(call).numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(pattern_rows(call, rows).numpy(), expected[:, :, rows.numpy()], atol=1e-5)
    value = call.value.double().repeat_interleave(call.group, 1).numpy()
    np.testing.assert_allclose(attend(call).numpy(), expected @ value, rtol=1e-5, atol=1e-5)


WITHOUT_SUM_1 = [name for name, call in CASES.items() if not call.is_softmax]


@pytest.mark.parametrize("case", ["full", "causal left padding", *WITHOUT_SUM_1, "maps"])
def test_a_constant_leaves_by_the_sum_of_each_row(case: str) -> None:
    """A (V - 1 cᵀ) and what comes of no token, from the whole float64 pattern."""
    call = with_maps(CASES["random mask"], -0.4, 0.3) if case == "maps" else CASES[case]
    expected, seen = dense_pattern(call), dense_visible(call).any(-1)
    sums = row_sums(call).expand(call.output.shape[:3]).numpy()
    np.testing.assert_allclose(sums, expected.sum(-1) * seen, rtol=1e-5, atol=1e-6)
    constant = torch.randn(call.kv_heads * call.value.shape[-1], generator=torch.Generator().manual_seed(2))
    free = without_constant(call, constant)
    rebuilt = expected @ free.value.double().repeat_interleave(call.group, 1).numpy()
    rebuilt += 0.0 if call.outside is None else call.outside.double().numpy()
    np.testing.assert_allclose(free.output.numpy()[seen], rebuilt[seen], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("valued", [False, True])
def test_keys_that_are_no_tokens_are_in_the_softmax(valued: bool) -> None:
    """Told apart from one softmax over all keys, of which those of the tokens are kept."""
    call = make_call(seed=66)
    other = torch.randn(1, 4, 2, 16, generator=torch.Generator().manual_seed(67))
    assert call.query is not None
    assert call.key is not None
    key, value = (torch.cat([x, other.expand(2, -1, -1, -1)], 2).double() for x in (call.key, call.value))
    scores = call.query.double() @ key.transpose(-1, -2) * call.scale
    whole = scores.softmax(-1)
    outside = whole[..., 13:] @ value[:, :, 13:] if valued else torch.zeros(1, 1, 1, 1)
    call = replace(call, log_normaliser=scores.logsumexp(-1).float(), outside=outside.float())
    np.testing.assert_allclose(pattern_rows(call), whole[..., :13], atol=1e-6)
    np.testing.assert_allclose(row_sums(call), whole[..., :13].sum(-1), atol=1e-6)
    np.testing.assert_allclose(attend(call), whole[..., :13] @ value[:, :, :13] + outside, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_scale_is_the_calls_own(causal: bool, scale: float) -> None:
    assert_statistics_match(replace(make_call(causal=causal), scale=scale))


def test_attend_with_the_wrong_value_head_differs() -> None:
    """Negative control: heads read the values of `h // group`, not of `h % kv_heads`."""
    call = make_call(kv_heads=2)
    interleaved = dense_pattern(call) @ call.value.double().repeat(1, 2, 1, 1).numpy()
    assert np.abs(attend(call).numpy() - interleaved).max() > 0.1


# --- blocks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 5])
@every_case
def test_blocks_do_not_change_the_statistics(case: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = CASES[case]
    expected = softmax_statistics(call)
    meaningful = torch.from_numpy(dense_visible(call).any(-1))
    monkeypatch.setitem(pattern.BLOCK_ROWS, "cpu", rows)
    found = softmax_statistics(call)
    for name in STATISTICS:
        torch.testing.assert_close(
            getattr(found, name)[meaningful], getattr(expected, name)[meaningful], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(("budget", "rows_at_once"), [(1, 16), (40 * 20, 20), (1 << 19, 40)])
def test_the_budget_bounds_a_block(budget: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block never holds more entries than the budget, but at least 16 rows."""
    monkeypatch.setitem(pattern.BLOCK_ELEMENTS, "cpu", budget)
    call = make_call(batch=1, heads=2, tokens=40, causal=True)
    blocks = [logs.shape for _, logs in pattern.log2_pattern_blocks(call, torch.empty(1, 2, 40), known=False)]
    assert max(shape[2] for shape in blocks) == rows_at_once
    assert max(shape.numel() for shape in blocks) <= max(budget, 16 * 40)
    assert sum(shape[1] * shape[2] for shape in blocks) == 2 * 40  # every row of every head once
    assert_statistics_match(call)


def test_blocks_of_a_causal_call_are_written_to_memory_that_is_taken_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The largest comes first: as they grow, each would take fresh pages."""
    monkeypatch.setitem(pattern.BLOCK_ROWS, "cpu", 8)
    monkeypatch.setitem(pattern.SEVERAL_HEADS_ELEMENTS, "cpu", 8 * 40)
    call = make_call(batch=1, heads=2, tokens=40, causal=True)
    blocks = pattern.log2_pattern_blocks(call, torch.empty(1, 2, 40), known=False)
    places, sizes = zip(*((logs.data_ptr(), logs.numel()) for _, logs in blocks), strict=True)
    assert len(set(sizes)) == 5
    assert len(set(places)) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("budget", [1, 2000, 1 << 26])
def test_statistics_on_cuda(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several heads and inputs share a block there."""
    monkeypatch.setitem(pattern.BLOCK_ELEMENTS, "cuda", budget)
    monkeypatch.setitem(pattern.BLOCK_ROWS, "cuda", 5)
    for case, call in CASES.items():
        moved = replace(call, **{name: x.cuda() for name, x in vars(call).items() if isinstance(x, Tensor)})
        expected, meaningful = dense_statistics(call), dense_visible(call).any(-1)
        found = softmax_statistics(moved)
        for name in STATISTICS:
            measured = getattr(found, name).cpu().numpy()[meaningful]
            np.testing.assert_allclose(
                measured, expected[name][meaningful], rtol=1e-4, atol=1e-4, err_msg=f"{case}: {name}"
            )


def test_a_given_log_normaliser_is_used() -> None:
    """Negative control: with a wrong normaliser the weights are wrong by the same factor."""
    call = with_log_normaliser(make_call())
    assert call.log_normaliser is not None
    shifted = replace(call, log_normaliser=call.log_normaliser + math.log(2))
    halved, expected = softmax_statistics(shifted).self_weight, softmax_statistics(call).self_weight
    torch.testing.assert_close(halved * 2, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "case", ["causal left padding", "mask per head, unseen keys", "bias and -inf", "causal"]
)
def test_the_calls_tensors_are_left_alone(case: str) -> None:
    call = replace(CASES[case])
    before = {name: x.clone() for name, x in vars(call).items() if isinstance(x, Tensor)}
    _ = softmax_statistics(call), pattern_rows(call), attend(call), visibility_read(call)
    for name, x in before.items():
        assert torch.equal(getattr(call, name), x), name


@pytest.mark.parametrize("case", ["full", "causal left padding", "group of 2", "bias per head"])
def test_memory_layout_does_not_matter(case: str) -> None:
    """Models hand over `[batch, token, head, dim]` seen through a transpose."""
    call = CASES[case]
    assert call.query is not None
    assert call.key is not None
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (call.query, call.key, call.value)]
    assert not strided[0].is_contiguous()
    assert_statistics_match(replace(call, query=strided[0], key=strided[1], value=strided[2]))


# --- visibility -------------------------------------------------------------------------------------

LOWER = torch.ones(13, 13, dtype=torch.bool).tril()
PADDED = key_padding([range(13), range(4, 11)], 13)
RULES: dict[str, tuple[AttentionCall, str, bool]] = {
    # name: (call, rule, whether some keys are not real)
    "no mask": (make_call(), "full", False),
    "no mask, causal": (make_call(causal=True), "causal", False),
    "all visible": (make_call(mask=torch.ones(2, 1, 13, 13, dtype=torch.bool)), "full", False),
    "all visible, additive": (make_call(mask=torch.zeros(1, 1, 13, 13)), "full", False),
    "position bias": (make_call(mask=random_bias(1, 4, 13, 13)), "full", False),
    "position bias, causal": (make_call(mask=random_bias(1, 4, 13, 13), causal=True), "causal", False),
    "padding": (make_call(mask=PADDED), "full", True),
    "padding, additive": (make_call(mask=additive(PADDED, -math.inf)), "full", True),
    "padding, causal": (make_call(mask=PADDED, causal=True), "causal", True),
    "padding and causality in the mask": (make_call(mask=PADDED & LOWER), "causal", True),
    "causal mask": (make_call(mask=LOWER), "causal", False),
    "causal mask, additive": (make_call(mask=additive(LOWER, -1e4)[None, None]), "causal", False),
    "same mask for each head": (make_call(mask=PADDED.expand(2, 4, 13, 13)), "full", True),
    "wide window": (make_call(mask=window(13, 12, 12)), "full", False),
    "wide window, causal": (make_call(mask=window(13, 12, 12), causal=True), "causal", False),
    "causal window": (make_call(mask=window(13, 4, 0)), "general", False),
    "window": (make_call(mask=window(13, 4, 4)), "general", False),
    "one hole": (
        make_call(mask=~torch.zeros(13, 13).bool().index_fill(0, torch.tensor(3), True)),
        "general",
        False,
    ),
    "random": (make_call(mask=random_mask(2, 1, 13, 13)), "general", False),
    "differs per head": (make_call(mask=random_mask(2, 4, 13, 13)), "general", False),
    "padding differs per head": (make_call(mask=random_mask(2, 4, 1, 13, share=0.8)), "general", False),
    "a key no head sees": (make_call(mask=random_mask(2, 4, 13, 13) & PADDED), "general", True),
    "one token": (make_call(tokens=1, causal=True), "causal", False),
    "no real token": (make_call(mask=key_padding([range(13), range(0)], 13)), "full", True),
}


@pytest.mark.parametrize("name", RULES)
def test_the_structure_of_a_mask_is_recognised(name: str) -> None:
    call, rule, has_unreal_keys = RULES[name]
    visibility = call.visibility
    assert visibility.rule == rule
    real = dense_visible(call).any(axis=(1, 2))
    assert real.all() != has_unreal_keys  # guards the table itself
    if visibility.keys is None:
        assert real.all()
    else:
        assert np.array_equal(visibility.keys.expand(call.batch, -1).numpy(), real)


@pytest.mark.parametrize("call", [*CASES.values(), *(call for call, _, _ in RULES.values())])
def test_visible_keys_are_counted(call: AttentionCall) -> None:
    visible = dense_visible(call)
    shape = call.output.shape[:3]
    assert np.array_equal(call.visibility.count.expand(shape).numpy(), visible.sum(-1))
    sees_itself = np.diagonal(visible, axis1=-2, axis2=-1)
    rows = visible.any(-1)  # of a row that sees nothing the answer is not asked for
    assert np.array_equal(call.visibility.sees_itself.expand(shape).numpy()[rows], sees_itself[rows])


@pytest.mark.parametrize("call", [*CASES.values(), *(call for call, _, _ in RULES.values())])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_sums_over_visible_keys(call: AttentionCall, share: float) -> None:
    batch, heads, tokens, _ = call.output.shape
    among = random_mask(batch, tokens, share=share)
    weights = torch.rand(batch, call.kv_heads, tokens, generator=torch.Generator().manual_seed(1))
    weights = weights * among[:, None, :]
    visible = dense_visible(call) & among.numpy()[:, None, None, :]
    value = call.value.float()
    weighted = (weights[..., None] * value).double().repeat_interleave(call.group, 1).numpy()
    expected = visible @ weighted
    measured = call.visibility.sum(value, weights)
    if measured.shape[1] == call.kv_heads:
        measured = measured.repeat_interleave(call.group, 1)
    np.testing.assert_allclose(measured.expand(expected.shape).numpy(), expected, rtol=1e-5, atol=1e-5)
    counts = call.visibility.count_among(among).expand(batch, heads, tokens)
    assert np.array_equal(counts.numpy(), visible.sum(-1))


def test_sums_of_many_rows_of_a_general_mask() -> None:
    """More rows than one block of the general rule."""
    mask = random_mask(1, 2, 600, 600)
    call = make_call(batch=1, heads=2, tokens=600, dim=4, mask=mask)
    torch.testing.assert_close(
        call.visibility.sum(call.value, torch.ones(1, 1, 600)), mask.float() @ call.value
    )
    among = random_mask(1, 600)
    assert torch.equal(call.visibility.count_among(among), (mask & among[:, None, None, :]).sum(-1))


def test_what_was_read_off_a_mask_goes_with_the_mask() -> None:
    """A change that leaves the mask alone keeps what was read off it; any other reads again."""
    call = make_call(mask=PADDED, causal=True)
    kept = replace(call, output=-call.output, sample=None)
    assert kept.visibility is call.visibility
    shared = replace(make_call(seed=1), mask=PADDED, causal=True, visibility=call.visibility)
    assert shared.visibility is call.visibility
    every = make_call(mask=PADDED)
    for changed in (
        replace(call, mask=None),
        replace(call, mask=PADDED.clone()),
        replace(call, causal=False),
        replace(every, causal=True),
    ):
        assert changed.visibility is not call.visibility
        assert torch.equal(changed.visibility.count, visibility_read(changed).count)
        assert changed.visibility.rule == visibility_read(changed).rule
    fewer = {name: getattr(call, name)[:, :, :5] for name in ("query", "key", "value", "output")}
    assert replace(call, mask=None, **fewer).visibility.count.flatten().tolist() == [1, 2, 3, 4, 5]


def test_a_call_knows_its_sizes() -> None:
    call = make_call(kv_heads=2, tokens=5)
    assert (call.batch, call.heads, call.tokens, call.kv_heads, call.group) == (2, 4, 5, 2, 2)


# --- identities -------------------------------------------------------------------------------------


def test_a_pattern_call_needs_no_queries() -> None:
    call = with_pattern(make_call(causal=True))
    assert call.query is None
    assert call.key is None
    assert torch.equal(pattern_rows(call), call.pattern)


def test_entropy_is_bounded_by_the_visible_keys() -> None:
    """By that of a uniform row of the same keys and the same sum s, s ln(n/s)."""
    for call in CASES.values():
        visible = dense_visible(call).sum(-1)
        entropy, rows = softmax_statistics(call).entropy.numpy(), visible > 0
        total = dense_pattern(call).sum(-1)[rows]
        assert (entropy[rows] <= total * np.log(visible[rows] / total) + 1e-5).all()


def test_equal_scores_give_the_uniform_pattern() -> None:
    call = make_call(causal=True)
    assert call.query is not None
    call = replace(call, query=torch.zeros_like(call.query))
    visible = torch.arange(1, 14).float().expand(2, 4, 13)
    softmax = softmax_statistics(call)
    torch.testing.assert_close(softmax.entropy, visible.log())
    torch.testing.assert_close(softmax.sum_of_squares, 1 / visible)
    torch.testing.assert_close(softmax.self_weight, 1 / visible)
    torch.testing.assert_close(softmax.first_weight, 1 / visible)
