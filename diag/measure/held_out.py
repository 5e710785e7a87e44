"""What the untouched model gives for other inputs: the means and donors that interventions take from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.errors import UserError
from diag.measure.batch_readings import Incidents
from diag.measure.batch_size import BatchSize
from diag.measure.edited_model import beside_of
from diag.measure.loop import run_batches, told_if_the_model_fails
from diag.models.base import Batch, Sample, Tower
from diag.models.hooks.beside import Beside, HeldOut, HeldOutLayer
from diag.models.hooks.edited_sinks import dominant_keys, value_at
from diag.models.hooks.layers import Layer

HELD_OUT = 16
"""How many other inputs are run."""


def held_out_samples(samples: Sequence[Sample]) -> list[Sample]:
    """The samples behind those that are measured, up to `HELD_OUT`; where they are fewer, the last measured
    ones as well, of which none is ever given to itself.

    samples: the measured ones, and those behind them. Raises UserError where there is one input alone.
    """
    if len({sample.id for sample in samples}) < 2:
        raise UserError(
            "means and donors are of other inputs than the one that is changed, and there is one alone",
            "give two inputs or more",
        )
    return list(samples[-HELD_OUT:])


def held_out(
    tower: Tower,
    samples: Sequence[Sample],
    layers: Sequence[Layer],
    *,
    seed: int = 0,
    batch_size: int | BatchSize = 8,
) -> HeldOut:
    """Runs the untouched tower and keeps of each input and layer: y averaged over its tokens, the value of
    each head's dominant key, and an ordinary one.

    seed: of which key is the ordinary one. Of a layer that attends in windows, keys are of the first.
    Raises UserError where fewer than two of the samples can be run.
    """
    found: dict[int, list[HeldOutLayer]] = {layer.index: [] for layer in layers}
    ids: list[str] = []

    def run(chunk: Sequence[Sample], batch: Batch, first_input: int) -> None:
        beside, of_batch = beside_of(tower, batch), dict[int, list[HeldOutLayer]]()

        def on_call(call: AttentionCall) -> None:
            of_batch.setdefault(call.layer, []).append(_of_call(call, beside, seed))

        watched = tower.capture(layers, on_call)
        with torch.inference_mode(), told_if_the_model_fails(tower, batch), watched:
            tower.forward(batch)
        for index, calls in of_batch.items():
            output = torch.stack([one.output for one in calls]).mean(0)
            found[index].append(HeldOutLayer(output, calls[0].sink, calls[0].ordinary))
        ids.extend(batch.ids)

    for _ in run_batches(tower, samples, run, batch_size=batch_size, incidents=Incidents()):
        pass
    if len(set(ids)) < 2:
        raise UserError(
            f"of {len(samples)} held-out inputs {len(ids)} can be run: means and donors take two or more",
            "give other inputs, or more of them",
        )
    return HeldOut(
        tuple(ids),
        {
            index: HeldOutLayer(
                *(torch.cat([getattr(one, x.name) for one in parts]) for x in fields(HeldOutLayer))
            )
            for index, parts in found.items()
            if parts
        },
    )


def _of_call(call: AttentionCall, beside: Beside, seed: int) -> HeldOutLayer:
    queries, inputs = beside.queries(call), len(beside.ids)
    windows = call.batch // inputs
    weights = queries[:, None, :, None].float()

    def of_input(x: Tensor) -> Tensor:
        return x.unflatten(0, (inputs, windows))

    total = of_input((call.output.float() * weights).sum(2)).sum(1)
    output = total / of_input(weights.sum(2)).sum(1).clamp(min=1)
    if not call.has_pattern:
        nowhere = torch.full_like(output, torch.nan)
        return HeldOutLayer(output.cpu(), nowhere.cpu(), nowhere.cpu())
    places = dominant_keys(call, queries, seed)
    sink, ordinary = (of_input(value_at(call, place))[:, 0].float().cpu() for place in places)
    return HeldOutLayer(output.cpu(), sink, ordinary)
