"""Interventions on what heads return: projections, gates, means and zeros; and on what branches add.

Notation of `diag.metrics.default`. Every function is differentiable, works on grouped heads without copying
keys or values, and computes in float32 for half formats.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.linalg import vecdot

from diag.attention.call import AttentionCall
from diag.attention.row_sums import row_sums
from diag.errors import MeasurementError
from diag.models.hooks.beside import Beside, mixed
from diag.variants.formulas import part_at_the_same_angle

Strength = Float[Tensor, " head"]
"""How much of a change, per query head."""


def xsa(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """y − (y·v̂)v̂: Exclusive Self Attention (Zhai 2026, arXiv 2603.09078)."""
    return gated_xsa(call, torch.ones_like(strength), beside)


def gated_xsa(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """y − α(y·v̂)v̂, α per head: 0 changes nothing, 1 is `xsa`."""
    output, value = with_own_value(call)
    return _less(output, _unit(value), per_head(call, strength))


def random_direction(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """y − α(y·r)r, r one fixed random unit direction per layer and head: the control of a projection."""
    output, _ = grouped(call)
    return _less(output, _random_direction(call, beside.seed), per_head(call, strength))


def matched_direction(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """y − α(y·w)w, w a random direction at v̂'s angle to y: removes as much of each token as `gated_xsa=α`."""
    output, value = with_own_value(call)
    part = part_at_the_same_angle(output, value, _random_direction(call, beside.seed))
    return (output - per_head(call, strength)[..., None] * part).flatten(1, 2)


def _random_direction(call: AttentionCall, seed: int) -> Float[Tensor, "kv_head group 1 dim"]:
    """One fixed random unit direction per layer and head."""
    generator = torch.Generator().manual_seed(mixed(seed, call.layer))
    drawn = torch.randn(call.heads, call.output.shape[-1], generator=generator, dtype=torch.float64)
    directions = _unit(drawn).to(call.output.device, torch.promote_types(call.output.dtype, torch.float32))
    return directions.unflatten(0, (call.kv_heads, call.group))[:, :, None]


def _less(output: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    """The grouped output less so much of its part along a unit direction, heads in one axis again."""
    share = vecdot(output, direction) * strength  # [batch, kv_head, group, token]
    return (output - share[..., None] * direction).flatten(1, 2)


def identity(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """A → (1−λ)A + λI: y → (1−λ)y + λv (the perturbation of SoftPAG)."""
    output, value = with_own_value(call)
    weight = per_head(call, strength)[..., None]
    return torch.lerp(output, value.expand_as(output), weight.expand_as(output)).flatten(1, 2)


def uniform(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """A → uniform over the visible keys: y → the plain mean of the visible values. O(token · dim).

    Rows keep their sum, and what comes of keys that are no tokens stays.
    """
    output, value = grouped(call)
    seen = call.visibility
    one = torch.ones(1, 1, call.keys, dtype=output.dtype, device=output.device)
    total = seen.sum(value[:, :, 0], one)  # [batch, head or kv_head, token or 1, dim]
    count = seen.count[..., None]
    if total.shape[1] != call.heads:
        total = total.repeat_interleave(call.group, 1)
    mean = total / count.clamp(min=1)
    if call.has_pattern and not call.is_softmax:
        mean = mean * row_sums(call)[..., None].to(mean.dtype) + call.outside_at(slice(None))
    return torch.where(count > 0, mean.to(output.dtype), output.flatten(1, 2))


def with_own_value(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """`grouped`; raises MeasurementError, naming the layer, where tokens have no value of their own."""
    if not call.own_keys:
        raise MeasurementError(
            f"layer '{call.module}' attends to keys that are not its tokens' own: no token has a value v_i",
            "choose uniform or random_direction, or leave the layer out with --intervene NAME:LAYERS",
        )
    return grouped(call)


def zero(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """y → 0: the head returns nothing (head ablation, Michel 2019)."""
    return call.output * 0  # and not zeros: the model goes on with a tensor that has a gradient


def mean(call: AttentionCall, strength: Strength, beside: Beside) -> Tensor:
    """y → its mean over the tokens of held-out inputs: what the head says of no input in particular."""
    found = beside.of_others(call, "output")[:, :, None]
    return call.output * 0 + found.to(torch.promote_types(call.output.dtype, torch.float32))


def grouped(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """`y [batch, kv_head, group, token, dim]` and `v [batch, kv_head, 1, token, dim]`, at least float32."""
    dtype = torch.promote_types(call.output.dtype, torch.float32)
    output = call.output.to(dtype).unflatten(1, (call.kv_heads, call.group))
    return output, call.value.to(dtype)[:, :, None]


def per_head(call: AttentionCall, strength: Strength) -> Float[Tensor, "kv_head group 1"]:
    """The strength as `grouped` has its heads, one for all tokens."""
    dtype = torch.promote_types(call.output.dtype, torch.float32)
    return strength.to(call.output.device, dtype).unflatten(0, (call.kv_heads, call.group))[..., None]


def _unit(x: Tensor) -> Tensor:
    """x/‖x‖; zero stays zero, with a gradient of zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > 0, x / norm.where(norm > 0, torch.ones_like(norm)), torch.zeros_like(x))


Update = Float[Tensor, "batch token dim"]
Real = Bool[Tensor, "batch token"]
"""False at padding."""


def without_branch(update: Update, real: Real | None, strength: float) -> Tensor:
    """The whole attention branch is removed: it adds 0 to the stream, not even the bias of W_O."""
    return torch.zeros_like(update)


def without_random(update: Update, real: Real | None, strength: float, seed: int = 0) -> Tensor:
    """The attention branch adds less a random direction of its own length: the control of `skip`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(update.shape[-1], generator=generator, dtype=torch.float64)
    direction = (drawn / drawn.norm()).to(update.device, update.dtype)
    return update - torch.linalg.vector_norm(update, dim=-1, keepdim=True) * direction


def context_broadcasting(update: Update, real: Real | None, strength: float) -> Tensor:
    """(x + mean over tokens of x)/2 at the end of the MLP branch, before the add."""
    return (update + _token_mean(update, real)) / 2


def scaled_context_broadcasting(update: Update, real: Real | None, strength: float) -> Tensor:
    """x + λ·(mean over tokens of x) at the end of the MLP branch, before the add."""
    return update + strength * _token_mean(update, real)


def without_gate(logits: Tensor) -> Tensor:
    """Y ⊙ σ(X W_θ) → Y: the model's own output gate is switched off (refused where there is none)."""
    return torch.full_like(logits, float("inf"))  # σ(∞) is exactly 1


def _token_mean(update: Update, real: Real | None) -> Float[Tensor, "batch 1 dim"]:
    if real is None:
        return update.mean(1, keepdim=True)
    weights = real.to(update.dtype)[..., None]
    return (update * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1)
