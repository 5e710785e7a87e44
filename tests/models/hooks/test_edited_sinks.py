"""What is done to a sink's value and weight, against dense float64 references and a pattern made by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import CASES, OTHER_TOKENS, dense_pattern, float64, make_call
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.errors import MeasurementError, UserError
from diag.models.hooks.beside import NOTHING, Beside, HeldOut, HeldOutLayer, Noted, mixed
from diag.models.hooks.edited_sinks import dominant_keys
from diag.models.hooks.interventions import parse

CALLS = {name: call for name, call in (CASES | OTHER_TOKENS).items() if call.has_pattern and not call.maps}
every_call = pytest.mark.parametrize("case", CALLS)


def beside(call: AttentionCall) -> Beside:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(3, 4, call.heads, call.value.shape[-1], generator=generator)
    others = HeldOut(("x", "own 0", "y", "z"), {0: HeldOutLayer(*drawn.unbind(0))})
    return Beside(ids=tuple(f"own {number}" for number in range(call.batch)), held_out=others)


def output(text: str, call: AttentionCall, told: Beside | None = None, seed: int = 0) -> Tensor:
    return parse(text, seed).output(call, beside(call) if told is None else told)


def dominant(call: AttentionCall) -> np.ndarray:
    """The key that each head gives most to, `[batch, head]`."""
    return dense_pattern(call).sum(2).argmax(-1)


def exchanged(call: AttentionCall, place: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Y with another value at one key of each head: A V of both, and their difference added."""
    pattern, expected = dense_pattern(call), float64(call.output).copy()
    values = float64(call.value).repeat(call.group, axis=1)
    for b, h in np.ndindex(*place.shape):
        changed = values[b, h].copy()
        changed[place[b, h]] = given[b, h]
        expected[b, h] += pattern[b, h] @ changed - pattern[b, h] @ values[b, h]
    return expected


def close(found: Tensor, expected: np.ndarray, call: AttentionCall) -> None:
    blind = dense_pattern(call).sum(-1) == 0  # these rows keep what they had
    expected = np.where(blind[..., None], float64(call.output), expected)
    tolerance = 2e-5 if call.output.dtype == torch.float32 else 5e-2
    np.testing.assert_allclose(float64(found), expected, atol=tolerance, rtol=tolerance)


@every_call
def test_values_are_exchanged_and_nothing_else(case: str) -> None:
    call, none = CALLS[case], np.zeros((CALLS[case].batch, CALLS[case].heads, CALLS[case].value.shape[-1]))
    told, place = beside(call), dominant(call)
    assert told.held_out is not None
    layer = told.held_out.layers[0]
    close(output("sink_zero", call), exchanged(call, place, none), call)
    own = [[1.0, 0.0, 1.0, 1.0], [1.0] * 4]  # the first input is held out as well, but not for itself
    for name, of in (
        ("sink_mean", layer.sink),
        ("sink_donor", layer.sink),
        ("sink_ordinary", layer.ordinary),
    ):
        found = float64(of)
        if name == "sink_mean":
            given = np.stack([np.average(found, 0, own[min(b, 1)]) for b in range(call.batch)])
        else:
            given = found[told.held_out.donors(told.ids, 0).numpy()]
        close(output(name, call), exchanged(call, place, given), call)


@every_call
def test_the_control_takes_another_key(case: str) -> None:
    call = CALLS[case]
    if (dense_pattern(call) < 0).any() or not NOTHING.queries(call).any(-1).all():
        return  # where weights may be negative, or nothing is seen, what a key receives says little
    place, other = dominant_keys(call, NOTHING.queries(call), 0)
    assert np.array_equal(place.numpy(), dominant(call))
    received = torch.from_numpy(dense_pattern(call).sum(2))
    assert (received.gather(-1, other[..., None]) > 0).all()
    alone = ((received > 0).sum(-1) == 1).numpy()
    assert np.array_equal((place == other).numpy(), alone)
    values = float64(call.value).repeat(call.group, axis=1)
    kept = np.where(
        alone[..., None], np.take_along_axis(values, place.numpy()[..., None, None], 2)[:, :, 0], 0
    )
    close(output("random_zero", call), exchanged(call, other.numpy(), kept), call)


@pytest.mark.parametrize("case", [name for name, call in CASES.items() if name in CALLS and call.tokens > 2])
def test_attention_to_the_sink_is_taken_away(case: str) -> None:
    call, place = CALLS[case], dominant(CALLS[case])
    pattern, expected = dense_pattern(call), float64(call.output).copy()
    if (pattern < 0).any():
        with pytest.raises(MeasurementError, match="weights that are negative"):
            output("sink_masked", call)
        return
    values = float64(call.value).repeat(call.group, axis=1)
    for b, h, i in np.ndindex(*pattern.shape[:3]):
        row, s = pattern[b, h, i].copy(), place[b, h]
        row[s] = 0
        if pattern[b, h, i, s] > 0 and row.sum() > 0:
            expected[b, h, i] = row * (pattern[b, h, i].sum() / row.sum()) @ values[b, h]
            expected[b, h, i] += (
                0 if call.outside is None else (float64(call.outside) + 0 * float64(call.output))[b, h, i]
            )
    close(output("sink_masked", call), expected, call)


def by_hand(share: float = 0.6) -> AttentionCall:
    """One head, ten tokens: token 3 has `share` of every row but the last, which sees it with 0.1."""
    pattern = torch.full((10, 10), (1 - share) / 9)
    pattern[:, 3] = share
    pattern[9] = 0.1
    value = torch.eye(10)[None, None]
    call = replace(make_call(batch=1, heads=1, tokens=10, dim=10), query=None, key=None)
    return replace(call, pattern=pattern[None, None], value=value, output=pattern[None, None] @ value)


def test_only_heads_with_a_sink_event_are_changed() -> None:
    call = by_hand()
    found = output("sink_zero=0.5", call)
    expected = call.output.clone()
    expected[..., 3] = 0
    torch.testing.assert_close(found, expected)
    assert torch.equal(output("sink_zero=0.7", call), call.output)  # no head gives a key so much
    nine = call.pattern.clone()
    nine[0, 0, 8] = 0.1  # 8 of 10 queries are too few
    fewer = replace(call, pattern=nine, output=nine @ call.value)
    assert torch.equal(output("sink_zero=0.5", fewer), fewer.output)
    masked = output("sink_masked=0.5", call)
    assert masked[0, 0, :, 3].abs().max() == 0
    torch.testing.assert_close(masked.sum(-1), torch.ones(1, 1, 10))


def test_what_is_said_of_a_sink() -> None:
    call, noted = by_hand(), Noted()
    output("sink_zero", call, replace(beside(call), noted=noted))
    assert noted.kept[0].tolist() == pytest.approx([1 - 0.55])
    assert noted.sinks[0].nonzero().tolist() == [[0, 3]]
    noted = Noted()
    output("random_zero", call, replace(beside(call), noted=noted))
    assert noted.sinks[0].nonzero().tolist() == [[0, 3]]  # the same tokens are left out of its measure


def test_padding_decides_nothing() -> None:
    """Queries that are padding give all to key 5; the others to key 1."""
    pattern = torch.full((6, 6), 0.02)
    pattern[:2, 1], pattern[2:, 5] = 0.9, 0.9
    value = torch.eye(6)[None, None]
    call = replace(make_call(batch=1, heads=1, tokens=6, dim=6), query=None, key=None)
    call = replace(call, pattern=pattern[None, None], value=value, output=pattern[None, None] @ value)
    real = torch.tensor([[True, True, False, False, False, False]])
    assert dominant_keys(call, NOTHING.queries(call), 0)[0].item() == 5
    place, other = dominant_keys(call, replace(NOTHING, real=real).queries(call), 0)
    assert (place.item(), other.item()) == (1, 0)


def test_without_other_inputs_there_is_no_donor() -> None:
    for name in ("sink_mean", "sink_donor", "sink_ordinary", "mean"):
        with pytest.raises(UserError, match="cannot be given what other inputs gave: none was run") as caught:
            output(name, make_call(), replace(NOTHING, ids=("a", "b")))
        assert "attnbias intervene" in str(caught.value.tip)


def test_seeds() -> None:
    assert [mixed(0, layer) for layer in range(3)] == [0, 1, 2]  # what was drawn before there were seeds
    assert len({mixed(seed, layer) for seed in range(50) for layer in range(50)}) == 2500
    call = make_call(tokens=40)
    for name in ("random_direction", "matched_direction", "random_zero", "random_keys=3", "sink_donor"):
        found = [output(name, call, seed=seed) for seed in (0, 0, *range(1, 7))]
        assert torch.equal(found[0], found[1])
        assert any(not torch.equal(found[0], other) for other in found[2:]), name


def test_head_ablation() -> None:
    call = make_call()
    assert not output("zero:0/1", call)[:, 1].any()
    assert torch.equal(output("zero:0/1", call)[:, [0, 2, 3]], call.output[:, [0, 2, 3]])
    told = beside(call)
    assert told.held_out is not None
    means = float64(told.held_out.layers[0].output)
    found = float64(output("mean", call))
    np.testing.assert_allclose(found[1], np.broadcast_to(means.mean(0)[:, None], found[1].shape), atol=1e-6)
    others = means[[0, 2, 3]].mean(0)  # an input is none of its own
    np.testing.assert_allclose(found[0], np.broadcast_to(others[:, None], found[0].shape), atol=1e-6)
