"""What a trainable variant does between attention and its output projection: small modules, and their table.

Each takes the heads' output `y [batch, head, token, dim]`, the values `v [batch, kv_head, token, dim]` and
the layer's input `x [batch, token, channel]`, and returns what the output projection reads instead of y.
At pretrained models `hooks.interventions` does the same to an `AttentionCall`; here parameters are learned,
half formats are computed in float32, and everything can be compiled. `CHANGES` is where one is registered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIGMOID_START = -4.0
"""σ(−4) = 0.018: a sigmoid cannot start at α = 0."""

GATE_STD = 0.02
LEAST_SQUARE = 1e-24
"""Below this ‖v‖² counts as 0 in a denominator: a zero value excludes nothing, with a gradient of zero."""


@dataclass(frozen=True)
class Sizes:
    """What a change needs to know of its layer: channels of x, query heads, channels of a head."""

    channels: int
    heads: int
    dim: int


class Change(nn.Module):
    """What happens to y before the output projection.

    forms: what may stand after `=`; the first is the default.
    """

    forms: ClassVar[tuple[str, ...]] = ()
    source: ClassVar[str]

    def __init__(self, sizes: Sizes, form: str, generator: torch.Generator) -> None:
        super().__init__()

    def forward(self, output: Tensor, value: Tensor, inputs: Tensor) -> Tensor:
        """`y, v, x` → what the projection reads, shape and format of y."""
        raise NotImplementedError


class Exclusive(Change):
    """z = y − (y·v̂)v̂: Exclusive Self Attention; no parameters."""

    source = "Zhai 2026, arXiv 2603.09078"

    def forward(self, output: Tensor, value: Tensor, inputs: Tensor) -> Tensor:
        return _without(output, value, None)


class GatedExclusive(Change):
    """z = y − α(y·v̂)v̂ with a learned α per head: tanh(a) from a = 0, or σ(a) from a = −4."""

    forms = ("tanh", "sigmoid")
    source = "vision post's proposal"

    def __init__(self, sizes: Sizes, form: str, generator: torch.Generator) -> None:
        super().__init__(sizes, form, generator)
        self.form = form
        self.gate = nn.Parameter(torch.full((sizes.heads,), 0.0 if form == "tanh" else SIGMOID_START))

    @property
    def alpha(self) -> Tensor:
        """α of each head, `[head]`."""
        return self.gate.tanh() if self.form == "tanh" else self.gate.sigmoid()

    def forward(self, output: Tensor, value: Tensor, inputs: Tensor) -> Tensor:
        return _without(output, value, self.alpha)


class RandomDirection(Change):
    """z = y − (y·r)r, r one fixed random unit direction per layer and head: the control of `xsa`."""

    source = "public controls study"
    direction: Tensor

    def __init__(self, sizes: Sizes, form: str, generator: torch.Generator) -> None:
        super().__init__(sizes, form, generator)
        drawn = torch.randn(sizes.heads, 1, sizes.dim, generator=generator, dtype=torch.float64)
        # stored with the weights, which were trained around it
        self.register_buffer("direction", (drawn / drawn.norm(dim=-1, keepdim=True)).float())

    def forward(self, output: Tensor, value: Tensor, inputs: Tensor) -> Tensor:
        y = _at_least_float32(output)
        direction = self.direction.to(y.dtype)
        return (y - (y * direction).sum(-1, keepdim=True) * direction).to(output.dtype)


class MatchedDirection(RandomDirection):
    """z = y − (y·w)w, w a random direction at v̂'s angle to y: removes as much of each token as `xsa` does."""

    source = "matched-energy control"

    def forward(self, output: Tensor, value: Tensor, inputs: Tensor) -> Tensor:
        y = _at_least_float32(output).unflatten(
            1, (value.shape[1], -1)
        )  # [batch, kv_head, group, token, dim]
        v = value.to(y.dtype)[:, :, None]
        direction = self.direction.to(y.dtype).unflatten(0, y.shape[1:3])
        return (y - part_at_the_same_angle(y, v, direction)).flatten(1, 2).to(output.dtype)


class OutputGate(Change):
    """y ⊙ σ(W_θ x), one gate per channel (elementwise) or per head (headwise)."""

    forms = ("elementwise", "headwise")
    source = "Qiu 2025, 2505.06708"

    def __init__(self, sizes: Sizes, form: str, generator: torch.Generator) -> None:
        super().__init__(sizes, form, generator)
        self.per_head = 1 if form == "headwise" else sizes.dim
        drawn = torch.empty(sizes.heads * self.per_head, sizes.channels)
        self.gate = nn.Parameter(drawn.normal_(std=GATE_STD, generator=generator))

    def forward(self, output: Tensor, value: Tensor, inputs: Tensor) -> Tensor:
        gate = (
            F.linear(inputs, self.gate.to(inputs.dtype)).sigmoid().unflatten(-1, (-1, self.per_head))
        )  # [batch, token, head, dim or 1]
        return output * gate.transpose(1, 2).to(output.dtype)


def part_at_the_same_angle(output: Tensor, value: Tensor, direction: Tensor) -> Tensor:
    """(y·w)w for the unit w that lies between y and a random direction r, at the angle that v has to y.

    y, v, r broadcast against each other, `[…, dim]`; the result is as long as (y·v̂)v̂, and what is left of y
    as long as what `xsa` leaves. Where y, or what r has beside y, is zero, so is what it adds.
    """
    v = _unit(value)
    along = (output * v).sum(-1, keepdim=True)
    norm, left = _norm(output), _norm(output - along * v)  # 1 − cos² would lose its digits where y is along v
    y = output / norm
    beside = _unit(direction - (direction * y).sum(-1, keepdim=True) * y)
    return along / norm * (along * y + left * beside)


def _unit(x: Tensor) -> Tensor:
    return x / _norm(x)


def _norm(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True).clamp_min(LEAST_SQUARE).sqrt()


def _without(output: Tensor, value: Tensor, alpha: Tensor | None) -> Tensor:
    """y − α(y·v̂)v̂; α = 1 where it is None. Grouped heads share their value without a copy."""
    y = _at_least_float32(output).unflatten(1, (value.shape[1], -1))  # [batch, kv_head, group, token, dim]
    v = value.to(y.dtype)[:, :, None]
    share = (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp_min(LEAST_SQUARE)
    if alpha is not None:
        share = share * alpha.to(y.dtype).view(value.shape[1], -1, 1, 1)
    return (y - share * v).flatten(1, 2).to(output.dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Broadcast(nn.Module):
    """What happens to an MLP's output `x [batch, token, channel]` before it is added to the stream.

    `cb`: (x + mean over tokens of x)/2; `cb_s`: x + λ ⊙ mean with a learned λ per channel, from 0.
    In a causal model the mean is over the tokens so far: over all, a token would see its future.
    """

    def __init__(self, scaled: bool, channels: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.scale = nn.Parameter(torch.zeros(channels)) if scaled else None

    def forward(self, update: Tensor) -> Tensor:
        """`x` → the broadcast x."""
        if self.causal:
            count = torch.arange(1, update.shape[1] + 1, device=update.device)[:, None]
            mean = (_at_least_float32(update).cumsum(1) / count).to(update.dtype)
        else:
            mean = update.mean(1, keepdim=True)
        return (update + mean) / 2 if self.scale is None else update + self.scale.to(update.dtype) * mean


CHANGES: dict[str, type[Change]] = {
    "xsa": Exclusive,
    "gated_xsa": GatedExclusive,
    "random_direction": RandomDirection,
    "matched_direction": MatchedDirection,
    "gated": OutputGate,
}
"""Variants of attention."""

BROADCASTS: dict[str, str] = {
    "cb": "(x + mean over tokens of x)/2 at the end of the MLP branch; no parameters",
    "cb_s": "x + λ ⊙ mean over tokens of x at the end of the MLP branch, λ learned per channel, from 0",
}
"""Variants of the MLP branch (Context Broadcasting, 2210.08457)."""

BASELINE = "sa"
"""The model as its library built it."""
