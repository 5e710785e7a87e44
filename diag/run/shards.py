"""One tower measured as a plan says: its samples, what is constant about it, its numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diag.errors import UserError
from diag.inputs.items import Inputs
from diag.measure.batch_readings import Incidents
from diag.measure.batch_size import BatchSize
from diag.measure.loop import Carriers, measure, pick_layers
from diag.measure.vision_sinks import VisionSinks
from diag.metrics.followed import FOLLOWED_METRICS
from diag.metrics.sink_events import OF_PROJECTION
from diag.metrics.stream import STREAM_METRICS
from diag.models.base import Model, Sample, Tower
from diag.models.hooks.block_parts import Block, find_blocks, understood_blocks
from diag.models.hooks.interventions import BRANCHES
from diag.models.value_constants import value_constants
from diag.results.caveats import columns_of
from diag.results.layer_values import LayerValues
from diag.run.plan import ProbePlan
from diag.run.prepared import Measurement


@dataclass(frozen=True)
class TowerJob:
    """A tower and all that is needed to measure it.

    constants: the columns that are the same in every row of the tower. removed: what `--values bias-free`
    takes out of each layer's values. blocks: where whole branches are changed, or the stream is measured.
    carriers: which image tokens carry sinks of the vision tower. size: of the next batch; it follows the
    memory, from shard to shard.
    """

    tower: Tower
    measurement: Measurement
    token_sets: Sequence[str]
    constants: Mapping[str, Any]
    removed: Mapping[int, Tensor] | None
    blocks: Sequence[Block]
    carriers: Carriers | None
    size: BatchSize

    @staticmethod
    def of(
        model: Model,
        tower: Tower,
        measurement: Measurement,
        token_sets: Sequence[str] | None = None,
        inputs: str = "given",
    ) -> TowerJob:
        """token_sets: the plan's if None, or the tower's defaults. inputs: as the column of that name says,
        where the tower is given them.

        Raises UserError, naming the layer, where the plan asks for what this model does not allow.
        """
        plan, removed = measurement.plan, None
        if plan.values == "bias_free":
            removed = value_constants(model.module, pick_layers(tower.layers, plan.layers, tower.places))
        return TowerJob(
            tower,
            measurement,
            token_sets or plan.tokens or tower.default_sets,
            {**_constants_of(model, tower, plan), "inputs": tower.facts.get("instead") or inputs},
            removed,
            _blocks_of(model, tower, measurement),
            _carriers_of(model, tower, measurement),
            BatchSize.of(plan.batch_size, model.module),
        )


def tower_samples(tower: Tower, given: Inputs, *, limit: int, seq_len: int | None) -> list[Sample]:
    """The first `limit` samples of a tower. Raises UserError if there is none."""
    found = list(itertools.islice(tower.samples(given, seq_len), limit))
    if not found:
        raise UserError(
            f"'{given.source}' gives no sample for the {tower.name} tower",
            "the text is shorter than one window: give more text, or a smaller --seq-len",
        )
    return found


def entry_of(model: Model, tower: Tower, given: str, inputs: int) -> dict[str, Any]:
    """What a manifest says of one tower. given: what the model is called. inputs: how many it was given."""
    return {
        "given": given,
        "resolved": model.resolved,
        "family": model.family,
        "tower": tower.name,
        "takes": tower.input_kind,
        "layers": tower.depth,
        "skipped_numbers": {place.path: place.index for place in tower.places if place.why is not None},
        "meaning": dict(tower.meaning),
        "inputs": inputs,
        "notes": list(model.notes),
        **dict(model.facts),
        **dict(tower.facts),
    }


def shard_values(
    job: TowerJob,
    samples: Iterable[Sample],
    incidents: Incidents,
    *,
    first_input: int = 0,
    order: Sequence[Sample] | None = None,
    advance: Callable[[int], object] = lambda inputs: None,
) -> Iterator[LayerValues]:
    """Measures samples and yields the numbers of each batch and layer.

    first_input: the number of the first sample within the run. order: all samples of the run, these if None.
    advance: told how many inputs are done.
    Raises NotFinite where no input of a run's first shard has finite values: running on would tell no more.
    """
    asked = job.measurement
    for batch in measure(
        job.tower,
        samples,
        metrics=asked.computed,
        token_sets=job.token_sets,
        layers=asked.plan.layers,
        value_constants=job.removed,
        edits=asked.edits,
        blocks=job.blocks,
        sampling=asked.sampling,
        batch_size=job.size,
        incidents=incidents,
        whole=first_input == 0,
        order=order,
        carriers=job.carriers,
    ):
        for values in batch:
            yield replace(values, first_input=first_input + values.first_input)
        advance(len(batch[0].ids))


def _constants_of(model: Model, tower: Tower, plan: ProbePlan) -> dict[str, Any]:
    """The columns that are the same in every row of one tower; `float32` for a model without parameters."""
    dtype = next((parameter.dtype for parameter in model.module.parameters()), torch.float32)
    return {
        "model": model.name,
        "tower": tower.name,
        "patch_size": _size(tower.facts.get("patch_size")),
        "image_size": _size(tower.facts.get("image_size")),
        **columns_of(model.facts, tower.facts),
        "values": plan.values,
        "intervention": " ".join(plan.intervene) or "none",
        "dtype": str(dtype).removeprefix("torch."),
        "seed": plan.seed,
    }


def _blocks_of(model: Model, tower: Tower, asked: Measurement) -> Sequence[Block]:
    """The tower's blocks where the plan changes whole branches, those of its layers for stream metrics, and
    those that are understood for what sinks do.

    Empty where neither needs them. A layer whose queries are other tokens than its keys makes another stream
    than it reads, and has no stream metrics. Raises UserError, naming the layer, if a block is not
    understood.
    """
    if any(edit.where in BRANCHES for edit in asked.edits):
        return find_blocks(model.module, tower.layers)
    layers = pick_layers(tower.layers, asked.plan.layers, tower.places)
    if STREAM_METRICS.keys().isdisjoint(asked.metrics):
        return () if set(OF_PROJECTION).isdisjoint(asked.metrics) else understood_blocks(model.module, layers)
    return find_blocks(model.module, [layer for layer in layers if layer.form.keys_of != "others"])


def _carriers_of(model: Model, tower: Tower, asked: Measurement) -> Carriers | None:
    """Which image tokens carry sinks of the vision tower, of a language model that reads images.

    Raises UserError where followed sinks are asked of a model without one; its other towers have none.
    """
    followed = [name for name in asked.metrics if name in FOLLOWED_METRICS]
    if followed and "language" not in model.towers:
        raise UserError(
            f"'{followed[0]}' follows sinks of a vision tower into a language model; '{model.name}' is none",
            "give a vision-language model such as LLaVA, or leave the group 'followed' out of --metrics",
        )
    if not followed or tower.name != "language":
        return None
    return VisionSinks(model, tower, asked.plan.allow_random).classes


def _size(size: Any) -> Any:
    """A size as a table has it: one number, or `64x32` where height and width differ."""
    return "x".join(map(str, size)) if isinstance(size, tuple | list) else size
