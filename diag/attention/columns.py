"""Chosen columns of the pattern: what every query gives to a few keys, in O(token) memory."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diag.attention.call import head_chunks
from diag.attention.pattern import masked
from diag.attention.softmax_statistics import CallStatistics
from diag.attention.visibility import four_dimensional, part_of


def pattern_columns(
    statistics: CallStatistics, keys: Int[Tensor, "batch head chosen"]
) -> Float[Tensor, "batch head token chosen"]:
    """`A_ij` of every query i and the chosen keys j, which differ between heads; float32.

    A row that sees no key is all zero. Not of a layer that adds up several maps.
    """
    call = statistics.call
    assert not call.maps
    shape = (*call.output.shape[:3], keys.shape[-1])
    if call.pattern is not None:
        return call.pattern.gather(-1, keys[:, :, None].expand(shape)).float()
    assert call.query is not None
    assert call.key is not None
    normaliser = statistics.known_log_normaliser
    normaliser = statistics.softmax.log_normaliser if normaliser is None else normaliser
    assert normaliser is not None
    found = torch.empty(shape, dtype=torch.float32, device=call.output.device)
    row = torch.arange(call.tokens, device=keys.device)[:, None]
    for in_batch, in_kv_head in head_chunks(call, call.query.shape[-1]):
        in_head = call.query_heads(in_kv_head)
        chosen = keys[in_batch, in_head]  # [batch, head, chosen]
        of_group = chosen.unflatten(1, (-1, call.group)).flatten(2)[..., None]  # [batch, kv_head, .., 1]
        key = call.key[in_batch, in_kv_head].take_along_dim(of_group, 2).float()
        key = key.unflatten(2, (call.group, -1)).flatten(1, 2)  # [batch, head, chosen, dim]
        scores = (call.query[in_batch, in_head].float() @ key.transpose(-1, -2)).mul_(call.scale)
        if call.mask is not None:
            mask = part_of(four_dimensional(call.mask), in_batch, in_head)
            mask = mask.expand(*scores.shape[:2], -1, call.keys)
            mask = mask.take_along_dim(chosen[:, :, None], -1)
            scores = masked(scores, mask, call.hidden, float("-inf"))
        if call.causal:
            scores = scores.masked_fill(chosen[:, :, None] > row, float("-inf"))
        found[in_batch, in_head] = (scores - normaliser[in_batch, in_head, :, None].float()).exp_()
    return torch.where((call.visibility.count > 0)[..., None], found, 0.0)
