"""Interventions on the pattern A: rows keep some of their keys, or give others what some had.

What is left of a row is renormalised: it keeps the sum that it had over tokens. That is 1 of a softmax; where
keys that are no tokens (sinks, memory, bias) hold a share of the row, they keep theirs. A row of which
nothing is left, and one that loses nothing, returns what it returned, bit for bit.

Everything is recomputed in blocks of query rows, and differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.attention.pattern import BLOCK_ELEMENTS, pattern_rows, score_rows
from diag.errors import MeasurementError
from diag.models.hooks.beside import Beside, drawn, mixed
from diag.models.hooks.edited_outputs import Strength, grouped, with_own_value

Keep = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Places of rows; their scores or weights, `[batch, head, row, key]`; the keys they see → those they keep."""

IMAGE_SHARE = 0.2
"""A head is image-centric for a query that gives image keys at least this much."""
SINK_SHARE = 0.5
"""And of this at most so much to visual sinks."""
VISUAL_SINK = 10.0
"""A visual sink receives so many times what the median image key receives."""


def mask_self(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """A_ii → 0, rows renormalised; a row that sees only itself (t = 0 of a causal model) stays as it is.

    Exact also where A_ii is nearly 1. Raises MeasurementError, naming the layer, where weights may be
    negative, as everything here does.
    """
    with_own_value(call)
    return restricted(call, beside, "mask_self", lambda rows, order, seen: _keys(call) != rows[:, None])


def window(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """A restricted to |i−j| < w, rows renormalised: what a sliding window would leave of the layer.

    Tokens without a place (class token, registers) see all others, and are seen by them.
    """
    return restricted(call, beside, "window", _within(call, strength, beside))


def random_window(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """As many keys of each row as `window=w` would leave, but drawn at random: its control."""
    return restricted(call, beside, "random_window", _drawn(call, beside, _within(call, strength, beside)))


def neighbourhood(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """A restricted to k × k patches around, moved inwards at the edges of the image, rows renormalised.

    Tokens without a place (class token, registers) see all others, and are seen by them.
    """
    return restricted(call, beside, "neighbourhood", _around(call, strength, beside))


def random_neighbourhood(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """As many keys of each row as `neighbourhood=k` would leave, but drawn at random: its control."""
    keep = _drawn(call, beside, _around(call, strength, beside))
    return restricted(call, beside, "random_neighbourhood", keep)


def top_keys(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """A restricted to the k largest weights of each row, rows renormalised."""
    return restricted(call, beside, "top_keys", _largest(call, strength))


def random_keys(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """k keys of each row, drawn at random among those that it sees: the control of `top_keys=k`."""
    return restricted(call, beside, "random_keys", _drawn(call, beside, _largest(call, strength)))


def redistribute(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """A share p of what rows give to visual sinks goes to the other image keys, in image-centric heads."""
    return _redistributed(call, strength, beside, "redistribute")


def random_redistribute(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """As `redistribute=p`, of as many image keys drawn at random instead of the sinks: its control."""
    return _redistributed(call, strength, beside, "random_redistribute")


def weights_of(call: AttentionCall, rows: Int[Tensor, " row"]) -> Float[Tensor, "batch head row key"]:
    """The attention weights of some rows, at least float32, differentiable; 0 where a row sees nothing."""
    if call.pattern is not None:
        return call.pattern[:, :, rows].to(torch.promote_types(call.pattern.dtype, torch.float32))
    if call.maps:
        return pattern_rows(call, rows)
    scores = score_rows(call, rows)
    nothing = (scores == float("-inf")).all(-1, keepdim=True)
    scores = scores.masked_fill(nothing, 0.0)  # the softmax of a row of -inf would put NaN into the gradient
    if call.outside is None:
        return scores.softmax(-1).masked_fill(nothing, 0.0)
    assert call.log_normaliser is not None
    normaliser = call.log_normaliser[:, :, rows, None].masked_fill(nothing, 0.0)
    return (scores - normaliser).exp().masked_fill(nothing, 0.0)


def row_blocks(call: AttentionCall) -> Iterator[Int[Tensor, " row"]]:
    """Query rows, as many at a time as their weights may take memory."""
    at_once = max(16, BLOCK_ELEMENTS["cpu"] // (call.keys * call.heads * call.batch))
    yield from torch.arange(call.tokens, device=call.output.device).split(at_once)


def refuse_without_weights(call: AttentionCall, name: str) -> None:
    """Raises MeasurementError, naming the layer, where there are no weights that can be changed."""
    if not call.has_pattern:
        raise MeasurementError(
            f"layer '{call.module}' has no softmax: there is no A_{'ii' if name == 'mask_self' else 'ij'}",
            f"choose another intervention than {name}, or name its layers: {name}:LAYERS",
        )
    if call.maps:
        raise _negative(call, name, f"adds up {len(call.maps)} maps: weights may be")


def restricted(call: AttentionCall, beside: Beside, name: str, keep: Keep) -> Tensor:
    """The output of the call with some keys of each row left, and the rows renormalised."""
    refuse_without_weights(call, name)
    output, value = grouped(call)
    changed, kept = [], []
    for rows in row_blocks(call):
        weights, stay, share = _restricted_rows(call, name, rows, keep)
        attended = _attended(call, weights, value, rows)
        stay = stay.unflatten(1, (call.kv_heads, call.group))
        changed.append(torch.where(stay, output[:, :, :, rows], attended))
        kept.append(share)
    if beside.noted is not None:
        beside.note_kept(over_queries(torch.cat(kept, 2), beside.queries(call)))
    return torch.cat(changed, 3).flatten(1, 2)


def over_queries(
    x: Float[Tensor, "batch head token"], queries: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch head"]:
    """The mean over those tokens of an input that are queries."""
    weights = queries[:, None].to(x.dtype)
    return (x * weights).sum(-1) / weights.sum(-1).clamp(min=1)


def _attended(call: AttentionCall, weights: Tensor, value: Tensor, rows: Tensor) -> Tensor:
    """What rows of weights return, heads grouped."""
    part = weights.unflatten(1, (call.kv_heads, call.group)).to(value.dtype)
    attended = (part @ value).flatten(1, 2) + call.outside_at(rows)
    return attended.to(value.dtype).unflatten(1, (call.kv_heads, call.group))


def _restricted_rows(
    call: AttentionCall, name: str, rows: Int[Tensor, " row"], keep: Keep
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with some of their keys, renormalised; which of them stay as they were, `[…, row, 1]`; and the
    share of their weight that the keys held which are left.
    """
    if call.pattern is not None:
        weights = weights_of(call, rows)
        if bool((weights < 0).any()):
            raise _negative(call, name, "has weights that are")
        seen = weights != 0
        left = keep(rows, weights, seen) & seen
        others = weights.masked_fill(~left, 0.0)
        sums, total = weights.sum(-1, keepdim=True), others.sum(-1, keepdim=True)
        stay = (total == 0) | (left == seen).all(-1, keepdim=True)
        some = total.where(total > 0, torch.ones_like(total))
        share = (total / sums.where(sums > 0, torch.ones_like(sums))).masked_fill(stay, 1.0)
        return others * (sums / some), stay, share[..., 0].detach()
    scores = score_rows(call, rows)
    seen = scores > float("-inf")
    left = keep(rows, scores, seen) & seen
    stay = ~left.any(-1, keepdim=True) | (left == seen).all(-1, keepdim=True)
    with torch.no_grad():
        nothing = ~seen.any(-1, keepdim=True)
        share = scores.detach().masked_fill(nothing, 0.0).softmax(-1).masked_fill(~left, 0.0).sum(-1)
    # masked before the softmax: exact also where what is left is next to nothing
    scores = scores.masked_fill(~left, float("-inf")).masked_fill(~left.any(-1, keepdim=True), 0.0)
    weights = scores.softmax(-1)
    if not call.is_softmax:
        weights = weights * weights_of(call, rows).sum(-1, keepdim=True)
    return weights, stay, share.masked_fill(stay[..., 0], 1.0)


def _negative(call: AttentionCall, name: str, why: str) -> MeasurementError:
    without = " without A_ii" if name == "mask_self" else ""
    return MeasurementError(
        f"layer '{call.module}' {why} negative, and cannot be renormalised{without}",
        f"choose another intervention than {name}, or leave the layer out with --layers",
    )


# --- which keys are kept


def _keys(call: AttentionCall) -> Int[Tensor, " key"]:
    return torch.arange(call.keys, device=call.output.device)


def _whole(strength: Strength, call: AttentionCall) -> Int[Tensor, "head 1 1"]:
    return strength.to(call.output.device).long()[:, None, None]


def _within(call: AttentionCall, strength: Strength, beside: Beside) -> Keep:
    with_own_value(call)
    reach, prefix, keys = _whole(strength, call), beside.geometry(call).prefix, _keys(call)

    def keep(rows: Tensor, order: Tensor, seen: Tensor) -> Tensor:
        near = (keys - rows[:, None]).abs() < reach  # [head, row, key]
        return near | (keys < prefix) | (rows < prefix)[:, None]

    return keep


def _around(call: AttentionCall, strength: Strength, beside: Beside) -> Keep:
    with_own_value(call)
    size, geometry, keys = _whole(strength, call), beside.geometry(call), _keys(call)
    grid, prefix = geometry.grid(call.tokens), geometry.prefix
    if grid is None:
        raise MeasurementError(
            f"layer '{call.module}' has {call.tokens} tokens of which it is not known where they lie",
            "choose window, which takes tokens in their order, or leave the layer out with --layers",
        )

    def near(of_rows: Tensor, of_keys: Tensor, sides: int) -> Tensor:
        """Along one axis: as many places as the neighbourhood is wide, moved inwards at the edges."""
        first = torch.minimum((of_rows - size[..., 0] // 2).clamp(min=0), (sides - size[..., 0]).clamp(min=0))
        return (of_keys >= first[..., None]) & (of_keys < first[..., None] + size)

    def keep(rows: Tensor, order: Tensor, seen: Tensor) -> Tensor:
        at, of = rows - prefix, keys - prefix
        around = near(at // grid[1], of // grid[1], grid[0]) & near(at % grid[1], of % grid[1], grid[1])
        return around | (keys < prefix) | (rows < prefix)[:, None]

    return keep


def _largest(call: AttentionCall, strength: Strength) -> Keep:
    number = _whole(strength, call)

    def keep(rows: Tensor, order: Tensor, seen: Tensor) -> Tensor:
        most = min(int(number.max()), call.keys)
        place = order.topk(most, -1).indices
        chosen = (torch.arange(most, device=order.device) < number).expand(place.shape)
        return torch.zeros_like(seen).scatter(-1, place, chosen)

    return keep


def _drawn(call: AttentionCall, beside: Beside, like: Keep) -> Keep:
    """As many of the keys that each row sees as another rule keeps, whichever."""
    head = torch.arange(call.heads, device=call.output.device)[:, None, None]

    def keep(rows: Tensor, order: Tensor, seen: Tensor) -> Tensor:
        number = (like(rows, order, seen) & seen).sum(-1, keepdim=True)
        noise = drawn(mixed(beside.seed, call.layer), head, rows[:, None], _keys(call))
        noise = noise.masked_fill(~seen, torch.iinfo(noise.dtype).max)
        last = noise.sort(-1).values.gather(-1, (number - 1).clamp(min=0))
        return (noise <= last) & (number > 0)

    return keep


# --- redistribution


def _redistributed(call: AttentionCall, strength: Strength, beside: Beside, name: str) -> Tensor:
    refuse_without_weights(call, name)
    image = beside.image(call)
    if image is None:
        raise MeasurementError(
            f"layer '{call.module}' has no keys of which it is known that they are an image's",
            f"give a model that reads images, or leave out {name}",
        )
    image = image.to(call.output.device).expand(call.batch, call.keys)
    queries = beside.queries(call)
    if call.own_keys and bool((queries & ~image).any()):
        queries = queries & ~image  # what a text asks of an image; of a vision model, all its tokens
    sinks = visual_sinks(call, image, queries)
    if name == "random_redistribute":
        sinks = _as_many(call, beside, image, sinks)
    output, value = grouped(call)
    share = strength.to(output.device, output.dtype)[:, None, None]
    changed, kept = [], []
    for rows in row_blocks(call):
        weights = weights_of(call, rows)
        if call.pattern is not None and bool((weights < 0).any()):
            raise _negative(call, name, "has weights that are")
        of_image = weights * image[:, None, None]
        of_sinks = weights * sinks[:, None, None]
        total, moved = of_image.sum(-1, keepdim=True), of_sinks.sum(-1, keepdim=True)
        others = total - moved
        centred = (total >= IMAGE_SHARE) & (moved <= SINK_SHARE * total) & (moved > 0) & (others > 0)
        centred = centred & queries[:, None, rows, None]
        some = others.where(centred, torch.ones_like(others))
        change = (of_image - of_sinks) * (moved / some) - of_sinks
        attended = _attended(call, weights + share * change, value, rows)
        here = (centred & (share > 0)).unflatten(1, (call.kv_heads, call.group))
        changed.append(torch.where(here, attended, output[:, :, :, rows]))
        kept.append((1 - share * moved.where(centred, torch.zeros_like(moved)))[..., 0].detach())
    beside.note_kept(over_queries(torch.cat(kept, 2), queries))
    return torch.cat(changed, 3).flatten(1, 2)


@torch.no_grad()
def visual_sinks(
    call: AttentionCall, image: Bool[Tensor, "batch key"], queries: Bool[Tensor, "batch token"]
) -> Bool[Tensor, "batch key"]:
    """Image keys that receive, averaged over heads and queries, `VISUAL_SINK` times the median image key."""
    received = torch.zeros(call.batch, call.keys, dtype=torch.float64, device=call.output.device)
    for rows in row_blocks(call):
        received += (weights_of(call, rows) * queries[:, None, rows, None]).sum((1, 2))
    median = received.masked_fill(~image, torch.nan).nanmedian(-1, keepdim=True).values
    return image & (received >= VISUAL_SINK * median) & (received > 0)


def _as_many(call: AttentionCall, beside: Beside, image: Tensor, sinks: Tensor) -> Bool[Tensor, "batch key"]:
    """As many image keys that are no sinks as there are sinks, drawn."""
    others = image & ~sinks
    noise = drawn(mixed(beside.seed, call.layer), _keys(call)).expand(call.batch, -1)
    noise = noise.masked_fill(~others, torch.iinfo(noise.dtype).max)
    number = sinks.sum(-1, keepdim=True)
    last = noise.sort(-1).values.gather(-1, (number - 1).clamp(min=0))
    return (noise <= last) & (number > 0) & others
