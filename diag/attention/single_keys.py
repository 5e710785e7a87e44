"""The weights of every query row on single keys: on those so many steps away, or on a few chosen ones.

They need the log-normaliser alone, and no row of the pattern: `A_ij = exp(s_ij - lse_i)`, O(token · dim)
for each key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.linalg import vecdot

from diag.attention.call import AttentionCall, head_chunks
from diag.attention.pattern import masked
from diag.attention.softmax_statistics import CallStatistics, softmax_statistics
from diag.attention.visibility import four_dimensional, part_of

Read = Callable[[AttentionCall, Tensor | None, slice, slice], Tensor]


class SingleWeights:
    """Weights of a call's rows on single keys, for some inputs and KV heads at a time; float32.

    Of a given pattern they are read off it; where a layer adds up maps, they are sums of those of each. A key
    that is hidden, or is not there, has a weight of 0; a row that sees nothing may hold anything.
    """

    def __init__(self, statistics: CallStatistics) -> None:
        call = statistics.call
        self.call = call
        self.parts: list[tuple[AttentionCall, Tensor | None, Tensor | None]] = []
        """a call, its log-normaliser (None where the pattern is given) and its coefficient (None for 1)"""
        if call.pattern is not None:
            self.parts.append((call, None, None))
        elif call.maps:
            for one in call.maps:
                alone = call.of_map(one)
                lse = one.log_normaliser
                lse = softmax_statistics(alone).log_normaliser if lse is None else lse.float()
                self.parts.append((alone, lse, one.coefficient))
        else:
            known = statistics.known_log_normaliser
            lse = statistics.softmax.log_normaliser if known is None else known.float()
            self.parts.append((call, lse, None))

    def on_steps(
        self, in_batch: slice, in_kv_head: slice, steps: Sequence[int]
    ) -> Float[Tensor, "some_batch some_head token step"]:
        """`A_i,i+s` for each step s."""

        def of_part(call: AttentionCall, lse: Tensor | None, b: slice, h: slice) -> Tensor:
            shape, nothing = call.output[b, h].shape[:3], 0.0 if lse is None else -torch.inf
            found = torch.full(
                (len(steps), *shape), nothing, device=call.output.device
            )  # a step lies in a row
            if lse is not None:
                query, key = _grouped(call, b, in_kv_head, h)
                mask = _mask(call, b, h)
            for place, step in enumerate(steps):
                rows, keys = apart(step, call.tokens)
                if call.causal and step > 0:
                    continue
                if lse is None:
                    assert call.pattern is not None
                    found[place, :, :, rows] = call.pattern[b, h].diagonal(step, -2, -1)
                    continue
                scores = vecdot(query[..., rows, :], key[..., keys, :]).flatten(1, 2).mul_(call.scale)
                if mask is not None:
                    scores = masked(scores, mask.diagonal(step, -2, -1), call.hidden, -torch.inf)
                found[place, :, :, rows] = scores
            return (found if lse is None else found.sub_(lse[b, h]).exp_()).movedim(0, -1)

        return self._summed(of_part, in_batch, in_kv_head)

    def on_keys(
        self, in_batch: slice, in_kv_head: slice, keys: Int[Tensor, "some_batch some_head key"]
    ) -> Float[Tensor, "some_batch some_head token key"]:
        """`A_ij` for a few keys j of each head."""

        def of_part(call: AttentionCall, lse: Tensor | None, b: slice, h: slice) -> Tensor:
            rows = (*keys.shape[:2], call.tokens, keys.shape[2])
            index = keys[:, :, None].expand(rows)
            if lse is None:
                assert call.pattern is not None
                return call.pattern[b, h].gather(-1, index).float()
            query, key = _grouped(call, b, in_kv_head, h)
            chosen = key.expand(-1, -1, call.group, -1, -1).flatten(1, 2)
            chosen = chosen.take_along_dim(keys[..., None], 2)  # [batch, head, key, dim]
            scores = (query.flatten(1, 2) @ chosen.mT).mul_(call.scale)
            if (mask := _mask(call, b, h)) is not None:
                there = mask.expand(*rows[:3], call.keys).gather(-1, index)
                scores = masked(scores, there, call.hidden, -torch.inf)
            if call.causal:
                position = torch.arange(call.tokens, device=keys.device)
                scores = scores.masked_fill_(keys[:, :, None] > position[:, None], -torch.inf)
            return scores.sub_(lse[b, h, :, None]).exp_()

        return self._summed(of_part, in_batch, in_kv_head)

    def _summed(self, of_part: Read, in_batch: slice, in_kv_head: slice) -> Tensor:
        in_head = self.call.query_heads(in_kv_head)
        found: Tensor | None = None
        for call, lse, coefficient in self.parts:
            part = of_part(call, lse, in_batch, in_head)
            if coefficient is not None:
                part = part * part_of(coefficient, in_batch, in_head)[..., None]
            found = part if found is None else found + part
        assert found is not None
        return found


def pattern_columns(
    statistics: CallStatistics, keys: Int[Tensor, "batch head chosen"]
) -> Float[Tensor, "batch head token chosen"]:
    """`A_ij` of every query i and the chosen keys j, which differ between heads; float32.

    A row that sees no key is all zero. What was asked for last is not computed again.
    """
    known = statistics.columns
    if known is not None and torch.equal(known[0], keys):
        return known[1]
    call, weights = statistics.call, SingleWeights(statistics)
    found = torch.empty(*call.output.shape[:3], keys.shape[-1], device=call.output.device)
    for in_batch, in_kv_head in head_chunks(call, call.value.shape[-1]):
        where = (in_batch, call.query_heads(in_kv_head))
        for number, key in enumerate(keys[where].split(1, -1)):  # one by one: the same whatever stands beside
            found[(*where, slice(None), number)] = weights.on_keys(in_batch, in_kv_head, key)[..., 0]
    found = torch.where((call.visibility.count > 0)[..., None], found, 0.0)
    statistics.columns = keys, found
    return found


def sum_of_steps(
    weights: Float[Tensor, "batch head group token step"],
    values: Float[Tensor, "batch head token dim"],
    steps: Sequence[int],
) -> Float[Tensor, "batch head group token dim"]:
    """`Σ_s w_is v_i+s` over the steps s, where there is such a token."""
    total = values.new_zeros(*weights.shape[:4], values.shape[-1])
    for place, step in enumerate(steps):
        rows, keys = apart(step, values.shape[2])
        total[..., rows, :].addcmul_(weights[..., rows, place, None], values[:, :, None, keys])
    return total


def apart(step: int, tokens: int) -> tuple[slice, slice]:
    """The rows that have a key so many steps away, and those keys."""
    return slice(max(0, -step), tokens - max(0, step)), slice(max(0, step), tokens + min(0, step))


def _grouped(call: AttentionCall, b: slice, in_kv_head: slice, h: slice) -> tuple[Tensor, Tensor]:
    """Queries `[batch, kv_head, group, token, dim]` and keys with a group axis of 1, float32."""
    assert call.query is not None
    assert call.key is not None
    query = call.query[b, h].float().unflatten(1, (-1, call.group))
    return query, call.key[b, in_kv_head].float()[:, :, None]


def _mask(call: AttentionCall, b: slice, h: slice) -> Tensor | None:
    """The mask of some inputs and heads with both axes of tokens, as a view."""
    if call.mask is None:
        return None
    part = part_of(four_dimensional(call.mask), b, h)
    return part.expand(-1, -1, call.tokens, call.keys)
