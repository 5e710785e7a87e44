"""What a trainable variant does between attention and its output projection: small modules, and their table.

Each takes the heads' output `y [batch, head, token, dim]`, the values `v [batch, kv_head, token, dim]`, the
layer's input `x [batch, token, channel]` and, where it needs it, the mean of the values that each query sees,
and returns what the output projection reads instead of y.
At pretrained models `hooks.interventions` does the same to an `AttentionCall`; here parameters are learned,
half formats are computed in float32, and everything can be compiled. `CHANGES` is where one is registered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diag.errors import UserError

Mean = Callable[[], Tensor]
"""Gives `v̄_i`, `[batch, head or kv_head, token or 1, dim]`: only who needs it has it computed."""

SIGMOID_START = -4.0
"""σ(−4) = 0.018: a sigmoid cannot start at α = 0."""

GATE_STD = 0.02
BALANCE = 0.01
"""Weight of a load-balance loss beside the loss that is trained on."""

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

    def forward(self, output: Tensor, value: Tensor, inputs: Tensor, mean: Mean) -> Tensor:
        """`y, v, x, v̄` → what the projection reads, shape and format of y."""
        raise NotImplementedError


class Exclusive(Change):
    """z = y − (y·v̂)v̂: Exclusive Self Attention; no parameters."""

    source = "Zhai 2026, arXiv 2603.09078"

    def forward(self, output: Tensor, value: Tensor, inputs: Tensor, mean: Mean) -> Tensor:
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

    def forward(self, output: Tensor, value: Tensor, inputs: Tensor, mean: Mean) -> Tensor:
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

    def forward(self, output: Tensor, value: Tensor, inputs: Tensor, mean: Mean) -> Tensor:
        y = _at_least_float32(output)
        direction = self.direction.to(y.dtype)
        return (y - (y * direction).sum(-1, keepdim=True) * direction).to(output.dtype)


class MatchedDirection(RandomDirection):
    """z = y − (y·w)w, w a random direction at v̂'s angle to y: removes as much of each token as `xsa` does."""

    source = "matched-energy control"

    def forward(self, output: Tensor, value: Tensor, inputs: Tensor, mean: Mean) -> Tensor:
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
        self.gate = _drawn(sizes.heads * self.per_head, sizes.channels, generator)

    def forward(self, output: Tensor, value: Tensor, inputs: Tensor, mean: Mean) -> Tensor:
        gate = (
            F.linear(inputs, self.gate.to(inputs.dtype)).sigmoid().unflatten(-1, (-1, self.per_head))
        )  # [batch, token, head, dim or 1]
        return output * gate.transpose(1, 2).to(output.dtype)


class Affine(Change):
    """α(x) y + (α_ma − α(x)) v̄: rows of A scaled by α, and what they lose given to all keys alike.

    This is Σ_j (α A_ij + β) v_j with β = (α_ma − α)/N over the N keys that the query sees. α is of each query
    and head; α_ma is its mean over batches, of each head, and runs while training.
    """

    forms = ("linear", "sigmoid")
    source = "Bae 2026, 2602.23057"
    momentum: ClassVar[float] = 0.9
    running: Tensor

    def __init__(self, sizes: Sizes, form: str, generator: torch.Generator) -> None:
        super().__init__(sizes, form, generator)
        self.form = form
        self.scale = _drawn(sizes.heads, sizes.channels, generator)
        self.register_buffer("running", torch.zeros(sizes.heads))

    def forward(self, output: Tensor, value: Tensor, inputs: Tensor, mean: Mean) -> Tensor:
        x = _at_least_float32(F.linear(inputs, self.scale.to(inputs.dtype)))
        alpha = (x.sigmoid() if self.form == "sigmoid" else (0.1 * x + 0.5).clamp(0.0, 1.0)).transpose(1, 2)
        running = self.running.to(alpha.dtype)
        if self.training:
            running = running.lerp(alpha.detach().mean((0, 2)), 1 - self.momentum)
            self.running.copy_(running)
        alpha = alpha[..., None]  # [batch, head, token, 1]
        average = _of_heads(_at_least_float32(mean()), output.shape[1])[..., -output.shape[2] :, :]
        offset = running[:, None, None] - alpha
        return (alpha * _at_least_float32(output) + offset * average).to(output.dtype)


class MixtureOfHeads(Change):
    """g_h(x) y_h: a router weighs heads; a quarter is always on, of the rest the highest per token.

    The form is the share of heads that is on. Gates are a softmax among those always on, times their number,
    and one among the chosen, times theirs, and both groups are weighed by a softmax of two, times 2. While
    training, `BALANCE` of the load-balance loss Σ_h P_h f_h · n (P: mean probability, f: share of the tokens
    that choose head h, of n that are routed) joins the gradient, whatever the loss is.
    """

    forms = ("0.75", "0.5", "0.9")
    source = "Jin 2024, 2410.11842"

    def __init__(self, sizes: Sizes, form: str, generator: torch.Generator) -> None:
        super().__init__(sizes, form, generator)
        self.always = max(1, sizes.heads // 4)
        self.chosen = max(1, round(float(form) * sizes.heads) - self.always)
        if sizes.heads < self.always + 2:
            raise UserError(
                f"mixture_of_heads chooses among heads, and the layer has {sizes.heads}",
                "build the model with 3 heads or more",
            )
        self.router = _drawn(sizes.heads + 2, sizes.channels, generator)

    def forward(self, output: Tensor, value: Tensor, inputs: Tensor, mean: Mean) -> Tensor:
        scores = _at_least_float32(F.linear(inputs, self.router.to(inputs.dtype)))
        always, routed, groups = scores.split([self.always, scores.shape[-1] - self.always - 2, 2], -1)
        probability = routed.softmax(-1)
        at = probability.topk(self.chosen, -1).indices
        on = torch.zeros_like(routed).scatter(-1, at, 1.0)
        chosen = routed.masked_fill(on == 0, -torch.inf).softmax(-1)
        weight = 2 * groups.softmax(-1)
        gate = torch.cat(
            [
                self.always * weight[..., :1] * always.softmax(-1),
                self.chosen * weight[..., 1:] * chosen,
            ],
            -1,
        )  # [batch, token, head]
        changed = (_at_least_float32(output) * gate.transpose(1, 2)[..., None]).to(output.dtype)
        if not self.training:
            return changed
        balance = routed.shape[-1] * (probability.mean((0, 1)) * on.mean((0, 1))).sum()
        return _WithLoss.apply(changed, BALANCE * balance)


class _WithLoss(torch.autograd.Function):
    """x as it is; the backward pass adds the gradient of a loss of its own to that of what x is used for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = loss.new_ones(())
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, ctx.loss


def mean_of_visible(value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """`v̄_i`, the mean of the values that each query sees, `[batch, head or kv_head, token or 1, dim]`.

    value: `[batch, kv_head, token, dim]`. mask: as `scaled_dot_product_attention` takes it, True for visible,
    or added to the scores: hidden is then what has no weight beside a score of 0. causal: where mask is None.
    """
    v = _at_least_float32(value)
    if mask is None and not causal:
        return v.mean(-2, keepdim=True)
    if mask is None:
        return v.cumsum(-2) / torch.arange(1, v.shape[-2] + 1, device=v.device)[:, None]
    visible = (mask if mask.dtype == torch.bool else mask.float().exp() > 0).to(v.dtype)
    count = visible.sum(-1, keepdim=True).clamp_min(1)
    return visible @ _of_heads(v, visible.shape[1] if visible.ndim == 4 else 1) / count


def _of_heads(value: Tensor, heads: int) -> Tensor:
    """Values of KV heads for `heads` query heads, where these are more."""
    return value if heads <= value.shape[1] else value.repeat_interleave(heads // value.shape[1], 1)


def _drawn(rows: int, channels: int, generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, channels).normal_(std=GATE_STD, generator=generator))


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
    "affine": Affine,
    "mixture_of_heads": MixtureOfHeads,
}
"""Variants of attention."""

BROADCASTS: dict[str, str] = {
    "cb": "(x + mean over tokens of x)/2 at the end of the MLP branch; no parameters",
    "cb_s": "x + λ ⊙ mean over tokens of x at the end of the MLP branch, λ learned per channel, from 0",
}
"""Variants of the MLP branch (Context Broadcasting, 2210.08457)."""

BASELINE = "sa"
"""The model as its library built it."""
