"""One pass over blocks of query rows for everything that needs the pattern itself.

What a single row holds (`entropy`, `distance`, …) comes out as `[batch, head, token]`; what a key
receives from many rows is summed up on the way. No token × token matrix: memory is O(rows · token)
for the block at hand, and O(token) for what is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.linalg import vecdot

from diag.attention.call import AttentionCall, first_key
from diag.attention.kernels import fused_quantities
from diag.attention.pattern import BLOCK_ELEMENTS, LN2, given_blocks, log2_pattern_blocks, positions
from diag.attention.positions import Distances, Geometry
from diag.attention.softmax_statistics import CallStatistics, Received
from diag.attention.value_statistics import value_blocks

NOTHING = -1e30
"""The logarithm of a weight of zero: finite, so that `A ln A` is 0."""

ADDING = ("own", "first", "previous", "prefix", "near", "sum")
"""What is a sum of weights: that of several maps is the sum of those of each."""

QUANTITIES = (*ADDING, "entropy", "received", "distance", "norms", "top")
"""What `pattern_pass` can be asked for; where a layer adds up several maps, only what is in `ADDING`. The
others are no numbers of a given pattern with negative weights."""


def pattern_pass(
    statistics: CallStatistics,
    wanted: Collection[str],
    rows: Sequence[Bool[Tensor, "#batch #head token"]],
    live: Bool[Tensor, "#batch #head row"],
    *,
    geometry: Geometry,
    norms: Float[Tensor, "batch head key"] | None = None,
    top: int = 1,
) -> dict[str, Tensor]:
    """The wanted quantities of every live query row, in one pass; other rows hold zeros.

    Rows are those of the call's sample where it has one: `[…, token]` reads `[…, row]` below. `received`
    is a sum over all rows; with a sample it is estimated from the drawn ones.

    statistics: of the call; what is known there already is not computed again.
    rows: for each token set, the rows that give to `received`.
    live: the rows that any reader looks at; the others may hold anything, NaN included.

    Per row, `[batch, head, token]`, float32: `own` A_ii, `first` (weight on the first key that anyone
    sees), `previous` A_i,i-1, `prefix` (weight on the prefix tokens), `near` (on near places), `sum` (on
    all), `entropy` in nats, `distance` and `distance_square` (means over places, weights renormalised)
    with `placed`, the weight on all places; `norms`: `norm_total` Σ A n and `norm_entropy` of the shares
    A n / Σ A n, n = `norms`; `top`: the keys of largest weight, `[…, top]`, largest first, -1 where
    there are fewer.
    Per key: `received` Σ_i A_ij over the rows of each set, `[set, batch, head, key]`.
    """
    assert set(wanted) <= set(QUANTITIES), wanted
    call = statistics.call
    if call.maps:
        return _of_maps(statistics, wanted, rows, live, geometry)
    tokens, device = call.tokens, call.output.device
    of_keys = key_places(call, geometry)
    wanted = set(wanted) - (set() if of_keys.grid(call.keys) else {"distance", "near"})
    fused = _known(statistics, wanted, live)
    wanted -= fused.keys()
    of_blocks = {"received"} if call.sample is not None else set()
    fused |= _fused(statistics, wanted - of_blocks, rows, live, geometry)
    wanted -= fused.keys()  # what is left needs the blocks
    if not wanted:
        return fused
    shape = (call.batch, call.heads, tokens if call.sample is None else call.sample.rows)
    names = [name for name in QUANTITIES if name in wanted and name not in ("received", "top", "norms")]
    if "distance" in names:
        names += ["distance_square", "placed"]
    if "norms" in wanted:
        names += ["norm_total", "norm_entropy"]
    found = {name: torch.zeros(shape, dtype=torch.float32, device=device) for name in names}
    keep = call.sample is None
    distances = _distances(call, geometry, keep=keep) if "distance" in names else None
    first = first_key(call)
    received = Received(call, rows) if "received" in wanted else None
    if received is not None:
        found["received"] = received.found
    if "top" in wanted:
        found["top"] = torch.full((*shape, top), -1, dtype=torch.int32, device=device)
    lengths_of = None
    if "norms" in wanted:
        assert norms is not None
        lengths_of = torch.stack([norms, torch.xlogy(norms, norms)], -1)  # [batch, head, token, 2]
    given = call.pattern is not None
    for where, block in _live_blocks(statistics, live):
        in_batch, in_head, in_row = where
        at, seen = positions(call, where), block.shape[-1]
        if "top" in found:
            number = min(top, seen)
            found["top"][where][..., :number] = block.topk(number, -1).indices.int()
            if len(found) == 1:
                continue
        pattern = block if given else block.exp2()
        if received is not None:
            received.add(pattern, where)
        if "own" in found:
            found["own"][where] = _of_keys(pattern, at)
        if "first" in found:
            index = first[in_batch].clamp(max=seen - 1)[:, None, None, None].expand(*pattern.shape[:3], 1)
            found["first"][where] = pattern.gather(-1, index)[..., 0]
        if "previous" in found:
            found["previous"][where] = _of_keys(pattern, (at - 1).clamp(min=0)) * (at > 0)
        if "prefix" in found:
            found["prefix"][where] = pattern[..., : geometry.prefix].sum(-1)
        if "sum" in found:
            found["sum"][where] = pattern.sum(-1)
        if "near" in found:
            found["near"][where] = _on_near_places(pattern, at, geometry, tokens)
        if distances is not None:
            on_places = pattern[..., of_keys.prefix :]
            lengths = distances.block(at, in_row.start)[:, : on_places.shape[-1]]
            found["placed"][where] = mass = on_places.sum(-1)
            mass = mass.clamp(min=torch.finfo(mass.dtype).tiny)
            travelled = on_places * lengths
            found["distance"][where] = travelled.sum(-1) / mass
            found["distance_square"][where] = travelled.mul_(lengths).sum(-1) / mass
        if lengths_of is not None:
            sums = pattern @ lengths_of[in_batch, in_head, :seen]  # [.., row, 2]: Σ A n, Σ A n ln n
        if "entropy" in found or lengths_of is not None:
            # of 0 log 0 is made 0
            logs = block.clamp(min=torch.finfo(block.dtype).tiny).log2_() if given else block
            products = logs.mul_(pattern).mul_(LN2)  # A ln A
        if "entropy" in found:
            found["entropy"][where] = products.sum(-1).neg_()
        if lengths_of is not None:
            total = sums[..., 0].clamp(min=torch.finfo(sums.dtype).tiny)
            weighted = (products @ lengths_of[in_batch, in_head, :seen, :1])[..., 0]
            found["norm_total"][where] = sums[..., 0]
            found["norm_entropy"][where] = total.log() - (weighted + sums[..., 1]) / total
    return fused | found


def _of_maps(
    statistics: CallStatistics,
    wanted: Collection[str],
    rows: Sequence[Bool[Tensor, "#batch #head token"]],
    live: Bool[Tensor, "#batch #head row"],
    geometry: Geometry,
) -> dict[str, Tensor]:
    """The wanted quantities of a layer that adds up maps: Σ_k c_k times those of each."""
    assert set(wanted) <= set(ADDING), wanted
    found: dict[str, Tensor] = {}
    for one in statistics.call.maps:
        alone = CallStatistics(statistics.call.of_map(one))
        for name, x in pattern_pass(alone, wanted, rows, live, geometry=geometry).items():
            found[name] = found.get(name, 0.0) + one.coefficient * x
    return found


def _known(statistics: CallStatistics, wanted: Collection[str], live: Tensor) -> dict[str, Tensor]:
    """What of `wanted` the sweep over all rows for the default metrics has summed up, or does now."""
    if "received" not in wanted or not statistics.givers:
        return {}
    softmax = statistics.softmax
    if softmax.received is None:
        return {}
    found = {"received": softmax.received}
    if statistics.call.sample is None:
        of_rows = {"own": softmax.self_weight, "first": softmax.first_weight, "entropy": softmax.entropy}
        found |= {name: x.masked_fill(~live, 0.0) for name, x in of_rows.items() if name in wanted}
    return found


def _fused(
    statistics: CallStatistics,
    wanted: Collection[str],
    rows: Sequence[Bool[Tensor, "#batch #head token"]],
    live: Bool[Tensor, "#batch #head row"],
    geometry: Geometry,
) -> dict[str, Tensor]:
    """What of `wanted` kernels compute (on CUDA), of the live rows; the others hold zeros."""
    call = statistics.call
    on_line = geometry.rows == 1 and geometry.patch_size == 1
    places = None if on_line else geometry.places(call.tokens)
    givers = torch.stack([part.expand(call.output.shape[:3]) for part in rows])
    found = fused_quantities(call, lambda: statistics.softmax, wanted, givers, places, geometry.prefix)
    of_rows = {name: x for name, x in found.items() if name != "received"}
    if call.sample is not None:
        of_rows = {name: x if name == "entropy" else call.sample.at(x) for name, x in of_rows.items()}
    return found | {name: x.masked_fill(~live, 0.0) for name, x in of_rows.items()}


def uniform(
    call: AttentionCall, geometry: Geometry, wanted: Collection[str]
) -> dict[str, Float[Tensor, "#batch #head token"]]:
    """What `distance` and `near` would be if each query attended alike to every key that it sees.

    One pass over the visible keys of the rows at hand (those of the call's sample, where it has one),
    shared by all heads where the mask is. Zeros where no place is seen.
    """
    tokens, device, seen, sample = call.tokens, call.output.device, call.visibility, call.sample
    of_keys = key_places(call, geometry)
    if not wanted or of_keys.grid(call.keys) is None:
        return {}
    distances = _distances(call, geometry, keep=sample is None) if "distance" in wanted else None
    count = seen.count if sample is None else sample.at(seen.count)
    # filled in place: small results kept between large temporary blocks would hold the heap open
    found = {
        name: torch.zeros(count.shape, dtype=torch.float32, device=device)
        for name in ("distance", "near")
        if name in wanted
    }
    rows_at_once = max(1, BLOCK_ELEMENTS[device.type] // (2 * count.shape[0] * count.shape[1] * call.keys))
    for b in [slice(None)] if sample is None else [slice(b, b + 1) for b in range(call.batch)]:
        for start in range(0, count.shape[2], rows_at_once):
            in_row = slice(start, min(start + rows_at_once, count.shape[2]))
            at = torch.arange(in_row.start, in_row.stop, device=device)
            if sample is not None:
                at = sample.index[b.start, in_row]
            visible = seen.of_rows(at, b)  # [.., row or 1, key]
            if distances is not None:
                places = visible[..., of_keys.prefix :].float()
                far = (places * distances.block(at, start)).sum(-1)
                found["distance"][b, :, in_row] = far / places.sum(-1).clamp(min=1)
            if "near" in found:
                near = _on_near_places(visible, at, geometry, tokens)
                found["near"][b, :, in_row] = near / count[b, :, in_row].clamp(min=1)
    return found


def key_places(call: AttentionCall, geometry: Geometry) -> Geometry:
    """Where the keys of a call lie whose tokens have this geometry."""
    if call.own_keys:
        return geometry
    return geometry.of_keys(call.tokens, call.keys) if call.keys_of == "pooled" else Geometry.unknown()


def _distances(call: AttentionCall, geometry: Geometry, *, keep: bool) -> Distances:
    of_keys = None if call.own_keys else (key_places(call, geometry), call.keys)
    return Distances(geometry, call.tokens, call.output.device, keep=keep, of_keys=of_keys)


def norms_of(
    call: AttentionCall, projection: Float[Tensor, "head value_dim width"] | None = None
) -> Float[Tensor, "batch head key"]:
    """‖f(v_j)‖ for every query head: f(v) = v W_O with that head's `projection`, or v without one."""
    shape = (call.batch, call.heads, call.keys)
    norms = torch.empty(shape, dtype=torch.float32, device=call.output.device)
    gram = None
    if projection is not None:
        projection = projection.float().unflatten(0, (call.kv_heads, call.group))
        # ‖v W‖² = v W Wᵀ vᵀ: width is large, value_dim small
        gram = projection @ projection.transpose(-1, -2)
    for (in_batch, in_head), value in value_blocks(call):
        own = value[:, :, None]  # [batch, kv_head, 1, token, value_dim]
        squares = vecdot(own if gram is None else own @ gram[in_head], own)
        squares = squares.clamp(min=0).expand(-1, -1, call.group, -1)
        norms[in_batch, call.query_heads(in_head)] = squares.sqrt().flatten(1, 2)
    return norms


def overlap(one: Tensor, other: Tensor, top: int) -> Float[Tensor, "batch head token"]:
    """Share of the `top` keys of each query that are in both, `[batch, head, token, top]` each."""
    parts = [
        (a[..., :, None] == b[..., None, :]).any(-1).sum(-1).float() / top
        for a, b in zip(one.split(1024, 2), other.split(1024, 2), strict=True)
    ]
    return torch.cat(parts, -1)


class Neighbour:
    """Top keys of the layer before, in one forward pass; O(token · top) memory.

    Layers are neighbours if their depth indices follow each other and each attends once, over the
    same tokens, which are its keys, and, where rows are sampled, the same rows. A layer split over windows
    has none: its rows are not the next layer's rows.

    inputs: how many inputs the batch holds.
    """

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        self.layer: int | None = None
        self.top: Tensor | None = None
        self.rows: Tensor | None = None

    def before(self, call: AttentionCall, top: Tensor) -> Tensor | None:
        """The top keys of the layer before, None if there is none; keeps `top` for the next layer."""
        last, last_layer, last_rows = self.top, self.layer, self.rows
        again = call.layer == last_layer
        self.layer, self.rows = call.layer, None if call.sample is None else call.sample.index
        self.top = None if again or call.batch != self.inputs or not call.own_keys else top
        if last is None or self.top is None or last_layer is None or call.layer != last_layer + 1:
            return None
        if last.shape != top.shape:
            return None
        alike = last_rows is self.rows or (
            last_rows is not None
            and self.rows is not None
            and torch.equal(last_rows.to(self.rows.device), self.rows)
        )
        return last.to(top.device) if alike else None  # the layer before may lie on another GPU


def _live_blocks(
    statistics: CallStatistics, live: Tensor
) -> Iterator[tuple[tuple[slice, slice, slice], Tensor]]:
    """Blocks of A where it is given, which are read only, or else of `log₂ A`, with their place.

    Rows that are not live have no weight.
    """
    call = statistics.call
    live = live.expand(call.batch, call.heads, -1)
    some_dead = (~live).flatten(0, 1).any(0).tolist()
    if call.pattern is not None:
        for where, pattern in given_blocks(call):
            dead = any(some_dead[where[2]])
            yield where, pattern.masked_fill(~live[where][..., None], 0.0) if dead else pattern
        return
    lse = statistics.known_log_normaliser
    known = lse is not None
    if lse is None:
        lse = torch.empty(call.output.shape[:3], dtype=torch.float32, device=call.output.device)
    for where, logs in log2_pattern_blocks(call, lse.float(), known):
        dead = any(some_dead[where[2]])
        yield where, logs.masked_fill(~live[where][..., None], NOTHING) if dead else logs


def _of_keys(pattern: Tensor, keys: Int[Tensor, " row"]) -> Float[Tensor, "batch head row"]:
    """Of each row of a block its weight on one key."""
    return pattern.gather(-1, keys[:, None].expand(*pattern.shape[:3], 1))[..., 0]


def _on_near_places(weights: Tensor, rows: Tensor, geometry: Geometry, tokens: int) -> Tensor:
    """The weight of each row, `[.., row or 1, key]`, on near places; a few keys around it can hold it."""
    prefix, keys = geometry.prefix, weights.shape[-1]
    around = rows[:, None] + geometry.around(tokens).to(rows.device)  # [row, near]
    inside = (around >= prefix) & (around < keys)
    around = around.clamp(0, keys - 1)
    inside &= geometry.near((rows - prefix)[:, None], around - prefix, tokens)
    every = weights.expand(*weights.shape[:2], len(rows), keys)
    return (every.gather(-1, around.expand(*every.shape[:2], -1, -1)) * inside).sum(-1)
