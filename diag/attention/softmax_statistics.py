"""The softmax statistics of every query row, exact, in memory linear in the number of tokens.

Whoever measures a call makes one `CallStatistics` of it: what is computed there is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.linalg import vecdot, vector_norm

from diag.attention.call import AttentionCall, first_key, head_chunks
from diag.attention.containers import SoftmaxStatistics
from diag.attention.kernels import fused_statistics
from diag.attention.pattern import LN2, Scratch, given_blocks, log2_pattern_blocks, masked
from diag.attention.row_sums import row_sums
from diag.attention.visibility import four_dimensional


class CallStatistics:
    """What is known of the rows of one call's pattern, each thing computed when it is first asked for.

    All token sets and metrics of a call share one of these.
    """

    def __init__(self, call: AttentionCall, softmax: SoftmaxStatistics | None = None) -> None:
        """softmax: where it is known already."""
        self.call = call
        self.givers: Sequence[Bool[Tensor, "#batch #head token"]] = ()
        """for each token set, the rows whose weights are summed up key by key while `softmax` is computed"""
        self.columns: tuple[Tensor, Tensor] | None = None
        """the keys whose weights were read last by `pattern_columns`, and these weights"""
        self._softmax = softmax

    @property
    def softmax(self) -> SoftmaxStatistics:
        """The softmax statistics of every row, or of the call's sampled ones."""
        if self._softmax is None:
            self._softmax = softmax_statistics(self.call, self.givers)
        return self._softmax

    @property
    def known_log_normaliser(self) -> Float[Tensor, "batch head token"] | None:
        """lse_i if it is there without computing anything: the kernel gave it, or `softmax` was asked for."""
        if self.call.log_normaliser is None and self._softmax is not None:
            return self._softmax.log_normaliser
        return self.call.log_normaliser

    @cached_property
    def controls(self) -> Float[Tensor, "control batch head token"]:
        """What goes with the entropy of a row and costs no pattern: for estimates from sampled rows."""
        return row_controls(self.call, self.softmax)

    def of_all_rows(self) -> CallStatistics:
        """Of the same call without its sample; the log-normaliser, which is of all rows, is kept."""
        whole = replace(self.call, sample=None, log_normaliser=self.softmax.log_normaliser)
        return CallStatistics(whole)


def softmax_statistics(
    call: AttentionCall, givers: Sequence[Bool[Tensor, "#batch #head token"]] = ()
) -> SoftmaxStatistics:
    """Every row statistic of a call's pattern in O(token) memory.

    givers: sets of rows whose weights are summed up key by key on the way (`received`), where blocks are
        read; of sampled rows, each counts for those that it stands for.

    Everything is read off blocks of query rows, one matrix product each. Where rows are sampled, only entropy
    and Σ A² are: the weights on single keys need the log-normaliser alone and are of all rows.
    Float32 arithmetic whatever the model's format. On CUDA one fused kernel gives the same numbers.
    """
    if call.maps:
        return _of_maps(call)
    if (fused := fused_statistics(call)) is not None:
        return fused
    if call.pattern is not None:
        return _of_pattern(call)
    first, sample = first_key(call), call.sample
    known = call.log_normaliser is not None
    lse = torch.empty(call.output.shape[:3], dtype=torch.float32, device=call.output.device)
    own, leading, sums = (torch.full_like(lse, torch.nan) for _ in range(3))
    lse = call.log_normaliser.float() if known else lse  # type: ignore[union-attr]
    entropy = lse.new_empty(*lse.shape[:2], call.tokens if sample is None else sample.rows)
    squares = torch.empty_like(entropy)
    received = Received(call, givers) if givers else None
    scratch = Scratch(call.output.device)
    for where, logs in log2_pattern_blocks(call, lse, known):
        # logs: [block batch, block head, block row, key]
        pattern = torch.exp2(logs, out=scratch(*logs.shape))
        vector_norm(pattern, dim=-1, out=squares[where])
        if sample is None:
            if call.own_keys:
                own[where] = pattern.diagonal(where[2].start, -2, -1)
            if call.visibility.keys is None:
                leading[where] = pattern[..., 0]
            else:
                leading[where] = _on_key(pattern, first[where[0]])
            if call.outside is not None:
                torch.sum(pattern, -1, out=sums[where])
        if received is not None:
            received.add(pattern, where)
        torch.sum(pattern.mul_(logs), -1, out=entropy[where])
    squares.square_()
    entropy.mul_(-LN2)
    if sample is not None:
        own, leading = (scores.sub_(lse).exp_() for scores in _scores_of_single_keys(call, first))
    total = None
    if call.outside is not None:
        total = row_sums(call) if sample is not None else sums.where(call.visibility.count > 0, 0.0)
    summed = None if received is None else received.found
    return SoftmaxStatistics(lse, entropy, squares, own, leading, total, summed)


class Received:
    """What keys receive from several sets of rows, summed up block by block.

    found: `Σ_i A_ij`, `[set, batch, head, key]`, float32. With sampled rows, an estimate of it.
    """

    def __init__(self, call: AttentionCall, givers: Sequence[Bool[Tensor, "#batch #head token"]]) -> None:
        shape, seen, sample = call.output.shape[:3], call.visibility, call.sample
        rows = [part.expand(shape) for part in givers]
        if sample is not None:
            rows = [sample.at(part) * sample.weight[:, None] for part in rows]
        self.givers = torch.stack(rows, 2).float()  # [batch, head, set, row]
        self.found = self.givers.new_zeros(len(rows), *shape[:2], call.keys)
        # rows of padding, and rows that see nothing, may hold anything
        self.guarded = seen.keys is not None or seen.rule == "general" or call.padding is not None

    def add(self, pattern: Float[Tensor, "batch head row key"], where: tuple[slice, slice, slice]) -> None:
        """Adds a block of weights, which is left as it is."""
        in_batch, in_head, in_row = where
        givers = self.givers[in_batch, in_head, :, in_row]
        if self.guarded and bool((silent := (givers == 0).all(2)).any()):
            pattern = pattern.masked_fill(silent[..., None], 0.0)
        self.found[:, in_batch, in_head, : pattern.shape[-1]] += (givers @ pattern).movedim(2, 0)


def _on_key(pattern: Tensor, key: Tensor) -> Tensor:
    """Of each row of a block its weight on `key[batch]`, or on its last where causality leaves that out."""
    key = key.clamp(max=pattern.shape[-1] - 1)[:, None, None, None]
    return pattern.take_along_dim(key, -1)[..., 0]


def _of_pattern(call: AttentionCall) -> SoftmaxStatistics:
    """Of a given pattern, block by block: nothing of its size is made."""
    assert call.pattern is not None
    device, shape = call.output.device, call.output.shape[:3]
    entropy, squares, sums, least = torch.empty(4, *shape, dtype=torch.float32, device=device)
    scratch, tiny = Scratch(device), torch.finfo(torch.float32).tiny
    for where, block in given_blocks(call):
        vector_norm(block, dim=-1, out=squares[where])
        torch.sum(block, -1, out=sums[where])
        torch.amin(block, -1, out=least[where])
        logs = torch.clamp(block, min=tiny, out=scratch(*block.shape)).log2_()  # 0 log 0 is 0
        torch.sum(logs.mul_(block), -1, out=entropy[where])
    squares.square_()
    entropy.mul_(-LN2)
    seen = call.visibility.count > 0
    index = first_key(call)[:, None, None, None].expand(*shape, 1)
    return SoftmaxStatistics(
        log_normaliser=None,
        entropy=entropy,
        sum_of_squares=squares,
        self_weight=_of_oneself(call, call.pattern),
        first_weight=call.pattern.gather(-1, index)[..., 0].float(),
        row_sum=torch.where(seen, sums, 0.0),
        negative=((least < 0) & seen).any(-1),
    )


def _of_oneself(call: AttentionCall, weights: Float[Tensor, "batch head token key"]) -> Tensor:
    """The weights on the queries' own keys; NaN where there are none."""
    if call.own_keys:
        return weights.diagonal(dim1=-2, dim2=-1).float()
    return torch.full(call.output.shape[:3], torch.nan, dtype=torch.float32, device=weights.device)


def _of_maps(call: AttentionCall) -> SoftmaxStatistics:
    """Of a layer that adds up maps, the weights on single keys; an entropy of it does not exist."""
    first = first_key(call)
    own = torch.zeros(call.output.shape[:3], dtype=torch.float32, device=call.output.device)
    leading = torch.zeros_like(own)
    for one in call.maps:
        alone = call.of_map(one)
        if one.log_normaliser is None:
            found = softmax_statistics(alone)
            weights = (found.self_weight, found.first_weight)
        else:
            lse = one.log_normaliser.float()
            scores = _scores_of_single_keys(alone, first)
            weights = (scores[0].sub_(lse).exp_(), scores[1].sub_(lse).exp_())
        own += one.coefficient * weights[0]
        leading += one.coefficient * weights[1]
    nothing = torch.full_like(own, torch.nan)
    return SoftmaxStatistics(None, nothing, nothing, own, leading, row_sums(call))


def row_controls(
    call: AttentionCall, softmax: SoftmaxStatistics
) -> Float[Tensor, "control batch head token"]:
    """Quantities of every row, in O(token) memory, that the entropy and its kind go with.

    The divergence D of uniform attention from that of the row is exact: D = lse - ln n - the mean score,
    n the visible keys. Were scores normally distributed with variance σ², the entropy would be ln n - D,
    n e^-D keys by it and n e^-2D keys by Σ A². The spread of all keys along the query stands in for σ²,
    and the weights on oneself and on the first key tell what a sink takes. (They need to be like the
    truth only; a mask that is no plain causal one enters by the log-normaliser alone.)

    softmax: the statistics of the call.
    """
    seen = call.visibility
    assert call.query is not None
    assert call.key is not None
    assert softmax.log_normaliser is not None
    middle, along = torch.empty_like(softmax.self_weight), torch.empty_like(softmax.self_weight)
    for in_batch, in_kv_head in head_chunks(call, call.query.shape[-1]):
        in_head = call.query_heads(in_kv_head)
        query = call.query[in_batch, in_head].float().contiguous().unflatten(1, (-1, call.group))
        key, part = call.key[in_batch, in_kv_head].float(), seen.part(in_batch, in_head)
        number = part.count.clamp(min=1)
        if part.keys is not None:
            key = key.masked_fill(~part.keys[:, None, :, None], 0.0)  # padding may hold anything
        total = number.amax((1, 2))[:, None, None, None]
        mean = key.sum(2, keepdim=True) / total
        if seen.rule == "causal":
            scores = vecdot(query, (key.cumsum(2) / number[..., None])[:, :, None])
        else:
            scores = (query @ mean[:, :, None].transpose(-1, -2))[..., 0]
        spread = key.transpose(-1, -2) @ key / total - mean.transpose(-1, -2) @ mean
        middle[in_batch, in_head] = scores.flatten(1, 2) * call.scale
        along[in_batch, in_head] = vecdot(query @ spread[:, :, None], query).flatten(1, 2) * call.scale**2
    number = seen.count.clamp(min=1)
    divergence = softmax.log_normaliser - number.log() - middle
    own, first = softmax.self_weight, softmax.first_weight
    return torch.stack(
        [
            divergence,
            divergence.square(),
            number * (-divergence).exp(),
            number * (-2 * divergence).exp(),
            along,
            own,
            torch.xlogy(own, own),
            first,
            torch.xlogy(first, first),
        ]
    )


def _scores_of_single_keys(call: AttentionCall, key: Tensor) -> tuple[Tensor, Tensor]:
    """`s_ii` and `s_ij`, j = `key[batch]`, of every query i, `[batch, head, token]`; -inf where hidden.

    Where queries have no keys of their own, s_ii is NaN.
    """
    assert call.query is not None
    assert call.key is not None
    own = torch.full(call.output.shape[:3], torch.nan, dtype=torch.float32, device=call.output.device)
    other = torch.empty_like(own)
    for in_batch, in_kv_head in head_chunks(call, call.query.shape[-1]):
        in_head = call.query_heads(in_kv_head)
        query = call.query[in_batch, in_head].float().unflatten(1, (-1, call.group))
        keys = call.key[in_batch, in_kv_head].float()
        chosen = keys.take_along_dim(key[in_batch, None, None, None], 2)  # [batch, kv_head, 1, dim]
        if call.own_keys:
            own[in_batch, in_head] = vecdot(query, keys[:, :, None]).flatten(1, 2)
        other[in_batch, in_head] = vecdot(query, chosen[:, :, None]).flatten(1, 2)
    own, other = own.mul_(call.scale), other.mul_(call.scale)
    if call.mask is not None:
        mask = four_dimensional(call.mask).expand(call.batch, -1, call.tokens, call.keys)
        if call.own_keys:
            own = masked(own, mask.diagonal(dim1=-2, dim2=-1), call.hidden, float("-inf"))
        batch = torch.arange(call.batch, device=key.device)
        other = masked(other, mask[batch, :, :, key], call.hidden, float("-inf"))
    if call.causal:
        position = torch.arange(call.tokens, device=key.device)
        other = other.masked_fill((key[:, None] > position)[:, None], float("-inf"))
    return own, other
