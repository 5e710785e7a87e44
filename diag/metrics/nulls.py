"""Further nulls of the alignment bias: near keys, other inputs, other groups of heads. Optional metrics.

Notation and which tokens count are as in `diag.metrics.default`. Values and outputs are all that is read:
memory is O(token · dim), and so is the time, times the number of near keys. Where rows are sampled, these are
of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.linalg import vecdot, vector_norm
from torch.nn.functional import pad

from diag.attention.call import repeats
from diag.attention.positions import NEAR_PATCHES, NEAR_TOKENS, TEXT, Geometry
from diag.attention.value_statistics import reciprocal, value_blocks
from diag.attention.visibility import Visibility, of_inputs
from diag.metrics.default import Selection
from diag.metrics.readings import Reading
from diag.metrics.registry import metric, registered


@dataclass(frozen=True, eq=False)
class OtherInput:
    """The values of another input at the same places, for each row of a call.

    there: whether the place is a token of the other input, in the same token set, and its value is finite.
    """

    value: Float[Tensor, "batch kv_head token value_dim"]
    there: Bool[Tensor, "batch token"]


@dataclass(frozen=True, eq=False)
class Beside:
    """One call through one token set, with what its bias is compared with.

    geometry: where tokens lie. other: another input's values, None where there is none.
    """

    on: Selection
    geometry: Geometry
    other: OtherInput | None = None

    @cached_property
    def near(self) -> tuple[Tensor, Tensor] | None:
        """Mean cosine of y_i with the values of near visible j ≠ i of S, and whether there is any.

        None where the places of tokens are not known.
        """
        on, call = self.on, self.on.call
        if self.geometry.grid(call.tokens) is None:
            return None
        sums = torch.empty(call.output.shape[:3], dtype=torch.float32, device=call.output.device)
        inside = on.among[:, None, :, None].float()
        for (in_batch, in_head), value in value_blocks(call):
            where = (in_batch, call.query_heads(in_head))
            units = value * reciprocal(vector_norm(value, dim=-1))[..., None] * of_inputs(inside, in_batch)
            total = near_sums(units, call.visibility.part(*where), self.geometry)
            output = call.output[where].float().unflatten(1, (-1, call.group))
            sums[where] = vecdot(output, total.unflatten(1, (value.shape[1], -1))).flatten(1, 2)
        count = on.grouped(near_sums(inside, call.visibility, self.geometry)[..., 0].round())
        return on.of_heads(sums) * on.per_output_norm / count.clamp(min=1), count > 0

    @cached_property
    def of_groups(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Mean over the other KV heads of cos(y_i, v_i) and of the partner null, and whether that has any j.

        KV heads that were written out for the query heads count once. None where there is only one.
        """
        on, call = self.on, self.on.call
        copies = repeats(call.value)
        others = call.kv_heads // copies - 1
        if not others:
            return None
        batch, _, tokens, dim = call.output.shape
        units = torch.zeros(batch, 1, tokens, dim, dtype=torch.float32, device=call.output.device)
        for (in_batch, _), value in value_blocks(call):  # Σ over KV heads of v̂_i
            per_norm = reciprocal(vector_norm(value, dim=-1))
            units[in_batch] += (per_norm[..., None] * value).sum(1, keepdim=True) / copies
        at_place, over_keys = torch.empty(2, *call.output.shape[:3], device=call.output.device)
        inside = on.among[:, None].float()
        for row in range(batch):
            one = slice(row, row + 1)
            output = call.output[one].float()
            at_place[one] = vecdot(output, units[one])
            total = call.visibility.part(one, slice(None)).sum(units[one], of_inputs(inside, one))
            over_keys[one] = vecdot(output, total)
        place = on.of_heads(at_place) * on.per_output_norm - on.cosine
        own = on.grouped(on.among[:, None] & call.visibility.sees_itself)
        partners = on.grouped(call.visibility.count_among(on.among)) - own.long()
        among_keys = on.of_heads(over_keys - on.values.partner) * on.per_output_norm - own * place
        return place / others, among_keys / (others * partners.clamp(min=1)), partners > 0

    @cached_property
    def of_other_input(self) -> Float[Tensor, "batch kv_head group token"] | None:
        """cos(y_i, v_i of the other input); None where there is no other input."""
        if self.other is None:
            return None
        value = self.other.value.float()[:, :, None]
        output = self.on.of_heads(self.on.call.output).float()
        per_norm = reciprocal(vector_norm(value, dim=-1))
        return vecdot(output, value) * per_norm * self.on.per_output_norm

    def of_rows(self, values: Tensor | None, also: Tensor | None = None) -> Reading:
        """A reading per token; undefined where there is nothing to compare with."""
        return self.on.nothing if values is None else self.on.per_row(values, also)


def near_sums(
    x: Float[Tensor, "some_batch some_head token dim"], seen: Visibility, geometry: Geometry
) -> Float[Tensor, "#every_batch query_head token dim"]:
    """`Σ_j x_j` over the visible near keys j ≠ i of every i that has a place; 0 for the others.

    Near is what `Geometry.near` says. The head axis of the result is that of `x`, or every query head where
    the mask differs between these; its batch axis is that of `x`, or the mask's. x is 0 where it does not
    count.
    """
    tokens, prefix = x.shape[2], geometry.prefix
    rows, cols = geometry.grid(tokens) or (0, 0)
    if seen.keys is not None:
        x = x * seen.keys[:, None, :, None]
    line = rows == 1
    if seen.rule == "full" or (seen.rule == "causal" and line):
        grid = x[:, :, prefix:].unflatten(2, (rows, cols))
        reach = NEAR_TOKENS if line else NEAR_PATCHES
        found = _window(grid, 3, reach, 0 if seen.rule == "causal" else reach)
        found = found if line else _window(found, 2, reach, reach)
        return pad((found - grid).flatten(2, 3), (0, 0, prefix, 0))
    if seen.visible_rows is not None:
        batch, heads = seen.visible_rows.shape[:2]
        x = x.expand(max(batch, len(x)), -1, -1, -1).repeat_interleave(max(1, heads // x.shape[1]), 1)
    found, place = torch.zeros_like(x), torch.arange(tokens - prefix, device=x.device)
    for step in geometry.around(tokens).tolist():
        if step == 0 or abs(step) >= len(place):
            continue
        of, to = place[max(0, -step) : len(place) - max(0, step)], place[max(0, step) :]
        to = to[: len(of)] if step > 0 else place[: len(of)]
        counts = geometry.near(of, to, tokens) & (seen.rule != "causal" or step < 0)
        if seen.visible_rows is not None:
            shown = seen.visible_rows[:, :, prefix:, prefix:].diagonal(step, dim1=-2, dim2=-1)
            counts = counts & shown  # [batch or 1, head or 1, row]
        part = x[:, :, prefix + to[0] : prefix + to[-1] + 1] * counts[..., None]
        found[:, :, prefix + of[0] : prefix + of[-1] + 1] += part
    return found


def _window(x: Tensor, axis: int, back: int, ahead: int) -> Tensor:
    """`Σ x_j` over j from i - back to i + ahead along an axis.

    By doubling: differences of sums over all of it would lose digits.
    """
    size = x.shape[axis]
    behind = (0, 0) * (x.ndim - 1 - axis)
    padded = pad(x, (*behind, back, ahead))
    found, width, reached = torch.zeros_like(x), 1, 0
    number = back + 1 + ahead
    while True:  # padded holds sums of `width` neighbours, from each place on
        if number & width:
            found = found + padded.narrow(axis, reached, size)
            reached += width
        if 2 * width > number:
            return found
        left = padded.shape[axis] - width
        padded = padded.narrow(axis, 0, left) + padded.narrow(axis, width, left)
        width *= 2


@metric("nulls", of_own_keys=True)
def cos_y_vnear(beside: Beside) -> Reading:
    return beside.of_rows(*(beside.near or (None, None)))


@metric("nulls", of_own_keys=True)
def excess_over_near(beside: Beside) -> Reading:
    null, defined = beside.near or (None, None)
    return beside.of_rows(None if null is None else beside.on.cosine - null, defined)


@metric("nulls", of_own_keys=True)
def cos_y_vother_input(beside: Beside) -> Reading:
    return _where_there(beside, beside.of_other_input)


@metric("nulls", of_own_keys=True)
def excess_over_other_input(beside: Beside) -> Reading:
    null = beside.of_other_input
    return _where_there(beside, None if null is None else beside.on.cosine - null)


@metric("nulls", of_own_keys=True)
def cos_y_vother_group(beside: Beside) -> Reading:
    found = beside.of_groups
    return beside.of_rows(found and found[0])


@metric("nulls", of_own_keys=True)
def excess_over_other_group(beside: Beside) -> Reading:
    found = beside.of_groups
    return beside.of_rows(None if found is None else beside.on.cosine - found[0])


@metric("nulls", of_own_keys=True)
def cos_y_vother_group_partner(beside: Beside) -> Reading:
    return beside.of_rows(*(beside.of_groups or (None, None, None))[1:])


@metric("nulls", of_own_keys=True)
def excess_across_groups(beside: Beside) -> Reading:
    found = beside.of_groups
    return beside.of_rows(*((found[0] - found[1], found[2]) if found is not None else (None, None)))


def _where_there(beside: Beside, values: Tensor | None) -> Reading:
    if values is None or beside.other is None:
        return beside.on.nothing
    reading, there = beside.of_rows(values), beside.other.there[:, None]
    # what the other input holds where it has no such token is nothing, and need not be finite
    return Reading(torch.where(there, reading.values, 0.0), reading.weights & there)


NULL_METRICS = registered("nulls")
"""The further nulls, by name."""

OF_OTHER_INPUTS = frozenset({"cos_y_vother_input", "excess_over_other_input"})
"""Those that need another input."""


def null_readings(
    on: Selection, names: Sequence[str], *, geometry: Geometry = TEXT, other: OtherInput | None = None
) -> dict[str, Reading]:
    """The named further nulls of one call seen through one token set."""
    beside = Beside(on, geometry, other)
    return {
        name: NULL_METRICS[name].compute(beside) if NULL_METRICS[name].defined_for(on.call) else on.nothing
        for name in names
    }
