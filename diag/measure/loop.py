"""The only loop: samples → batches → attention calls → metrics → one number per input, layer and head.

What leaves this file is small: a `LayerValues` block per layer and batch, on the CPU, in float64. No
average over inputs is taken here; tables do that, from the blocks of all batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diag.attention.call import AttentionCall, without_constant
from diag.attention.sampling import RowSampling
from diag.errors import MeasurementError, UnreadableInput, UserError
from diag.inputs.images import neutral_image
from diag.measure.batches import Batches, BatchSize, is_out_of_memory
from diag.measure.collected import OF_HEADS, BatchReadings, BatchStreamReadings, Report, on_host
from diag.measure.edited import check_layers, edited_modules, heads_return
from diag.measure.gate import LayerFacts, ReconstructionCheck
from diag.metrics.attention import METRICS
from diag.metrics.divergence import DIVERGENCE_METRICS
from diag.metrics.stream import STREAM_METRICS
from diag.models.base import Batch, Sample, Tower
from diag.models.hooks.blocks import Block
from diag.models.hooks.interventions import Edit
from diag.models.hooks.residual import stream_states
from diag.models.hooks.seam import Layer, Sightings


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
    sampling: RowSampling | None = None,
    batch_size: int | BatchSize = 8,
    report: Report | None = None,
) -> Iterator[BatchValues]:
    """Runs a tower over samples and yields each batch's numbers.

    metrics: names from `METRICS`, `SHAPE_METRICS`, `STREAM_METRICS` and `DIVERGENCE_METRICS` (a second
        forward pass, with neutral images); all of `METRICS` if None.
    layers: depth indices; all if None.
    token_sets: the tower's default sets if None.
    value_constants: what is taken out of the values and outputs of each layer before they are measured
        (`diag.models.value_constants`), by depth index; the model itself goes on with them. Nothing if None.
    edits: what is done to the model while it runs; what it goes on with is what is measured.
    blocks: the layers' blocks, for stream metrics and where an edit changes a whole branch.
    sampling: which query rows stand for all of them in long sequences; as `RowSampling` has it if None.
    batch_size: inputs per forward pass. A batch that does not fit into memory is run again in halves.
    Inputs that cannot be read are noted in `report.failed` and left out.
    Raises MeasurementError, naming the layer, where the seam is blind or a call does not rebuild its
    output, and UserError where values are not finite, or divergence metrics are asked of a text tower.
    """
    names = list(METRICS) if metrics is None else [name for name in metrics if name in OF_HEADS]
    of_stream = [name for name in metrics or () if name in STREAM_METRICS]
    diverging = [name for name in names if name in DIVERGENCE_METRICS]
    if diverging and tower.input_kind != "vision":
        raise UserError(
            f"'{diverging[0]}' compares an image with a neutral one; the {tower.name} tower takes none",
            "give --images, or leave the divergence metrics out",
        )
    sets = list(token_sets) if token_sets is not None else list(tower.default_sets)
    for token_set in sets:
        tower.check_set(token_set)  # an unknown set is told before any work
    listed = pick_layers(tower.layers, layers)
    check_layers(edits, tower.layers)
    report = Report() if report is None else report
    forward = _Forward(
        tower,
        names,
        of_stream,
        sets,
        listed,
        value_constants,
        edits,
        blocks,
        sampling or RowSampling(),
        report,
    )
    size = batch_size if isinstance(batch_size, BatchSize) else BatchSize(batch_size)
    # the neutral twin is made of the image itself, not of what was prepared for the model
    prepare = None if diverging else tower.prepare
    batches = Batches(readable(samples, report, prepare), size, most=tower.max_batch)
    facts: dict[int, LayerFacts] = {}
    for chunk in batches:
        gate = ReconstructionCheck() if not facts else None
        before = size.begin()
        full: str | None = None
        try:
            collected, stream, sightings = forward.run(chunk, gate)
            if gate is not None:
                report.skipped_layers = {
                    path: why for path, why in sightings.skipped.items() if path not in sightings.calls
                }
                listed = [layer for layer in listed if layer.path not in report.skipped_layers]
            _all_called(listed, sightings)
            found = collected.blocks(listed) if names else []
            if stream is not None:
                found += stream.blocks(listed)
            on_cpu = list(on_host(found, collected.batch.ids))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            full = str(error)
        if full is not None:  # here the error and what its frames held are gone
            batches.give_back(chunk, full)
            continue
        size.grow(len(chunk), before)
        if gate is not None:
            facts = {
                layer.index: gate.facts(layer.index, sightings.projection.get(layer.path, "unknown"))
                for layer in listed
            }
        yield BatchValues(
            collected.batch.ids,
            tuple(
                LayerValues(layer, collected.sized(layer, facts[layer.index]), values, chosen, of_heads)
                for layer, chosen, of_heads, values in on_cpu
            ),
        )


@dataclass(frozen=True)
class _Forward:
    """One forward pass with everything around it; the fields are the arguments of `measure`."""

    tower: Tower
    names: Sequence[str]
    of_stream: Sequence[str]
    sets: Sequence[str]
    listed: Sequence[Layer]
    value_constants: Mapping[int, Tensor] | None
    edits: Sequence[Edit]
    blocks: Sequence[Block]
    sampling: RowSampling
    report: Report

    def run(
        self, samples: Sequence[Sample], gate: ReconstructionCheck | None
    ) -> tuple[BatchReadings, BatchStreamReadings | None, Sightings]:
        """Runs the tower over one batch; on the first one a `gate` checks every call."""
        measured = {layer.index for layer in self.listed}
        watched = [
            layer
            for layer in self.tower.layers
            if layer.index in measured or any(edit.at(layer.index) for edit in self.edits)
        ]
        removed = self.value_constants or {}
        batch = self.tower.encode(samples)
        neutral = None
        if not DIVERGENCE_METRICS.keys().isdisjoint(self.names):
            neutral = _neutral_outputs(self.tower, samples, watched, self.edits, self.blocks, removed)
        collected = BatchReadings(self.names, self.sets, self.tower, batch, self.sampling, neutral)
        around = [block for block in self.blocks if block.index in measured]
        stream = None
        if self.of_stream:
            stream = BatchStreamReadings(
                self.of_stream, collected, around, self.edits, self.report, gate is not None
            )

        def on_call(call: AttentionCall) -> Tensor | None:
            if gate is not None and call.layer in measured:
                gate.check(call, len(batch.ids))
            call, changed = _edited_call(call, self.edits)
            if call.layer in measured:
                used = without_constant(call, removed[call.layer]) if removed else call
                collected.add(used)
                if stream is not None:
                    stream.calls.setdefault(call.layer, []).append((call, used))
            return call.output if changed else None

        with (
            torch.inference_mode(),
            edited_modules(self.tower.layers, self.blocks, self.edits, batch.real),
            self.tower.capture(watched, on_call) as sightings,
            nullcontext() if stream is None else stream_states(around, stream.add),
        ):
            self.tower.forward(batch)
        return collected, stream, sightings


def _edited_call(call: AttentionCall, edits: Sequence[Edit]) -> tuple[AttentionCall, bool]:
    """The call as the model goes on with it, and whether that is another one."""
    if not any(edit.where == "attention" and edit.at(call.layer) for edit in edits):
        return call, False
    return replace(call, output=heads_return(edits, call)), True


def _neutral_outputs(
    tower: Tower,
    chunk: Sequence[Sample],
    watched: Sequence[Layer],
    edits: Sequence[Edit],
    blocks: Sequence[Block],
    removed: Mapping[int, Tensor],
) -> dict[int, list[Tensor]]:
    """What heads return for the same inputs with neutral images, by layer in the order of its calls.

    The model is changed, and constants are taken out, as in the pass that is measured.
    """
    outputs: dict[int, list[Tensor]] = {}

    def on_call(call: AttentionCall) -> Tensor | None:
        call, changed = _edited_call(call, edits)
        used = without_constant(call, removed[call.layer]) if call.layer in removed else call
        outputs.setdefault(call.layer, []).append(used.output)
        return call.output if changed else None

    batch = tower.encode([Sample(sample.id, partial(_neutral, sample)) for sample in chunk])
    with (
        torch.inference_mode(),
        edited_modules(tower.layers, blocks, edits, batch.real),
        tower.capture(watched, on_call),
    ):
        tower.forward(batch)
    return outputs


def _neutral(sample: Sample) -> object:
    return neutral_image(sample.read())


def capture(tower: Tower, batch: Batch, layers: Sequence[int] | None = None) -> list[AttentionCall]:
    """The attention calls of one batch, in the order in which they were made.

    Tensors are those that the model used, on its device; `diag.attention.pattern.pattern_rows` gives the
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


def readable(
    samples: Iterable[Sample], report: Report, prepare: Callable[[Any], Any] | None = None
) -> Iterator[Sample]:
    """The samples that could be read, held in memory; the others are noted with the reason.

    prepare: the tower's, for contents as it makes them (`diag.measure.prefetch` may have done so already).
    """
    for sample in samples:
        try:
            content = sample.read() if prepare is None else prepare(sample.read())
        except UnreadableInput as error:
            report.failed[sample.id] = str(error)
            continue
        yield Sample(sample.id, partial(_identity, content))


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
