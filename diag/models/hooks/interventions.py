"""What can be done to attention: pure functions from a call to the output that the model goes on with.

Notation of `diag.metrics.default`. Every function is differentiable, works on grouped heads without copying
keys or values, and computes in float32 for half formats. `INTERVENTIONS` is the one place where one is
registered; `parse` reads `NAME[=STRENGTH][:LAYERS[/HEADS]]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.linalg import vecdot

from diag.attention.call import AttentionCall
from diag.attention.pattern import BLOCK_ELEMENTS, pattern_rows, score_rows
from diag.attention.row_sums import row_sums
from diag.errors import MeasurementError, UserError, did_you_mean, ranges
from diag.inputs.tables import NUMBER, PLACE, Layout, read_table
from diag.models.names.changes import WRITTEN, strengths_file
from diag.variants.formulas import part_at_the_same_angle

Strength = Float[Tensor, " head"]
"""How much of a change, per query head."""

STRENGTHS = Layout({"layer": PLACE, "head": PLACE, "strength": NUMBER}, key=("layer", "head"))
"""A table of one's own: a strength per head."""


def xsa(call: AttentionCall, strength: Strength) -> Tensor:
    """y − (y·v̂)v̂: Exclusive Self Attention (Zhai 2026, arXiv 2603.09078)."""
    return gated_xsa(call, torch.ones_like(strength))


def gated_xsa(call: AttentionCall, strength: Strength) -> Tensor:
    """y − α(y·v̂)v̂, α per head: 0 changes nothing, 1 is `xsa`."""
    output, value = _with_own_value(call)
    return _less(output, _unit(value), _per_head(call, strength))


def random_direction(call: AttentionCall, strength: Strength) -> Tensor:
    """y − α(y·r)r, r one fixed random unit direction per layer and head: the control of a projection."""
    output, _ = _grouped(call)
    return _less(output, _random_direction(call), _per_head(call, strength))


def matched_direction(call: AttentionCall, strength: Strength) -> Tensor:
    """y − α(y·w)w, w a random direction at v̂'s angle to y: removes as much of each token as `gated_xsa=α`."""
    output, value = _with_own_value(call)
    part = part_at_the_same_angle(output, value, _random_direction(call))
    return (output - _per_head(call, strength)[..., None] * part).flatten(1, 2)


def _random_direction(call: AttentionCall) -> Float[Tensor, "kv_head group 1 dim"]:
    """One fixed random unit direction per layer and head."""
    generator = torch.Generator().manual_seed(call.layer)
    drawn = torch.randn(call.heads, call.output.shape[-1], generator=generator, dtype=torch.float64)
    directions = _unit(drawn).to(call.output.device, torch.promote_types(call.output.dtype, torch.float32))
    return directions.unflatten(0, (call.kv_heads, call.group))[:, :, None]


def _less(output: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    """The grouped output less so much of its part along a unit direction, heads in one axis again."""
    share = vecdot(output, direction) * strength  # [batch, kv_head, group, token]
    return (output - share[..., None] * direction).flatten(1, 2)


def identity(call: AttentionCall, strength: Strength) -> Tensor:
    """A → (1−λ)A + λI: y → (1−λ)y + λv (the perturbation of SoftPAG)."""
    output, value = _with_own_value(call)
    weight = _per_head(call, strength)[..., None]
    return torch.lerp(output, value.expand_as(output), weight.expand_as(output)).flatten(1, 2)


def uniform(call: AttentionCall, strength: Strength) -> Tensor:
    """A → uniform over the visible keys: y → the plain mean of the visible values. O(token · dim).

    Rows keep their sum, and what comes of keys that are no tokens stays.
    """
    output, value = _grouped(call)
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


def mask_self(call: AttentionCall, strength: Strength) -> Tensor:
    """A_ii → 0, rows renormalised; a row that sees only itself (t = 0 of a causal model) stays as it is.

    Recomputed in blocks of query rows, which is exact also where A_ii is nearly 1. Rows keep their sum, and
    what comes of keys that are no tokens stays.

    Raises MeasurementError, naming the layer, where weights may be negative.
    """
    output, value = _with_own_value(call)
    rows_at_once = max(16, BLOCK_ELEMENTS["cpu"] // (call.tokens * call.heads * call.batch))
    changed = []
    for rows in torch.arange(call.tokens, device=output.device).split(rows_at_once):
        pattern, alone = (part.unflatten(1, (call.kv_heads, call.group)) for part in _without_own(call, rows))
        attended = (pattern.to(output.dtype) @ value).flatten(1, 2) + call.outside_at(rows)
        attended = attended.to(output.dtype).unflatten(1, (call.kv_heads, call.group))
        changed.append(torch.where(alone, output[:, :, :, rows], attended))
    return torch.cat(changed, 3).flatten(1, 2)


def _without_own(call: AttentionCall, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the pattern without the own key, renormalised, and which of them see nothing else."""
    own = torch.arange(call.tokens, device=rows.device) == rows[:, None]
    if not call.has_pattern:
        raise MeasurementError(
            f"layer '{call.module}' has no softmax: there is no A_ii",
            "choose another intervention than mask_self, or name its layers: mask_self:LAYERS",
        )
    whole = None if call.is_softmax or call.maps else pattern_rows(call, rows)
    negative = call.pattern is not None and whole is not None and bool((whole < 0).any())
    if call.maps or negative:
        why = f"adds up {len(call.maps)} maps: weights may be" if call.maps else "has weights that are"
        raise MeasurementError(
            f"layer '{call.module}' {why} negative, and cannot be renormalised without A_ii",
            "choose another intervention than mask_self, or leave the layer out with --layers",
        )
    sums = 1.0 if whole is None else whole.sum(-1, keepdim=True)
    if call.pattern is not None:
        assert whole is not None
        others = whole.masked_fill(own, 0.0)
        total = others.sum(-1, keepdim=True)
        return others * (sums / total.where(total > 0, torch.ones_like(total))), total == 0
    scores = score_rows(call, rows).masked_fill(own, float("-inf"))
    alone = (scores == float("-inf")).all(-1, keepdim=True)
    # the softmax of a row of -inf would put NaN into the gradient
    return scores.masked_fill(alone, 0.0).softmax(-1) * sums, alone


def _with_own_value(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """`_grouped`; raises MeasurementError, naming the layer, where tokens have no value of their own."""
    if not call.own_keys:
        raise MeasurementError(
            f"layer '{call.module}' attends to keys that are not its tokens' own: no token has a value v_i",
            "choose uniform or random_direction, or leave the layer out with --intervene NAME:LAYERS",
        )
    return _grouped(call)


def _grouped(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """`y [batch, kv_head, group, token, dim]` and `v [batch, kv_head, 1, token, dim]`, at least float32."""
    dtype = torch.promote_types(call.output.dtype, torch.float32)
    output = call.output.to(dtype).unflatten(1, (call.kv_heads, call.group))
    return output, call.value.to(dtype)[:, :, None]


def _per_head(call: AttentionCall, strength: Strength) -> Float[Tensor, "kv_head group 1"]:
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


BRANCHES = ("attention branch", "mlp branch")
"""Places where a whole branch is changed."""

GATE = "output gate"


@dataclass(frozen=True)
class Intervention:
    """One way to change a model.

    where: "attention" (what a head returns), "output gate" (between heads and W_O), "attention branch" or
        "mlp branch" (what a branch adds to the stream).
    change: `(AttentionCall, strength per head) → output` for attention, `gate logits → gate logits` for an
        output gate, for branches `(update, real, strength) → update`.
    strength: what the number after `=` is if none is given; None where there is none to give.
    of_softmax, of_values: whether it needs a softmax layer, or one whose tokens have values of their own;
        then it is of these alone, where no layers are named.
    """

    where: str
    change: Callable[..., Tensor]
    source: str
    strength: float | None = None
    of_softmax: bool = False
    of_values: bool = False

    @property
    def definition(self) -> str:
        """The first line of the function's docstring."""
        return (self.change.__doc__ or "").splitlines()[0]


INTERVENTIONS: dict[str, Intervention] = {
    "xsa": Intervention("attention", xsa, "Zhai 2026", of_values=True),
    "gated_xsa": Intervention("attention", gated_xsa, "vision post's proposal", 0.5, of_values=True),
    "random_direction": Intervention("attention", random_direction, "public controls study", 1.0),
    "matched_direction": Intervention(
        "attention", matched_direction, "matched-energy control", 1.0, of_values=True
    ),
    "mask_self": Intervention("attention", mask_self, "-", of_softmax=True, of_values=True),
    "uniform": Intervention("attention", uniform, "Deconstructing Attention"),
    "identity": Intervention("attention", identity, "SoftPAG", 1.0, of_values=True),
    "gated": Intervention(GATE, without_gate, "Qiu 2025 (2505.06708)", of_softmax=True),
    "skip": Intervention("attention branch", without_branch, "LayerBoost"),
    "cb": Intervention("mlp branch", context_broadcasting, "Context Broadcasting 2210.08457"),
    "cb_s": Intervention("mlp branch", scaled_context_broadcasting, "Context Broadcasting 2210.08457", 1.0),
}


@dataclass(frozen=True)
class Edit:
    """An intervention with its strength, on some layers and heads.

    layers, heads: the model's own numbers of layers, or before a model is known negative ones that count
        from the last, and of heads; None for all.
    strength: one number, or one per (layer, head), where what is not named is 0.
    text: as written, in canonical spelling.
    """

    name: str
    text: str
    strength: float | Mapping[tuple[int, int], float]
    layers: frozenset[int] | None = None
    heads: frozenset[int] | None = None

    @property
    def where(self) -> str:
        """Where in the block it changes something."""
        return INTERVENTIONS[self.name].where

    def at(self, layer: int) -> bool:
        """Whether it changes this layer."""
        return self.layers is None or layer in self.layers

    def output(self, call: AttentionCall) -> Tensor:
        """What the heads return instead, in the format of the call's output. Raises UserError for a head
        that is not there."""
        for head in self.heads or ():
            if head >= call.heads:
                raise UserError(
                    f"--intervene {self.text}: layer {call.layer} has no head {head}",
                    f"its heads are 0 to {call.heads - 1}",
                )
        if isinstance(self.strength, Mapping):
            given = [self.strength.get((call.layer, head), 0.0) for head in range(call.heads)]
        else:
            given = [float(self.strength)] * call.heads
        change = INTERVENTIONS[self.name].change
        changed = change(call, torch.tensor(given, dtype=torch.float32)).to(call.output.dtype)
        if self.heads is None:
            return changed
        chosen = torch.tensor([head in self.heads for head in range(call.heads)], device=changed.device)
        return torch.where(chosen[:, None, None], changed, call.output)


def parse(text: str) -> Edit:
    """`NAME[=STRENGTH][:LAYERS[/HEADS]]`, for example `xsa:8-11`, `gated_xsa=0.5`, `identity=0.3:0-5/0,2`.

    STRENGTH is a number, or a CSV file with the columns layer, head, strength. Raises UserError.
    """
    match = WRITTEN.fullmatch(text.strip())
    name = match[1].strip().replace("-", "_") if match else ""
    if match is None or name not in INTERVENTIONS:
        near = did_you_mean(name, INTERVENTIONS) or f"interventions are {', '.join(INTERVENTIONS)}"
        raise UserError(f"--intervene {text}: there is no intervention '{name or text}'", near)
    entry = INTERVENTIONS[name]
    if match[2] and entry.strength is None:
        raise UserError(f"--intervene {text}: '{name}' takes no strength", f"write {name}")
    if match[4] and entry.where != "attention":
        whole = "branch" if entry.where in BRANCHES else "layer"
        raise UserError(
            f"--intervene {text}: '{name}' changes a whole {whole}, not heads", "give layers only"
        )
    strength = _strength(match[2], text) if match[2] else (1.0 if entry.strength is None else entry.strength)
    if isinstance(strength, Mapping) and entry.where != "attention":
        raise UserError(f"--intervene {text}: '{name}' takes one number", f"for example {name}=0.5")
    layers = _numbers(match[3], text, from_end=True)
    return Edit(name, text.strip(), strength, layers, _numbers(match[4], text))


def _strength(given: str, text: str) -> float | Mapping[tuple[int, int], float]:
    with suppress(ValueError):
        return float(given)
    path = strengths_file(text)
    if path is None:
        raise UserError(
            f"--intervene {text}: '{given}' is neither a number nor a file", "for example gated_xsa=0.5"
        )
    tip = "columns are layer, head, strength"
    table = read_table(path, STRENGTHS, "strengths", tip=tip)
    if table["strength"].isna().any():
        raise UserError(f"cannot read strengths '{given}': a row has none", tip)
    rows = table[list(STRENGTHS.needed)].itertuples(index=False)
    return {(int(layer), int(head)): float(value) for layer, head, value in rows}


def _numbers(given: str | None, text: str, *, from_end: bool = False) -> frozenset[int] | None:
    said = f"--intervene {text}:"
    return frozenset(ranges(given, said, "xsa:0,5-11", from_end=from_end)) if given else None
