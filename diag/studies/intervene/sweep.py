"""The sweep: a model run untouched and changed, layer after layer, on the same inputs.

Effects are paired: each input is run both ways. A case is one intervention with its strength on some layers:
`one` layer, all layers from the `first` up to one, or from one up to the `last`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from diag.measure.batch_readings import Incidents
from diag.measure.batch_size import BatchSize
from diag.measure.edited_model import beside_of, edited
from diag.measure.loop import pick_layers, run_batches, told_if_the_model_fails
from diag.measure.reconstruction import refuse_non_finite
from diag.models.base import Batch, Model, Sample, Tower
from diag.models.hooks.beside import HeldOut, Noted
from diag.models.hooks.block_parts import Block, find_blocks
from diag.models.hooks.interventions import Edit
from diag.models.hooks.layers import Layer
from diag.studies.intervene.effect import PassOutcome, effects

SCOPES = {
    "one": "one layer at a time",
    "first": "from the first layer up to this one",
    "last": "from this layer up to the last",
}


@dataclass(frozen=True)
class Case:
    """One change of the model: `edit` restricted to the layers of its scope. head is -1 for all heads."""

    edit: Edit
    scope: str
    layer: int
    head: int = -1

    @property
    def strength(self) -> float:
        """The edit's strength; NaN where a file gives one for each head."""
        return self.edit.strength if isinstance(self.edit.strength, float) else float("nan")


def cases(
    edits: Sequence[Edit], layers: Sequence[Layer], scopes: Sequence[str], heads: int = 0
) -> list[Case]:
    """Every case of a sweep; `heads`: also each of so many heads of each layer alone (0: no)."""
    found = []
    indices = [layer.index for layer in layers]
    for edit, scope, layer in itertools.product(edits, scopes, indices):
        if not edit.at(layer):
            continue
        chosen = {
            "one": {layer},
            "first": {i for i in indices if i <= layer},
            "last": {i for i in indices if i >= layer},
        }
        among = frozenset(i for i in chosen[scope] if edit.at(i))
        found.append(Case(replace(edit, layers=among), scope, layer))
    for edit, layer, head in itertools.product(edits, indices, range(heads)):
        if edit.where == "attention" and edit.at(layer) and (edit.heads is None or head in edit.heads):
            alone = replace(edit, layers=frozenset({layer}), heads=frozenset({head}))
            found.append(Case(alone, "one", layer, head))
    return found


def sweep(
    model: Model,
    tower: Tower,
    samples: Sequence[Sample],
    todo: Sequence[Case],
    *,
    batch_size: int | BatchSize = 8,
    labels: Mapping[str, int] | None = None,
    classify: Callable[[Tensor], Tensor] | None = None,
    held_out: HeldOut | None = None,
    incidents: Incidents | None = None,
    advance: Callable[[int], object] = lambda inputs: None,
) -> pd.DataFrame:
    """Runs every input untouched and under every case: one row per case, effect and input.

    labels: the true class by input id, where it is known. classify: embeddings → class logits (zero-shot).
    held_out: what other inputs gave, where an edit takes it.
    batch_size, incidents: as in `diag.measure.loop.run_batches`.
    Columns: intervention, strength, scope, layer, head (-1: all), effect, input, input_index, value.
    Raises UserError where a single input does not fit into memory.
    """
    layers = pick_layers(tower.layers, None)
    head = None if tower.language_head is None else tower.language_head()
    runner = _Runner(tower, layers, find_blocks(model.module, layers), head, classify, held_out)

    def changed(chunk: Sequence[Sample], batch: Batch, first_input: int) -> list[pd.DataFrame]:
        truth = torch.tensor([(labels or {}).get(sample.id, -1) for sample in chunk])
        untouched = runner.outcome(batch, (), truth)
        assert untouched.states is not None
        refuse_non_finite(untouched.states, batch, runner.blocks[-1].path)
        return [
            pd.DataFrame(
                {
                    "intervention": case.edit.name,
                    "strength": case.strength,
                    "scope": case.scope,
                    "layer": case.layer,
                    "head": case.head,
                    "effect": name,
                    "input": list(batch.ids),
                    "input_index": np.arange(len(chunk)) + first_input,
                    "value": value.cpu().numpy(),
                }
            )
            for case in todo
            for name, value in effects(untouched, runner.outcome(batch, (case.edit,), truth)).items()
        ]

    rows: list[pd.DataFrame] = []
    for found in run_batches(tower, samples, changed, batch_size=batch_size, incidents=incidents):
        rows += found
        advance(len(found[0]))
    return pd.concat(rows, ignore_index=True)


@dataclass(frozen=True)
class _Runner:
    """A tower with all that it takes to run it changed and read what it ends in."""

    tower: Tower
    layers: Sequence[Layer]
    blocks: Sequence[Block]
    head: nn.Module | None
    classify: Callable[[Tensor], Tensor] | None
    held_out: HeldOut | None

    def outcome(self, batch: Batch, edits: Sequence[Edit], labels: Tensor) -> PassOutcome:
        """What one forward pass with the edits ends in."""
        tower, states, noted = self.tower, [], Noted()
        beside = beside_of(tower, batch, self.held_out, noted)

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            states.append(output[0] if isinstance(output, tuple) else output)

        handle = self.blocks[-1].module.register_forward_hook(keep)
        try:
            changed = edited(tower, self.layers, self.blocks, edits, batch.real, beside)
            with torch.inference_mode(), told_if_the_model_fails(tower, batch), changed:
                result = tower.forward(batch)
                ended = result if isinstance(result, Tensor) else None
                logits = ended if tower.ending == "next-token logits" else None
                if self.head is not None:
                    logits = self.head(result.last_hidden_state)
        finally:
            handle.remove()
        embedding = ended if tower.ending == "embedding" else getattr(result, "pooler_output", None)
        scores = ended if tower.ending == "class logits" else None
        if self.classify is not None and embedding is not None:
            scores = self.classify(embedding)
        return PassOutcome(
            next_logits=logits,
            ids=None if logits is None else batch.data,
            bytes=None
            if logits is None or tower.decode is None
            else predicted_bytes(tower.decode, batch.data),
            class_logits=scores,
            embedding=embedding,
            states=states[-1],
            labels=labels.to(states[-1].device) if (labels >= 0).any() else None,
            counted=_counted(tower, batch, states[-1], noted.sinks),
            kept=_kept(len(batch.ids), noted.kept) if edits else states[-1].new_ones(len(batch.ids)),
        )


def _counted(tower: Tower, batch: Batch, states: Tensor, sinks: Sequence[Tensor]) -> Tensor | None:
    """Which states are of patches, or of real tokens where there are none, and are no edited sinks.

    `[input, token]`; None where rows are no inputs. Sinks of windows, and of keys that are others than the
    last block's tokens, are nowhere among them.
    """
    inputs, tokens = len(batch.ids), math.prod(states.shape[1:-1])
    if len(states) != inputs:
        return None
    counted = torch.ones(inputs, tokens, dtype=torch.bool, device=states.device)
    if "patch" in tower.token_sets:
        counted &= tower.tokens_in("patch", tokens).to(states.device)
    if batch.real is not None and batch.real.shape == counted.shape:
        counted &= batch.real.to(states.device)
    for found in sinks:
        if found.shape == counted.shape:
            counted &= ~found
    return counted


def _kept(inputs: int, kept: Sequence[Tensor]) -> Tensor | None:
    """The mean over calls, layers and windows of what each row kept; None where no edit says."""
    each = [x.double().unflatten(0, (inputs, -1)).mean(1) for x in kept]
    return torch.stack(each).mean(0) if each else None


def predicted_bytes(decode: Callable[[Sequence[int]], str], ids: Tensor) -> Tensor:
    """Bytes of UTF-8 that all tokens but the first stand for, `[batch]`.

    A character cut by the window's edge counts as the three bytes of the replacement character.
    """
    return torch.tensor([len(decode(row).encode()) for row in ids[:, 1:].tolist()], device=ids.device)
