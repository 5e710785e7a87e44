"""The only loop: samples → batches → attention calls → metrics → one number per input, layer and head.

What leaves this file is small: a `LayerValues` block per layer and batch, on the CPU, in float64. No
average over inputs is taken here; tables do that, from the blocks of all batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from diag.attention import AttentionCall, attend, without_constant
from diag.blocks import Block
from diag.branches import stream_states
from diag.collected import OF_HEADS, Collected, CollectedStream, LayerFacts, Report, on_host
from diag.edited import check_layers, edited_branches, heads_return
from diag.errors import MeasurementError, UnreadableInput, UserError
from diag.interventions import Edit
from diag.metrics import METRICS
from diag.models.base import Batch, Sample, Tower
from diag.seam import Layer, Sightings
from diag.stream import STREAM_METRICS

GATE_ROWS = 32
GATE_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}
GATE_TOLERANCE_HALF = 1e-2


@dataclass(frozen=True)
class LayerValues:
    """One layer's numbers for one batch: `values[token set, metric, input, head]`, NaN where undefined.

    metrics: names along the metric axis. of_heads: False for numbers of a whole layer; the head axis is 1.
    """

    layer: Layer
    facts: LayerFacts
    values: np.ndarray
    metrics: tuple[str, ...]
    of_heads: bool = True


@dataclass(frozen=True)
class BatchValues:
    """One forward pass: ids of its inputs and a block per layer."""

    ids: tuple[str, ...]
    layers: tuple[LayerValues, ...]


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

    metrics: names from `METRICS`, `SHAPE_METRICS` and `STREAM_METRICS`; all of `METRICS` if None.
    layers: depth indices; all if None.
    token_sets: the tower's default set if None.
    value_constants: what is taken out of the values and outputs of each layer before they are measured
        (`diag.models.value_constants`), by depth index; the model itself goes on with them. Nothing if None.
    edits: what is done to the model while it runs; what it goes on with is what is measured.
    blocks: the layers' blocks, for stream metrics and where an edit changes a whole branch.
    Inputs that cannot be read are noted in `report.failed` and left out.
    Raises MeasurementError, naming the layer, where the seam is blind or a call does not rebuild its
    output, and UserError where values are not finite.
    """
    names = list(METRICS) if metrics is None else [name for name in metrics if name in OF_HEADS]
    of_stream = [name for name in metrics or () if name in STREAM_METRICS]
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
        collected = Collected(names, sets, tower, batch)
        gate = _Gate() if not facts else None
        around = [block for block in blocks if block.index in {layer.index for layer in listed}]
        stream = (
            CollectedStream(of_stream, collected, around, edits, report, gate is not None)
            if of_stream
            else None
        )

        def on_call(
            call: AttentionCall,
            collected: Collected = collected,
            gate: _Gate | None = gate,
            stream: CollectedStream | None = stream,
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
                used = call if free is None else without_constant(call, free)
                collected.add(used)
                if stream is not None:
                    stream.calls.setdefault(call.layer, []).append((call, used))
            return call.output if changed else None

        with (
            torch.inference_mode(),
            edited_branches(blocks, edits),
            tower.capture(watched, on_call) as sightings,
            nullcontext() if stream is None else stream_states(around, stream.add),
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
        found = collected.blocks(listed) if names else []
        if stream is not None:
            found += stream.blocks(listed)
        yield BatchValues(
            batch.ids,
            tuple(
                LayerValues(layer, collected.sized(layer, facts[layer.index]), values, chosen, of_heads)
                for layer, chosen, of_heads, values in on_host(found, batch.ids)
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
