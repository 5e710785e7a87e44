"""The tokens of every image after every block, on the disk while a readout needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diag.attention.states import BlockStates
from diag.errors import UserError
from diag.measure.batch_readings import Incidents
from diag.measure.batch_size import BatchSize
from diag.measure.loop import measure, run_batches, told_if_the_model_fails
from diag.models.base import Batch, Model, Sample, Tower
from diag.models.hooks.block_parts import find_blocks
from diag.models.hooks.layers import Layer
from diag.models.hooks.residual import stream_states

FILES = ".features"
"""Where in a folder they lie."""


@dataclass
class Features:
    """Features of images, in their order. ids: those that could be read.

    tokens: layer → `[image, patch, dim]` of the stream after the layer's block, float32, in a file that is
    mapped. cls: layer → `[image, dim]`, where the model has a class token.
    """

    ids: list[str] = field(default_factory=list)
    tokens: dict[int, np.ndarray] = field(default_factory=dict)
    cls: dict[int, np.ndarray] = field(default_factory=dict)


def features_of(
    model: Model,
    tower: Tower,
    samples: Sequence[Sample],
    layers: Sequence[Layer],
    folder: Path,
    *,
    batch_size: BatchSize,
    incidents: Incidents,
    advance: Callable[[int], object],
) -> Features:
    """Runs the model once over all images. Raises UserError where a block is not understood."""
    blocks, found = find_blocks(model.module, layers), Features()
    folder.mkdir(exist_ok=True)

    def stored(name: str, rows: Tensor) -> np.ndarray:
        shape = (len(samples), *rows.shape[1:])
        return np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=shape)

    def run(chunk: Sequence[Sample], batch: Batch, first: int) -> tuple[str, ...]:
        def keep(states: BlockStates) -> None:
            if states.batch != len(batch.ids):
                raise UserError(
                    f"layer {states.layer} runs {states.batch} rows for {len(batch.ids)} images",
                    "leave it out with --layers",
                )
            for kind, into in (("patch", found.tokens), ("cls", found.cls)):
                where = tower.tokens_in(kind, states.tokens) if kind in tower.token_sets else None
                if where is None or not where.any():
                    continue
                rows = states.after[:, where.to(states.after.device)].float().cpu()
                rows = rows if kind == "patch" else rows[:, 0]
                if states.layer not in into:
                    into[states.layer] = stored(f"{kind}-{states.layer:03d}", rows)
                into[states.layer][first : first + len(rows)] = rows.numpy()

        watched = stream_states(blocks, keep)
        with torch.inference_mode(), told_if_the_model_fails(tower, batch), watched:
            tower.forward(batch)
        return batch.ids

    for ids in run_batches(tower, samples, run, batch_size=batch_size, incidents=incidents):
        found.ids += ids
        advance(len(ids))
    for arrays in (found.tokens, found.cls):
        for layer, array in arrays.items():
            arrays[layer] = array[: len(found.ids)]
    return found


def metrics_of(
    tower: Tower,
    samples: Sequence[Sample],
    layers: Sequence[Layer],
    metrics: Sequence[str],
    *,
    batch_size: BatchSize,
    advance: Callable[[int], object],
) -> Mapping[str, tuple[list[str], np.ndarray]]:
    """What a probe measures of the same images: metric → ids, and `[image, layer]`, heads averaged."""
    ids, rows = list[str](), list[np.ndarray]()
    indices = [layer.index for layer in layers]
    found = measure(
        tower, samples, metrics=metrics, token_sets=["patch"], layers=indices, batch_size=batch_size
    )
    for batch in found:
        by_layer = {values.layer: values for values in batch}
        ids += batch[0].ids
        rows.append(np.stack([by_layer[index].values[0].mean(-1) for index in indices], -1))
        advance(len(batch[0].ids))
    table = np.concatenate(rows, 1)  # [metric, image, layer]
    return {name: (ids, table[place]) for place, name in enumerate(metrics)}
