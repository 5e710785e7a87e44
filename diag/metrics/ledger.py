"""The ledger: whose is y? Signed shares of each output, and of its bias, by class of keys. Optional metrics.

`output_from_C = Σ_{j∈C} A_ij (v_j·y_i)/‖y_i‖²` sums to 1 over the classes C, and
`bias_from_C = Σ_{j∈C} A_ij (v_j·v̂_i)/‖y_i‖` to cos(y_i, v_i): both exactly, because y_i = Σ_j A_ij v_j + o_i.

A key belongs to the first class that fits, in the order of `CLASSES`. What is no key of a token (`extra`) is
o_i. What no other class takes is `rest`, which is read as what is left: the sums are exact in any format, and
under edits that make y something else than A V. A class of which a model has no key in a layer is
undefined.

No row of the pattern is kept, and as a rule none is made: weights on single keys need the log-normaliser
alone. Which token is the sink is told by what keys receive, which the sweep for the default metrics sums up
on its way. Only image and text classes are read off blocks of their own. Which rows count is as in
`diag.metrics.default`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.linalg import vecdot

from diag.attention.call import AttentionCall
from diag.attention.pattern import given_blocks, log2_pattern_blocks
from diag.attention.positions import TEXT, Geometry
from diag.attention.single_keys import SingleWeights, pattern_columns, sum_of_steps
from diag.attention.softmax_statistics import CallStatistics
from diag.attention.value_statistics import reciprocal, value_blocks
from diag.attention.visibility import of_inputs, part_of
from diag.metrics.catalogue import LEDGER_CLASSES as CLASSES
from diag.metrics.default import Selection, without_negative
from diag.metrics.pattern_pass import pattern_pass
from diag.metrics.readings import Reading
from diag.metrics.registry import metric, registered

FEW = ("cls", "registers", "prefix")
"""Classes of tokens that stand beside the patches: a few keys, whose places are known."""

MANY = ("image", "text")
"""Classes of which any key may be, where a model reads both."""

OUTPUT, BIAS = 0, 1
"""Places of the two ledgers in an axis of 2: v_j·y_i, and v_j·v_i."""

Kinds = Mapping[str, Bool[Tensor, "#batch token"]]
"""Class of `FEW` or `MANY` -> which tokens are of it; without classes that a model or layer does not have."""


@dataclass(frozen=True, eq=False)
class Ledger:
    """One call through one token set: Σ A (v·y) and Σ A (v·v) of each class, `[2, batch, head, token]`.

    of_sink: of a class of `FEW`, whether the sink is of it, `[batch, head]`.
    """

    on: Selection
    sums: Mapping[str, Tensor]
    of_sink: Mapping[str, Tensor]

    def of_output(self, name: str) -> Reading:
        """The share of y that a class has; undefined where y is zero, or the class is not there."""
        if name != "rest" and name not in self.sums:
            return self.on.nothing
        scale, rows = self._per_output
        if name != "rest":
            return Reading(self.sums[name][OUTPUT] * scale, rows)
        return Reading(1 - self._taken(OUTPUT) * scale, rows)

    def of_bias(self, name: str) -> Reading:
        """The part of the bias that a class has."""
        if name != "rest" and name not in self.sums:
            return self.on.nothing
        if name != "rest":
            return Reading(self.sums[name][BIAS] * self._per_bias, self.on.rows)
        cosine = self.on.cosine.flatten(1, 2)
        return Reading(cosine - self._taken(BIAS) * self._per_bias, self.on.rows)

    def of_sinks_that_are(self, kind: str) -> Reading:
        """The share of y that the sink has where it is of a class; 0 where it is not."""
        if kind not in self.of_sink or "sink" not in self.sums:
            return self.on.nothing
        reading = self.of_output("sink")
        return reading._replace(values=reading.values * self.of_sink[kind][..., None])

    def _taken(self, which: int) -> Float[Tensor, "batch head token"]:
        return functools.reduce(torch.add, (x[which] for x in self.sums.values()))

    @functools.cached_property
    def _per_output(self) -> tuple[Float[Tensor, "batch head token"], Bool[Tensor, "batch head token"]]:
        """1/‖y_i‖², and the rows that have one."""
        scale = reciprocal(self.on.values.output_norm).square()
        return scale, self.on.rows & (scale > 0)

    @functools.cached_property
    def _per_bias(self) -> Float[Tensor, "batch head token"]:
        """1/(‖y_i‖ ‖v_i‖)"""
        return (self.on.per_output_norm * self.on.per_value_norm).flatten(1, 2)


for _name in CLASSES:
    _declared = metric(
        "ledger", name=f"output_from_{_name}", of_shares=_name == "sink", of_own_keys=True, of_weights=True
    )
    _declared(functools.partial(Ledger.of_output, name=_name))
    _declared = metric(
        "ledger", name=f"bias_from_{_name}", of_shares=_name == "sink", of_own_keys=True, of_weights=True
    )
    _declared(functools.partial(Ledger.of_bias, name=_name))
for _name in ("cls", "registers"):
    _declared = metric(
        "ledger", name=f"output_from_sink_{_name}", of_shares=True, of_own_keys=True, of_weights=True
    )
    _declared(functools.partial(Ledger.of_sinks_that_are, kind=_name))

LEDGER_METRICS = registered("ledger")
"""The metrics of the ledger, by name."""


def ledger_readings(
    selections: Sequence[Selection],
    names: Sequence[str],
    *,
    geometry: Geometry = TEXT,
    kinds: Kinds | None = None,
) -> list[dict[str, Reading]]:
    """The named metrics of one call, for each token set; all rows are read, whatever sample the call has.

    selections: the call through each token set, as `selections_of` gives them. geometry: where tokens lie.
    kinds: which tokens are of the classes that have names.

    With sampled rows the sink is the key that receives most from these; all else is exact.
    """
    call, kinds = selections[0].call, kinds or {}
    defined = [name for name in names if LEDGER_METRICS[name].defined_for(call)]
    if not defined:
        return [dict.fromkeys(names, on.nothing) for on in selections]
    places, sinks = _Places(call, geometry, kinds), None if call.maps else _sinks(selections, geometry)
    shared, of_sinks = _sums(selections[0], places, sinks)
    found = []
    for number, on in enumerate(selections):
        view = Ledger(on, shared, {})
        if sinks is not None:
            sink = sinks[..., number]
            view = Ledger(on, places.without(shared, sink, of_sinks[..., number]), places.kinds_of(sink))
        readings = {name: LEDGER_METRICS[name].compute(view) for name in defined}
        readings = without_negative(on, readings, LEDGER_METRICS)
        found.append({name: readings.get(name, on.nothing) for name in names})
    return found


class _Places:
    """Which class each key is of, for each row, apart from the sink."""

    def __init__(self, call: AttentionCall, geometry: Geometry, kinds: Kinds) -> None:
        self.call, self.geometry = call, geometry
        self.near = geometry.grid(call.tokens) is not None
        free = torch.ones(1, call.tokens, dtype=torch.bool, device=call.output.device)
        self.kinds: dict[str, Tensor] = {}
        for name in (*FEW, *MANY):
            if name in kinds:
                self.kinds[name] = kinds[name] & free
                free = free & ~kinds[name]
        few = [self.kinds[name] for name in FEW if name in self.kinds]
        self.few = functools.reduce(torch.logical_or, few, torch.zeros_like(free[:1]))
        self.many = [name for name in MANY if name in self.kinds]
        around = geometry.around(call.tokens) if self.near else torch.zeros(0, dtype=torch.long)
        most = 0 if call.causal else call.tokens - 1
        self.steps = [step for step in around.tolist() if step and -call.tokens < step <= most]

    @functools.cached_property
    def on_steps(self) -> Bool[Tensor, "#batch token step"]:
        """Whether the key so many steps from each row is near it, and of no class that comes before."""
        device, tokens = self.call.output.device, self.call.tokens
        rows = torch.arange(tokens, device=device)[:, None]
        keys = rows + torch.tensor(self.steps, device=device)
        there = (keys >= 0) & (keys < tokens)
        keys = keys.clamp(0, tokens - 1)
        return self.are_near(rows, keys) & there & ~self.few[:, keys]

    def are_near(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Whether rows and keys, which broadcast, lie near each other, oneself included."""
        prefix = self.geometry.prefix
        near = self.geometry.near(rows - prefix, keys - prefix, self.call.tokens)
        return near & (rows >= prefix) & (keys >= prefix)

    def kinds_of(self, sink: Int[Tensor, "batch head"]) -> dict[str, Tensor]:
        """Of each class of known places, whether the heads' sinks are of it."""
        index = sink.clamp(min=0)
        batch = len(index)
        found = {name: mask.expand(batch, -1).gather(-1, index) for name, mask in self.kinds.items()}
        return {name: is_of & (sink >= 0) for name, is_of in found.items()}

    def without(
        self, shared: Mapping[str, Tensor], sink: Int[Tensor, "batch head"], of_sink: Tensor
    ) -> dict[str, Tensor]:
        """The sums with the sink as a class of its own, taken from the one that it was in, row by row."""
        rows = torch.arange(self.call.tokens, device=sink.device)
        kinds = self.kinds_of(sink)
        is_few = [kinds[name] for name in FEW if name in kinds]
        free = ~functools.reduce(torch.logical_or, is_few, torch.zeros_like(sink, dtype=torch.bool))[
            ..., None
        ]
        taken = {name: kinds[name][..., None] for name in FEW if name in kinds}
        if self.near:
            taken["near"] = self.are_near(rows, sink.clamp(min=0)[..., None]) & free
            free = free & ~taken["near"]
        taken |= {name: kinds[name][..., None] & free for name in self.many}
        left = {
            name: x - of_sink.where(taken[name], 0.0) if name in taken else x for name, x in shared.items()
        }
        return {"sink": of_sink, **left}


def _sinks(selections: Sequence[Selection], geometry: Geometry) -> Int[Tensor, "batch head set"]:
    """For each token set, the key of each head that receives most from its rows; -1 where there is none."""
    call, statistics = selections[0].call, selections[0].statistics
    among = functools.reduce(torch.logical_or, (on.among for on in selections))
    live = selections[0].at(among[:, None, :] & (call.visibility.count > 0))
    rows = [on.rows for on in selections]
    received = pattern_pass(statistics, {"received"}, rows, live, geometry=geometry)["received"]
    if call.padding is not None:
        received = received.masked_fill(call.padding[:, None], 0.0)
    most, place = received.max(-1)
    place = torch.where(most > 0, place, -1)
    if call.pattern is not None and (negative := statistics.softmax.negative) is not None:
        place = torch.where(negative, -1, place)
    return place.movedim(0, -1)


def _sums(
    on: Selection, places: _Places, sinks: Int[Tensor, "batch head set"] | None
) -> tuple[dict[str, Tensor], Float[Tensor, "2 batch head token set"]]:
    """Σ A (v·y) and Σ A (v·v) of each class, the sink in the class that it is in otherwise; and the sinks'.

    Of classes all are `[2, batch, head, token]`.
    """
    call, weights = on.call, SingleWeights(on.statistics)
    shape = (2, *call.output.shape[:3])
    few = places.few.any(0).nonzero()[:, 0]
    names = ["self", *(name for name in FEW if name in places.kinds), *(["near"] if places.near else [])]
    names += [*places.many, *(["extra"] if call.outside is not None else [])]
    sums = {name: torch.zeros(shape, dtype=torch.float32, device=call.output.device) for name in names}
    rows = torch.arange(call.tokens, device=call.output.device)
    sets = 0 if sinks is None else sinks.shape[-1]
    of_sinks = torch.zeros(*shape, sets, dtype=torch.float32, device=call.output.device)
    if sinks is not None:
        at = sinks.clamp(min=0)
        no_sink = (rows[:, None] == at[:, :, None]) | (sinks < 0)[:, :, None]
        on_sinks = pattern_columns(on.statistics, at).masked_fill(no_sink, 0.0)
    for (in_batch, in_kv_head), value in value_blocks(call):
        in_head = call.query_heads(in_kv_head)
        where = (slice(None), in_batch, in_head)
        output = call.output[in_batch, in_head].float().unflatten(1, (-1, call.group))
        own = value[:, :, None]  # [batch, kv_head, 1, token, dim]

        def products(of: Tensor, output: Tensor = output, own: Tensor = own) -> Tensor:
            """Inner products with y and v, `[2, batch, head, token]`."""
            along = torch.stack(torch.broadcast_tensors(vecdot(of, output), vecdot(of, own)))
            return along.flatten(2, 3)

        itself = on.softmax.self_weight[in_batch, in_head]
        of_itself = on.values.value_norm[in_batch, in_kv_head].square().repeat_interleave(call.group, 1)
        of_itself = torch.stack([on.values.product[in_batch, in_head], of_itself])
        sums["self"][where] = own_share = itself * of_itself
        kinds = {name: of_inputs(mask, in_batch)[:, None] for name, mask in places.kinds.items()}
        if len(few):
            on_few = weights.on_keys(in_batch, in_kv_head, few.expand(*itself.shape[:2], -1))
            on_few = on_few.masked_fill(rows[:, None] == few, 0.0)
            chosen = own[..., few, :].mT
            along = torch.stack(torch.broadcast_tensors(output @ chosen, own @ chosen)).flatten(2, 3)
            along *= on_few
            for name in FEW:
                if name in kinds:
                    of_class = kinds[name][..., None, few]  # [batch, 1, 1, key]
                    sums[name][where] = (along * of_class).sum(-1)
        for number in range(sets):
            index = at[in_batch, in_head, number].unflatten(1, (-1, call.group))[..., None, None]
            chosen = own.expand(-1, -1, call.group, -1, -1).take_along_dim(index, 3).mT
            along = torch.stack([output @ chosen, own @ chosen])[..., 0].flatten(2, 3)
            of_sinks[(*where, slice(None), number)] = on_sinks[in_batch, in_head, :, number] * along
        if places.steps:
            around = weights.on_steps(in_batch, in_kv_head, places.steps)
            around *= of_inputs(places.on_steps, in_batch)[:, None]
            around = around.unflatten(1, (-1, call.group))
            sums["near"][where] = products(sum_of_steps(around, value, places.steps))
            for name in places.many:
                some = sum_of_steps(around, value * kinds[name][..., None], places.steps)
                sums[name][where] = -products(some)
        for name in places.many:  # whose own keys, and near ones, are of other classes
            sums[name][where] -= own_share * kinds[name]
        if "extra" in sums:
            outside = part_of(call.outside_at(slice(None)), in_batch, in_head)  # type: ignore[arg-type]
            outside = outside.expand(*output.flatten(1, 2).shape).unflatten(1, (-1, call.group))
            sums["extra"][where] = products(outside)
    if places.many:
        for name, found in class_sums(
            on.statistics, {name: places.kinds[name] for name in places.many}
        ).items():
            sums[name] += found
    return sums, of_sinks


def class_sums(
    statistics: CallStatistics, classes: Kinds, *, mass: bool = False
) -> dict[str, Float[Tensor, "sum batch head token"]]:
    """Σ A (v·y) and Σ A (v·v_i) over all keys of each class, in one sweep over all rows.

    mass: whether Σ A stands behind them.
    """
    call = statistics.call
    if call.maps:
        parts = []
        for one in call.maps:
            alone = class_sums(CallStatistics(call.of_map(one)), classes, mass=mass)
            parts.append({name: x * one.coefficient for name, x in alone.items()})
        return {name: sum((part[name] for part in parts[1:]), parts[0][name]) for name in classes}
    shape = (2 + mass, *call.output.shape[:3])
    found = {name: torch.zeros(shape, dtype=torch.float32, device=call.output.device) for name in classes}
    if call.pattern is not None:
        blocks = given_blocks(call)
    else:
        lse = statistics.softmax.log_normaliser
        assert lse is not None
        blocks = log2_pattern_blocks(replace(call, sample=None), lse.float(), True)
    seen_keys = call.visibility.keys
    for where, block in blocks:
        in_batch, in_head, in_row = where
        pattern = block if call.pattern is not None else block.exp2_()
        owner = torch.arange(in_head.start, in_head.stop, device=block.device) // call.group
        value = call.value[in_batch][:, owner].float()  # [batch, head, key, dim]
        hidden = None if seen_keys is None else ~of_inputs(seen_keys, in_batch)[:, None, :, None]
        value = value if hidden is None else value.masked_fill(hidden, 0.0)
        own, output = value[:, :, in_row], call.output[where].float()
        for name, mask in classes.items():
            among = of_inputs(mask, in_batch)[:, None, :, None]
            along = pattern @ (value * among)[:, :, : block.shape[-1]]
            of_class = [vecdot(along, output), vecdot(along, own)]
            if mass:
                of_class.append((pattern * among[:, :, : block.shape[-1], 0][:, :, None]).sum(-1))
            found[name][:, in_batch, in_head, in_row] = torch.stack(of_class)
    return found
