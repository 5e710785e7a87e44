"""How the values of one call lie about each other: along sampled anchors, and in how many directions.

Both are read off the same blocks of values, in one pass after that of `value_statistics`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.linalg import vecdot, vector_norm
from torch.nn.functional import threshold

from diag.attention.call import AttentionCall
from diag.attention.pattern import Scratch
from diag.attention.value_statistics import reciprocal, value_blocks
from diag.attention.visibility import of_inputs

ANCHORS = 16
"""Sampled anchor tokens of `value_similarity_partial`; all tokens where there are no more than these."""

COARSE = 8
"""Up to which mean of 1/(1 - cos²) partial similarities are computed in float32, with errors below 1e-6."""


@dataclass(frozen=True, eq=False)
class ValueSpread:
    """Numbers per KV head of the values of S, `[batch, kv_head]`.

    partial_similarity: mean cosine over pairs of values without their parts along an anchor, over anchors.
    participation_ratio: (tr C)²/tr C², C their covariance. is_spread: whether they differ at all.
    """

    partial_similarity: Tensor
    participation_ratio: Tensor
    is_spread: Tensor


def value_spread(
    call: AttentionCall, among: Bool[Tensor, "#batch token"], norm: Float[Tensor, "batch kv_head token"]
) -> ValueSpread:
    """The spread of a call's values for one token set.

    among: the tokens of S that are keys. norm: ‖v_i‖.
    """
    count = among.sum(-1)  # [batch or 1]
    ranks, valid = anchors(count, ANCHORS)  # [batch or 1, anchor]
    place = among.int().argsort(dim=-1, descending=True, stable=True).gather(-1, ranks)
    other = torch.arange(call.tokens, device=place.device) != place[..., None]
    chosen = (among[:, None, :] & other)[:, None]  # [batch or 1, 1, anchor, token]
    per_norm = reciprocal(norm)
    shape, device = (call.batch, call.kv_heads), norm.device
    similarity = torch.empty(*shape, ANCHORS, dtype=torch.float64, device=device)
    trace, squares = torch.empty(2, *shape, dtype=torch.float32, device=device)
    weights = among[:, None, :, None].float()
    number = count[:, None, None, None].clamp(min=1)

    scratch = Scratch(device)
    for where, value in value_blocks(call):
        of, there = (of_inputs(x, where[0]) for x in (place, chosen))
        cosines, coarse = _partial_cosines(value, per_norm[where], of, there)
        each = similarity[where].copy_(cosines)
        if coarse.any():  # only these heads are copied in float64
            inputs = coarse.nonzero()[:, 0]
            of, there = (x.expand(len(value), *x.shape[1:])[inputs] for x in (of, there))
            exact = value[coarse].double()[:, None]
            lengths = reciprocal(vector_norm(exact, dim=-1))
            each[coarse] = _partial_cosines(exact, lengths, of, there)[0][:, 0]
        inside = of_inputs(weights, where[0])
        mean = inside.mT @ value / of_inputs(number, where[0])
        centred = torch.sub(value, mean, out=scratch(*value.shape)).mul_(inside)
        covariance = centred.mT @ centred  # [batch, kv_head, dim, dim]
        trace[where] = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        squares[where] = covariance.square_().sum((-2, -1))
    exist = valid[:, None]
    # what rounding of the mean leaves is no spread; NaN stays, to be found out
    energy = (among[:, None] * norm.square()).sum(-1)
    return ValueSpread(
        partial_similarity=(similarity * exist).sum(-1) / exist.sum(-1).clamp(min=1),
        participation_ratio=trace.square() * reciprocal(squares),
        is_spread=~(trace <= 1e-12 * energy),
    )


def anchors(count: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Ranks of the anchor tokens among those that count, and which of them exist, `[batch, number]` each.

    All tokens where there are at most `number`; otherwise one drawn at random from each of `number`
    equal strata (neighbouring strata may share a token where there are few more), the same for every
    input and run, so that a table does not depend on batches.
    """
    stratum = torch.arange(number, device=count.device)
    draw = torch.rand(number, dtype=torch.float32, generator=torch.Generator().manual_seed(0)).to(
        count.device
    )
    sampled = ((stratum + draw) / number * count[:, None]).long()
    ranks = torch.where(count[:, None] <= number, stratum, sampled)
    valid = ranks < count[:, None]
    return torch.where(valid, ranks, 0), valid


def mean_pairwise(total: Tensor, units: Tensor, count: Tensor) -> Tensor:
    """Mean cosine over ordered pairs, from the sum of the unit vectors: (‖Σ û‖² - units)/(n(n-1)).

    units: how many of the n vectors are not zero.
    """
    return (total.square().sum(-1) - units) / (count * (count - 1)).clamp(min=1)


def _partial_cosines(
    value: Float[Tensor, "batch kv_head token dim"],
    per_norm: Float[Tensor, "batch kv_head token"],
    place: Int[Tensor, "#batch anchor"],
    chosen: Bool[Tensor, "#batch 1 anchor token"],
) -> tuple[Float[Tensor, "batch kv_head anchor"], Bool[Tensor, "batch kv_head"]]:
    """Mean cosine over pairs of the chosen values without their parts along the anchor at `place`, in the
    format of the values, and whether float32 is too coarse for it.

    1 - cos² loses its digits where values are nearly parallel: the error is about ε · mean of 1/(1 - cos²).

    per_norm: 1/‖v_i‖, 0 for zero vectors.
    """
    per_norm = per_norm[:, :, None]
    index = place[:, None, :, None].expand(*value.shape[:2], -1, value.shape[-1])
    anchor = value.gather(2, index)
    anchor *= per_norm.mT.gather(2, index[..., :1])
    cosine = (anchor @ value.mT).mul_(per_norm)  # [batch, kv_head, anchor, token]
    # what is left of v̂_j without its part along the anchor; of what was not chosen, nothing
    left = torch.addcmul(chosen.to(value.dtype), cosine, cosine, value=-1)
    scale = threshold(left, 1e-12, torch.inf, inplace=True).rsqrt_()
    count = chosen.sum(-1)
    coarse = vector_norm(scale, dim=-1).square() > COARSE * count
    scale *= per_norm
    units = scale.sign().sum(-1)
    total = scale @ value
    total = torch.addcmul(total, vecdot(total, anchor)[..., None], anchor, value=-1)
    return mean_pairwise(total, units, count), (coarse | (units < count)).any(-1)
