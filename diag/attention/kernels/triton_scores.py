"""What the statistics kernels share: tiles of masked scores, and how a call becomes a kernel's arguments.

Scores are in bits, `s_ij = log2(e) · (scale · q_i·k_j + mask_ij)`; a hidden score is `NOTHING`.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803
# (Triton reads the annotations of its kernels itself and knows `constexpr` only; what a kernel is compiled
# for is in capitals)

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.attention.visibility import four_dimensional

FORMATS = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD = 256
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether kernels run in Triton's interpreter, on the CPU: for tests."""

NOTHING = tl.constexpr(-1e30)
LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


class Blocks(NamedTuple):
    """Query rows and keys of a tile, warps of a program, and how many key blocks are fetched ahead."""

    rows: int
    keys: int
    warps: int
    stages: int


PART = 64
"""How many channels of float32 vectors are multiplied at a time."""


def blocks(itemsize: int, padded: int, under_mask: bool) -> Blocks:
    """The tile for a format and a padded head size, by what fits on chip without spilling registers.

    The queries of a tile stay in registers or shared memory, and `stages` key blocks pass through shared
    memory: together below 99 KiB, what the smallest supported device lets one program have. The widest heads
    get fewer rows. Float32 takes twice the registers for the rounded parts of its vectors: smaller tiles, and
    wide vectors are read `PART` channels at a time; with a mask it still spills, and is right but slow.
    Where every query row has mask entries of its own, addresses and entries take registers too.
    """
    if under_mask:
        return Blocks(64, 32, 8, 2)
    if itemsize == 4:
        return Blocks(64, 32, 4, 2)
    return Blocks(64, 64, 8, 2) if padded == LARGEST_HEAD else Blocks(128, 64, 8, 3)


def supports(call: AttentionCall) -> bool:
    """Whether the kernels take this call: queries and keys of a format and head size they know, on CUDA.

    The rest (a given pattern, keys of other tokens, float64, calls that need gradients, AMD devices, offsets
    beyond 32 bits) goes through plain PyTorch. In Triton's interpreter tensors on the CPU are taken too.
    """
    query, key = call.query, call.key
    if query is None or key is None or call.pattern is not None or not on_device(query, key):
        return False
    if not call.own_keys:
        return False
    trained = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    far = max(reach(query), reach(key)) >= 2**31
    return query.shape[-1] <= LARGEST_HEAD and not trained and not far and query.numel() > 0


def on_device(one: Tensor, other: Tensor) -> bool:
    """Whether both tensors have the same of the known formats, on a device that Triton's kernels run on."""
    if one.dtype not in FORMATS or other.dtype != one.dtype:
        return False
    if INTERPRETED:
        return not one.is_cuda
    if not one.is_cuda or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(one.device) >= (8, 0)


def launch(call: AttentionCall) -> tuple[Blocks, dict[str, Any]]:
    """The tile of a call, and the options that both kernels are compiled for."""
    query = call.query
    assert query is not None
    padded = max(16, triton.next_power_of_2(query.shape[-1]))
    kind = 0 if call.mask is None else 1 if call.mask.dtype == torch.bool else 2
    by_key = call.mask is not None and (call.mask.ndim < 2 or call.mask.shape[-2] == 1)
    sizes = blocks(query.element_size(), padded, kind != 0 and not by_key)
    options = {
        "DIM": query.shape[-1],
        "PADDED": padded,
        "WIDTH": padded if query.element_size() == 2 else min(padded, PART),
        "ROWS": sizes.rows,
        "KEYS": sizes.keys,
        "MASK": kind,
        "BY_KEY": by_key,
        "CAUSAL": call.causal,
        "WIDEN": INTERPRETED,  # it multiplies the bit patterns of bfloat16; products are exact in float32
        "num_warps": sizes.warps,
        "num_stages": sizes.stages,
        "enable_fp_fusion": True,  # Triton 3.9 warns where nothing is said
    }
    return sizes, options


def arguments(call: AttentionCall) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int | float, ...]]:
    """Queries, keys and mask as the kernels read them, and strides, sizes and scalars in their order.

    The queries stand in where there is no mask. Broadcast dimensions of a mask get a stride of 0.
    """
    query, key, mask = call.query, call.key, call.mask
    assert query is not None
    assert key is not None
    sizes = (call.tokens, call.heads, call.heads // key.shape[1])
    rest = (*sizes, call.scale * LOG2E.value, call.hidden)
    if mask is None:
        return (query, key, query), (*query.stride(), *key.stride(), 0, 0, 0, 0, *rest)
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    mask = mask.float() if mask.dtype == torch.float64 else mask
    mask = four_dimensional(mask).expand(call.batch, call.heads, call.tokens, call.tokens)
    return (query, key, mask), (*query.stride(), *key.stride(), *mask.stride(), *rest)


def reach(x: Tensor) -> int:
    """The largest offset within one head."""
    return (x.shape[-2] - 1) * x.stride(-2) + (x.shape[-1] - 1) * x.stride(-1)


@triton.jit
def read_vectors(
    base, index, token_stride, dim_stride, tokens, first, DIM: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Channels of the tokens `index` from the channel `first` on, `[token, WIDTH]`; zeros beyond the ends."""
    dims = first + tl.arange(0, WIDTH)
    inside = (index < tokens)[:, None] & (dims < DIM)[None, :]
    return tl.load(base + index[:, None] * token_stride + dims[None, :] * dim_stride, mask=inside, other=0.0)


@triton.jit
def _product(query, key, WIDEN: tl.constexpr):
    """`q_i·k_j` of a tile, float32: three products of rounded parts where the tensor cores round float32."""
    if WIDEN:
        query, key = query.to(tl.float32), key.to(tl.float32)
    return tl.dot(query, tl.trans(key), input_precision="tf32x3")


@triton.jit
def score_tile(
    query, key, query_at, key_at, first_row, first_key, mask, scale, hidden, tokens,
    query_token, query_dim, key_token, key_dim, mask_row, mask_key,
    DIM: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    MASK: tl.constexpr, BY_KEY: tl.constexpr, CAUSAL: tl.constexpr, WIDEN: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Masked scores in bits of a tile, `[row, key]`; EDGE: some keys may lie beyond the end or the diagonal.

    query, key: the vectors; only where they are of the whole width, otherwise they are read here in parts.
    """
    rows = first_row + tl.arange(0, ROWS)
    keys = first_key + tl.arange(0, KEYS)
    if WIDTH == PADDED:
        scores = _product(query, key, WIDEN)
    else:
        scores = tl.zeros([ROWS, KEYS], dtype=tl.float32)
        for first in range(0, PADDED, WIDTH):
            scores += _product(
                read_vectors(query_at, rows, query_token, query_dim, tokens, first, DIM, WIDTH),
                read_vectors(key_at, keys, key_token, key_dim, tokens, first, DIM, WIDTH),
                WIDEN,
            )
    scores *= scale
    if MASK != 0:
        if BY_KEY:
            at = mask + keys.to(tl.int64) * mask_key
            entry = tl.load(at, mask=keys < tokens, other=0)[None, :]
        else:
            # the tile's corner in 64 bits, places in the tile in 32
            wide = tl.zeros([], dtype=tl.int64)
            corner = mask + (wide + first_row) * mask_row + (wide + first_key) * mask_key
            down = tl.arange(0, ROWS)[:, None] * mask_row
            at = corner + down + tl.arange(0, KEYS)[None, :] * mask_key
            entry = tl.load(at, mask=(rows < tokens)[:, None] & (keys < tokens)[None, :], other=0)
        scores = mask_scores(scores, entry, hidden, MASK)
    if EDGE:
        shown = (keys < tokens)[None, :]
        if CAUSAL:
            shown = shown & (keys[None, :] <= rows[:, None])
        scores = tl.where(shown, scores, NOTHING)
    return scores


@triton.jit
def mask_scores(scores, entry, hidden, MASK: tl.constexpr):
    """Scores in bits with mask entries (0 and 1, or what is added in nats); hidden ones become NOTHING."""
    if MASK == 1:
        return tl.where(entry != 0, scores, NOTHING)
    else:
        added = entry.to(tl.float32)
        away = added <= hidden
        added = tl.where(away, 0.0, added)  # in bits, the smallest float would be no float
        return tl.where(away, NOTHING, scores + added * LOG2E)
