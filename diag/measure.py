"""The only loop: samples → batches → attention calls → metrics → one number per input, layer and head.

What leaves this file is small: a `LayerValues` block per layer and batch, on the CPU, in float64. No
average over inputs is taken here; tables do that, from the blocks of all batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from diag.attention import AttentionCall, attend, without_constant
from diag.blocks import Block
from diag.edited import check_layers, edited_branches, heads_return
from diag.errors import MeasurementError, UnreadableInput, UserError
from diag.interventions import Edit
from diag.metrics import METRICS, Reading, readings, reduce
from diag.models.base import Batch, Sample, Tower
from diag.records import RATIOS
from diag.seam import Layer, Sightings

GATE_ROWS = 32
GATE_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}
GATE_TOLERANCE_HALF = 1e-2


@dataclass(frozen=True)
class LayerFacts:
    """What a layer turned out to be; constants of every row of its table.

    All but the sizes are read off the first batch.

    n_tokens: keys of one softmax (the largest, if a layer is called once per window).
    attn_scope: "full", or "window" if an input's tokens are split over several softmaxes or a mask
        hides real keys beyond causality.
    first_token: "excluded" where the first token sees only itself (causal), else "included".
    projection: whether the output projection read Y "as captured", "modified" or "unknown".
    gate_error: relative error of A V rebuilt from the call.
    """

    n_tokens: int
    attn_scope: str
    first_token: str
    projection: str
    gate_error: float


@dataclass(frozen=True)
class LayerValues:
    """One layer's numbers for one batch: `values[token set, metric, input, head]`, NaN where undefined."""

    layer: Layer
    facts: LayerFacts
    values: np.ndarray


@dataclass(frozen=True)
class BatchValues:
    """One forward pass: ids of its inputs and a block per layer."""

    ids: tuple[str, ...]
    layers: tuple[LayerValues, ...]


@dataclass
class Report:
    """What happened beside the numbers; filled while the loop runs."""

    failed: dict[str, str] = field(default_factory=dict)
    skipped_layers: dict[str, str] = field(default_factory=dict)


def measure(
    tower: Tower,
    samples: Iterable[Sample],
    *,
    metrics: Sequence[str] | None = None,
    token_sets: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    value_constants: Mapping[int, Tensor] | None = None,
    edits: Sequence[Edit] = (),
    blocks: Sequence[Block] = (),
    batch_size: int = 8,
    report: Report | None = None,
) -> Iterator[BatchValues]:
    """Runs a tower over samples and yields each batch's numbers.

    metrics: names from `METRICS`; all of them if None. layers: depth indices; all if None.
    token_sets: the tower's default set if None.
    value_constants: what is taken out of the values and outputs of each layer before they are measured
        (`diag.models.value_constants`), by depth index; the model itself goes on with them. Nothing if None.
    edits: what is done to the model while it runs; what it goes on with is what is measured.
    blocks: the layers' blocks, where an edit changes a whole branch.
    Inputs that cannot be read are noted in `report.failed` and left out.
    Raises MeasurementError, naming the layer, where the seam is blind or a call does not rebuild its
    output, and UserError where values are not finite.
    """
    names = list(METRICS) if metrics is None else [name for name in metrics if name not in RATIOS]
    sets = list(token_sets) if token_sets is not None else [tower.token_sets[0]]
    for token_set in sets:
        tower.tokens_in(token_set, len(tower.prefix))  # an unknown set is told before any work
    listed = pick_layers(tower.layers, layers)
    measured = {layer.index for layer in listed}
    watched = [
        layer for layer in tower.layers if layer.index in measured or any(e.at(layer.index) for e in edits)
    ]
    check_layers(edits, tower.layers)
    report = Report() if report is None else report
    facts: dict[int, LayerFacts] = {}
    size = min(batch_size, tower.max_batch or batch_size)
    for chunk in chunks(readable(samples, report), size):
        batch = tower.encode(chunk)
        collected = _Collected(names, sets, tower, batch)
        gate = _Gate() if not facts else None

        def on_call(
            call: AttentionCall, collected: _Collected = collected, gate: _Gate | None = gate
        ) -> Tensor | None:
            if gate is not None and call.layer in measured:
                gate.check(call, len(collected.batch.ids))
            changed = any(edit.where == "attention" and edit.at(call.layer) for edit in edits)
            if changed:
                output, visibility = heads_return(edits, call), call.visibility
                call = replace(call, output=output)
                call.__dict__["visibility"] = visibility
            if call.layer in measured:
                free = None if value_constants is None else value_constants[call.layer]
                collected.add(call if free is None else without_constant(call, free))
            return call.output if changed else None

        with (
            torch.inference_mode(),
            edited_branches(blocks, edits),
            tower.capture(watched, on_call) as sightings,
        ):
            tower.forward(batch)
        if gate is not None:
            report.skipped_layers = {
                path: why for path, why in sightings.skipped.items() if path not in sightings.calls
            }
            listed = [layer for layer in listed if layer.path not in report.skipped_layers]
        _all_called(listed, sightings)
        if gate is not None:
            facts = {
                layer.index: gate.facts(layer.index, sightings.projection.get(layer.path, "unknown"))
                for layer in listed
            }
        yield BatchValues(
            batch.ids,
            tuple(
                LayerValues(layer, collected.sized(layer, facts[layer.index]), block)
                for layer, block in collected.blocks(listed)
            ),
        )


def capture(tower: Tower, batch: Batch, layers: Sequence[int] | None = None) -> list[AttentionCall]:
    """The attention calls of one batch, in the order in which they were made.

    Tensors are those that the model used, on its device; `diag.attention.pattern_rows` gives the
    weights of chosen query rows.
    """
    calls: list[AttentionCall] = []
    with torch.inference_mode(), tower.capture(pick_layers(tower.layers, layers), calls.append):
        tower.forward(batch)
    return calls


def pick_layers(layers: Sequence[Layer], chosen: Sequence[int] | None) -> list[Layer]:
    """The layers with the chosen depth indices. Raises UserError with the allowed range."""
    known = {layer.index: layer for layer in layers}
    if not known:
        raise UserError("the model has no attention layer", "attnbias measures transformers")
    for index in chosen or ():
        if index not in known:
            raise UserError(f"no layer {index}", f"layers are 0 to {max(known)}")
    return [known[index] for index in sorted(set(known if chosen is None else chosen))]


def readable(samples: Iterable[Sample], report: Report) -> Iterator[Sample]:
    """The samples that could be read, held in memory; the others are noted with the reason."""
    for sample in samples:
        try:
            content = sample.read()
        except UnreadableInput as error:
            report.failed[sample.id] = str(error)
            continue
        yield Sample(sample.id, partial(_identity, content))


class _Collected:
    """Readings of one forward pass, by layer, until every call of a layer has been seen."""

    def __init__(self, names: Sequence[str], sets: Sequence[str], tower: Tower, batch: Batch) -> None:
        self.names, self.sets, self.tower, self.batch = names, sets, tower, batch
        self.readings: dict[int, dict[str, list[dict[str, Reading]]]] = {}
        self.masks: dict[tuple[str, int, int], Tensor] = {}
        self.sizes: dict[int, list[int]] = {}

    def add(self, call: AttentionCall) -> None:
        inputs = len(self.batch.ids)
        if call.batch % inputs:
            raise MeasurementError(
                f"layer '{call.module}' ran {call.batch} rows for {inputs} inputs: whose they are is unclear",
                "try --batch-size 1",
            )
        self.sizes.setdefault(call.layer, []).append(call.tokens)
        of_layer = self.readings.setdefault(call.layer, {name: [] for name in self.sets})
        for token_set in self.sets:
            of_layer[token_set].append(readings(call, self.names, self.tokens(token_set, call)))

    def sized(self, layer: Layer, facts: LayerFacts) -> LayerFacts:
        """A layer's facts with the sizes of this batch: images of native resolution differ."""
        sizes = self.sizes[layer.index]
        scope = "window" if len(sizes) > 1 else facts.attn_scope
        return replace(facts, n_tokens=max(sizes), attn_scope=scope)

    def tokens(self, token_set: str, call: AttentionCall) -> Tensor:
        """The token set's mask `[batch or 1, token]` on the call's device, without padding."""
        place = (token_set, call.tokens, call.batch)
        if place not in self.masks:
            mask = self.tower.tokens_in(token_set, call.tokens)[None]
            real = self.batch.real
            if real is not None and real.shape == (call.batch, call.tokens):
                mask = mask & real.cpu()
            self.masks[place] = mask.to(call.output.device)
        return self.masks[place]

    def blocks(self, layers: Sequence[Layer]) -> Iterator[tuple[Layer, np.ndarray]]:
        """Each layer with its `[token set, metric, input, head]`; the device is read once, at the end."""
        inputs = len(self.batch.ids)
        on_device = []
        for layer in layers:
            of_layer = self.readings.pop(layer.index)
            reduced = [
                reduce([part[name] for part in of_layer[token_set]], inputs, METRICS[name].reduce)
                for token_set in self.sets
                for name in self.names
            ]
            heads = reduced[0].shape[-1]
            on_device.append(torch.stack(reduced).view(len(self.sets), len(self.names), inputs, heads))
        flat = torch.cat([block.flatten() for block in on_device]).cpu().numpy()
        start = 0
        for layer, block in zip(layers, on_device, strict=True):
            values = flat[start : start + block.numel()].reshape(block.shape)
            start += block.numel()
            if np.isinf(values).any():
                metric, who = np.argwhere(np.isinf(values))[0][1:3]
                raise UserError(
                    f"layer '{layer.path}' gives values that are not finite ({self.names[metric]}, "
                    f"input '{self.batch.ids[who]}')",
                    "the weights or activations hold NaN or infinity; try --dtype float32",
                )
            yield layer, values


class _Gate:
    """The reconstruction gate: on the first batch, A V rebuilt from a call must be what the model used."""

    def __init__(self) -> None:
        self.seen: dict[int, list[tuple[int, str, str, float]]] = {}

    def check(self, call: AttentionCall, inputs: int) -> None:
        rows = torch.linspace(0, call.tokens - 1, min(GATE_ROWS, call.tokens)).long().to(call.output.device)
        visible = call.visibility.count.expand(call.batch, call.heads, call.tokens)[:, :, rows] > 0
        used = call.output[:, :, rows].float() * visible[..., None]
        rebuilt = attend(call, rows) * visible[..., None]
        error = ((rebuilt - used).norm() / used.norm().clamp(min=torch.finfo(torch.float32).tiny)).item()
        tolerance = GATE_TOLERANCE.get(call.output.dtype, GATE_TOLERANCE_HALF)
        if not torch.isfinite(used).all():
            raise UserError(
                f"layer '{call.module}' gives values that are not finite",
                "the weights or activations hold NaN or infinity; try --dtype float32",
            )
        if not error < tolerance:
            raise MeasurementError(
                f"layer '{call.module}': A V rebuilt from the call differs from what the model used "
                f"(relative error {error:.1e}, allowed {tolerance:.0e})",
                "this attention is not understood; please report the model",
            )
        seen = call.visibility
        split = call.batch > inputs
        windowed = split or (seen.rule == "general" and bool(seen.count.max() < call.tokens))
        alone = bool((seen.count[..., 0] <= 1).all()) and call.tokens > 1
        facts = (
            call.tokens,
            "window" if windowed else "full",
            "excluded" if alone else "included",
            error,
        )
        self.seen.setdefault(call.layer, []).append(facts)

    def facts(self, layer: int, projection: str) -> LayerFacts:
        tokens, scopes, firsts, errors = zip(*self.seen[layer], strict=True)
        scope = "window" if len(tokens) > 1 else scopes[0]
        return LayerFacts(max(tokens), scope, firsts[0], projection, max(errors))


def _all_called(layers: Sequence[Layer], sightings: Sightings) -> None:
    if not layers:
        path, why = next(iter(sightings.skipped.items()))
        raise MeasurementError(
            f"no layer attends to its own tokens ('{path}': {why})", "list others with --layers"
        )
    for layer in layers:
        if sightings.runs.get(layer.path, 1) > 1:
            raise MeasurementError(
                f"layer '{layer.path}' ran {sightings.runs[layer.path]} times in one forward pass: "
                "depths that share weights would be mixed",
                "leave it out with --layers",
            )
        if layer.path not in sightings.calls:
            raise MeasurementError(
                f"layer '{layer.path}' was never run: something bypassed it",
                "leave it out with --layers if that is meant",
            )


def chunks(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """Samples in lists of `size`; the last may be shorter."""
    iterator = iter(samples)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _identity(content: object) -> object:
    return content
