"""One attention call, and the exact softmax statistics of it in memory linear in the number of tokens.

Everything that is measured starts from an `AttentionCall`: the queries, keys, values and output of
one layer as the model used them. No function here holds a whole token × token matrix, except
`pattern_rows` when it is asked for every row: what needs the pattern streams blocks of query rows.

Notation of the formulas: `s_ij = scale · q_i·k_j + mask_ij`, `lse_i = log Σ_j exp s_ij`,
`A_ij = exp(s_ij - lse_i)`, `y_i = Σ_j A_ij v_j`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.linalg import vecdot, vector_norm

from diag.errors import MeasurementError
from diag.sampling import RowSample

HIDDEN = -9000.0
"""An additive mask entry at or below this hides the key: exp(-9000) is zero in every float format.
Libraries write -inf, the smallest float or -10000; no position bias in use reaches it."""

LN2 = math.log(2)

BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
"""How many pattern entries one streamed block may hold: 8 MiB, or 256 MiB."""

LANE_ELEMENTS = {"cpu": 1 << 17, "cuda": BLOCK_ELEMENTS["cuda"] // 2}
"""Up to how many pattern entries one block takes several heads: few heads stay in a core's cache."""

TENSOR_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""How many numbers some heads' queries or values may be where they are read head by head."""

BLOCK_ROWS = {"cpu": 256, "cuda": 4096}
SAMPLED_BLOCK_ROWS = {"cpu": 128, "cuda": 4096}
LEAST_BLOCKS = 16
"""Blocks per head in long sequences: fewer would compute more of what causality hides."""


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of one layer's attention, before the output projection.

    With grouped heads (`kv_head < head`) query head `h` reads KV head `h // (head // kv_head)`.
    Either `query` and `key` are given, or the `pattern` itself (the route of libraries that
    materialise it).

    mask: True where a key is visible (bool), or added to the scores (float), broadcastable to
        `[batch, head, token, token]`; None for no mask. `causal` is in addition to it.
    hidden: the additive entry at or below which a key is hidden.
    log_normaliser: `lse_i`, where the attention kernel returned it.
    sample: the query rows on which what needs whole rows of the pattern is computed; None for all.
    """

    layer: int
    module: str
    query: Float[Tensor, "batch head token dim"] | None
    key: Float[Tensor, "batch kv_head token dim"] | None
    value: Float[Tensor, "batch kv_head token value_dim"]
    output: Float[Tensor, "batch head token value_dim"]
    mask: Tensor | None
    causal: bool
    scale: float
    hidden: float = HIDDEN
    log_normaliser: Float[Tensor, "batch head token"] | None = None
    pattern: Float[Tensor, "batch head token token"] | None = None
    sample: RowSample | None = None

    @property
    def batch(self) -> int:
        """Rows of the call; more than the inputs of the batch where windows sit in the batch."""
        return self.output.shape[0]

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.output.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens, as queries and as keys."""
        return self.output.shape[2]

    @property
    def kv_heads(self) -> int:
        """Key and value heads; a divisor of `heads`."""
        return self.value.shape[1]

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    @cached_property
    def visibility(self) -> Visibility:
        """Which keys each query sees."""
        return Visibility.of(self)

    @cached_property
    def softmax(self) -> SoftmaxStatistics:
        """The statistics of every row of the pattern, computed once."""
        return softmax_statistics(self)

    @cached_property
    def controls(self) -> Float[Tensor, "control batch head token"]:
        """What goes with the entropy of a row and costs no pattern: for estimates from sampled rows."""
        return row_controls(self)


@dataclass(frozen=True, eq=False)
class Visibility:
    """Which keys each query sees, kept as structure wherever the mask has one.

    rule: "full" (every real key), "causal" (real keys up to oneself) or "general" (`visible_rows`).
    keys: keys that any query sees, `[batch or 1, token]`; None if all of them.
    count: visible keys of each query, `[batch or 1, head or 1, token]`.
    """

    rule: str
    keys: Bool[Tensor, "#batch token"] | None
    count: Tensor
    visible_rows: Tensor | None = None

    @staticmethod
    def of(call: AttentionCall) -> Visibility:
        """Reads the structure off a call's mask; O(rows · token) memory beside the mask itself."""
        device, tokens = call.output.device, call.tokens
        position = torch.arange(1, tokens + 1, device=device)
        if call.mask is None:
            count = position if call.causal else torch.full_like(position, tokens)
            return Visibility("causal" if call.causal else "full", None, count[None, None])
        mask = _four_dimensional(call.mask)
        visible = mask if mask.dtype == torch.bool else mask > call.hidden
        if visible.shape[1] > 1 and bool((visible == visible[:, :1]).all()):
            visible = visible[:, :1]
        visible = visible.expand(-1, -1, tokens, tokens)
        lower = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
        if call.causal:
            visible = visible & lower
        count = visible.sum(-1)
        if visible.shape[1] == 1:
            keys = visible[:, 0].any(1)  # [batch, key]
            kept = None if bool(keys.all()) else keys
            for rule, shape in (("full", keys[:, None, :]), ("causal", keys[:, None, :] & lower)):
                if bool((visible[:, 0] == shape).all()):
                    return Visibility(rule, kept, count)
        return Visibility("general", visible.any(2).any(1), count, visible)

    def part(self, in_batch: slice, in_head: slice) -> Visibility:
        """That of some inputs and query heads."""

        def cut(x: Tensor) -> Tensor:
            x = x[in_batch] if x.shape[0] > 1 else x
            return x[:, in_head] if x.ndim > 2 and x.shape[1] > 1 else x

        keys, visible = (None if x is None else cut(x) for x in (self.keys, self.visible_rows))
        return Visibility(self.rule, keys, cut(self.count), visible)

    def sum(
        self, x: Float[Tensor, "batch kv_head token dim"], weights: Float[Tensor, "#batch #kv_head token"]
    ) -> Float[Tensor, "batch some_head some_token dim"]:
        """`Σ_j visible_ij · w_j · x_j` for every query i, O(token · dim) memory.

        The head axis of the result is that of `x`, or every query head where the mask differs
        between heads; the token axis is 1 where all queries see the same keys.
        """
        if self.keys is not None:
            weights = weights * self.keys[:, None, :]
        if self.rule == "full":
            return weights[:, :, None, :] @ x
        x = x * weights[..., None]
        if self.rule == "causal":
            return x.cumsum(2)
        assert self.visible_rows is not None
        heads = self.visible_rows.shape[1]
        if heads not in (1, x.shape[1]):
            x = x.repeat_interleave(heads // x.shape[1], 1)
        blocks = self.visible_rows.split(256, dim=2)  # each [batch or 1, head or 1, row, key]
        return torch.cat([block.to(x.dtype) @ x for block in blocks], 2)

    def count_among(self, among: Bool[Tensor, "#batch token"]) -> Tensor:
        """How many of the keys in `among` each query sees, `[batch or 1, head or 1, token or 1]`."""
        if self.keys is not None:
            among = among & self.keys
        if self.rule == "full":
            return among.sum(-1)[:, None, None]
        if self.rule == "causal":
            return among.cumsum(-1)[:, None, :]
        assert self.visible_rows is not None
        blocks = self.visible_rows.split(256, dim=2)
        return torch.cat([(block & among[:, None, None, :]).sum(-1) for block in blocks], 2)

    @property
    def sees_itself(self) -> Tensor:
        """Whether each query sees its own key, broadcastable to `[batch, head, token]`."""
        if self.rule == "general":
            assert self.visible_rows is not None
            return self.visible_rows.diagonal(dim1=-2, dim2=-1)
        if self.keys is not None:
            return self.keys[:, None, :]
        return torch.ones_like(self.count, dtype=torch.bool)


@dataclass(frozen=True, eq=False)
class SoftmaxStatistics:
    """Per query row, float32, `[batch, head, token]`. Rows that see no key hold no meaning.

    Entropy and Σ A² are those of the call's sampled rows, `[batch, head, row]`, where it has a sample.
    """

    log_normaliser: Tensor | None
    """lse_i; None where only the pattern is known"""
    entropy: Tensor
    """-Σ_j A_ij ln A_ij, in nats"""
    sum_of_squares: Tensor
    """Σ_j A_ij²"""
    self_weight: Tensor
    """A_ii"""
    first_weight: Tensor
    """A_i0, the weight on the first key that anyone sees"""


def softmax_statistics(call: AttentionCall) -> SoftmaxStatistics:
    """Every row statistic of a call's pattern in O(token) memory (science: section 5).

    Entropy and Σ A² stream blocks of query rows through one matrix product each, all rows or the call's
    sampled ones; the weights on single keys need only the log-normaliser and are of all rows.
    Float32 arithmetic whatever the model's format. On CUDA one fused kernel gives the same numbers.
    """
    from diag.kernels import fused_statistics  # it stands on this module

    if (fused := fused_statistics(call)) is not None:
        return fused
    first = _first_key(call)
    if call.pattern is not None:
        pattern = call.pattern.float()
        index = first[:, None, None, None].expand(pattern.shape[0], call.heads, call.tokens, 1)
        return SoftmaxStatistics(
            log_normaliser=None,
            entropy=-torch.xlogy(pattern, pattern).sum(-1),
            sum_of_squares=pattern.square().sum(-1),
            self_weight=pattern.diagonal(dim1=-2, dim2=-1),
            first_weight=pattern.gather(-1, index)[..., 0],
        )
    batch, heads, tokens = call.output.shape[:3]
    known = call.log_normaliser is not None
    lse = torch.empty(batch, heads, tokens, device=call.output.device)
    lse = call.log_normaliser.float() if known else lse  # type: ignore[union-attr]
    entropy = torch.empty(
        batch, heads, tokens if call.sample is None else call.sample.rows, device=lse.device
    )
    squares = torch.empty_like(entropy)
    scratch = Scratch(call)
    for where, logs in log2_pattern_blocks(call, lse, known):
        # logs: [block batch, block head, block row, key]
        pattern = torch.exp2(logs, out=scratch(logs.shape))
        squares[where] = vector_norm(pattern, dim=-1).square_()
        entropy[where] = pattern.mul_(logs).sum(-1).mul_(-LN2)
    own, leading = (scores.sub_(lse).exp_() for scores in _scores_of_single_keys(call, first))
    return SoftmaxStatistics(lse, entropy, squares, own, leading)


def row_controls(call: AttentionCall) -> Float[Tensor, "control batch head token"]:
    """Quantities of every row, in O(token) memory, that the entropy and its kind go with.

    The divergence D of uniform attention from that of the row is exact: D = lse - ln n - the mean score,
    n the visible keys. Were scores normally distributed with variance σ², the entropy would be ln n - D,
    n e^-D keys by it and n e^-2D keys by Σ A². The spread of all keys along the query stands in for σ²,
    and the weights on oneself and on the first key tell what a sink takes. (They need to be like the
    truth only; a mask that is no plain causal one enters by the log-normaliser alone.)
    """
    softmax, seen = call.softmax, call.visibility
    assert call.query is not None
    assert call.key is not None
    assert softmax.log_normaliser is not None
    middle, along = torch.empty_like(softmax.self_weight), torch.empty_like(softmax.self_weight)
    for in_batch, in_kv_head in lanes(call, call.query.shape[-1]):
        in_head = slice(in_kv_head.start * call.group, in_kv_head.stop * call.group)
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


def pattern_rows(
    call: AttentionCall, rows: Tensor | Sequence[int] | None = None
) -> Float[Tensor, "batch head row token"]:
    """The attention weights of the chosen query rows (all rows if None), float32.

    A row that sees no key is all zero.
    """
    device = call.output.device
    rows = torch.arange(call.tokens, device=device) if rows is None else torch.as_tensor(rows, device=device)
    if call.pattern is not None:
        return call.pattern[:, :, rows].float()
    return torch.nan_to_num(score_rows(call, rows).softmax(-1), nan=0.0).float()


def score_rows(call: AttentionCall, rows: Tensor) -> Tensor:
    """Masked scores of the chosen query rows, `[batch, head, row, token]`; -inf where a key is hidden.

    In the format of the queries, at least float32. Differentiable.
    """
    assert call.query is not None
    assert call.key is not None
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    query = call.query[:, :, rows].to(dtype).unflatten(1, (call.kv_heads, call.group))
    key = call.key.to(dtype)[:, :, None]
    scores = (query @ key.transpose(-1, -2)).flatten(1, 2) * call.scale  # [batch, head, row, token]
    return _mask_scores(call, scores, rows)


def attend(call: AttentionCall, rows: Tensor | None = None) -> Float[Tensor, "batch head row value_dim"]:
    """`y = A V` for the chosen rows, rebuilt from the call: what the reconstruction gate compares."""
    weights = pattern_rows(call, rows).unflatten(1, (call.kv_heads, call.group))
    return (weights @ call.value.float()[:, :, None]).flatten(1, 2)


def without_constant(call: AttentionCall, constant: Float[Tensor, " channel"]) -> AttentionCall:
    """The call with a constant c taken out of every value, and so out of every output.

    Rows of A sum to 1, so A (V - 1 cᵀ) = Y - 1 cᵀ exactly. A row that sees no key sums to 0 and keeps
    its output. Queries, keys, mask and pattern stay.

    constant: c of each of the model's KV heads, one after the other. The model may have repeated
        them in the call.

    Raises MeasurementError if the call's heads cannot be those of the constant.
    """
    heads, rest = divmod(constant.numel(), call.value.shape[-1])
    if rest or heads == 0 or call.kv_heads % heads:
        raise MeasurementError(
            f"layer '{call.module}': a constant of {constant.numel()} numbers does not fit "
            f"{call.kv_heads} value heads of {call.value.shape[-1]}",
            "please report the model; without --values bias-free it can be measured",
        )
    each = constant.to(call.value.device).float().view(heads, 1, -1)
    each = each.repeat_interleave(call.kv_heads // heads, 0)  # [kv_head, 1, dim]
    sees = (call.visibility.count > 0)[..., None]
    output = call.output - torch.where(sees, each.repeat_interleave(call.group, 0), 0.0)
    changed = replace(
        call, value=(call.value - each).to(call.value.dtype), output=output.to(call.output.dtype)
    )
    changed.__dict__["visibility"] = call.visibility  # that of the mask, which several layers may share
    return changed


def all_rows(call: AttentionCall) -> AttentionCall:
    """The call without its sample of rows; what was computed of all rows is kept."""
    whole = replace(call, sample=None, log_normaliser=call.softmax.log_normaliser)
    whole.__dict__["visibility"] = call.visibility
    return whole


def _four_dimensional(mask: Tensor) -> Tensor:
    return mask[(None,) * (4 - mask.ndim)]


def _first_key(call: AttentionCall) -> Tensor:
    """Index of the first key that anyone sees, `[batch]`; 0 unless padding is on the left."""
    keys = call.visibility.keys
    if keys is None:
        return torch.zeros(call.batch, dtype=torch.long, device=call.output.device)
    return keys.int().argmax(-1).expand(call.batch)


def _mask_scores(call: AttentionCall, scores: Tensor, rows: Tensor) -> Tensor:
    """Adds the mask's `rows` and causality to `scores` `[batch, head, row, token]`; hidden is -inf."""
    if call.mask is not None:
        mask = _four_dimensional(call.mask)
        block = mask if mask.shape[2] == 1 else mask[:, :, rows]
        scores = _masked(scores, block, call.hidden, float("-inf"))
    if call.causal:
        position = torch.arange(call.tokens, device=scores.device)
        scores = scores.masked_fill(position > rows[:, None], float("-inf"))
    return scores


def _scores_of_single_keys(call: AttentionCall, key: Tensor) -> tuple[Tensor, Tensor]:
    """`s_ii` and `s_ij`, j = `key[batch]`, of every query i, `[batch, head, token]`; -inf where hidden."""
    assert call.query is not None
    assert call.key is not None
    own = torch.empty(call.output.shape[:3], device=call.output.device)
    other = torch.empty_like(own)
    for in_batch, in_kv_head in lanes(call, call.query.shape[-1]):
        in_head = slice(in_kv_head.start * call.group, in_kv_head.stop * call.group)
        query = call.query[in_batch, in_head].float().unflatten(1, (-1, call.group))
        keys = call.key[in_batch, in_kv_head].float()
        chosen = keys.take_along_dim(key[in_batch, None, None, None], 2)  # [batch, kv_head, 1, dim]
        own[in_batch, in_head] = vecdot(query, keys[:, :, None]).flatten(1, 2)
        other[in_batch, in_head] = vecdot(query, chosen[:, :, None]).flatten(1, 2)
    own, other = own.mul_(call.scale), other.mul_(call.scale)
    if call.mask is not None:
        mask = _four_dimensional(call.mask).expand(call.batch, -1, call.tokens, call.tokens)
        own = _masked(own, mask.diagonal(dim1=-2, dim2=-1), call.hidden, float("-inf"))
        batch = torch.arange(call.batch, device=key.device)
        other = _masked(other, mask[batch, :, :, key], call.hidden, float("-inf"))
    if call.causal:
        position = torch.arange(call.tokens, device=key.device)
        other = other.masked_fill((key[:, None] > position)[:, None], float("-inf"))
    return own, other


def lanes(call: AttentionCall, width: int) -> Iterator[tuple[slice, slice]]:
    """Some inputs and KV heads at a time, in order, so that on the CPU what is made of them stays in cache.

    width: numbers per token and query head.
    """
    budget = TENSOR_ELEMENTS["cuda" if call.output.is_cuda else "cpu"]
    number = max(1, budget // (call.group * call.tokens * width))
    heads_at_once = -(-call.kv_heads // -(-call.kv_heads // number))  # parts of about one size
    batch_at_once = max(1, number // call.kv_heads)
    for b in range(0, call.batch, batch_at_once):
        for h in range(0, call.kv_heads, heads_at_once):
            yield (
                slice(b, min(b + batch_at_once, call.batch)),
                slice(h, min(h + heads_at_once, call.kv_heads)),
            )


class Scratch:
    """Memory that every block of a stream is written to in turn: fresh memory would cost page faults.

    `scratch(shape)` is a tensor in it; None, for fresh memory, where gradients are asked for.
    """

    def __init__(self, call: AttentionCall) -> None:
        inputs = (call.query, call.key)
        self.fresh = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        self.buffer = torch.empty(0, device=call.output.device)

    def __call__(self, shape: Sequence[int]) -> Tensor | None:
        if self.fresh:
            return None
        elements = math.prod(shape)
        if self.buffer.numel() < elements:
            self.buffer = self.buffer.new_empty(elements)
        return self.buffer[:elements].view(*shape)


def log2_pattern_blocks(
    call: AttentionCall, lse: Tensor, known: bool
) -> Iterator[tuple[tuple[slice, slice, slice], Tensor]]:
    """Yields `log₂ A` in blocks `[batch, head, row, key]` with their place; fills `lse` where not known.

    To the base of 2, because exp2 is two to thirty times as fast as exp on a CPU, most of all where a
    weight is 0 or nearly so. A block is overwritten by the next.

    Rows are those of the call's sample, where it has one; `lse` is that of all rows. Keys after the last
    that a causal block sees are left out. Hidden entries hold a large negative number instead of -inf, so
    that `A log₂ A` is 0 and not NaN.
    """
    if call.sample is None:
        yield from _all_blocks(call, lse, known)
        return
    if not known:
        for _ in _all_blocks(call, lse, known):
            pass
    yield from _sampled_blocks(call, call.sample, lse)


def positions(call: AttentionCall, where: tuple[slice, slice, slice]) -> Int[Tensor, " row"]:
    """Which query rows a block of `log2_pattern_blocks` holds; with a sample it is of one input."""
    if call.sample is None:
        return torch.arange(where[2].start, where[2].stop, device=call.output.device)
    return call.sample.index[where[0].start, where[2]]


def _sampled_blocks(
    call: AttentionCall, sample: RowSample, lse: Tensor
) -> Iterator[tuple[tuple[slice, slice, slice], Tensor]]:
    """The blocks of the sampled rows: every input has rows of its own, so a block is of one input."""
    assert call.query is not None
    device = "cuda" if call.output.is_cuda else "cpu"
    budget = BLOCK_ELEMENTS[device]
    rows_at_once = max(1, min(sample.rows, SAMPLED_BLOCK_ROWS[device], max(budget // call.tokens, 16)))
    heads_at_once = max(1, budget // (2 * rows_at_once * call.tokens)) if device == "cuda" else 1
    mask = None if call.mask is None else _four_dimensional(call.mask)
    scratch = Scratch(call)
    last = sample.index[:, rows_at_once - 1 :: rows_at_once].tolist() if call.causal else None
    for b in range(call.batch):
        in_batch = slice(b, b + 1)
        for h in range(0, call.heads, heads_at_once):
            in_head = slice(h, min(h + heads_at_once, call.heads))
            key = _keys_of_heads(call, in_batch, in_head)[0].float().contiguous().transpose(1, 2)
            for number, r in enumerate(range(0, sample.rows, rows_at_once)):
                in_row = slice(r, min(r + rows_at_once, sample.rows))
                rows = sample.index[b, in_row]
                seen = call.tokens
                if last is not None and number < len(last[b]):
                    seen = last[b][number] + 1
                query = call.query[b, in_head][:, rows].float()
                offset = lse[b, in_head][:, rows, None] / LN2
                into = scratch((*query.shape[:2], seen))
                block = torch.baddbmm(
                    offset, query, key[..., :seen], beta=-1.0, alpha=call.scale / LN2, out=into
                )
                if mask is not None:
                    part = _mask_part(mask, in_batch, in_head, slice(None), seen)
                    part = part[0] if part.shape[2] == 1 else part[0].index_select(1, rows)
                    block = _masked(block, part, call.hidden, -1e30, unit=1 / LN2)
                if call.causal:
                    block.masked_fill_(torch.arange(seen, device=rows.device) > rows[:, None], -1e30)
                yield (in_batch, in_head, in_row), block[None]


def _all_blocks(
    call: AttentionCall, lse: Tensor, known: bool
) -> Iterator[tuple[tuple[slice, slice, slice], Tensor]]:
    assert call.query is not None
    assert call.key is not None
    device = "cuda" if call.output.is_cuda else "cpu"
    budget, rows_at_once = (
        BLOCK_ELEMENTS[device],
        min(BLOCK_ROWS[device], max(128, call.tokens // LEAST_BLOCKS), call.tokens),
    )
    if call.tokens <= 2 * rows_at_once:
        rows_at_once = call.tokens
    rows_at_once = max(1, min(rows_at_once, max(budget // call.tokens, 16)))
    number = max(1, min(LANE_ELEMENTS[device], budget) // (rows_at_once * call.tokens))
    heads_at_once = min(call.heads, number)
    batch_at_once = max(1, number // call.heads)
    upper = torch.ones(rows_at_once, rows_at_once, dtype=torch.bool, device=call.output.device).triu(1)
    mask = None if call.mask is None else _four_dimensional(call.mask)
    scratch = Scratch(call)
    for b in range(0, call.batch, batch_at_once):
        in_batch = slice(b, min(b + batch_at_once, call.batch))
        for h in range(0, call.heads, heads_at_once):
            in_head = slice(h, min(h + heads_at_once, call.heads))
            query = call.query[in_batch, in_head].float()
            key = _keys_of_heads(call, in_batch, in_head).float()
            lanes_shape = query.shape[:2]
            query, key = query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)
            if rows_at_once < call.tokens:  # every block of rows reads them
                key = key.transpose(1, 2).contiguous().transpose(1, 2)
            for r in range(0, call.tokens, rows_at_once):
                stop = min(r + rows_at_once, call.tokens)
                in_row = slice(r, stop)
                seen = stop if call.causal else call.tokens
                offset = lse[in_batch, in_head, in_row].flatten(0, 1)[..., None] / LN2
                block = torch.baddbmm(
                    offset,
                    query[:, in_row],
                    key[:, :, :seen],
                    beta=-1.0 if known else 0.0,
                    alpha=call.scale / LN2,
                    out=scratch((len(query), stop - r, seen)),
                )
                block = block.unflatten(0, lanes_shape)  # [batch, head, row, key]
                if mask is not None:
                    part = _mask_part(mask, in_batch, in_head, in_row, seen)
                    block = _masked(block, part, call.hidden, -1e30, unit=1 / LN2)
                if call.causal:
                    block[..., r:].masked_fill_(upper[: stop - r, : stop - r], -1e30)
                if not known:
                    top = block.amax(-1, keepdim=True)
                    normaliser = top + (block - top).exp2_().sum(-1, keepdim=True).log2_()
                    normaliser *= LN2
                    lse[in_batch, in_head, in_row] = normaliser[..., 0]
                    block = block.sub_(normaliser / LN2)  # as rounded: to the last bit what a known one gives
                yield (in_batch, in_head, in_row), block


def _keys_of_heads(call: AttentionCall, in_batch: slice, in_head: slice) -> Tensor:
    """Keys of the query heads in a slice: a view wherever the slice is one head or heads are not grouped."""
    assert call.key is not None
    if call.group == 1:
        return call.key[in_batch, in_head]
    if in_head.stop - in_head.start == 1:
        kv_head = in_head.start // call.group
        return call.key[in_batch, kv_head : kv_head + 1]
    owner = torch.arange(in_head.start, in_head.stop, device=call.key.device) // call.group
    return call.key[in_batch][:, owner]


def _mask_part(mask: Tensor, in_batch: slice, in_head: slice, in_row: slice, seen: int) -> Tensor:
    return mask[
        in_batch if mask.shape[0] > 1 else slice(None),
        in_head if mask.shape[1] > 1 else slice(None),
        in_row if mask.shape[2] > 1 else slice(None),
        : seen if mask.shape[3] > 1 else None,
    ]


def _masked(scores: Tensor, mask: Tensor, hidden: float, fill: float, unit: float = 1.0) -> Tensor:
    """Scores with a boolean or additive mask applied; hidden entries become `fill`.

    unit: what a score of 1 is here.
    """
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, fill)
    return scores.add(mask.float(), alpha=unit).masked_fill_(mask <= hidden, fill)
