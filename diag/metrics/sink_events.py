"""Sink events: whether nearly all queries of a head attend to one key, and what it does. Optional metrics.

A head has an event in an input where its dominant key s = argmax_j mean_i A_ij has A_is ≥ ½ for at least
90 % of the queries i (2606.08105). What the sink does is read off the contributions u_j = γ W_O v_j of the
keys to the stream, γ the layer scale and W_O the head's part of the output projection, and off U = A u: a
no-op sink has hardly any u, a broadcasting one gives all queries the same.

Everything is one number per input and head; the classes are 0 or 1, so that their means are rates. Queries
are the rows of the token set that count (`diag.metrics.default`); the sink is any key that a query sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.linalg import cholesky_ex, eigvalsh, qr, vector_norm

from diag.attention.positions import TEXT, Geometry
from diag.attention.single_keys import pattern_columns
from diag.metrics.default import Selection, without_negative
from diag.metrics.pattern_pass import received_by
from diag.metrics.readings import Reading
from diag.metrics.registry import metric, registered

LEAST_WEIGHT, LEAST_QUERIES = 0.5, 0.9
"""An event: at least this weight on the dominant key, from at least this share of the queries. Definition 1
of 2606.08105 asks A_is ≥ 1 - ε of all queries; its code has ε = ½, and one query in ten may do otherwise."""

NO_OP_RATIO, BROADCAST_RATIO, BROADCAST_RANK = 0.2, 0.5, 1.5
"""No-op: a value norm ratio of at most the first. Broadcast: at least the second, and at most this stable
rank. Those of 2606.08105."""

EVENT_ELEMENTS = 1 << 18
"""How many numbers of values are copied of heads with events at a time: 1 MiB."""

GRAM_ROWS = 128
"""Over how many rows products are summed up in float32, before float64 goes on."""

Roots = Callable[[], Float64[Tensor, "head value_dim root_dim"]]
"""Gives R of each query head with R Rᵀ = W Wᵀ, W = W_O γ of that head, so that ‖v W‖ = ‖v R‖. Asked only
where a head has an event."""


class SinkEvents:
    """One call through one token set, with its sinks and what they do.

    received: what each key receives from the rows that count, `Σ_i A_ij`.
    weight: what each row gives to its head's dominant key, `A_is`.
    roots: of the heads' output projections; None where these are not known.
    kinds: which keys are of a kind, by the names of `KINDS`; empty where that is not known.
    geometry: where tokens lie.
    """

    def __init__(
        self,
        on: Selection,
        received: Float[Tensor, "batch head key"],
        weight: Float[Tensor, "batch head token"],
        roots: Roots | None,
        kinds: Mapping[str, Bool[Tensor, "#batch key"]],
        geometry: Geometry,
    ) -> None:
        self.on, self.roots, self.kinds, self.geometry = on, roots, kinds, geometry
        self.sink: Int[Tensor, "batch head"] = received.argmax(-1)
        rows = on.rows.expand(weight.shape)
        self.count = rows.sum(-1).double()
        hits = ((weight >= LEAST_WEIGHT) & rows).sum(-1)
        self.event: Bool[Tensor, "batch head"] = (self.count > 0) & (
            hits >= LEAST_QUERIES * self.count - 1e-9
        )
        self.wild = (rows & ~weight.isfinite()).any(-1)

    def per_head(self, values: Tensor, defined: Tensor | bool = True) -> Reading:
        """One number per head, which weighs as much as it has rows; infinite where weights are not finite."""
        values = torch.where(self.wild, torch.inf, values.double())
        return Reading(values[..., None], (self.count * (self.wild | defined))[..., None])

    def of_events(self, values: Tensor, defined: Tensor | bool = True) -> Reading:
        """One number per head that has an event; undefined in the others."""
        return self.per_head(values, self.event & defined)

    def of_kind(self, kind: str) -> Reading:
        """Whether the sink of an event is of a kind of key."""
        if not self.kinds:
            return self.on.nothing
        if kind not in self.kinds:
            return self.of_events(torch.zeros_like(self.event))
        of_key = self.kinds[kind].expand(len(self.sink), -1)
        return self.of_events(of_key.gather(-1, self.sink))

    @cached_property
    def keys(self) -> Bool[Tensor, "batch key"]:
        """Keys that any query sees and that stand for something."""
        call = self.on.call
        seen = call.visibility.keys
        keys = self.sink.new_ones(1, call.keys, dtype=torch.bool) if seen is None else seen
        if call.padding is not None and call.own_keys:
            keys = keys & ~call.padding
        return keys.expand(call.batch, -1)

    @cached_property
    def effect(self) -> Float64[Tensor, "2 batch head"] | None:
        """Value norm ratio and stable rank of the heads with an event, NaN in the others; None where W_O is
        not known."""
        call = self.on.call
        found = self.count.new_full((2, *self.sink.shape), torch.nan)
        if self.roots is None:
            return None
        rows, outside = self.on.rows.expand(call.batch, call.heads, -1), call.outside
        events = self.event.nonzero()
        if not len(events):
            return found
        roots = self.roots().to(found.device, torch.float32)
        all_keys, all_rows = bool(self.keys.all()), bool(rows.all())
        for part in events.split(max(1, EVENT_ELEMENTS // (call.keys * call.value.shape[-1]))):
            b, h = part.unbind(-1)
            root, keys = roots[h], self.keys[b]  # [event, dim, root_dim], [event, key]
            value = call.value[b, h // call.group].float()
            if not all_keys:  # padding may hold anything
                value.masked_fill_(~keys[..., None], 0.0)
            norms = vector_norm(value @ root, dim=-1).double()
            sink = self.sink[b, h][:, None]
            others = norms.scatter(-1, sink, 0.0).sum(-1) / (keys.sum(-1) - 1)
            ratio = norms.gather(-1, sink)[:, 0] / torch.where(others > 0, others, torch.nan)
            found[0, b, h] = torch.where(norms.isfinite().all(-1), ratio, torch.inf)
            output = call.output[b, h].float()
            if outside is not None:
                output -= outside.expand(call.output.shape)[b, h]
            if not all_rows:
                output.masked_fill_(~rows[b, h][..., None], 0.0)
            output = output @ root  # U in as few dimensions as a head has
            # many rows in one float32 sum would cost digits
            gram = torch.stack([(x.mT @ x).double() for x in output.split(GRAM_ROWS, 1)]).sum(0)
            finite = gram.isfinite().all(-1).all(-1)
            gram = torch.where(finite[:, None, None], gram, 0.0)
            largest = eigvalsh(gram)[:, -1]
            rank = gram.diagonal(dim1=-2, dim2=-1).sum(-1) / torch.where(largest > 0, largest, torch.nan)
            found[1, b, h] = torch.where(finite, rank, torch.inf)
        return found

    @cached_property
    def classes(self) -> dict[str, Bool[Tensor, "batch head"]] | None:
        """Which heads have an event of each class; None where W_O is not known."""
        if self.effect is None:
            return None
        ratio, rank = self.effect
        no_op = self.event & (ratio <= NO_OP_RATIO)
        broadcast = self.event & (ratio >= BROADCAST_RATIO) & (rank <= BROADCAST_RANK)
        return {"no-op": no_op, "broadcast": broadcast, "unclassified": self.event & ~no_op & ~broadcast}

    def of_class(self, name: str) -> Reading:
        """Whether a head has an event of this class."""
        return self.on.nothing if self.classes is None else self.per_head(self.classes[name])


KINDS = ("cls", "registers", "image", "text")
"""What keys there are: class token; registers and whatever else stands beside patches; patches of an image or
the tokens that stand for them; tokens of a text."""


@metric("sinks", of_shares=True, of_weights=True)
def sink_event(view: SinkEvents) -> Reading:
    return view.per_head(view.event)


@metric("sinks", of_shares=True, of_weights=True)
def sink_no_op(view: SinkEvents) -> Reading:
    return view.of_class("no-op")


@metric("sinks", of_shares=True, of_weights=True)
def sink_broadcast(view: SinkEvents) -> Reading:
    return view.of_class("broadcast")


@metric("sinks", of_shares=True, of_weights=True)
def sink_unclassified(view: SinkEvents) -> Reading:
    return view.of_class("unclassified")


@metric("sinks", of_shares=True, of_weights=True)
def value_norm_ratio_out(view: SinkEvents) -> Reading:
    return _effect(view, 0)


@metric("sinks", of_shares=True, of_weights=True)
def stable_rank(view: SinkEvents) -> Reading:
    return _effect(view, 1)


def _effect(view: SinkEvents, which: int) -> Reading:
    if view.effect is None:
        return view.on.nothing
    found = view.effect[which]
    return view.of_events(torch.where(found.isnan(), 0.0, found), ~found.isnan())


@metric("sinks", of_shares=True, of_weights=True)
def sink_index(view: SinkEvents) -> Reading:
    return view.of_events(view.sink)


@metric("sinks", of_shares=True, of_weights=True)
def sink_row(view: SinkEvents) -> Reading:
    return _place(view, 0)


@metric("sinks", of_shares=True, of_weights=True)
def sink_column(view: SinkEvents) -> Reading:
    return _place(view, 1)


def _place(view: SinkEvents, axis: int) -> Reading:
    grid = view.geometry.grid(view.on.call.keys) if view.on.call.own_keys else None
    if grid is None or view.geometry.rows == 1:
        return view.on.nothing
    patch = view.sink - view.geometry.prefix
    place = patch // grid[1] if axis == 0 else patch % grid[1]
    return view.of_events(place, patch >= 0)


@metric("sinks", of_shares=True, of_weights=True)
def sink_on_first(view: SinkEvents) -> Reading:
    return view.of_events(view.sink == view.keys.int().argmax(-1)[:, None])


@metric("sinks", of_shares=True, of_weights=True)
def sink_on_cls(view: SinkEvents) -> Reading:
    return view.of_kind("cls")


@metric("sinks", of_shares=True, of_weights=True)
def sink_on_registers(view: SinkEvents) -> Reading:
    return view.of_kind("registers")


@metric("sinks", of_shares=True, of_weights=True)
def sink_on_image(view: SinkEvents) -> Reading:
    return view.of_kind("image")


@metric("sinks", of_shares=True, of_weights=True)
def sink_on_text(view: SinkEvents) -> Reading:
    return view.of_kind("text")


OF_PROJECTION = ("sink_no_op", "sink_broadcast", "sink_unclassified", "value_norm_ratio_out", "stable_rank")
"""What is undefined where W_O is not known, or does not read the outputs as they are."""

SINK_METRICS = registered("sinks")
"""The metrics of sink events, by name."""


def roots_of(weight: Float[Tensor, "head value_dim width"]) -> Float64[Tensor, "head value_dim root_dim"]:
    """What stands for the projections in norms: R with R Rᵀ = W Wᵀ, as small as a head is wide."""
    weight = weight.double()
    root, failed = cholesky_ex(weight @ weight.mT)
    return qr(weight.mT, mode="r").R.mT if bool(failed.any()) else root


def sink_readings(
    selections: Sequence[Selection],
    names: Sequence[str],
    *,
    roots: Roots | None = None,
    kinds: Mapping[str, Bool[Tensor, "#batch key"]] | None = None,
    geometry: Geometry = TEXT,
) -> list[dict[str, Reading]]:
    """The named metrics of sink events of one call, for each token set.

    selections: as in `shape_readings`. roots, kinds, geometry: as in `SinkEvents`.

    What a key receives is summed up over all rows, also where the call has a sample of them.
    """
    call = selections[0].call
    if not names or not SINK_METRICS["sink_event"].defined_for(call):
        return [dict.fromkeys(names, on.nothing) for on in selections]
    if call.sample is not None:
        whole = selections[0].statistics.of_all_rows()
        selections = [on.of_all_rows(whole) for on in selections]
    statistics = selections[0].statistics
    received = received_by(statistics, [on.rows for on in selections])  # [set, batch, head, key]
    # what different sets make dominant is as a rule one key
    sinks = received.argmax(-1).movedim(0, -1)
    weights = pattern_columns(statistics, sinks)
    results = []
    for number, on in enumerate(selections):
        view = SinkEvents(on, received[number], weights[..., number], roots, kinds or {}, geometry)
        readings = {name: SINK_METRICS[name].compute(view) for name in names}
        results.append(without_negative(on, readings, SINK_METRICS))
    return results
