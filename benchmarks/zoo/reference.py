"""The dense float64 numbers of one input's attention calls, from formulas alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.observer import Call

FAINT = -60.0
"""Added to a score, next to the row's largest addition, this hides a key: e⁻⁶⁰ is nothing beside 1."""

METRICS = (
    "cos_y_vself",
    "self_part",
    "self_weight",
    "value_similarity",
    "entropy",
    "cos_y_vuniform",
    "row_sum",
)


@dataclass
class Rows:
    """One call of one input: `[row, head, token, …]`, row = window; what of it counts.

    pattern, visible: of the keys that are the queries' own tokens; 0 where a query sees nothing.
    among: tokens that count, `[row, token]`.
    """

    value: Tensor
    output: Tensor
    pattern: Tensor
    visible: Tensor
    among: Tensor


def layouts(call: Call, heads: int | None) -> list[tuple[int, int | None]]:
    """Ways to find heads among the axes before `[token, dim]`: (axis, size of the part that is heads).

    heads: the configured number. The usual place comes first.
    """
    assert call.output is not None
    lead = list(call.output.shape[:-2])
    found: list[tuple[int, int | None]] = []
    for axis in reversed(range(len(lead))):
        if heads is None or lead[axis] == heads:
            found.append((axis, None))
    if len(lead) == 1 and heads and lead[0] % heads == 0 and lead[0] != heads:
        found = [(0, heads), (-1, heads)]
    if len(lead) == 1 and lead[0] == 1:
        found = [(0, None)]
    return found


def split(x: Tensor, layout: tuple[int, int | None]) -> Tensor:
    """`[…, token, dim]` as `[row, head, token, dim]`."""
    axis, part = layout
    if part is not None:
        if axis == 0:  # rows before heads
            return x.unflatten(0, (-1, part))
        return x.unflatten(0, (part, -1)).transpose(0, 1)
    x = x.movedim(axis, -3)
    return x.reshape(-1, *x.shape[-3:])


def rows_of(call: Call, layout: tuple[int, int | None]) -> Rows:
    """The call as the formulas take it."""
    assert call.value is not None
    assert call.output is not None
    pattern, visible = (call.pattern, call.seen) if call.eager else weights_of(call)
    assert pattern is not None
    assert visible is not None
    queries = call.lengths[0]
    own = slice(call.own, call.own + queries)
    parts = (call.value[..., own, :], call.output, pattern[..., own], visible[..., own])
    value, output, pattern, visible = (split(x, layout) for x in parts)
    return Rows(value, output, pattern, visible, torch.ones(len(value), queries, dtype=torch.bool))


def weights_of(call: Call) -> tuple[Tensor, Tensor]:
    """The weights of PyTorch's attention, and whether each query sees each key."""
    assert call.query is not None
    assert call.key is not None
    assert call.scale is not None
    query, (queries, keys) = call.query, call.lengths
    bias = torch.zeros(*query.shape[:-2], queries, keys, dtype=torch.float64)
    if call.mask is not None:
        added = call.mask
        if added.dtype == torch.bool:
            added = torch.zeros(added.shape, dtype=torch.float64).masked_fill(~added, -math.inf)
        bias = bias + added.double()
    if call.causal:
        bias = bias.masked_fill(~torch.ones(queries, keys, dtype=torch.bool).tril(), -math.inf)
    key = call.key
    if key.ndim > 2 and key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    top = bias.amax(-1, keepdim=True)
    visible = (bias - top.clamp(min=-1e30) > FAINT) & bias.isfinite() & (bias > -1e30)
    nothing = ~visible.any(-1, keepdim=True)
    scores = call.scale * query @ key.mT + bias
    return scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0), visible


def numbers(calls: Sequence[Rows]) -> dict[str, Tensor]:
    """One number per metric and query head of one input: all tokens of all its windows count once."""
    total: dict[str, Tensor] = {}
    weight: dict[str, Tensor] = {}
    for rows in calls:
        for name, value, count in _sums(rows):
            total[name] = total.get(name, 0) + value
            weight[name] = weight.get(name, 0) + count
    return {name: torch.where(weight[name] > 0, total[name] / weight[name], math.nan) for name in total}


def numbers_of_weights(
    calls: Sequence[Call], layout: tuple[int, int | None], queries: Tensor
) -> dict[str, Tensor]:
    """Of one input, per query head, what is of weights alone, on any keys. queries: those that count."""
    total: dict[str, Tensor] = {}
    weight: Tensor | int = 0
    for call in calls:
        pattern, visible = (call.pattern, call.seen) if call.eager else weights_of(call)
        assert pattern is not None
        assert visible is not None
        pattern, visible = (split(x, layout)[:, :, queries] for x in (pattern, visible.expand_as(pattern)))
        counted = visible.sum(-1) > 1  # [row, head, query]
        weight = weight + counted.sum((0, 2))
        for name, x in (("entropy", -torch.xlogy(pattern, pattern).sum(-1)), ("row_sum", pattern.sum(-1))):
            total[name] = total.get(name, 0) + (x * counted).sum((0, 2))
    return {name: torch.where(weight > 0, x / weight, math.nan) for name, x in total.items()}


def _selects(visible: Tensor) -> bool:
    """Whether each query sees as many keys as all others, or all up to itself: all may leave out a key."""
    count = visible.sum(-1)
    upto = torch.arange(1, count.shape[-1] + 1).clamp(max=count.amax())
    return bool((count == count.amax()).all() or (count == upto).all())


def _sums(rows: Rows) -> Iterator[tuple[str, Tensor, Tensor]]:
    visible, pattern, y = rows.visible, rows.pattern, rows.output
    v = rows.value.repeat_interleave(y.shape[1] // rows.value.shape[1], 1)
    seen = visible & rows.among[:, None, :, None]  # by queries that count
    among = rows.among & (_selects(visible) | seen.any(2).any(1))  # [row, token]
    counted = among[:, None] & (visible.sum(-1) > 1)  # [row, head, token]
    length_y, length_v = y.norm(dim=-1), v.norm(dim=-1)
    own = pattern.diagonal(dim1=-2, dim2=-1)
    in_set = (visible & among[:, None, None, :]).double()
    uniform = in_set @ v
    per_row = {
        "cos_y_vself": _ratio((y * v).sum(-1), length_y * length_v),
        "self_part": _ratio(own * length_v, length_y),
        "self_weight": own,
        "row_sum": pattern.sum(-1),
        "entropy": -torch.xlogy(pattern, pattern).sum(-1),
        "cos_y_vuniform": _ratio((uniform * v).sum(-1), uniform.norm(dim=-1) * length_v),
    }
    for name, value in per_row.items():
        weights = counted & (in_set.sum(-1) > 0) if name == "cos_y_vuniform" else counted
        yield name, (value * weights).sum((0, 2)), weights.sum((0, 2))
    unit = _ratio(v, length_v[..., None])
    n = among.sum(-1)  # [row]
    gram = unit @ unit.mT
    pairs = (among[:, :, None] & among[:, None, :]).double() * (1 - torch.eye(unit.shape[2]).double())
    mean = (gram * pairs[:, None]).sum((-1, -2)) / pairs.sum((-1, -2)).clamp(min=1)[:, None]
    weights = torch.where(n >= 2, n, 0)[:, None].expand_as(mean)
    yield "value_similarity", (mean * weights).sum(0), weights.sum(0)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below.clamp(min=1e-300), 0.0)
