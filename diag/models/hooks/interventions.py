"""What can be done to attention: the table of interventions, and how one is written.

`INTERVENTIONS` is the one place where one is registered; `parse` reads `NAME[=STRENGTH][:LAYERS[/HEADS]]`.
What they do is in `edited_outputs`, `edited_patterns` and `edited_sinks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.errors import UserError, did_you_mean, ranges
from diag.inputs.tables import NUMBER, PLACE, Layout, read_table
from diag.models.hooks import edited_outputs as outputs
from diag.models.hooks import edited_patterns as patterns
from diag.models.hooks import edited_sinks as sinks
from diag.models.hooks.beside import NOTHING, Beside, mixed
from diag.models.names.changes import WRITTEN, strengths_file

STRENGTHS = Layout({"layer": PLACE, "head": PLACE, "strength": NUMBER}, key=("layer", "head"))
"""A table of one's own: a strength per head."""


BRANCHES = ("attention branch", "mlp branch")
"""Places where a whole branch is changed."""

GATE = "output gate"

MOST_KEYS = 1 << 24
"""As many keys as a strength may name: float32 has every whole number up to here."""

WHOLE, SHARE = "a whole number above 0", "a number from 0 to 1"
"""What a strength may be, where it is not any number."""


@dataclass(frozen=True)
class Intervention:
    """One way to change a model.

    where: "attention" (what a head returns), "output gate" (between heads and W_O), "attention branch" or
        "mlp branch" (what a branch adds to the stream).
    change: `(AttentionCall, strength per head, Beside) → output` for attention, `gate logits → gate logits`
        for an output gate, for branches `(update, real, strength) → update`.
    strength: what the number after `=` is if none is given; None where there is none to give.
    allowed: what that number may be; any if None.
    of_softmax, of_values: whether it needs a softmax layer, or one whose tokens have values of their own;
        then it is of these alone, where no layers are named.
    of_others: whether it takes what held-out inputs gave.
    draws: of a branch, whether `change` takes a seed besides.
    """

    where: str
    change: Callable[..., Tensor]
    source: str
    strength: float | None = None
    allowed: str | None = None
    of_softmax: bool = False
    of_values: bool = False
    of_others: bool = False
    draws: bool = False

    @property
    def definition(self) -> str:
        """The first line of the function's docstring."""
        return (self.change.__doc__ or "").splitlines()[0]


def _restriction(change: Callable[..., Tensor], source: str, size: float, *, of_values: bool) -> Intervention:
    return Intervention("attention", change, source, size, WHOLE, of_softmax=True, of_values=of_values)


def _of_sinks(change: Callable[..., Tensor], *, of_others: bool = False) -> Intervention:
    source = "Attention Sinks: Two Algorithms (2606.08105)"
    return Intervention("attention", change, source, 0.0, SHARE, of_softmax=True, of_others=of_others)


NEIGHBOURS = "Faster Neighborhood Attention (2403.04690)"
VAR = "Visual Attention Sink (VAR, 2503.03321)"

INTERVENTIONS: dict[str, Intervention] = {
    "xsa": Intervention("attention", outputs.xsa, "Zhai 2026", of_values=True),
    "gated_xsa": Intervention("attention", outputs.gated_xsa, "vision post's proposal", 0.5, of_values=True),
    "random_direction": Intervention("attention", outputs.random_direction, "public controls study", 1.0),
    "matched_direction": Intervention(
        "attention", outputs.matched_direction, "matched-energy control", 1.0, of_values=True
    ),
    "mask_self": Intervention("attention", patterns.mask_self, "-", of_softmax=True, of_values=True),
    "uniform": Intervention("attention", outputs.uniform, "Deconstructing Attention"),
    "identity": Intervention("attention", outputs.identity, "SoftPAG", 1.0, of_values=True),
    "zero": Intervention("attention", outputs.zero, "Michel 2019"),
    "mean": Intervention("attention", outputs.mean, "circuit work", of_others=True),
    "window": _restriction(patterns.window, "LayerBoost", 64.0, of_values=True),
    "random_window": _restriction(patterns.random_window, "control of window", 64.0, of_values=True),
    "neighbourhood": _restriction(patterns.neighbourhood, NEIGHBOURS, 7.0, of_values=True),
    "random_neighbourhood": _restriction(
        patterns.random_neighbourhood, "control of neighbourhood", 7.0, of_values=True
    ),
    "top_keys": _restriction(patterns.top_keys, "HyLRA, Superlinear", 64.0, of_values=False),
    "random_keys": _restriction(patterns.random_keys, "control of top_keys", 64.0, of_values=False),
    "redistribute": Intervention("attention", patterns.redistribute, VAR, 0.4, SHARE, of_softmax=True),
    "random_redistribute": Intervention(
        "attention", patterns.random_redistribute, "control of redistribute", 0.4, SHARE, of_softmax=True
    ),
    "sink_zero": _of_sinks(sinks.sink_zero),
    "sink_mean": _of_sinks(sinks.sink_mean, of_others=True),
    "sink_donor": _of_sinks(sinks.sink_donor, of_others=True),
    "sink_ordinary": _of_sinks(sinks.sink_ordinary, of_others=True),
    "random_zero": _of_sinks(sinks.random_zero),
    "sink_masked": _of_sinks(sinks.sink_masked),
    "random_masked": _of_sinks(sinks.random_masked),
    "gated": Intervention(GATE, outputs.without_gate, "Qiu 2025 (2505.06708)", of_softmax=True),
    "skip": Intervention("attention branch", outputs.without_branch, "LayerBoost"),
    "random_skip": Intervention("attention branch", outputs.without_random, "control of skip", draws=True),
    "cb": Intervention("mlp branch", outputs.context_broadcasting, "Context Broadcasting 2210.08457"),
    "cb_s": Intervention(
        "mlp branch", outputs.scaled_context_broadcasting, "Context Broadcasting 2210.08457", 1.0
    ),
}


@dataclass(frozen=True)
class Edit:
    """An intervention with its strength, on some layers and heads.

    layers, heads: the model's own numbers of layers, or before a model is known negative ones that count
        from the last, and of heads; None for all.
    strength: one number, or one per (layer, head), where what is not named is 0.
    text: as written, in canonical spelling.
    seed: of what it draws.
    """

    name: str
    text: str
    strength: float | Mapping[tuple[int, int], float]
    layers: frozenset[int] | None = None
    heads: frozenset[int] | None = None
    seed: int = 0

    @property
    def where(self) -> str:
        """Where in the block it changes something."""
        return INTERVENTIONS[self.name].where

    def at(self, layer: int) -> bool:
        """Whether it changes this layer."""
        return self.layers is None or layer in self.layers

    def output(self, call: AttentionCall, beside: Beside = NOTHING) -> Tensor:
        """What the heads return instead, in the format of the call's output.

        beside: what is known of the call's batch. Raises UserError for a head that is not there.
        """
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
        beside = replace(beside, seed=self.seed, heads=self.heads)
        changed = change(call, torch.tensor(given, dtype=torch.float32), beside).to(call.output.dtype)
        if self.heads is None:
            return changed
        chosen = torch.tensor([head in self.heads for head in range(call.heads)], device=changed.device)
        return torch.where(chosen[:, None, None], changed, call.output)

    def update(self, layer: int, update: Tensor, real: Tensor | None) -> Tensor:
        """What the layer's branch adds to the stream instead, of an edit of branches."""
        entry = INTERVENTIONS[self.name]
        drawn = {"seed": mixed(self.seed, layer)} if entry.draws else {}
        return entry.change(update, real, self.strength, **drawn)


def parse(text: str, seed: int = 0) -> Edit:
    """`NAME[=STRENGTH][:LAYERS[/HEADS]]`, for example `xsa:8-11`, `gated_xsa=0.5`, `identity=0.3:0-5/0,2`.

    STRENGTH is a number, or a CSV file with the columns layer, head, strength. seed: of what it draws.
    Raises UserError.
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
    _check_strength(entry, name, strength, text)
    layers = _numbers(match[3], text, from_end=True)
    return Edit(name, text.strip(), strength, layers, _numbers(match[4], text), seed)


def _check_strength(
    entry: Intervention, name: str, strength: float | Mapping[tuple[int, int], float], text: str
) -> None:
    """Raises UserError for a strength that the intervention cannot have."""
    if entry.allowed is None:
        return
    given = strength.values() if isinstance(strength, Mapping) else (strength,)
    for number in given:
        whole = entry.allowed == WHOLE
        if not ((1 <= number <= MOST_KEYS and number == int(number)) if whole else 0 <= number <= 1):
            raise UserError(
                f"--intervene {text}: {number:g} is not {entry.allowed}",
                f"for example {name}={entry.strength if whole else 0.5:g}",
            )


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
