"""Interventions on sinks: the value of a head's dominant key exchanged, or its weight taken away.

The dominant key of a head is s = argmax_j mean_i A_ij, on each input. A stays as it is where a value is
exchanged: y_i → y_i + A_is (v′ − v_s). The strength ε says of which heads: of those that give A_is ≥ ε in
90 % of their queries; 0.5 is a sink event (2606.08105), 0 is every head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.models.hooks.beside import Beside, drawn, mixed
from diag.models.hooks.edited_outputs import Strength
from diag.models.hooks.edited_patterns import (
    over_queries,
    refuse_without_weights,
    restricted,
    row_blocks,
    weights_of,
)

EVENT_QUERIES = 0.9
"""In how many of the queries a sink holds at least ε."""


@dataclass(frozen=True, eq=False)
class Dominant:
    """The dominant key of each head, and what it holds.

    place: s. other: another key that is drawn; s where there is none. weight: A_is. chosen: whether the head
    gives it enough to be changed. mean: A_is averaged over queries.
    """

    place: Int[Tensor, "batch head"]
    other: Int[Tensor, "batch head"]
    weight: Float[Tensor, "batch head token"]
    chosen: Bool[Tensor, "batch head"]
    mean: Float[Tensor, "batch head"]


def sink_zero(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """v_s → 0, s the key that a head gives most to, A fixed."""
    found = _dominant(call, strength, beside, "sink_zero")
    return _with_value(call, beside, found, torch.zeros_like(value_at(call, found.place)))


def sink_mean(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """v_s → the mean of the head's sink values over held-out inputs, A fixed."""
    found = _dominant(call, strength, beside, "sink_mean")
    return _with_value(call, beside, found, beside.of_others(call, "sink"))


def sink_donor(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """v_s → the head's sink value of another input, A fixed."""
    found = _dominant(call, strength, beside, "sink_donor")
    return _with_value(call, beside, found, beside.of_others(call, "sink", donor=True))


def sink_ordinary(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """v_s → an ordinary value of the head, of another input: that of a key which is no sink, A fixed."""
    found = _dominant(call, strength, beside, "sink_ordinary")
    return _with_value(call, beside, found, beside.of_others(call, "ordinary", donor=True))


def random_zero(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """v_j → 0 at a random key j that is not the sink, A fixed: the control of what is done to its value."""
    found = _dominant(call, strength, beside, "random_zero")
    other = _column(call, found.other)
    return _with_value(call, beside, found, torch.zeros_like(value_at(call, found.other)), at=other)


def sink_masked(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """A_is → 0, rows renormalised, s the key that a head gives most to."""
    return _masked(call, strength, beside, "sink_masked")


def random_masked(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """A_ij → 0 at a random key j that is not the sink, rows renormalised: the control of `sink_masked`."""
    return _masked(call, strength, beside, "random_masked")


@torch.no_grad()
def dominant_keys(
    call: AttentionCall, queries: Bool[Tensor, "batch token"], seed: int
) -> tuple[Int[Tensor, "batch head"], Int[Tensor, "batch head"]]:
    """The key that each head gives most to over the queries, and another one that queries give something to,
    drawn by its place; the same where there is no other.
    """
    received = torch.zeros(call.batch, call.heads, call.keys, dtype=torch.float64, device=call.output.device)
    for rows in row_blocks(call):
        received += (weights_of(call, rows) * queries[:, None, rows, None]).sum(2)
    place = received.argmax(-1)
    keys = torch.arange(call.keys, device=place.device)
    head = torch.arange(call.heads, device=place.device)[:, None]
    noise = drawn(mixed(seed, call.layer), head, keys).expand(call.batch, -1, -1)
    free = (received > 0) & (keys != place[..., None])
    if queries.shape[1] == call.keys:
        free = free & queries[:, None]
    other = noise.masked_fill(~free, torch.iinfo(noise.dtype).max).argmin(-1)
    return place, torch.where(free.any(-1), other, place)


def _dominant(call: AttentionCall, strength: Strength, beside: Beside, name: str) -> Dominant:
    refuse_without_weights(call, name)
    queries = beside.queries(call)
    place, other = dominant_keys(call, queries, beside.seed)
    weight = _column(call, place)
    least = strength.to(weight.device, weight.dtype)  # [head]
    enough = over_queries((weight.detach() >= least[..., None]).to(weight.dtype), queries) >= EVENT_QUERIES
    chosen = (enough | (least == 0)) & queries.any(-1, keepdim=True)
    return Dominant(place, other, weight, chosen, over_queries(weight.detach(), queries))


def _column(call: AttentionCall, place: Int[Tensor, "batch head"]) -> Float[Tensor, "batch head token"]:
    """The weight that each query gives to one key of its head."""
    parts = []
    for rows in row_blocks(call):
        weights = weights_of(call, rows)
        at = place[..., None, None].expand(-1, -1, weights.shape[2], 1)
        parts.append(weights.gather(-1, at)[..., 0])
    return torch.cat(parts, 2)


def value_at(call: AttentionCall, place: Int[Tensor, "batch head"]) -> Float[Tensor, "batch head dim"]:
    """The value that each query head has at a key of its own, at least float32."""
    value = call.value.to(torch.promote_types(call.value.dtype, torch.float32))
    at = place.unflatten(1, (call.kv_heads, call.group))[..., None].expand(-1, -1, -1, value.shape[-1])
    return value.gather(2, at).flatten(1, 2)  # [batch, head, dim]


def _with_value(
    call: AttentionCall,
    beside: Beside,
    found: Dominant,
    given: Float[Tensor, "batch head dim"],
    at: Float[Tensor, "batch head token"] | None = None,
) -> Tensor:
    """y with another value at the dominant key. at: the weights of `other`, where that one's is exchanged."""
    place, weight = (found.place, found.weight) if at is None else (found.other, at)
    beside.note_sinks(found.place, call.keys)
    mean = found.mean if at is None else over_queries(at.detach(), beside.queries(call))
    chosen = found.chosen & ((at is None) | (found.other != found.place))
    beside.note_kept(1 - mean * chosen)
    step = given.to(weight.dtype) - value_at(call, place)
    changed = call.output.to(weight.dtype) + weight[..., None] * step[:, :, None]
    return torch.where(chosen[..., None, None], changed, call.output.to(weight.dtype))


def _masked(call: AttentionCall, strength: Strength, beside: Beside, name: str) -> Tensor:
    found = _dominant(call, strength, beside, name)
    beside.note_sinks(found.place, call.keys)
    place = found.place if name == "sink_masked" else found.other
    chosen = found.chosen & ((name == "sink_masked") | (found.other != found.place))
    gone = torch.where(chosen, place, -1)[..., None, None]  # no key has that number
    keys = torch.arange(call.keys, device=place.device)
    return restricted(call, beside, name, lambda rows, order, seen: keys != gone)
