"""Statistics of every row of the attention pattern on CUDA: one pass over queries and keys, in Triton.

A program owns a block of query rows of one head and walks over the keys, as flash attention does, but
multiplies no values: it keeps five numbers per row instead of an output row. With scores in bits,
`s_ij = log2(e) · (scale · q_i·k_j + mask_ij)`, and the largest score so far `m`, it carries

    l = Σ 2^(s-m)        u = Σ 2^(s-m) (s-m)        w = Σ 2^(2(s-m))

When a block of keys raises m to m', with δ = m - m' ≤ 0, what was summed up is rescaled:

    l ← 2^δ l            u ← 2^δ (u + δ l)          w ← 2^(2δ) w

because s - m' = (s - m) + δ. At the end A_ij = 2^(s_ij-m) / l, and so

    lse = ln 2 · (m + log2 l)        H = ln 2 · (log2 l - u / l)        Σ A² = w / l²

Both terms of H are at least 0 (every s - m ≤ 0): nothing cancels, unlike in `lse - Σ A s`. Mean distances are
sums over 2^(s-m) as l is. A_ii and the weights on chosen keys take one dot product each.

A hidden score is a large negative number, not -inf: δ stays finite. While a row has seen hidden keys only,
its sums are wrong; the first visible key rescales them by 2^(-1e30) = 0.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803
# (Triton reads the annotations of its kernels itself and knows `constexpr` only; what a kernel is compiled
# for is in capitals)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from diag.attention.call import AttentionCall, first_key
from diag.attention.containers import SoftmaxStatistics
from diag.attention.kernels.triton_scores import (
    LN2,
    NOTHING,
    arguments,
    launch,
    mask_scores,
    read_vectors,
    score_tile,
)


@dataclass(frozen=True, eq=False)
class RowStatistics:
    """Per query row, float32, `[batch, head, token]`. A row that sees no key holds zeros (lse: -1e30)."""

    log_normaliser: Tensor
    """lse_i in nats"""
    entropy: Tensor
    """-Σ_j A_ij ln A_ij, in nats"""
    sum_of_squares: Tensor
    """Σ_j A_ij²"""
    self_weight: Tensor
    """A_ii"""
    chosen_weight: Tensor
    """A_ij of the chosen keys, `[chosen, batch, head, token]`"""
    distance: Tensor | None
    """Σ_j A_ij D_ij / Σ_j A_ij over keys that have a place; 0 where none is seen, None if not asked for"""
    distance_square: Tensor | None
    """the same of D_ij²"""
    placed: Tensor | None
    """Σ_j A_ij over the keys that have a place"""


def softmax_statistics(call: AttentionCall) -> SoftmaxStatistics:
    """What `diag.attention.softmax_statistics` gives, in one pass; a given log-normaliser is not read.

    The log-normaliser needs all rows whatever sample of them the call has, and so all of them are computed.
    """
    found = row_statistics(call, first_key(call)[:, None])
    entropy, squares = found.entropy, found.sum_of_squares
    if call.sample is not None:
        entropy, squares = call.sample.at(entropy), call.sample.at(squares)
    return SoftmaxStatistics(
        found.log_normaliser, entropy, squares, found.self_weight, found.chosen_weight[0]
    )


def row_statistics(
    call: AttentionCall,
    chosen: Tensor,
    *,
    distances: bool = False,
    places: Tensor | None = None,
    prefix: int = 0,
) -> RowStatistics:
    """Every statistic of every query row of a call that `supports` takes.

    chosen: keys whose weights are wanted, `[batch, chosen]` of int.
    distances: whether mean distances are wanted, over the keys from `prefix` on.
    places: coordinates of every token, `[token, 2]`, for Euclidean distance; None for |i - j|.
    """
    assert call.query is not None
    device, shape = call.query.device, (call.batch, call.heads, call.tokens)
    planes = torch.empty((7 if distances else 4, *shape), device=device, dtype=torch.float32)
    lse, entropy, squares, own, *farther = planes
    weights = torch.empty((chosen.shape[1], *shape), device=device, dtype=torch.float32)
    on_plane = distances and places is not None
    coordinates = places.to(device, torch.float32).contiguous() if places is not None else lse
    tensors, scalars = arguments(call)
    sizes, options = launch(call)
    # what is not asked for is not written
    into = (lse, entropy, squares, own, weights, *(farther or (lse, lse, lse)))
    read = (*tensors, chosen.to(device, torch.int64).contiguous(), coordinates)
    options |= {"CHOSEN": chosen.shape[1], "DISTANCE": (2 if on_plane else 1) if distances else 0}
    programs = (triton.cdiv(call.tokens, sizes.rows) * call.batch * call.heads,)
    _row_kernel[programs](*read, *into, *scalars, lse.numel(), prefix, **options)
    return RowStatistics(lse, entropy, squares, own, weights, *(farther or (None, None, None)))


@triton.jit
def _sweep(
    most, total, moment, squares, travelled, travelled_square, on_places,
    query, query_at, key_at, first_row, mask, places, scale, hidden, tokens,
    query_token, query_dim, key_token, key_dim, mask_row, mask_key, prefix, start, stop,
    DIM: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    MASK: tl.constexpr, BY_KEY: tl.constexpr, CAUSAL: tl.constexpr, DISTANCE: tl.constexpr,
    WIDEN: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Carries the sums of the module's first lines over the key blocks from `start` to `stop`."""
    rows = first_row + tl.arange(0, ROWS)
    for first in range(start, stop, KEYS):
        keys = first + tl.arange(0, KEYS)
        key = query
        if WIDTH == PADDED:
            key = read_vectors(key_at, keys, key_token, key_dim, tokens, 0, DIM, PADDED)
        scores = score_tile(
            query, key, query_at, key_at, first_row, first, mask, scale, hidden, tokens,
            query_token, query_dim, key_token, key_dim, mask_row, mask_key,
            DIM, PADDED, WIDTH, ROWS, KEYS, MASK, BY_KEY, CAUSAL, WIDEN, EDGE,
        )  # fmt: skip
        higher = tl.maximum(most, tl.max(scores, 1))
        raised = most - higher  # δ
        below = scores - higher[:, None]
        weights = tl.exp2(below)
        shrunk = tl.exp2(raised)
        moment = shrunk * (moment + raised * total) + tl.sum(weights * below, 1)
        total = shrunk * total + tl.sum(weights, 1)
        squares = shrunk * shrunk * squares + tl.sum(weights * weights, 1)
        if DISTANCE != 0:
            inside = keys >= prefix
            if DISTANCE == 1:
                apart = tl.abs((rows[:, None] - keys[None, :]).to(tl.float32))
            else:
                down = tl.load(places + 2 * rows, mask=rows < tokens, other=0.0)[:, None]
                down -= tl.load(places + 2 * keys, mask=keys < tokens, other=0.0)[None, :]
                sideways = tl.load(places + 2 * rows + 1, mask=rows < tokens, other=0.0)[:, None]
                sideways -= tl.load(places + 2 * keys + 1, mask=keys < tokens, other=0.0)[None, :]
                apart = tl.sqrt(down * down + sideways * sideways)
            kept = tl.where(inside[None, :], weights, 0.0)
            far = tl.where(inside[None, :], weights * apart, 0.0)
            on_places = shrunk * on_places + tl.sum(kept, 1)
            travelled = shrunk * travelled + tl.sum(far, 1)
            travelled_square = shrunk * travelled_square + tl.sum(far * apart, 1)
        most = higher
    return most, total, moment, squares, travelled, travelled_square, on_places


@triton.jit
def _row_kernel(
    query_at, key_at, mask_at, chosen, places,
    lse_at, entropy_at, squares_at, own_at, weights_at, travelled_at, travelled_square_at, placed_at,
    query_batch, query_head, query_token, query_dim, key_batch, key_head, key_token, key_dim,
    mask_batch, mask_head, mask_row, mask_key, tokens, heads, group, scale, hidden, plane, prefix,
    DIM: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    MASK: tl.constexpr, BY_KEY: tl.constexpr, CAUSAL: tl.constexpr, CHOSEN: tl.constexpr,
    DISTANCE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A program: one block of query rows of one head. Programs of a head follow each other and share keys."""
    per_head = tl.cdiv(tokens, ROWS)
    lane = tl.program_id(0) // per_head
    block = tl.program_id(0) % per_head
    if CAUSAL:
        block = per_head - 1 - block  # the longest rows first: short ones fill up the end
    batch, head = (lane // heads).to(tl.int64), (lane % heads).to(tl.int64)
    query_at += batch * query_batch + head * query_head
    key_at += batch * key_batch + head // group * key_head
    mask_at += batch * mask_batch + head * mask_head
    rows = block * ROWS + tl.arange(0, ROWS)
    query = read_vectors(query_at, rows, query_token, query_dim, tokens, 0, DIM, WIDTH)

    # Keys before `whole` are seen by all rows of the block as far as causality and the end go.
    whole = tokens // KEYS * KEYS
    stop = tokens
    if CAUSAL:
        whole = block * ROWS // KEYS * KEYS
        stop = tl.minimum(tokens, (block + 1) * ROWS)
    none = tl.zeros([ROWS], dtype=tl.float32)
    most, total, moment, squares, travelled, travelled_square, on_places = _sweep(
        none + NOTHING, none, none, none, none, none, none,
        query, query_at, key_at, block * ROWS, mask_at, places, scale, hidden, tokens,
        query_token, query_dim, key_token, key_dim, mask_row, mask_key, prefix, 0, whole,
        DIM, PADDED, WIDTH, ROWS, KEYS, MASK, BY_KEY, CAUSAL, DISTANCE, WIDEN, False,
    )  # fmt: skip
    most, total, moment, squares, travelled, travelled_square, on_places = _sweep(
        most, total, moment, squares, travelled, travelled_square, on_places,
        query, query_at, key_at, block * ROWS, mask_at, places, scale, hidden, tokens,
        query_token, query_dim, key_token, key_dim, mask_row, mask_key, prefix, whole, stop,
        DIM, PADDED, WIDTH, ROWS, KEYS, MASK, BY_KEY, CAUSAL, DISTANCE, WIDEN, True,
    )  # fmt: skip

    # A row that saw hidden keys only. What is not a number stays, to be found out: its total is none either.
    empty = (most <= 0.5 * NOTHING) & (total >= 0)
    total = tl.where(empty, 1.0, total)
    at = lane.to(tl.int64) * tokens + rows
    inside = rows < tokens
    logarithm = tl.log2(total)
    tl.store(lse_at + at, tl.where(empty, NOTHING, LN2 * (most + logarithm)), mask=inside)
    tl.store(entropy_at + at, tl.where(empty, 0.0, LN2 * (logarithm - moment / total)), mask=inside)
    tl.store(squares_at + at, tl.where(empty, 0.0, squares / (total * total)), mask=inside)
    most = tl.where(empty, 0.0, most)  # leaves a weight of 0 on every key
    if DISTANCE != 0:
        mass = tl.where(on_places > 0, on_places, 1.0)
        tl.store(travelled_at + at, tl.where(empty, 0.0, travelled / mass), mask=inside)
        tl.store(travelled_square_at + at, tl.where(empty, 0.0, travelled_square / mass), mask=inside)
        tl.store(placed_at + at, tl.where(empty, 0.0, on_places / total), mask=inside)

    own = tl.zeros([ROWS], dtype=tl.float32)
    for first in range(0, PADDED, WIDTH):
        part = read_vectors(query_at, rows, query_token, query_dim, tokens, first, DIM, WIDTH).to(tl.float32)
        key = read_vectors(key_at, rows, key_token, key_dim, tokens, first, DIM, WIDTH).to(tl.float32)
        own += tl.sum(part * key, 1)
    own *= scale
    if MASK != 0:
        entry = tl.load(mask_at + rows.to(tl.int64) * (mask_row + mask_key), mask=inside, other=0)
        own = mask_scores(own, entry, hidden, MASK)
    tl.store(own_at + at, tl.exp2(own - most) / total, mask=inside)
    for number in range(CHOSEN):
        index = tl.load(chosen + batch * CHOSEN + number)
        score = tl.zeros([ROWS], dtype=tl.float32)
        for first in range(0, PADDED, WIDTH):
            dims = first + tl.arange(0, WIDTH)
            part = read_vectors(query_at, rows, query_token, query_dim, tokens, first, DIM, WIDTH)
            key = tl.load(key_at + index * key_token + dims * key_dim, mask=dims < DIM, other=0.0)
            score += tl.sum(part.to(tl.float32) * key.to(tl.float32)[None, :], 1)
        score *= scale
        if MASK != 0:
            entry = tl.load(mask_at + rows.to(tl.int64) * mask_row + index * mask_key, mask=inside, other=0)
            score = mask_scores(score, entry, hidden, MASK)
        if CAUSAL:
            score = tl.where(index <= rows, score, NOTHING)
        weight = tl.exp2(score - most) / total
        tl.store(weights_at + at, weight, mask=inside)
        weights_at += plane
