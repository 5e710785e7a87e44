"""Why a hook differs, on numbers that are made by hand: each reason, and what is none of them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diag.studies.audit.reasons import channels_of, distinct_heads, why_outputs_differ, why_values_differ
from diag.studies.audit.words import (
    CONSTANT,
    ELSEWHERE,
    GATE,
    INTERLEAVED,
    LATENT,
    NORM,
    OTHER_ORDER,
    OTHER_TOKENS,
    REPEATED,
    SAME,
    SCALED,
    SHARED,
    SUM,
    UNEXPLAINED,
)

ROWS, HEADS, DIM = 24, 4, 6
WIDTH = HEADS * DIM
DRAW = torch.Generator().manual_seed(0)
V = torch.randn(ROWS, HEADS, DIM, generator=DRAW)
FLAT = V.flatten(1)
OTHER = torch.randn(ROWS, WIDTH, generator=DRAW)
WEIGHT, BIAS = torch.rand(DIM, generator=DRAW) + 0.5, torch.randn(WIDTH, generator=DRAW)
ORDER = torch.randperm(WIDTH, generator=DRAW)
TOLERANCE = 1e-5


def rms(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()


def interleaved(*parts: Tensor) -> Tensor:
    """The channels of each head side by side: its queries, its keys, its values."""
    return torch.cat([x.reshape(ROWS, -1, DIM) for x in parts], -1).flatten(1)


CASES = {
    "own": (FLAT, V, {}, SAME, ""),
    "last third": (torch.cat([OTHER, OTHER, FLAT], 1), V, {}, SAME, ""),
    "grouped": (FLAT, V, {"heads": 8}, REPEATED, "4 value heads for 8 query heads"),
    "repeated by the model": (
        *(FLAT, V.repeat_interleave(2, 1), {"heads": 8}, REPEATED),
        "4 value heads for 8 query heads",
    ),
    "interleaved": (
        *(interleaved(OTHER, OTHER, FLAT), V, {}, INTERLEAVED),
        "channels 12 to 17 of each 18: a head's values stand beside its queries and keys",
    ),
    "latent": (
        *(interleaved(OTHER, FLAT), V, {"latent": 8}, LATENT),
        "channels 6 to 11 of each 12, made of 8 numbers",
    ),
    "first third": (torch.cat([FLAT, OTHER, OTHER], 1), V, {}, ELSEWHERE, "channels 0 to 23 of 72"),
    "permuted": (FLAT[:, ORDER], V, {}, ELSEWHERE, "4 × 6 of 24 channels, in another order"),
    "RMS norm": (FLAT, rms(V), {}, NORM, "RMS norm over each head"),
    "RMS norm with weights": (FLAT, rms(V) * WEIGHT, {}, NORM, "RMS norm over each head"),
    "norm of all heads": (
        *(FLAT, (rms(FLAT) * (1 + BIAS)).view_as(V), {}, NORM),
        "RMS norm over all heads together",
    ),
    "layer norm": (
        *(FLAT, F.layer_norm(V, [DIM], WEIGHT, WEIGHT.flip(0)), {}, NORM),
        "layer norm over each head",
    ),
    "scaled": (FLAT, 0.25 * V, {}, SCALED, "by 0.25"),
    "a constant": (
        *(FLAT - BIAS, V, {}, CONSTANT),
        "a constant is missing from every value",
    ),
    "a known constant": (
        *(FLAT - BIAS, V, {"constants": {"b_V": -BIAS, "b_V + W_V β": BIAS}}, CONSTANT),
        "b_V + W_V β is missing from every value",
    ),
    "another layer's": (OTHER, V, {"earlier": {1: -V, 3: V}}, SHARED, "of layer 3"),
    "other rows": (FLAT.flip(0), V, {}, OTHER_ORDER, "as where windows are cut behind the projection"),
    "fewer rows": (FLAT[:20], V, {}, OTHER_TOKENS, "20 tokens of the projection, 24 values"),
    "something else": (OTHER, V, {"earlier": {1: -V}}, UNEXPLAINED, ""),
    "squared": (FLAT, V.pow(2), {}, UNEXPLAINED, ""),
}


@pytest.mark.parametrize("case", CASES)
def test_the_reason_of_a_difference_is_found(case: str) -> None:
    shown, used, more, reason, detail = CASES[case]
    found = why_values_differ(shown, used, **{"heads": HEADS, "tolerance": TOLERANCE} | more)
    assert (found.reason, found.detail) == (reason, detail)
    if reason in (UNEXPLAINED, OTHER_TOKENS):
        assert math.isnan(found.remaining_error)
    else:
        assert found.remaining_error < TOLERANCE
    if reason != OTHER_TOKENS:
        kept = used[:, ::2] if case == "repeated by the model" else used
        last = shown[:, -kept[0].numel() :].double()
        error = (last - kept.flatten(1).double()).norm() / kept.double().norm()
        assert found.relative_error == pytest.approx(error.item(), abs=1e-12)


def test_channels_are_found_only_if_all_are_there() -> None:
    places = channels_of(torch.cat([OTHER, FLAT[:, ORDER]], 1), FLAT, TOLERANCE)
    assert places is not None
    assert places.tolist() == [WIDTH + ORDER.tolist().index(channel) for channel in range(WIDTH)]
    assert channels_of(torch.cat([OTHER, FLAT[:, 1:]], 1), FLAT, TOLERANCE) is None


def test_heads_that_were_repeated_are_told_from_heads_that_are_alike_now_and_then() -> None:
    assert torch.equal(distinct_heads(V.repeat_interleave(2, 1)), V)
    assert torch.equal(distinct_heads(V.repeat(1, 2, 1)), V.repeat(1, 2, 1))  # in another order


# --- outputs


FACTORS = 0.5 + torch.rand(V.shape, generator=DRAW)
GATES = torch.sigmoid(torch.randn(V.shape, generator=DRAW))
PER_HEAD = torch.sigmoid(torch.randn(ROWS, HEADS, 1, generator=DRAW))


@pytest.mark.parametrize(
    ("follows", "reason", "detail"),
    [
        (lambda y: y, SAME, ""),
        (lambda y: y * GATES, GATE, "a factor for each token and channel, from "),
        (lambda y: y * PER_HEAD, GATE, "a factor for each token and head, from "),
        (lambda y: y * 0.5, SCALED, "by 0.5"),
        (lambda y: y + GATES, SUM, "to Y, and does not follow it"),
        (rms, NORM, "RMS norm over each head"),
        (lambda y: y.flatten(1)[:, ORDER].view_as(y), ELSEWHERE, "the same, with channels in another order"),
        (lambda y: torch.tanh(y), UNEXPLAINED, ""),
    ],
)
def test_what_comes_between_attention_and_its_projection(follows, reason: str, detail: str) -> None:
    read, again = follows(V).flatten(1), follows(V * FACTORS).flatten(1)
    found = why_outputs_differ(read, V, (again, V * FACTORS), tolerance=TOLERANCE)
    assert found.reason == reason
    assert found.detail.startswith(detail)
    assert bool(found.detail) == bool(detail)
    assert found.relative_error == pytest.approx(((read - FLAT).norm() / FLAT.norm()).item(), rel=1e-5)


def test_a_factor_is_no_gate_without_having_asked() -> None:
    """Any two tensors differ by some factor: only a second run tells a gate."""
    assert why_outputs_differ((V * GATES).flatten(1), V, None, tolerance=TOLERANCE).reason == UNEXPLAINED
    again = torch.tanh(V * FACTORS).flatten(1), V * FACTORS
    assert why_outputs_differ(torch.tanh(V).flatten(1), V, again, tolerance=TOLERANCE).reason == UNEXPLAINED
