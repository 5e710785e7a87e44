"""What the metrics of values and outputs are made of: norms, inner products, sums of unit vectors.

Notation: per head, `v_i` values, `y_i` outputs, `v̂ = v/‖v‖`, `z_i = y_i - (y_i·v̂_i) v̂_i`; S the token set.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.linalg import vecdot, vector_norm

from diag.attention.call import AttentionCall, head_chunks
from diag.attention.containers import ValueStatistics
from diag.attention.kernels import fused_values
from diag.attention.pattern import Scratch
from diag.attention.visibility import of_inputs, part_of


def value_statistics(
    call: AttentionCall,
    among: Bool[Tensor, "#batch token"],
    rows: Bool[Tensor, "#batch #head token"],
    least: float,
) -> ValueStatistics:
    """The statistics of a call for one token set; O(token · dim) memory.

    among: the tokens of S that are keys. rows: the rows that count.
    least: how much of ‖y_i‖ has to be left in z_i for it to be a direction.
    """
    if not call.own_keys:
        return _of_outputs(call, rows)
    fused = fused_values(call, among, rows, least)
    return _in_blocks(call, among, rows, least) if fused is None else fused


def uniform_outputs(
    call: AttentionCall,
    among: Bool[Tensor, "#batch token"],
    sums: Float[Tensor, "batch head token"],
) -> tuple[Float[Tensor, "batch head token"], Float[Tensor, "batch head token"]]:
    """`v_i·ȳ_i` and `‖ȳ_i‖` of ȳ_i = s_i u_i/n_i + o_i, what uniform rows of the same sums would give.

    u_i sums up the n_i visible values of S, and o_i comes of keys that are no tokens. sums: s_i.
    """
    assert call.outside is not None
    inner, norm = torch.empty(2, *call.output.shape[:3], dtype=torch.float32, device=call.output.device)
    count = call.visibility.count_among(among).clamp(min=1)  # [batch or 1, head or 1, token or 1]
    share = (sums / count)[..., None]
    for (in_batch, in_head), value in value_blocks(call):
        own_heads = call.query_heads(in_head)
        where = (in_batch, own_heads)
        plain = call.visibility.part(*where).sum(value, of_inputs(among, in_batch)[:, None].float())
        if plain.shape[1] != own_heads.stop - own_heads.start:
            plain = plain.repeat_interleave(call.group, 1)
        output = torch.addcmul(part_of(call.outside, *where).float(), share[where], plain)
        inner[where] = vecdot(output.unflatten(1, (-1, call.group)), value[:, :, None]).flatten(1, 2)
        norm[where] = vector_norm(output, dim=-1)
    return inner, norm


def value_blocks(
    call: AttentionCall,
) -> Iterator[tuple[tuple[slice, slice], Float[Tensor, "some_batch some_kv_head token value_dim"]]]:
    """Yields the values in float32, contiguous, some KV heads of some inputs at a time, with their place.

    The value of a token that no query sees is 0: padding may hold anything. A block is overwritten by the
    next, and is read only.
    """
    keys, scratch = call.visibility.keys, Scratch(call.value.device)
    for in_batch, in_head in head_chunks(call, call.value.shape[-1]):
        hidden = None if keys is None else ~of_inputs(keys, in_batch)[:, None, :]
        yield (in_batch, in_head), _float32(call.value[in_batch, in_head], hidden, scratch)


def reciprocal(x: Tensor) -> Tensor:
    """1/x of numbers that are not negative, 0 where x is 0."""
    return x.reciprocal().nan_to_num_(nan=torch.nan, posinf=0.0)


def _in_blocks(call: AttentionCall, among: Tensor, rows: Tensor, least: float) -> ValueStatistics:
    """The statistics in plain PyTorch, block by block: nothing of the size of the values is made."""
    batch, heads, tokens, dim = call.output.shape
    group, seen = call.group, call.visibility
    hides = seen.keys is not None or seen.rule == "general"
    apart = seen.visible_rows is not None and seen.visible_rows.shape[1] > 1

    def new(*shape: int) -> Tensor:
        return torch.empty(batch, *shape, dtype=torch.float32, device=call.output.device)

    of_sums = (heads if apart else call.kv_heads, tokens)
    found = ValueStatistics(
        value_norm=new(call.kv_heads, tokens),
        uniform=new(*of_sums),
        uniform_norm=new(*of_sums),
        output_norm=new(heads, tokens),
        product=new(heads, tokens),
        partner=new(heads, tokens),
        exclusive_norm=new(heads, tokens),
        value_total=new(call.kv_heads, dim),
        output_total=new(heads, dim),
        exclusive_total=new(heads, dim),
    )
    outputs, work = Scratch(call.output.device), Scratch(call.output.device)
    for (in_batch, in_head), value in value_blocks(call):
        own_heads = call.query_heads(in_head)
        of_values, of_outputs = (in_batch, in_head), (in_batch, own_heads)
        of_uniform = of_outputs if apart else of_values
        visible = seen.part(in_batch, own_heads)
        output = _float32(call.output[of_outputs], visible.count == 0 if hides else None, outputs)
        output = output.unflatten(1, (-1, group))  # [batch, kv_head, group, token, dim]
        in_set = of_inputs(among, in_batch)[:, None]

        own, norm = value[:, :, None], vector_norm(value, dim=-1)
        per_norm = reciprocal(norm)  # [batch, kv_head, token]
        found.value_norm[of_values] = norm
        weights = in_set * per_norm
        found.value_total[of_values] = (weights[:, :, None] @ value)[:, :, 0]
        # [batch, kv_head, group or 1, token or 1, dim]
        units = visible.sum(value, weights).unflatten(1, (value.shape[1], -1))
        found.partner[of_outputs] = _inner(output, units, work).flatten(1, 2)
        del units
        plain = visible.sum(value, in_set.float()).unflatten(1, (value.shape[1], -1))
        found.uniform[of_uniform] = _inner(own, plain, work).flatten(1, 2)
        found.uniform_norm[of_uniform] = vector_norm(plain, dim=-1).flatten(1, 2)
        del plain

        length = vector_norm(output, dim=-1)  # [batch, kv_head, group, token]
        product = _inner(output, own, work)
        share = product * per_norm[:, :, None] * per_norm[:, :, None]
        exclusive = torch.addcmul(output, share[..., None], own, value=-1, out=work(*output.shape))
        left = vector_norm(exclusive, dim=-1)
        counted = part_of(rows, in_batch, own_heads)
        counted = counted.unflatten(1, (-1, group)) if counted.shape[1] > 1 else counted[:, :, None]
        per_length = torch.where(counted, reciprocal(length), 0.0)
        per_left = torch.where(counted & (left > least * length), reciprocal(left), 0.0)
        for into, x in (
            (found.output_norm, length),
            (found.product, product),
            (found.exclusive_norm, left),
            (found.output_total, (per_length[..., None, :] @ output)[..., 0, :]),
            (found.exclusive_total, (per_left[..., None, :] @ exclusive)[..., 0, :]),
        ):
            into[of_outputs] = x.flatten(1, 2)
    return found


def _of_outputs(call: AttentionCall, rows: Tensor) -> ValueStatistics:
    """Those of outputs alone, and the norms of the keys' values: where no token has a value of its own."""
    batch, heads, _, dim = call.output.shape
    norm = torch.empty(batch, call.kv_heads, call.keys, dtype=torch.float32, device=call.output.device)
    for where, value in value_blocks(call):
        norm[where] = vector_norm(value, dim=-1)
    output = call.output.float().masked_fill((call.visibility.count == 0)[..., None], 0.0)
    length = vector_norm(output, dim=-1)
    per_length = torch.where(rows, reciprocal(length), 0.0)
    none = torch.full_like(length, torch.nan)
    of_values, of_rest = none[:, : call.kv_heads], none.new_full((batch, heads, dim), torch.nan)
    return ValueStatistics(
        value_norm=norm,
        uniform=of_values,
        uniform_norm=of_values,
        output_norm=length,
        product=none,
        partner=none,
        exclusive_norm=none,
        value_total=of_rest[:, : call.kv_heads],
        output_total=(per_length[..., None, :] @ output)[..., 0, :],
        exclusive_total=of_rest,
    )


def _float32(x: Tensor, hidden: Tensor | None, scratch: Scratch) -> Tensor:
    """x in float32, contiguous, 0 where hidden: x itself where it is all that, else a copy in scratch memory.

    hidden: over all axes but the last; None for nothing.
    """
    if hidden is None and x.dtype == torch.float32 and x.is_contiguous():
        return x
    copy = scratch(*x.shape).copy_(x)
    return copy if hidden is None else copy.masked_fill_(hidden[..., None], 0.0)


def _inner(x: Tensor, total: Tensor, scratch: Scratch) -> Tensor:
    """x_i · total_i, where the token axis of `total` may be 1."""
    if total.shape[-2] == 1:
        return (x @ total.transpose(-1, -2))[..., 0]
    shape = torch.broadcast_shapes(x.shape, total.shape)
    return torch.mul(x, total, out=scratch(*shape)).sum(-1)
