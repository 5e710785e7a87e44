"""What an intervention is told beside the call: where tokens lie, which are an image's, what others gave."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.attention.positions import TEXT, Geometry
from diag.errors import UserError


@dataclass(frozen=True, eq=False)
class HeldOutLayer:
    """What the heads of one layer gave for each held-out input, untouched.

    output: y averaged over tokens. sink: the value of the key that received most. ordinary: that of another
    key, drawn.
    """

    output: Float[Tensor, "input head dim"]
    sink: Float[Tensor, "input head dim"]
    ordinary: Float[Tensor, "input head dim"]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The untouched model on other inputs: what means and donors are taken from. ids: theirs."""

    ids: tuple[str, ...]
    layers: Mapping[int, HeldOutLayer]

    def mean(self, of: Float[Tensor, "input head dim"], ids: tuple[str, ...]) -> Float[Tensor, "_ head dim"]:
        """The mean over held-out inputs for each of the inputs `ids`; an input is none of its own."""
        others = torch.tensor([[one != other for other in self.ids] for one in ids], dtype=of.dtype)
        weights = (others / others.sum(1, keepdim=True)).to(of.device)
        return torch.einsum("ij,jhd->ihd", weights, of)

    def donors(self, ids: tuple[str, ...], seed: int) -> Int[Tensor, " _"]:
        """Which held-out input gives to each of the inputs `ids`: drawn by id and seed, never itself."""
        found = []
        for one in ids:
            others = [place for place, other in enumerate(self.ids) if other != one]
            drawn = hashlib.sha256(f"{seed}/{one}".encode()).digest()
            found.append(others[int.from_bytes(drawn[:8]) % len(others)])
        return torch.tensor(found)


@dataclass
class Noted:
    """What interventions say of a forward pass besides what they return.

    kept: for each call and its rows, the share of attention weight that an intervention left where it was,
        averaged over queries and the heads that it changed, `[row]`. sinks: keys that were taken for sinks,
        `[row, key]`.
    """

    kept: list[Float[Tensor, " row"]] = field(default_factory=list)
    sinks: list[Bool[Tensor, "row key"]] = field(default_factory=list)


def _line(call: AttentionCall) -> Geometry:
    return TEXT


def _no_image(call: AttentionCall) -> None:
    return None


@dataclass(frozen=True, eq=False)
class Beside:
    """What an intervention is told beside the call.

    ids: the inputs of the batch. geometry: where the tokens of a call lie. image: which of its keys are of an
    image, `[row or 1, key]`; None where the model reads none. real: False at padding, `[input, token]`.
    held_out: None where no other inputs were run. seed: of all that is drawn. heads: those that are changed;
    None for all. noted: where what they say is kept, if anybody asks.
    """

    ids: tuple[str, ...] = ()
    geometry: Callable[[AttentionCall], Geometry] = _line
    image: Callable[[AttentionCall], Bool[Tensor, "#row key"] | None] = _no_image
    real: Bool[Tensor, "input token"] | None = None
    held_out: HeldOut | None = None
    seed: int = 0
    heads: frozenset[int] | None = None
    noted: Noted | None = None

    def queries(self, call: AttentionCall) -> Bool[Tensor, "row token"]:
        """The queries that are tokens of an input: they see keys and are no padding."""
        real = (call.visibility.count > 0).any(1).expand(call.batch, call.tokens)
        if self.real is not None and self.real.shape == real.shape:
            real = real & self.real.to(real.device)
        return real if call.padding is None else real & ~call.padding

    def note_kept(self, kept: Float[Tensor, "row head"]) -> None:
        """Keeps what share of the weight was left where it was, of the heads that are changed."""
        if self.noted is not None:
            chosen = slice(None) if self.heads is None else sorted(self.heads)
            self.noted.kept.append(kept[:, chosen].mean(1))

    def note_sinks(self, place: Int[Tensor, "row head"], keys: int) -> None:
        """Keeps which keys were taken for sinks by the heads that are changed."""
        if self.noted is not None:
            chosen = slice(None) if self.heads is None else sorted(self.heads)
            found = torch.zeros(len(place), keys, dtype=torch.bool, device=place.device)
            self.noted.sinks.append(found.scatter(1, place[:, chosen], True))

    def of_others(
        self, call: AttentionCall, name: str, *, donor: bool = False
    ) -> Float[Tensor, "row head dim"]:
        """What held-out inputs gave at the call's layer, for each row of the call: a field of `HeldOutLayer`.

        donor: of one of them instead of their mean. Raises UserError where none was run.
        """
        if self.held_out is None:
            raise UserError(
                f"layer '{call.module}' cannot be given what other inputs gave: none was run",
                "attnbias intervene runs held-out inputs first",
            )
        of = getattr(self.held_out.layers[call.layer], name).to(call.output.device)
        if donor:
            found = of[self.held_out.donors(self.ids, self.seed).to(of.device)]
        else:
            found = self.held_out.mean(of, self.ids)
        return found.repeat_interleave(call.batch // len(self.ids), 0)


NOTHING = Beside()
"""Beside a call of which nothing else is known: its tokens are a line of text."""


def mixed(seed: int, layer: int) -> int:
    """The seed of what is drawn at a layer; of seed 0 the layer's own number."""
    return (layer + seed * 0x9E3779B97F4A7C15) % 2**63


def drawn(seed: int, *axes: Int[Tensor, ...]) -> Int[Tensor, ...]:
    """A number for each place, the same on every device and in every batch: a hash of the seed and the place.

    axes: numbers of the places along each axis; they broadcast.
    """
    found = torch.full_like(axes[0], _signed(seed))
    for axis in axes:
        found = _scrambled(found + axis)
    return found


def _scrambled(x: Int[Tensor, ...]) -> Int[Tensor, ...]:
    """The finaliser of splitmix64; products of int64 wrap around."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & (1 << 33) - 1)


def _signed(x: int) -> int:
    x %= 1 << 64
    return x - (1 << 64) if x >= 1 << 63 else x
