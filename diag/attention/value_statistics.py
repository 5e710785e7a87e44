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
from diag.attention.visibility import Visibility, of_inputs, part_of


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
    batch, _, tokens, dim = call.output.shape
    group, seen = call.group, call.visibility
    hides = seen.keys is not None or seen.rule == "general"
    apart = seen.visible_rows is not None and seen.visible_rows.shape[1] > 1

    def new(*shape: int) -> Tensor:
        return torch.empty(batch, *shape, dtype=torch.float32, device=call.output.device)

    kv_heads, several = call.kv_heads, seen.visible_rows is not None or seen.keys is not None
    # numbers of query heads lie beside those of the KV head that they share: [batch, kv_head, group, ...]
    value_norm, value_total = new(kv_heads, tokens), new(kv_heads, dim)
    uniform, uniform_norm = (new(kv_heads, group if apart else 1, tokens) for _ in range(2))
    output_norm, product, partner, exclusive_norm = (new(kv_heads, group, tokens) for _ in range(4))
    output_total, exclusive_total = (new(kv_heads, group, dim) for _ in range(2))
    counted = rows.unflatten(1, (-1, group)) if rows.shape[1] > 1 else rows[:, :, None]

    outputs, work = Scratch(call.output.device), Scratch(call.output.device)
    for where, value in value_blocks(call):
        own_heads = (where[0], call.query_heads(where[1]))
        visible = seen.part(*own_heads) if several else seen
        output = _float32(call.output[own_heads], visible.count == 0 if hides else None, outputs)
        output = output.unflatten(1, (-1, group))  # [batch, kv_head, group, token, dim]
        in_set = of_inputs(among, where[0])[:, None]

        own, norm = value[:, :, None], vector_norm(value, dim=-1)
        per_norm = reciprocal(norm)  # [batch, kv_head, token]
        value_norm[where] = norm
        # Σ v̂ and Σ v over what each query sees, [batch, kv_head, group or 1, token or 1, dim]
        sums = _sums(visible, value, in_set * per_norm, in_set.float())
        units = next(sums)
        if visible.rule == "general":
            value_total[where] = ((in_set * per_norm)[:, :, None] @ value)[:, :, 0]
        else:  # the last query sees all
            value_total[where] = units[:, :, 0, -1]
        partner[where] = _inner(output, units, work)
        del units  # before the other sums are made
        plain = next(sums)
        uniform[where] = _inner(own, plain, work)
        uniform_norm[where] = vector_norm(plain, dim=-1)
        del plain

        length = vector_norm(output, dim=-1)  # [batch, kv_head, group, token]
        along = _inner(output, own, work)
        output_norm[where], product[where] = length, along
        share = along * per_norm[:, :, None] * per_norm[:, :, None]
        rest = torch.addcmul(output, share[..., None], own, value=-1, out=work(*output.shape))
        left = vector_norm(rest, dim=-1)
        exclusive_norm[where] = left
        count = part_of(counted, *where)
        per_length = torch.where(count, reciprocal(length), 0.0)
        per_left = torch.where(count & (left > least * length), reciprocal(left), 0.0)
        output_total[where] = (per_length[..., None, :] @ output)[..., 0, :]
        exclusive_total[where] = (per_left[..., None, :] @ rest)[..., 0, :]
    return ValueStatistics(
        value_norm=value_norm,
        uniform=uniform.flatten(1, 2),
        uniform_norm=uniform_norm.flatten(1, 2),
        output_norm=output_norm.flatten(1, 2),
        product=product.flatten(1, 2),
        partner=partner.flatten(1, 2),
        exclusive_norm=exclusive_norm.flatten(1, 2),
        value_total=value_total,
        output_total=output_total.flatten(1, 2),
        exclusive_total=exclusive_total.flatten(1, 2),
    )


def _sums(
    visible: Visibility, value: Tensor, *weights: Tensor
) -> Iterator[Float[Tensor, "batch kv_head some_group some_token dim"]]:
    """Yields `visible.sum` for each of several weights, query heads beside their KV head."""
    if visible.rule == "full":  # a hidden key has no weight, and its value is 0
        both = torch.stack(torch.broadcast_tensors(*weights), 2) @ value  # [batch, kv_head, weight, dim]
        yield from (x[:, :, None, None] for x in both.unbind(2))
        return
    yield from (visible.sum(value, x).unflatten(1, (value.shape[1], -1)) for x in weights)


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
