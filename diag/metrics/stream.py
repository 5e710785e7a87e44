"""The residual stream around one block, and its statistics: pure functions from states to numbers per token.

Every function takes a `Stream`, the states of one block seen through one token set, and returns a
`Reading` with a head axis of 1, which `readings.reduce` turns into one number per input. `StreamReadings`
collects them over one forward pass, and adds what needs several layers at once: those functions take `Sinks`.

Notation: `x` the stream before an update is added to it, `Δ` the update, `x̂ = x/‖x‖`; S the token set.
Every real token of S counts. A cosine with a zero vector is 0. Arithmetic is float32 whatever the model's
format. Nothing here holds a token × token matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from torch.linalg import vecdot, vector_norm

from diag.attention.states import BlockStates, Updates
from diag.attention.value_statistics import reciprocal
from diag.metrics.readings import Reading, reduce
from diag.metrics.registry import metric, registered
from diag.metrics.secondary_sinks import alike_first, secondary_sink_lives


class Stream:
    """The states of one block through one token set, with the quantities that several metrics share."""

    def __init__(self, states: BlockStates, tokens: Bool[Tensor, "#batch token"] | None = None) -> None:
        self.states = states
        among = torch.ones(1, states.tokens, dtype=torch.bool) if tokens is None else tokens
        self.among = among.to(states.before.device) & self.real
        """tokens that count, `[batch or 1, token]`"""
        self.count = self.among.sum(-1)

    @cached_property
    def real(self) -> Bool[Tensor, "#batch token"]:
        """Tokens that are no padding, as the batch or the layer's mask says."""
        states, call = self.states, self.states.call
        real = torch.ones(1, states.tokens, dtype=torch.bool, device=states.before.device)
        if states.real is not None:
            real = real & states.real.to(real.device)
        if call is not None and self.same_tokens and call.visibility.keys is not None:
            real = real & call.visibility.keys
        return real

    @property
    def same_tokens(self) -> bool:
        """Whether the attention call runs over the tokens of the stream, all at once, as queries and keys."""
        states, call = self.states, self.states.call
        if call is None or not call.own_keys:
            return False
        return (call.batch, call.tokens) == (states.batch, states.tokens)

    @cached_property
    def before(self) -> Float[Tensor, "batch token dim"]:
        return self.states.before.float()

    @cached_property
    def middle(self) -> Float[Tensor, "batch token dim"]:
        return self.before if self.states.middle is self.states.before else self.states.middle.float()

    @cached_property
    def after(self) -> Float[Tensor, "batch token dim"]:
        return self.states.after.float()

    @cached_property
    def attention_update(self) -> Float[Tensor, "batch token dim"]:
        return self.states.attention_update.float()

    @cached_property
    def mlp_update(self) -> Float[Tensor, "batch token dim"]:
        return self.states.mlp_update.float()

    @cached_property
    def attention_cosine(self) -> Float[Tensor, "batch token"]:
        return cosine(self.attention_update, self.before)

    @cached_property
    def mlp_cosine(self) -> Float[Tensor, "batch token"]:
        return cosine(self.mlp_update, self.middle)

    @cached_property
    def projected_value(self) -> Float[Tensor, "batch token dim"] | None:
        """W_O v_i, the values of all heads side by side; None where it is not known."""
        call, to_stream = self.states.call, self.states.to_stream
        if call is None or to_stream is None or not self.same_tokens:
            return None
        return to_stream(call.value.repeat_interleave(call.group, 1))

    def per_token(self, values: Float[Tensor, "batch token"], also: Tensor | None = None) -> Reading:
        """A reading of one number per token, on the tokens that count."""
        weights = self.among if also is None else self.among & also
        return Reading(values[:, None], weights[:, None])

    def per_input(self, values: Float[Tensor, " batch"], least: int = 2) -> Reading:
        """A reading of one number per input; undefined with fewer than `least` tokens."""
        weights = torch.where(self.count >= least, self.count, 0).expand(len(values))
        return Reading(values[:, None, None], weights[:, None, None])

    def undefined(self) -> Reading:
        """A reading in which nothing counts."""
        nothing = self.before.new_zeros(self.states.batch, 1, 1)
        return Reading(nothing, nothing)


@metric("block")
def attention_stream_cosine(on: Stream) -> Reading:
    return on.per_token(on.attention_cosine)


@metric("block")
def attention_stream_energy(on: Stream) -> Reading:
    return on.per_token(on.attention_cosine.square())


@metric("block")
def mlp_stream_cosine(on: Stream) -> Reading:
    return on.per_token(on.mlp_cosine)


@metric("block")
def mlp_stream_energy(on: Stream) -> Reading:
    return on.per_token(on.mlp_cosine.square())


@metric("block")
def attention_update_ratio(on: Stream) -> Reading:
    return _norm_ratio(on, on.attention_update, on.before)


@metric("block")
def mlp_update_ratio(on: Stream) -> Reading:
    return _norm_ratio(on, on.mlp_update, on.middle)


@metric("block")
def value_stream_cosine(on: Stream) -> Reading:
    value = on.projected_value
    return on.undefined() if value is None else on.per_token(cosine(value, on.before))


@metric("block")
def output_value_cosine(on: Stream) -> Reading:
    value, call, to_stream = on.projected_value, on.states.call, on.states.to_stream
    if value is None or call is None or to_stream is None:
        return on.undefined()
    # a token that sees only itself has y = v whatever the model learned
    others = (call.visibility.count > 1).any(1)
    return on.per_token(cosine(to_stream(call.output), value), others)


@metric("block")
def block_influence(on: Stream) -> Reading:
    return on.per_token(_distance(on.before, on.after))


@metric("block")
def update_cosine_previous(on: Stream) -> Reading:
    previous = on.states.previous
    if previous is None:
        return on.undefined()
    return on.per_token(cosine(on.attention_update, previous.attention.float()))


@metric("block")
def delta_cosine_previous(on: Stream) -> Reading:
    previous = on.states.previous
    if previous is None:
        return on.undefined()
    return on.per_token(cosine(on.after - on.before, previous.block.float()))


@metric("block")
def token_similarity(on: Stream) -> Reading:
    norm = vector_norm(on.after, dim=-1)
    weights = torch.where(on.among & (norm > 0), 1 / norm, 0.0)
    total = (weights[:, None] @ _without(on.after, ~on.among))[:, 0].double()
    units = (weights > 0).sum(-1)
    pairs = (on.count * (on.count - 1)).clamp(min=1)
    return on.per_input((total.square().sum(-1) - units) / pairs)


@metric("block")
def token_distance(on: Stream) -> Reading:
    states = _without(on.after, ~on.among)
    mean = states.sum(1, keepdim=True) / on.count[:, None, None].clamp(min=1)
    whole = vector_norm(states, dim=(1, 2))
    part = vector_norm(_without(states - mean, ~on.among), dim=(1, 2))
    reading = on.per_input(part / torch.where(whole == 0, 1.0, whole))
    return Reading(reading.values, reading.weights * (whole != 0)[:, None, None])


@metric("block")
def massive_activation(on: Stream) -> Reading:
    largest, middle = on.after.new_zeros(on.states.batch), on.after.new_zeros(on.states.batch)
    for i, chosen in enumerate(on.among.expand(on.states.batch, -1)):
        magnitudes = on.after[i, chosen].abs().flatten()  # [token · dim]
        if len(magnitudes):
            # of an even number the lower one of the two in the middle
            largest[i], middle[i] = magnitudes.max(), magnitudes.median()
    reading = on.per_input(largest / torch.where(middle == 0, 1.0, middle), least=1)
    # a median of zero leaves no unit
    return Reading(reading.values, reading.weights * (middle != 0)[:, None, None])


@metric("depth")
def secondary_sinks(on: Sinks) -> Reading:
    return Reading(on.created.float().sum(-1)[:, None, None], on.weight)


@metric("depth")
def secondary_sink_lifetime(on: Sinks) -> Reading:
    return Reading(on.lifetime[:, None], on.created[:, None])


@dataclass(frozen=True, eq=False)
class Sinks:
    """Secondary sinks that are created in one layer, through one token set.

    created: `[batch, token]`. lifetime: `[batch, token]`, layers in which the token stands over depth.
    weight: `[batch, 1, 1]`, 0 where the token set is empty.
    """

    created: Bool[Tensor, "batch token"]
    lifetime: Float[Tensor, "batch token"]
    weight: Tensor


STREAM_METRICS = registered("block", "depth")
"""The metrics of the residual stream, by name."""


class StreamReadings:
    """The named stream metrics of one forward pass, for every token set.

    names: of `STREAM_METRICS`. depth: blocks of the whole model; what needs them all is undefined if fewer
    were seen.
    """

    def __init__(self, names: Sequence[str], depth: int) -> None:
        self.asked = list(names)
        self.names = [name for name in names if STREAM_METRICS[name].reads == "block"]
        self.across = [name for name in names if STREAM_METRICS[name].reads == "depth"]
        self.depth = depth
        self.readings: dict[int, dict[str, dict[str, Reading]]] = {}
        self.masks: dict[int, dict[str, Tensor]] = {}
        self.alike: dict[int, tuple[Tensor, Tensor]] = {}
        self.last: tuple[int, Updates] | None = None

    def add(self, states: BlockStates, tokens: Mapping[str, Bool[Tensor, "#batch token"]]) -> None:
        """Reads one block; `tokens` are the masks of the token sets by name. Blocks come in depth order."""
        states = self._with_previous(states)
        of_layer = self.readings.setdefault(states.layer, {})
        for name, mask in tokens.items():
            on = Stream(states, mask)
            of_layer[name] = {metric: STREAM_METRICS[metric].compute(on) for metric in self.names}
            self.masks.setdefault(states.layer, {})[name] = on.among.expand(states.batch, -1)
        if self.across:
            self.alike[states.layer] = alike_first(states.after, Stream(states).real)

    def block(self, layer: int, inputs: int) -> Float64[Tensor, "token_set metric input 1"]:
        """One number per input of each token set and metric, in the order given, after `finished`."""
        of_layer = self.readings[layer].values()
        reduced = [
            reduce([of_set[name]], inputs, STREAM_METRICS[name].reduce)
            for of_set in of_layer
            for name in self.asked
        ]
        return torch.stack(reduced).view(len(of_layer), len(self.asked), inputs, 1)

    def finished(self) -> dict[int, dict[str, dict[str, Reading]]]:
        """`[layer][token set][metric]`, when every block has been seen."""
        if not self.across:
            return self.readings
        layers = sorted(self.alike)
        shapes = {self.alike[layer][0].shape for layer in layers}
        whole = layers == list(range(self.depth)) and len(shapes) == 1
        if whole:
            here = self.alike[layers[0]][0].device  # layers of one model may lie on several
            similar = torch.stack([self.alike[layer][0].to(here) for layer in layers])
            norms = torch.stack([self.alike[layer][1].to(here) for layer in layers])
            created, lifetime = secondary_sink_lives(similar, norms)
        for layer, of_layer in self.readings.items():
            for token_set, of_set in of_layer.items():
                among = self.masks[layer][token_set]
                weight = among.any(-1).float()[:, None, None] * whole
                own = created[layer].to(among.device) & among if whole else torch.zeros_like(among)
                lives = lifetime.to(among.device) if whole else torch.zeros_like(among, dtype=torch.float32)
                of_set |= {
                    name: STREAM_METRICS[name].compute(Sinks(own, lives, weight)) for name in self.across
                }
        return self.readings

    def _with_previous(self, states: BlockStates) -> BlockStates:
        last, needed = self.last, {"update_cosine_previous", "delta_cosine_previous"} & {*self.names}
        if needed:
            self.last = (
                states.layer,
                Updates(states.attention_update, states.after.float() - states.before.float()),
            )
        fits = last is not None and last[0] == states.layer - 1
        if last is None or not fits or last[1].block.shape != states.after.shape:
            return states
        here = states.after.device
        return replace(states, previous=Updates(last[1].attention.to(here), last[1].block.to(here)))


def cosine(
    a: Float[Tensor, "batch token dim"], b: Float[Tensor, "batch token dim"]
) -> Float[Tensor, "batch token"]:
    """cos(a_i, b_i), 0 with a zero vector."""
    return vecdot(a, b) * reciprocal(vector_norm(a, dim=-1)) * reciprocal(vector_norm(b, dim=-1))


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos(a_i, b_i), from ‖â - b̂‖²/2, which keeps its digits where they are nearly parallel."""
    norms = [vector_norm(x, dim=-1, keepdim=True) for x in (a, b)]
    apart = (a * reciprocal(norms[0]) - b * reciprocal(norms[1])).square().sum(-1) / 2
    zero = (norms[0] == 0) | (norms[1] == 0)
    return torch.where(zero[..., 0], 1.0, apart)


def _norm_ratio(on: Stream, update: Tensor, stream: Tensor) -> Reading:
    below = vector_norm(stream, dim=-1)
    ratio = vector_norm(update, dim=-1) / torch.where(below == 0, 1.0, below)
    return on.per_token(ratio, below != 0)


def _without(x: Float[Tensor, "batch token dim"], out: Tensor) -> Float[Tensor, "batch token dim"]:
    """Zero at the tokens `out`: padding may hold anything, and 0 · NaN is NaN."""
    return x.masked_fill(out[..., None], 0.0)
