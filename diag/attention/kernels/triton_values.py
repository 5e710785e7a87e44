"""Statistics of values and outputs on CUDA in two passes over the values and one over the outputs, in Triton.

The first kernel sums the values of each block of tokens, the second makes of these sums what was summed up
before each block (where causality asks for it), the third holds a block of values once and meets it with the
outputs of every query head that shares them: norms, `y_i·v_i`, the null references, what is left of y_i
without its part along v_i (z_i), and the sums of unit vectors that mean pairwise cosines are made of. In
plain PyTorch each of these reads a float32 copy of the values or outputs, or of both, anew. A reciprocal norm
of a zero vector is 0.
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
from diag.attention.containers import ValueStatistics
from diag.attention.kernels.triton_scores import on_device, reach, read_vectors

ELEMENTS = 4096
"""Numbers of a block of vectors: 32 per thread, and four to five such blocks are held at once."""


def supports_values(call: AttentionCall) -> bool:
    """Whether `value_statistics` takes this call: a format and size it knows, and a mask with a structure.

    A mask under which queries see neither the same keys nor those up to themselves has no running sum.
    """
    value, output = call.value, call.output
    trained = torch.is_grad_enabled() and (value.requires_grad or output.requires_grad)
    fits = max(reach(value), reach(output)) < 2**31 and value.shape[-1] <= 256
    known = call.own_keys and call.visibility.rule != "general"
    return on_device(value, output) and fits and not trained and known


def value_statistics(call: AttentionCall, among: Tensor, rows: Tensor, least: float) -> ValueStatistics:
    """The statistics of a call that `supports_values` takes, for one token set.

    among: the tokens of S that are keys, `[batch or 1, token]`, bool. rows: the rows that count,
        `[batch or 1, head or 1, token]`, bool.
    least: how much of ‖y_i‖ has to be left in z_i for it to be a direction.
    """
    value, output, seen = call.value, call.output, call.visibility
    batch, heads, tokens, dim = output.shape
    kv_heads = call.kv_heads
    padded = max(16, triton.next_power_of_2(dim))
    size = max(16, min(64, ELEMENTS // padded))
    count = triton.cdiv(tokens, size)
    of_values = torch.empty(3, batch, kv_heads, tokens, device=value.device, dtype=torch.float32)
    of_outputs = torch.empty(4, batch, heads, tokens, device=value.device, dtype=torch.float32)
    before = torch.empty(batch, kv_heads, count, 2, padded, device=value.device, dtype=torch.float32)
    sums = torch.empty(batch, heads, count, 2, padded, device=value.device, dtype=torch.float32)
    real = among.new_ones(1, tokens) if seen.keys is None else seen.keys
    of_keys = [x.expand(batch, tokens).view(torch.uint8) for x in (among, real)]
    of_rows = [x.expand(batch, heads, tokens).view(torch.uint8) for x in (seen.count > 0, rows)]
    per_key, per_row = ((*x, *x[0].stride(), *x[1].stride()) for x in (of_keys, of_rows))
    programs = (batch * kv_heads * count,)
    options = {"DIM": dim, "PADDED": padded, "SIZE": size, "num_warps": 4, "enable_fp_fusion": True}
    _sum_kernel[programs](
        value, of_values, before, *per_key, *value.stride(), tokens, kv_heads, count, **options
    )
    total = before.sum(2)  # [batch, kv_head, 2, padded]
    if seen.rule == "causal":
        _scan_kernel[(batch * kv_heads,)](before, count, WIDTH=2 * padded, num_warps=4, enable_fp_fusion=True)
    else:
        before = total
    vectors = (value, output, before, of_values, of_outputs, sums)
    strides = (*value.stride(), *output.stride())
    sizes = (tokens, kv_heads, count, call.group, least)
    causal = seen.rule == "causal"
    _value_kernel[programs](*vectors, *per_key, *per_row, *strides, *sizes, CAUSAL=causal, **options)
    # in the order of its fields
    totals = total[:, :, 0, :dim], *sums.sum(2)[..., :dim].unbind(2)
    return ValueStatistics(*of_values, *of_outputs, *totals)


@triton.jit
def _reciprocal(x):
    return tl.where(x == 0, 0.0, 1.0 / tl.where(x == 0, 1.0, x))


@triton.jit
def _values(
    value_at, real_at, among_at, real_token, among_token, token, tokens, value_token, value_dim,
    DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Values of real keys with the others 0, their norms and reciprocal norms, and which are in S."""
    inside = token < tokens
    real = tl.load(real_at + token * real_token, mask=inside, other=0) != 0
    among = tl.load(among_at + token * among_token, mask=inside, other=0) != 0
    value = read_vectors(value_at, token, value_token, value_dim, tokens, 0, DIM, PADDED).to(tl.float32)
    value = tl.where(real[:, None], value, 0.0)  # padding may hold anything, and 0 · NaN is NaN
    norm = tl.sqrt(tl.sum(value * value, 1))
    return value, norm, _reciprocal(norm), tl.where(among, 1.0, 0.0)


@triton.jit
def _sum_kernel(
    value_at, of_values, sums, among_at, real_at, among_batch, among_token, real_batch, real_token,
    value_batch, value_head, value_token, value_dim, tokens, kv_heads, count,
    DIM: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A program: norms of one block of values, and Σ v̂ and Σ v over those in S."""
    lane = (tl.program_id(0) // count).to(tl.int64)
    block = tl.program_id(0) % count
    batch, head = lane // kv_heads, lane % kv_heads
    token = block * SIZE + tl.arange(0, SIZE)
    value, norm, per_norm, weight = _values(
        value_at + batch * value_batch + head * value_head, real_at + batch * real_batch,
        among_at + batch * among_batch, real_token, among_token, token, tokens, value_token, value_dim,
        DIM, PADDED,
    )  # fmt: skip
    dims = tl.arange(0, PADDED)
    at = sums + (lane * count + block) * 2 * PADDED + dims
    tl.store(at, tl.sum(value * (weight * per_norm)[:, None], 0))
    tl.store(at + PADDED, tl.sum(value * weight[:, None], 0))
    tl.store(of_values + lane * tokens + token, norm, mask=token < tokens)


@triton.jit
def _scan_kernel(sums, count, WIDTH: tl.constexpr):
    """A program: the sums of one head's blocks become those of all blocks before, in order."""
    at = sums + tl.program_id(0).to(tl.int64) * count * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], dtype=tl.float32)
    for _ in range(count):
        own = tl.load(at)
        tl.store(at, total)
        total += own
        at += WIDTH


@triton.jit
def _value_kernel(
    value_at, output_at, before, of_values, of_outputs, sums,
    among_at, real_at, among_batch, among_token, real_batch, real_token,
    sees_at, rows_at, sees_batch, sees_head, sees_token, rows_batch, rows_head, rows_token,
    value_batch, value_head, value_token, value_dim, output_batch, output_head, output_token, output_dim,
    tokens, kv_heads, count, group, least,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A program: one block of values, and the outputs of every query head that shares them."""
    lane = (tl.program_id(0) // count).to(tl.int64)
    lanes = (tl.num_programs(0) // count).to(tl.int64)
    block = tl.program_id(0) % count
    batch, kv_head = lane // kv_heads, lane % kv_heads
    token = block * SIZE + tl.arange(0, SIZE)
    inside = token < tokens
    value, _, per_norm, weight = _values(
        value_at + batch * value_batch + kv_head * value_head, real_at + batch * real_batch,
        among_at + batch * among_batch, real_token, among_token, token, tokens, value_token, value_dim,
        DIM, PADDED,
    )  # fmt: skip
    dims = tl.arange(0, PADDED)
    if CAUSAL:
        before += (lane * count + block) * 2 * PADDED
        units = tl.cumsum(value * (weight * per_norm)[:, None], 0) + tl.load(before + dims)[None, :]
        plain = tl.cumsum(value * weight[:, None], 0) + tl.load(before + PADDED + dims)[None, :]
    else:
        before += lane * 2 * PADDED
        units = tl.load(before + dims)[None, :]
        plain = tl.load(before + PADDED + dims)[None, :]
    plane = lanes * tokens
    at = of_values + lane * tokens + token
    tl.store(at + plane, tl.sum(value * plain, 1), mask=inside)
    tl.store(at + 2 * plane, tl.sqrt(tl.sum(plain * plain, 1)) + tl.zeros([SIZE], tl.float32), mask=inside)

    plane *= group
    for member in range(group):
        head = kv_head * group + member
        sees_key = sees_at + batch * sees_batch + head * sees_head + token * sees_token
        seeing = tl.load(sees_key, mask=inside, other=0) != 0
        counted = tl.load(
            rows_at + batch * rows_batch + head * rows_head + token * rows_token, mask=inside, other=0
        )
        own = output_at + batch * output_batch + head * output_head
        output = read_vectors(own, token, output_token, output_dim, tokens, 0, DIM, PADDED).to(tl.float32)
        output = tl.where(seeing[:, None], output, 0.0)
        norm = tl.sqrt(tl.sum(output * output, 1))
        product = tl.sum(output * value, 1)
        exclusive = output - (product * per_norm * per_norm)[:, None] * value
        left = tl.sqrt(tl.sum(exclusive * exclusive, 1))
        per_token = of_outputs + (lane * group + member) * tokens + token
        tl.store(per_token, norm, mask=inside)
        tl.store(per_token + plane, product, mask=inside)
        tl.store(per_token + 2 * plane, tl.sum(output * units, 1), mask=inside)
        tl.store(per_token + 3 * plane, left, mask=inside)
        per_output = tl.where(counted != 0, _reciprocal(norm), 0.0)
        per_left = tl.where((counted != 0) & (left > least * norm), _reciprocal(left), 0.0)
        summed = sums + ((lane * group + member) * count + block) * 2 * PADDED + dims
        tl.store(summed, tl.sum(output * per_output[:, None], 0))
        tl.store(summed + PADDED, tl.sum(exclusive * per_left[:, None], 0))
