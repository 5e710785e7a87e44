"""Keys that are no tokens: memory, zero and bias keys stand beside those of the tokens in a softmax.

They are taken out of a call, and what they add to its output is kept (`AttentionCall.outside`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diag.attention.pattern import BLOCK_ELEMENTS


class OfTokens(NamedTuple):
    """What is left of a call: its tokens' keys and values, and what the others gave.

    mask: of the tokens' keys. outside: `Σ_e A_ie v_e` over the others. log_normaliser: of all keys.
    """

    key: Float[Tensor, "batch kv_head token dim"]
    value: Float[Tensor, "batch kv_head token value_dim"]
    mask: Tensor | None
    outside: Float[Tensor, "batch head token value_dim"]
    log_normaliser: Float[Tensor, "batch head token"]


def without_extra_keys(
    query: Float[Tensor, "batch head token dim"],
    key: Float[Tensor, "batch kv_head key dim"],
    value: Float[Tensor, "batch kv_head key value_dim"],
    mask: Tensor | None,
    scale: float,
    extra: tuple[int, int],
) -> OfTokens:
    """Parts a call's keys into tokens and others; O(token) memory, scores are made block by block.

    mask: as in `AttentionCall`, of all keys. extra: how many keys in front of its tokens and behind them are
        none.
    """
    before, tokens = extra[0], query.shape[2]
    own = slice(before, before + tokens)
    group = query.shape[1] // key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    wide_key, wide_value = (x.to(dtype).repeat_interleave(group, 1) for x in (key, value))
    other = torch.ones(key.shape[2], dtype=torch.bool, device=key.device)
    other[own] = False
    rows = max(1, BLOCK_ELEMENTS[query.device.type] // (query.shape[0] * query.shape[1] * key.shape[2]))
    outside, normaliser = [], []
    for start in range(0, tokens, rows):
        at = slice(start, start + rows)
        scores = query[:, :, at].to(dtype) @ wide_key.mT * scale
        if mask is not None:
            part = mask if mask.shape[-2] == 1 else mask[..., at, :]
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
        lse = scores.logsumexp(-1)
        weights = (scores[..., other] - lse[..., None]).exp().nan_to_num(0.0)
        outside.append(weights @ wide_value[:, :, other])
        normaliser.append(lse)
    whole = mask is None or mask.shape[-1] == 1
    return OfTokens(
        key[:, :, own],
        value[:, :, own],
        mask if whole else mask[..., own],  # type: ignore[index]
        torch.cat(outside, 2).to(value.dtype),
        torch.cat(normaliser, 2),
    )


def without_extra_weights(
    pattern: Float[Tensor, "batch head token key"],
    value: Float[Tensor, "batch head key value_dim"],
    extra: tuple[int, int],
) -> tuple[Tensor, Tensor, Float[Tensor, "batch head token value_dim"]]:
    """Pattern and values of the tokens' keys, views, and `outside`, where a call's pattern is known.

    extra: as in `without_extra_keys`.
    """
    before, after = extra
    parts = (before, pattern.shape[-1] - before - after, after)
    first, own, last = pattern.split(parts, -1)
    others, values, behind = value.split(parts, -2)
    return own, values, first @ others + last @ behind
