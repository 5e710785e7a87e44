"""The pattern A of a call: chosen rows of it, and all of it in blocks that are gone when the next comes.

Nothing here holds a whole token × token matrix, except `pattern_rows` when it is asked for every row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diag.attention.call import AttentionCall, of_threads
from diag.attention.sampling import RowSample
from diag.attention.visibility import four_dimensional
from diag.errors import MeasurementError, UserError

LN2 = math.log(2)

BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
"""How many pattern entries one streamed block may hold: 8 MiB, or 256 MiB."""

SEVERAL_HEADS_ELEMENTS = {"cpu": 1 << 18, "cuda": BLOCK_ELEMENTS["cuda"] // 2}
"""Up to how many pattern entries per thread one block takes several heads: few stay in a core's cache."""

BLOCK_ROWS = {"cpu": 256, "cuda": 4096}
SAMPLED_BLOCK_ROWS = {"cpu": 128, "cuda": 4096}
LEAST_BLOCKS = 16
"""Blocks per head in long sequences: fewer would compute more of what causality hides."""


def _places(rows: Tensor | Sequence[int] | int, tokens: int, device: torch.device) -> Int[Tensor, " row"]:
    """Query rows as places from the first token: what causality hides from a row is decided by its place.

    Raises UserError for rows that are not there, or no whole numbers.
    """
    found = torch.as_tensor(rows, device=device)
    if found.is_floating_point() or found.dtype == torch.bool:
        raise UserError(
            f"rows are {str(found.dtype).removeprefix('torch.')}", "give the places of tokens: [0, 5, -1]"
        )
    # what measures gives tensors, and does not wait for a GPU to look at them
    if not isinstance(rows, Tensor) and ((found < -tokens) | (found >= tokens)).any():
        raise UserError(
            f"no query row {found.tolist()}", f"rows are 0 to {tokens - 1}, or -1 to -{tokens} from the last"
        )
    return torch.where(found < 0, found + tokens, found).reshape(-1)


def pattern_rows(
    call: AttentionCall, rows: Tensor | Sequence[int] | int | None = None
) -> Float[Tensor, "batch head row key"]:
    """The attention weights of the chosen query rows (all rows if None), float32.

    A row that sees no key is all zero. Weights of added maps and of a given pattern may be negative, and
    where keys are no tokens, rows sum to less than 1.
    """
    device = call.output.device
    rows = torch.arange(call.tokens, device=device) if rows is None else _places(rows, call.tokens, device)
    if call.pattern is not None:
        return call.pattern[:, :, rows].float()
    if call.maps:
        found = torch.zeros(*call.output.shape[:2], len(rows), call.keys, device=device)
        for one in call.maps:
            chosen = one.coefficient.expand(-1, -1, call.tokens)[:, :, rows, None]
            found += chosen.float() * pattern_rows(call.of_map(one), rows)
        return found
    scores = score_rows(call, rows)
    if call.outside is None:
        return torch.nan_to_num(scores.softmax(-1), nan=0.0).float()
    assert call.log_normaliser is not None
    return torch.nan_to_num((scores - call.log_normaliser[:, :, rows, None]).exp(), nan=0.0).float()


def score_rows(call: AttentionCall, rows: Tensor) -> Tensor:
    """Masked scores of the chosen query rows, `[batch, head, row, key]`; -inf where a key is hidden.

    In the format of the queries, at least float32. Differentiable. Raises MeasurementError of a layer without
    softmax.
    """
    if not call.has_pattern:
        raise MeasurementError(
            f"layer '{call.module}' has no softmax, and so no attention weights",
            "choose a layer whose mixer is softmax",
        )
    assert call.query is not None
    assert call.key is not None
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    query = call.query[:, :, rows].to(dtype).unflatten(1, (call.kv_heads, call.group))
    key = call.key.to(dtype)[:, :, None]
    scores = (query @ key.transpose(-1, -2)).flatten(1, 2) * call.scale  # [batch, head, row, token]
    if call.mask is not None:
        mask = four_dimensional(call.mask)
        block = mask if mask.shape[2] == 1 else mask[:, :, rows]
        scores = masked(scores, block, call.hidden, float("-inf"))
    if call.causal:
        position = torch.arange(call.keys, device=scores.device)
        scores = scores.masked_fill(position > rows[:, None], float("-inf"))
    return scores


def attend(call: AttentionCall, rows: Tensor | None = None) -> Float[Tensor, "batch head row value_dim"]:
    """`y = A V + o` for the chosen rows, rebuilt from the call."""
    outside = call.outside_at(slice(None) if rows is None else rows)
    return weighted_values(call, pattern_rows(call, rows)) + outside


def weighted_values(
    call: AttentionCall, weights: Float[Tensor, "batch head row key"]
) -> Float[Tensor, "batch head row value_dim"]:
    """`A V` of some rows of A: with what comes of no token, what the reconstruction gate compares."""
    grouped = weights.unflatten(1, (call.kv_heads, call.group))
    return (grouped @ call.value.float()[:, :, None]).flatten(1, 2)


def log2_pattern_blocks(
    call: AttentionCall, lse: Tensor, known: bool
) -> Iterator[tuple[tuple[slice, slice, slice], Tensor]]:
    """Yields `log₂ A` in blocks `[batch, head, row, key]` with their place; fills `lse` where not known.

    To the base of 2, because exp2 is two to thirty times as fast as exp on a CPU, most of all where a
    weight is 0 or nearly so. A block is overwritten by the next. Nothing here has a gradient.

    Rows are those of the call's sample, where it has one; `lse` is that of all rows. Keys after the last
    that a causal block sees are left out. Hidden entries hold a large negative number instead of -inf, so
    that `A log₂ A` is 0 and not NaN.
    """
    assert call.query is not None
    assert call.key is not None
    call, lse = replace(call, query=call.query.detach(), key=call.key.detach()), lse.detach()
    if call.sample is None:
        yield from _all_blocks(call, lse, known)
        return
    if not known:
        for _ in _all_blocks(call, lse, known):
            pass
    yield from _sampled_blocks(call, call.sample, lse)


def given_blocks(call: AttentionCall) -> Iterator[tuple[tuple[slice, slice, slice], Tensor]]:
    """Yields a given pattern in blocks `[batch, head, row, key]` with their place, float32.

    Where the pattern is float32 blocks are parts of it, not copies: they are read only. Keys after the last
    that a causal block sees are left out: their weights are 0.
    """
    assert call.pattern is not None
    device, causal = call.output.device, call.visibility.rule == "causal"
    budget = min(of_threads(SEVERAL_HEADS_ELEMENTS, device), BLOCK_ELEMENTS[device.type])
    heads, rows, keys = call.pattern.shape[1:]
    most = BLOCK_ROWS[device.type] // 2 if causal else rows
    rows_at_once = max(1, min(rows, most, budget // max(1, keys)))
    number = max(1, budget // (rows_at_once * max(1, keys)))
    heads_at_once, batch_at_once = min(heads, number), max(1, number // heads)
    for b in range(0, call.batch, batch_at_once):
        for h in range(0, heads, heads_at_once):
            for r in range(0, rows, rows_at_once):
                where = (
                    slice(b, min(b + batch_at_once, call.batch)),
                    slice(h, min(h + heads_at_once, heads)),
                    slice(r, min(r + rows_at_once, rows)),
                )
                yield where, call.pattern[where][..., : where[2].stop if causal else keys].float()


def positions(call: AttentionCall, where: tuple[slice, slice, slice]) -> Int[Tensor, " row"]:
    """Which query rows a block of `log2_pattern_blocks` holds; with a sample it is of one input."""
    if call.sample is None:
        return torch.arange(where[2].start, where[2].stop, device=call.output.device)
    return call.sample.index[where[0].start, where[2]]


class Scratch:
    """Memory that every block of a stream is written to in turn: fresh memory would cost page faults."""

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.empty(0, dtype=torch.float32, device=device)

    def __call__(self, *shape: int) -> Tensor:
        """A float32 tensor of this shape; it holds what was there before."""
        elements = math.prod(shape)
        if self.buffer.numel() < elements:
            self.buffer = self.buffer.new_empty(elements)
        return self.buffer[:elements].view(shape)


def _sampled_blocks(
    call: AttentionCall, sample: RowSample, lse: Tensor
) -> Iterator[tuple[tuple[slice, slice, slice], Tensor]]:
    """The blocks of the sampled rows: every input has rows of its own, so a block is of one input."""
    assert call.query is not None
    device = "cuda" if call.output.is_cuda else "cpu"
    budget = BLOCK_ELEMENTS[device]
    rows_at_once = max(1, min(sample.rows, SAMPLED_BLOCK_ROWS[device], max(budget // call.keys, 16)))
    heads_at_once = max(1, budget // (2 * rows_at_once * call.keys)) if device == "cuda" else 1
    mask = None if call.mask is None else four_dimensional(call.mask)
    scratch = Scratch(call.output.device)
    ends = sample.index.tolist() if call.causal else None
    for b in range(call.batch):
        in_batch = slice(b, b + 1)
        for h in range(0, call.heads, heads_at_once):
            in_head = slice(h, min(h + heads_at_once, call.heads))
            key = _keys_of_heads(call, in_batch, in_head)[0].float().contiguous().transpose(1, 2)
            for r in range(0, sample.rows, rows_at_once):
                in_row = slice(r, min(r + rows_at_once, sample.rows))
                rows = sample.index[b, in_row]
                # every row of a block sees the keys up to its first row, none those after its last
                common, seen = call.keys, call.keys
                if ends is not None:
                    common, seen = (min(ends[b][at] + 1, seen) for at in (in_row.start, in_row.stop - 1))
                query = call.query[b, in_head][:, rows].float()
                offset = lse[b, in_head][:, rows, None] / LN2
                into = scratch(*query.shape[:2], seen)
                block = torch.baddbmm(
                    offset, query, key[..., :seen], beta=-1.0, alpha=call.scale / LN2, out=into
                )
                if mask is not None:
                    part = _mask_part(mask, in_batch, in_head, slice(None), seen)
                    part = part[0] if part.shape[2] == 1 else part[0][:, rows]
                    block = masked(block, part, call.hidden, -1e30, unit=1 / LN2)
                after = torch.arange(common, seen, device=rows.device) > rows[:, None]
                block[..., common:].masked_fill_(after, -1e30)
                yield (in_batch, in_head, in_row), block[None]


def _all_blocks(
    call: AttentionCall, lse: Tensor, known: bool
) -> Iterator[tuple[tuple[slice, slice, slice], Tensor]]:
    assert call.query is not None
    assert call.key is not None
    device = "cuda" if call.output.is_cuda else "cpu"
    budget = BLOCK_ELEMENTS[device]
    rows_at_once = min(BLOCK_ROWS[device], max(128, call.tokens // LEAST_BLOCKS), call.tokens)
    if call.tokens <= 2 * rows_at_once:
        rows_at_once = call.tokens
    rows_at_once = max(1, min(rows_at_once, max(budget // call.keys, 16)))
    of_several = min(of_threads(SEVERAL_HEADS_ELEMENTS, call.output.device), budget)
    number = max(1, of_several // (rows_at_once * call.keys))
    heads_at_once = min(call.heads, number)
    batch_at_once = max(1, number // call.heads)
    mask = None if call.mask is None else four_dimensional(call.mask)
    # a minimum is many times as fast as a fill by a mask
    most = torch.full((rows_at_once, rows_at_once), torch.inf, device=call.output.device)
    most = most.where(torch.ones_like(most, dtype=torch.bool).tril(), -1e30)
    offsets = lse[..., None] / LN2
    scratch = Scratch(call.output.device)
    for b in range(0, call.batch, batch_at_once):
        in_batch = slice(b, min(b + batch_at_once, call.batch))
        for h in range(0, call.heads, heads_at_once):
            in_head = slice(h, min(h + heads_at_once, call.heads))
            query = call.query[in_batch, in_head].float()
            shape, query = query.shape[:2], query.flatten(0, 1)
            key = _keys_of_heads(call, in_batch, in_head).float().flatten(0, 1)
            if rows_at_once < call.tokens:  # several blocks of rows read them
                key = key.contiguous()
            key, offset = key.transpose(1, 2), offsets[in_batch, in_head].flatten(0, 1)
            for r in reversed(range(0, call.tokens, rows_at_once)):  # the largest first: memory is taken once
                stop = min(r + rows_at_once, call.tokens)
                in_row = slice(r, stop)
                seen = min(stop, call.keys) if call.causal else call.keys
                block = torch.baddbmm(
                    offset[:, in_row],
                    query[:, in_row],
                    key[:, :, :seen],
                    beta=-1.0 if known else 0.0,
                    alpha=call.scale / LN2,
                    out=scratch(len(query), stop - r, seen),
                )
                block = block.unflatten(0, shape)  # [batch, head, row, key]
                if mask is not None:
                    part = _mask_part(mask, in_batch, in_head, in_row, seen)
                    block = masked(block, part, call.hidden, -1e30, unit=1 / LN2)
                if call.causal and r < seen:
                    block[..., r:].clamp_(max=most[: stop - r, : seen - r])
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


def masked(scores: Tensor, mask: Tensor, hidden: float, fill: float, unit: float = 1.0) -> Tensor:
    """Scores with a boolean or additive mask applied; hidden entries become `fill`.

    unit: what a score of 1 is here.
    """
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, fill)
    return scores.add(mask.float(), alpha=unit).masked_fill_(mask <= hidden, fill)
