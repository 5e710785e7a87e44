"""What every key receives from the query rows, on CUDA: column sums of the pattern, in Triton.

A program owns a block of keys of one head and walks over the query rows in order, with the log-normaliser
that `triton_statistics` found: `A_ij = 2^(s_ij - log2(e) · lse_i)`.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803
# (Triton reads the annotations of its kernels itself and knows `constexpr` only; what a kernel is compiled
# for is in capitals)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.attention.kernels.triton_scores import LOG2E, NOTHING, arguments, launch, read_vectors, score_tile


def received(call: AttentionCall, log_normaliser: Tensor, givers: Tensor) -> Tensor:
    """`Σ_i g_i A_ij`, what each key receives from the rows of each set, `[set, batch, head, token]`, float32.

    log_normaliser: lse_i as `row_statistics` gives it, `[batch, head, token]`.
    givers: g, the rows of each set (bool, or weights), `[set, batch, head, token]`. A row of weight 0 gives
        nothing, whatever it holds.
    """
    sets = givers.shape[0]
    shape = (call.batch, call.heads, call.tokens)
    weights = givers.expand(sets, *shape).to(torch.float32).contiguous()
    into = torch.empty_like(weights)
    tensors, scalars = arguments(call)
    sizes, options = launch(call)
    grid = (triton.cdiv(call.tokens, sizes.keys) * call.batch * call.heads, sets)
    _key_kernel[grid](
        *tensors, log_normaliser.contiguous(), weights, into, *scalars, into[0].numel(), **options
    )
    return into


@triton.jit
def _gather(
    received, key, query_at, key_at, first_key, mask, lse_at, givers_at, scale, hidden, tokens,
    query_token, query_dim, key_token, key_dim, mask_row, mask_key, start, stop,
    DIM: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    MASK: tl.constexpr, BY_KEY: tl.constexpr, CAUSAL: tl.constexpr, WIDEN: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds up what the keys receive from the query blocks from `start` to `stop`."""
    for first in range(start, stop, ROWS):
        rows = first + tl.arange(0, ROWS)
        query = key
        if WIDTH == PADDED:
            query = read_vectors(query_at, rows, query_token, query_dim, tokens, 0, DIM, PADDED)
        scores = score_tile(
            query, key, query_at, key_at, first, first_key, mask, scale, hidden, tokens,
            query_token, query_dim, key_token, key_dim, mask_row, mask_key,
            DIM, PADDED, WIDTH, ROWS, KEYS, MASK, BY_KEY, CAUSAL, WIDEN, EDGE,
        )  # fmt: skip
        inside = rows < tokens
        givers = tl.load(givers_at + rows, mask=inside, other=0.0)
        lse = tl.load(lse_at + rows, mask=inside, other=0.0) * LOG2E
        lse = tl.where(givers != 0, lse, -NOTHING)[:, None]  # of a row that sees nothing it would overflow
        given = givers[:, None] * tl.exp2(scores - lse)
        received += tl.sum(tl.where(givers[:, None] != 0, given, 0.0), 0)
    return received


@triton.jit
def _key_kernel(
    query_at, key_at, mask_at, lse_at, givers_at, into,
    query_batch, query_head, query_token, query_dim, key_batch, key_head, key_token, key_dim,
    mask_batch, mask_head, mask_row, mask_key, tokens, heads, group, scale, hidden, plane,
    DIM: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    MASK: tl.constexpr, BY_KEY: tl.constexpr, CAUSAL: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A program: one block of keys of one query head, and one set of rows."""
    per_head = tl.cdiv(tokens, KEYS)
    lane = tl.program_id(0) // per_head
    block = tl.program_id(0) % per_head
    keys = block * KEYS + tl.arange(0, KEYS)
    batch, head = (lane // heads).to(tl.int64), (lane % heads).to(tl.int64)
    query_at += batch * query_batch + head * query_head
    key_at += batch * key_batch + head // group * key_head
    mask_at += batch * mask_batch + head * mask_head
    lse_at += lane.to(tl.int64) * tokens
    givers_at += tl.program_id(1).to(tl.int64) * plane + lane.to(tl.int64) * tokens
    into += tl.program_id(1).to(tl.int64) * plane + lane.to(tl.int64) * tokens
    key = read_vectors(key_at, keys, key_token, key_dim, tokens, 0, DIM, WIDTH)

    # Rows before `start` see none of the keys; those from `whole` on see all, as far as causality goes.
    start = 0
    whole = 0
    if CAUSAL:
        start = block * KEYS // ROWS * ROWS
        whole = tl.minimum(tl.cdiv((block + 1) * KEYS, ROWS) * ROWS, tokens)
    received = tl.zeros([KEYS], dtype=tl.float32)
    received = _gather(
        received, key, query_at, key_at, block * KEYS, mask_at, lse_at, givers_at, scale, hidden, tokens,
        query_token, query_dim, key_token, key_dim, mask_row, mask_key, start, whole,
        DIM, PADDED, WIDTH, ROWS, KEYS, MASK, BY_KEY, CAUSAL, WIDEN, True,
    )  # fmt: skip
    received = _gather(
        received, key, query_at, key_at, block * KEYS, mask_at, lse_at, givers_at, scale, hidden, tokens,
        query_token, query_dim, key_token, key_dim, mask_row, mask_key, whole, tokens,
        DIM, PADDED, WIDTH, ROWS, KEYS, MASK, BY_KEY, CAUSAL, WIDEN, False,
    )  # fmt: skip
    tl.store(into + keys, received, mask=keys < tokens)
