"""The one loop that runs models over inputs, and what is measured in it: batches → attention calls → numbers.

`run_batches` reads samples, makes batches of them and halves those that do not fit into memory; what is done
with a batch is up to its caller: metrics (`measure`), calls as files (`diag.measure.activations`), a sweep
of interventions (`diag.studies.intervene`). What `measure` gives is small: `LayerValues` for each layer and
batch, on the CPU, in float64. No average over inputs is taken here; tables do that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.attention.row_sums import without_constant
from diag.attention.sampling import RowSampling
from diag.attention.visibility import Visibility
from diag.errors import BadInputs, MeasurementError, NotFinite, UnreadableInput, UserError
from diag.inputs.images import neutral_image
from diag.measure.batch_readings import OF_HEADS, BatchReadings, BatchStreamReadings, Incidents, layer_values
from diag.measure.batch_size import Batches, BatchSize, is_out_of_memory
from diag.measure.edited_model import beside_of, by_own_numbers, check_layers, edited_modules, heads_return
from diag.measure.next_inputs import Seen, next_inputs
from diag.measure.output_projections import OutputProjections
from diag.measure.reconstruction import ReconstructionCheck
from diag.metrics.default import METRICS
from diag.metrics.divergence import DIVERGENCE_METRICS
from diag.metrics.followed import FOLLOWED_METRICS
from diag.metrics.nulls import OF_OTHER_INPUTS
from diag.metrics.stream import STREAM_METRICS
from diag.models.base import Batch, Sample, Tower
from diag.models.hooks.beside import Beside
from diag.models.hooks.block_parts import Block
from diag.models.hooks.depth import Place
from diag.models.hooks.interventions import Edit
from diag.models.hooks.layers import Layer
from diag.models.hooks.meaning import nothing_of_its_own
from diag.models.hooks.residual import stream_states
from diag.models.hooks.seam import OnCall, OtherSize, Sightings
from diag.models.layer_numbers import numbered
from diag.models.loading import theirs
from diag.results.layer_values import LayerFacts, LayerValues

Result = TypeVar("Result")
Carriers = Callable[[Sequence[Sample], Batch], Mapping[str, Tensor]]

MODEL_TIP = "config, weights, tokenizer and processor must belong together; on a GPU, try --device cpu"


def run_batches(
    tower: Tower,
    samples: Iterable[Sample],
    work: Callable[[Sequence[Sample], Batch, int], Result],
    *,
    batch_size: int | BatchSize = 8,
    incidents: Incidents | None = None,
    whole: bool = True,
) -> Iterator[Result]:
    """The one loop over batches: what `work` makes of each, in the order of the samples.

    work: is given the samples of a batch, the batch itself and the number of its first input, and runs the
        tower. A batch for which memory runs out is done again in halves: all of its work, from the start.
    batch_size: inputs per forward pass.
    incidents: where inputs that cannot be read, or of which `work` raises BadInputs, are noted; they are left
        out, and all others are in the batches that they would be in if those had not been there.
    whole: whether it is an error of the model, and no longer of inputs, if none of these is finite.
    Raises UserError where a single input does not fit into memory, and NotFinite as `whole` says.
    """
    size = batch_size if isinstance(batch_size, BatchSize) else BatchSize(batch_size)
    incidents = Incidents() if incidents is None else incidents
    batches = Batches(readable(samples, incidents, tower.prepare), size, most=tower.max_batch)
    first_input, non_finite = 0, dict[str, str]()

    def done(chunk: Sequence[Sample]) -> tuple[Result, int]:
        batch = tower.encode(chunk)
        try:
            return work(chunk, batch, first_input), len(batch.ids)
        except OtherSize:
            if tower.look_again is None:
                raise
        tower.look_again(chunk)
        batch = tower.encode(chunk)
        return work(chunk, batch, first_input), len(batch.ids)

    for chunk in batches:
        before = size.begin()
        full, bad = None, dict[str, str]()
        try:
            result, inputs = done(chunk)
        except BadInputs as error:
            if not error.inputs.keys() <= {sample.id for sample in chunk}:
                raise  # rows of a batch that was given as it is
            bad = error.inputs
            non_finite |= bad if isinstance(error, NotFinite) else {}
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            full = str(error)
        # here the error and what its frames held are gone
        if full is not None:
            batches.give_back(chunk, full)
            continue
        if bad:
            incidents.failed |= bad
            batches.put_back([sample for sample in chunk if sample.id not in bad])
            continue
        size.grow(len(chunk), before)
        yield result
        first_input += inputs
    if whole and non_finite and not first_input:  # none was measured
        raise NotFinite(non_finite)


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
    incidents: Incidents | None = None,
    whole: bool = True,
    order: Sequence[Sample] | None = None,
    carriers: Carriers | None = None,
) -> Iterator[list[LayerValues]]:
    """Runs a tower over samples and yields each batch's numbers, layer by layer.

    metrics: names from `METRICS`, `SHAPE_METRICS`, `SINK_METRICS`, `STREAM_METRICS`, `LEDGER_METRICS`,
        `NULL_METRICS` and `DIVERGENCE_METRICS` (a second forward pass, with neutral images); all of `METRICS`
        if None.
    layers: numbers of layers, as `pick_layers` reads them; all if None.
    token_sets: the tower's default sets if None.
    value_constants: what is taken out of the values and outputs of each layer before they are measured
        (`diag.models.value_constants`), by depth index; the model itself goes on with them. Nothing if None.
    edits: what is done to the model while it runs; what it goes on with is what is measured.
    blocks: the layers' blocks, for stream metrics, what sinks do, and where an edit changes a whole branch.
    sampling: which query rows stand for all of them in long sequences; as `RowSampling` has it if None.
    batch_size: inputs per forward pass. A batch that does not fit into memory is run again in halves.
    whole: as in `run_batches`.
    order: all inputs of the run, of which `samples` may be a part: each is compared with the next one where a
        metric needs another input; `samples` if None.
    carriers: which image tokens of a batch carry sinks of the vision tower, where a metric follows them
        (`diag.measure.vision_sinks`).
    Inputs that cannot be read, or whose values are not finite, are noted in `incidents.failed` and left out.
    Raises MeasurementError, naming the layer, where the seam is blind or a call does not rebuild its
    output, NotFinite where no input has finite values, and UserError where divergence metrics are asked of a
    text tower.
    """
    names = list(METRICS) if metrics is None else [name for name in metrics if name in OF_HEADS]
    diverging = [name for name in names if name in DIVERGENCE_METRICS]
    if diverging and tower.input_kind != "vision":
        raise UserError(
            f"'{diverging[0]}' compares an image with a neutral one; the {tower.name} tower takes none",
            "give --images, or leave the divergence metrics out",
        )
    if diverging:  # the neutral twin is made of the image itself, not of what was prepared for the model
        tower = replace(tower, prepare=None)
    if order is None and not OF_OTHER_INPUTS.isdisjoint(names):
        samples = order = list(samples)
    sets = list(token_sets) if token_sets is not None else list(tower.default_sets)
    for token_set in sets:
        tower.check_set(token_set)  # an unknown set is told before any work
    listed = pick_layers(tower.layers, layers, tower.places)
    edits = by_own_numbers(edits, tower.layers, tower.places)
    check_layers(edits, tower.layers)
    incidents = Incidents() if incidents is None else incidents
    work = _BatchWork(
        tower,
        names,
        [name for name in metrics or () if name in STREAM_METRICS],
        sets,
        listed,
        value_constants or {},
        edits,
        blocks,
        sampling or RowSampling(),
        incidents,
        order or (),
        carriers,
    )
    yield from run_batches(
        tower, samples, work.numbers, batch_size=batch_size, incidents=incidents, whole=whole
    )


@dataclass
class _BatchWork:
    """What `measure` does with a batch; the fields are its arguments, and what the first batch has told."""

    tower: Tower
    names: Sequence[str]
    of_stream: Sequence[str]
    sets: Sequence[str]
    listed: Sequence[Layer]
    removed: Mapping[int, Tensor]
    edits: Sequence[Edit]
    blocks: Sequence[Block]
    sampling: RowSampling
    incidents: Incidents
    order: Sequence[Sample]
    carriers: Carriers | None
    facts: dict[int, LayerFacts] = field(default_factory=dict)
    projections: OutputProjections = field(init=False)

    def __post_init__(self) -> None:
        self.projections = OutputProjections(self.blocks)

    def numbers(self, samples: Sequence[Sample], batch: Batch, first_input: int) -> list[LayerValues]:
        """Runs the tower over one batch and reads its numbers; every call of the first one is checked."""
        gate = None if self.facts else ReconstructionCheck()
        of_heads, of_stream, sightings = self.forward(samples, batch, gate)
        if gate is not None:
            others = {name: why for name, why in sightings.skipped.items() if name not in sightings.calls}
            self.incidents.skipped_layers = {**self.tower.skipped, **others}
        layers = [layer for layer in self.listed if layer.name not in self.incidents.skipped_layers]
        _all_called(layers, sightings)
        if of_heads.sinks:
            self.note_unprojected(of_heads, layers, sightings)
        facts = self.facts
        if gate is not None:
            projection = sightings.projection
            facts = {
                layer.index: replace(
                    gate.facts(layer.index, projection.get(layer.name, "unknown")),
                    value_from=layer.form.value_from,
                    mixer=layer.form.mixer,
                )
                for layer in layers
            }
        found = layer_values(of_heads, of_stream, layers, facts, first_input)
        if self.incidents.tokens is not None:
            self.incidents.tokens.add(batch.ids, of_heads.each)
        self.facts = facts  # now that the numbers are read, memory has not run out
        return found

    def forward(
        self, samples: Sequence[Sample], batch: Batch, gate: ReconstructionCheck | None
    ) -> tuple[BatchReadings, BatchStreamReadings | None, Sightings]:
        """One forward pass that is measured, behind one of the neutral twins where a metric needs them."""
        measured = {layer.index for layer in self.listed}
        neutral = None
        if not DIVERGENCE_METRICS.keys().isdisjoint(self.names):
            neutral = self.neutral_outputs(samples)
        following = None
        if not OF_OTHER_INPUTS.isdisjoint(self.names):
            following = next_inputs(self.tower, batch, samples, self.order, self.values_seen)
        carrying = None
        if self.carriers is not None and not FOLLOWED_METRICS.keys().isdisjoint(self.names):
            carrying = self.carriers(samples, batch)
        per_token = self.incidents.tokens is not None
        of_heads = BatchReadings(
            self.names,
            self.sets,
            self.tower,
            batch,
            self.sampling,
            neutral=neutral,
            projections=self.projections,
            following=following,
            carrying=carrying,
            per_token=per_token,
        )
        around = [block for block in self.blocks if block.index in measured]
        of_stream = None
        if self.of_stream:
            of_stream = BatchStreamReadings(
                self.of_stream, of_heads, around, self.edits, self.incidents, gate is not None
            )

        told = beside_of(self.tower, batch)

        def on_call(call: AttentionCall) -> Tensor | None:
            call = _with_real_keys(call, batch)
            if gate is not None and call.layer in measured:
                gate.check(call, batch.ids)
            call, changed = _edited_call(call, self.edits, told)
            if call.layer in measured:
                used = self.without_constant(call)
                of_heads.add(used)
                if of_stream is not None:
                    of_stream.calls.setdefault(call.layer, []).append((call, used))
                if gate is not None and of_heads.sinks:
                    self.projections.saw(call.layer, call.output)
            return call.output if changed else None

        beside = None if of_stream is None else stream_states(around, of_stream.add)
        seen = self.projections.watched() if gate is not None and of_heads.sinks else nullcontext()
        with seen:
            return of_heads, of_stream, self.run(batch, on_call, beside)

    def note_unprojected(
        self, of_heads: BatchReadings, layers: Sequence[Layer], sightings: Sightings
    ) -> None:
        """Leaves out what needs W_O where that reads anything but what heads return, and names the layers."""
        for layer in layers:
            read = sightings.projection.get(layer.name, "unknown")
            if read == "modified" or (read == "unknown" and layer.index not in self.projections.read):
                of_heads.unprojected.add(layer.index)
            if layer.index in of_heads.unprojected and layer.path not in self.incidents.sinks_unprojected:
                self.incidents.sinks_unprojected.append(layer.path)

    def neutral_outputs(self, samples: Sequence[Sample]) -> dict[int, list[Tensor]]:
        """What heads return for the same inputs with neutral images, by layer in the order of its calls.

        The model is changed, and constants are taken out, as in the pass that is measured.
        """
        outputs: dict[int, list[Tensor]] = {}

        def on_call(call: AttentionCall) -> Tensor | None:
            call, changed = _edited_call(call, self.edits, told)
            outputs.setdefault(call.layer, []).append(self.without_constant(call).output)
            return call.output if changed else None

        twins = [Sample(sample.id, partial(_neutral, sample)) for sample in samples]
        batch = self.tower.encode(twins)
        told = beside_of(self.tower, batch)
        self.run(batch, on_call)
        return outputs

    def values_seen(self, batch: Batch) -> dict[int, list[Seen]]:
        """The values of the layers that are measured in a forward pass of its own, in the order of its calls.

        The model is changed, and constants are taken out, as in the pass that is measured.
        """
        measured = {layer.index for layer in self.listed}
        masks = BatchReadings((), self.sets, self.tower, batch, self.sampling)
        found: dict[int, list[Seen]] = {}
        told = beside_of(self.tower, batch)

        def on_call(call: AttentionCall) -> Tensor | None:
            call, changed = _edited_call(_with_real_keys(call, batch), self.edits, told)
            if call.layer in measured and call.own_keys:
                used = self.without_constant(call)
                sets = [masks.tokens(name, used) for name in self.sets]
                found.setdefault(call.layer, []).append(Seen.of(used, batch, sets))
            return call.output if changed else None

        self.run(batch, on_call)
        return found

    def run(
        self, batch: Batch, on_call: OnCall, beside: AbstractContextManager[object] | None = None
    ) -> Sightings:
        """One forward pass of the edited model. beside: entered last, its hooks see what edits made."""
        watched = [
            layer
            for layer in self.tower.layers
            if layer in self.listed or any(edit.at(layer.index) for edit in self.edits)
        ]
        with (
            torch.inference_mode(),
            told_if_the_model_fails(self.tower, batch),
            edited_modules(self.tower.layers, self.blocks, self.edits, batch.real),
            self.tower.capture(batch.layers(watched), on_call) as sightings,
            beside or nullcontext(),
        ):
            self.tower.forward(batch)
        return sightings

    def without_constant(self, call: AttentionCall) -> AttentionCall:
        """The call without what is taken out of its layer's values and outputs."""
        return without_constant(call, self.removed[call.layer]) if call.layer in self.removed else call


def _with_real_keys(call: AttentionCall, batch: Batch) -> AttentionCall:
    """The call with padding as the batch has it, where its mask does not tell.

    A layer without softmax has no mask; where each query has a selection of keys, one that none selects is no
    padding.
    """
    real, seen = batch.real, call.visibility
    if real is None or not call.own_keys or real.shape != (call.batch, call.tokens):
        return call
    real = real.to(call.output.device)
    if call.has_pattern:
        if seen.rule != "general" or seen.keys is None or not bool((real & ~seen.keys).any()):
            return call
        return replace(call, visibility=replace(seen, keys=seen.keys | real))
    if bool(real.all()):
        return call
    seen = Visibility.of_keys(real, call.causal)
    return replace(call, mask=seen.mask, visibility=seen)


def _edited_call(call: AttentionCall, edits: Sequence[Edit], beside: Beside) -> tuple[AttentionCall, bool]:
    """The call as the model goes on with it, and whether that is another one."""
    if not any(edit.where == "attention" and edit.at(call.layer) for edit in edits):
        return call, False
    return replace(call, output=heads_return(edits, call, beside)), True


def _neutral(sample: Sample) -> object:
    content = sample.read()
    return [neutral_image(x) for x in content] if isinstance(content, list) else neutral_image(content)


def capture(tower: Tower, batch: Batch, layers: Sequence[int] | None = None) -> list[AttentionCall]:
    """The attention calls of one batch, in the order in which they were made.

    Tensors are those that the model used, on its device; `diag.attention.pattern.pattern_rows` gives the
    weights of chosen query rows.
    """
    calls: list[AttentionCall] = []
    listed = batch.layers(pick_layers(tower.layers, layers, tower.places))
    watched = tower.capture(listed, calls.append)
    with torch.inference_mode(), told_if_the_model_fails(tower, batch), watched:
        tower.forward(batch)
    return calls


@contextmanager
def told_if_the_model_fails(tower: Tower, batch: Batch) -> Iterator[None]:
    """Around all that watches a forward pass: an error that the model makes alone, too, is told as its own.

    Any other is a fault of what watches it, and goes on as it is; so does memory that runs out.
    Raises UserError with what the model says.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a model may raise anything; whose it is, it is asked alone
        if is_out_of_memory(error):
            raise
        with theirs(f"the model's {tower.name} tower fails on its own input", MODEL_TIP):
            tower.forward(batch)
        raise


def pick_layers(
    layers: Sequence[Layer], chosen: Sequence[int] | None, places: Sequence[Place] = ()
) -> list[Layer]:
    """The layers with the chosen numbers, which are the model's own; negative ones count from its last layer.

    places: the tower's, also those that are not measured. Raises UserError as `own_numbers` does.
    """
    return numbered(layers, chosen, places)


def readable(
    samples: Iterable[Sample], incidents: Incidents, prepare: Callable[[Any], Any] | None = None
) -> Iterator[Sample]:
    """The samples that could be read, held in memory; the others are noted with the reason.

    prepare: the tower's, for contents as it makes them (`diag.measure.prefetch` may have done so already).
    """
    for sample in samples:
        try:
            content = sample.read() if prepare is None else prepare(sample.read())
        except UnreadableInput as error:
            incidents.failed[sample.id] = str(error)
            continue
        yield Sample.holding(sample.id, content)


def _all_called(layers: Sequence[Layer], sightings: Sightings) -> None:
    if not layers:
        raise nothing_of_its_own(*next(iter(sightings.skipped.items())))
    for layer in layers:
        ran = sightings.runs.get(layer.path, layer.form.runs)
        if ran != layer.form.runs and layer.name in sightings.calls:
            raise MeasurementError(
                f"layer '{layer.path}' ran {ran} times in one forward pass: "
                "depths that share weights would be mixed",
                "leave it out with --layers",
            )
        if layer.name not in sightings.calls:
            raise MeasurementError(
                f"layer '{layer.name}' was never run: something bypassed it",
                "leave it out with --layers if that is meant",
            )
