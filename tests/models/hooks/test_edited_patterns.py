"""Restricted and redistributed patterns against dense float64 references and patterns made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import (
    CASES,
    OTHER_TOKENS,
    dense_pattern,
    dense_visible,
    float64,
    make_call,
    with_dense_output,
    with_maps,
)
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.attention.positions import Geometry
from diag.errors import MeasurementError
from diag.models.hooks.beside import NOTHING, Beside, Noted
from diag.models.hooks.interventions import parse

KEPT = ["window=3", "random_window=3", "neighbourhood=3", "top_keys=3", "random_keys=3"]
every_case = pytest.mark.parametrize("case", CASES)
Rule = Callable[[np.ndarray, int], np.ndarray]


def output(text: str, call: AttentionCall, beside: Beside = NOTHING, seed: int = 0) -> Tensor:
    return parse(text, seed).output(call, beside)


def seen_by(call: AttentionCall) -> np.ndarray:
    """Which keys have weight: where a pattern is given, those that are not 0."""
    return dense_pattern(call) != 0 if call.pattern is not None else dense_visible(call)


def restricted(call: AttentionCall, rule: Rule) -> np.ndarray:
    """Row by row: what is left of it, scaled to the sum that it had; unchanged where that is all or nothing.

    rule: the weights of a row, -1 where its keys are hidden, and its place → which keys are kept.
    """
    pattern, seen = dense_pattern(call), seen_by(call)
    values = float64(call.value).repeat(call.group, axis=1)
    expected = float64(call.output).copy()
    outside = np.zeros(call.output.shape) + (0 if call.outside is None else float64(call.outside))
    for b, h, i in np.ndindex(*pattern.shape[:3]):
        row, visible = pattern[b, h, i], seen[b, h, i]
        left = rule(np.where(visible, row, -1), i) & visible
        if left.any() and (left != visible).any() and row[left].sum() > 0:
            share = np.where(left, row, 0) * (row.sum() / row[left].sum())
            expected[b, h, i] = share @ values[b, h] + outside[b, h, i]
    return expected


def within(reach: int) -> Rule:
    return lambda row, i: np.abs(np.arange(len(row)) - i) < reach


def largest(number: int) -> Rule:
    def rule(row: np.ndarray, i: int) -> np.ndarray:
        kept = np.zeros(len(row), dtype=bool)
        kept[np.argsort(-row, kind="stable")[:number]] = True
        return kept

    return rule


def nearest(number: int) -> Rule:
    """One row of tokens: so many around, moved inwards at the ends."""

    def rule(row: np.ndarray, i: int) -> np.ndarray:
        places = np.arange(len(row))
        first = min(max(i - number // 2, 0), max(len(row) - number, 0))
        return (places >= first) & (places < first + number)

    return rule


RULES = {"window=3": within(3), "top_keys=3": largest(3), "neighbourhood=3": nearest(3)}


@every_case
def test_what_is_left_is_renormalised(case: str) -> None:
    for text, rule in RULES.items():
        is_renormalised(CASES[case], text, rule)


def is_renormalised(call: AttentionCall, text: str, rule: Rule) -> None:
    if (dense_pattern(call) < 0).any():
        with pytest.raises(MeasurementError, match=r"layer 'layer' has weights that are negative") as caught:
            output(text, call)
        assert text.partition("=")[0] in str(caught.value.tip)
        return
    tolerance = 2e-5 if call.output.dtype == torch.float32 else 4e-2
    found = output(text, call)
    assert found.dtype == call.output.dtype
    np.testing.assert_allclose(float64(found), restricted(call, rule), atol=tolerance, rtol=tolerance)


@every_case
def test_what_keeps_everything_changes_no_bit(case: str) -> None:
    call = CASES[case]
    if (dense_pattern(call) < 0).any():
        return
    for name in (text.partition("=")[0] for text in KEPT):
        changes_no_bit(call, name)


def changes_no_bit(call: AttentionCall, name: str) -> None:
    noted = Noted()
    found = output(f"{name}={call.keys}", call, replace(NOTHING, noted=noted))
    assert torch.equal(found, call.output)
    some = NOTHING.queries(call).any(-1)
    np.testing.assert_allclose(float64(noted.kept[0][some]), 1, atol=1e-5)
    if call.tokens > 3:
        assert not torch.equal(output(f"{name}=1", call), call.output)  # a negative control


def with_rows_as_outputs(call: AttentionCall) -> AttentionCall:
    """Values are one key each, so that y is the row of the pattern itself."""
    value = torch.eye(call.keys).expand(call.batch, call.kv_heads, -1, -1)
    return replace(call, value=value, output=torch.from_numpy(dense_pattern(call)).float())


@pytest.mark.parametrize("case", ["plain", "causal", "grouped"])
def test_a_control_keeps_as_many_keys_of_each_row(case: str) -> None:
    call = CASES.get(case) or make_call(kv_heads=2, causal=True)
    call = with_rows_as_outputs(call)
    for text in ("window=3", "top_keys=4", "neighbourhood=5"):
        name = text.replace("top_keys", "keys")
        ours, theirs = (output(one, call) for one in (text, f"random_{name}"))
        assert torch.equal((ours > 0).sum(-1), (theirs > 0).sum(-1))
        assert not torch.equal(ours > 0, theirs > 0)
        torch.testing.assert_close(theirs.sum(-1), torch.ones(theirs.shape[:3]))
        other = output(f"random_{name}", call, seed=1)
        assert not torch.equal(theirs > 0, other > 0)  # the seed reaches it
        alone = replace(
            call, query=call.query[1:], key=call.key[1:], value=call.value[1:], output=call.output[1:]
        )
        assert torch.equal((output(f"random_{name}", alone) > 0)[0], (theirs > 0)[1])  # whatever the batch


def test_the_neighbourhood_is_patches_and_tokens_without_a_place_stay() -> None:
    """A class token and 3 × 4 patches, 3 × 3 around each: at the edges moved inwards, as its kernels do."""
    call = with_rows_as_outputs(make_call(tokens=13))
    grid = replace(NOTHING, geometry=lambda call: Geometry(1, 3, 4, 16.0))
    kept = output("neighbourhood=3", call, grid)[0, 0] > 0
    assert kept[0].all()
    assert kept[:, 0].all()
    corner = [1, 2, 3, 5, 6, 7, 9, 10, 11]  # of the first patch: rows 0 to 2, columns 0 to 2
    assert kept[1].nonzero()[:, 0].tolist() == [0, *corner]
    assert kept[12].nonzero()[:, 0].tolist() == [0, *(place + 1 for place in corner)]
    assert (kept[1:].sum(-1) == 10).all()
    kept = output("window=2", call, grid)[0, 0] > 0
    assert kept[5].nonzero()[:, 0].tolist() == [0, 4, 5, 6]
    unknown = replace(NOTHING, geometry=lambda call: Geometry.unknown(1))
    with pytest.raises(MeasurementError, match="13 tokens of which it is not known where they lie") as caught:
        output("neighbourhood=3", call, unknown)
    assert "choose window" in str(caught.value.tip)


def test_a_window_by_hand() -> None:
    """Four tokens that attend evenly; the first sees itself and the second, half each."""
    even = torch.full((1, 1, 4, 4), 0.25)
    value = torch.tensor([[[[1.0], [2.0], [4.0], [8.0]]]])
    call = replace(make_call(batch=1, heads=1, tokens=4, dim=1), query=None, key=None, pattern=even)
    call = replace(call, value=value, output=even @ value)
    assert output("window=2", call).flatten().tolist() == pytest.approx([1.5, 7 / 3, 14 / 3, 6.0])
    noted = Noted()
    output("window=2", call, replace(NOTHING, noted=noted))
    assert noted.kept[0].tolist() == pytest.approx([(0.5 + 0.75 + 0.75 + 0.5) / 4])


def test_the_mass_of_the_top_keys_is_told() -> None:
    call, noted = CASES["causal"], Noted()
    output("top_keys=2:0/1", call, replace(NOTHING, noted=noted))
    pattern = dense_pattern(call)[:, 1]
    expected = np.sort(pattern, -1)[..., -2:].sum(-1).mean(-1)
    np.testing.assert_allclose(float64(noted.kept[0]), expected, atol=1e-5)


def test_padding_is_no_query_of_the_mass() -> None:
    call, noted = make_call(tokens=6), Noted()
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    output("top_keys=2", call, replace(NOTHING, noted=noted, real=real))
    held = np.sort(dense_pattern(call), -1)[..., -2:].sum(-1).mean(1)  # [batch, row]
    np.testing.assert_allclose(float64(noted.kept[0]), [held[0].mean(), held[1, :4].mean()], atol=1e-5)


@pytest.mark.parametrize("name", ["window", "neighbourhood", "top_keys"])
def test_what_cannot_be_restricted_is_refused(name: str) -> None:
    call = with_maps(make_call(), -0.4)
    with pytest.raises(MeasurementError, match=r"layer 'layer' adds up 2 maps: weights may be negative"):
        output(name, call)
    bare = replace(make_call(), query=None, key=None)
    with pytest.raises(MeasurementError, match=r"layer 'layer' has no softmax: there is no A_ij") as caught:
        output(name, bare)
    assert f"{name}:LAYERS" in str(caught.value.tip)
    if name != "top_keys":
        with pytest.raises(MeasurementError, match="keys that are not its tokens' own"):
            output(name, OTHER_TOKENS["pooled keys"])


@pytest.mark.parametrize("case", OTHER_TOKENS)
def test_top_keys_of_other_tokens(case: str) -> None:
    call = OTHER_TOKENS[case]
    tolerance = 2e-5 if call.output.dtype == torch.float32 else 4e-2
    found = float64(output("top_keys=2", call))
    np.testing.assert_allclose(found, restricted(call, largest(2)), atol=tolerance, rtol=tolerance)


# --- redistribution


def image_of(call: AttentionCall, keys: list[int]) -> Beside:
    marked = torch.zeros(1, call.keys, dtype=torch.bool)
    marked[:, keys] = True
    return replace(NOTHING, image=lambda call: marked)


def made_by_hand() -> AttentionCall:
    """Six keys, 0 to 3 an image's, of which 0 is a sink; rows 4 and 5 are text, the last one not centred."""
    rows = [[0.25] * 4 + [0, 0]] * 4
    rows += [[0.30, 0.02, 0.02, 0.36, 0.2, 0.1], [0.60, 0.01, 0.01, 0.08, 0.2, 0.1]]
    pattern = torch.tensor(rows)[None, None]
    value = torch.eye(6)[None, None]
    call = replace(make_call(batch=1, heads=1, tokens=6, dim=6), query=None, key=None, pattern=pattern)
    return replace(call, value=value, output=pattern @ value)


def test_redistribution_by_hand() -> None:
    call, noted = made_by_hand(), Noted()
    beside = replace(image_of(call, [0, 1, 2, 3]), noted=noted)
    found = output("redistribute=0.5", call, beside)[0, 0]
    assert torch.equal(found[[0, 1, 2, 3, 5]], call.output[0, 0, [0, 1, 2, 3, 5]])
    # keys 0 and 3 receive 0.45 and 0.22, ten times the median 0.015 and more: both are sinks, and hold more
    # than half of what the image gets; a row that is not image-centric stays
    assert torch.equal(found[4], call.output[0, 0, 4])
    pattern = call.pattern.clone()
    pattern[0, 0, 4] = torch.tensor([0.30, 0.14, 0.14, 0.12, 0.2, 0.1])
    pattern[0, 0, 5] = torch.tensor([0.90, 0.00, 0.00, 0.00, 0.1, 0.0])
    call = replace(call, pattern=pattern, output=pattern @ call.value)
    found = output("redistribute=0.5", call, beside)[0, 0]
    # the median image key receives 0.14 from the two rows, the sink 1.2: not ten times as much
    assert torch.equal(found, call.output[0, 0])


def test_redistribution_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(4)
    weights = 0.5 + torch.rand(2, 4, 24, 24, generator=generator)
    weights[..., 3] = 11 + 6 * torch.rand(2, 4, 24, generator=generator)  # in some rows more than half
    plain = make_call(tokens=24, seed=4)
    call = with_dense_output(replace(plain, query=0 * plain.query, mask=weights.log()))
    keys = list(range(16))
    pattern, values, expected = dense_pattern(call), float64(call.value), float64(call.output).copy()
    changed = 0
    for b in range(call.batch):
        received = pattern[b, :, 16:].sum((0, 1))[:16]
        sinks = np.flatnonzero(received >= 10 * np.sort(received)[7])  # torch's median: the lower one
        for h, i in np.ndindex(call.heads, 8):
            row = pattern[b, h, 16 + i]
            total, moved = row[:16].sum(), row[sinks].sum()
            if total >= 0.2 and 0 < moved <= 0.5 * total:
                new = row.copy()
                new[sinks] *= 0.7
                rest = np.setdiff1d(keys, sinks)
                new[rest] += 0.3 * moved * row[rest] / row[rest].sum()
                expected[b, h, 16 + i] = new @ values[b, h]
                changed += 1
    assert 5 < changed < 60
    found = output("redistribute=0.3", call, image_of(call, keys))
    np.testing.assert_allclose(float64(found), expected, atol=2e-5)
    assert torch.equal(output("redistribute=0", call, image_of(call, keys)), call.output)
    control = output("random_redistribute=0.3", call, image_of(call, keys))
    assert not torch.equal(control, call.output)
    assert not torch.equal(control, found)
    with pytest.raises(MeasurementError, match="no keys of which it is known that they are an image's"):
        output("redistribute", call)
