"""Every model that can be measured: what its name means, how it is loaded, where it can be seen."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from diag.errors import UserError, need
from diag.models.families import all_families, family_of
from diag.models.family import SPREAD
from diag.models.names.spec import ModelSpec

if TYPE_CHECKING:
    import torch

    from diag.models.base import Model, Tower


def load(spec: ModelSpec, *, device: str | torch.device, dtype: torch.dtype) -> Model:
    """Loads what a spec names, in evaluation mode, with finite weights, and says which weights they are.

    Raises UserError if the family's library is not installed, if the weights are missing, damaged or do not
    fit, or if no attention of the model can be seen.
    """
    from diag.models.loading import seeded, single_precision
    from diag.models.weights import digest

    family = family_of(spec.family)
    need(f"'{spec.given}'", *family.needs)
    if device == SPREAD and not family.spreads:
        able = ", ".join(f"{other.prefix}:" for other in all_families() if other.spreads)
        raise UserError(
            f"'{spec.given}' is loaded onto one device, only {able} models can be spread",
            "--device auto or cuda:0",
        )
    # random weights are the same in every process, and whenever a run goes on
    with single_precision(), seeded(spec.seed) if spec.random_init else nullcontext():
        model = family.load(spec, device=device, dtype=dtype)
    towers = {name: in_single_precision(tower) for name, tower in model.towers.items()}
    facts = {
        "revision": spec.revision,
        "checkpoint": None if spec.checkpoint is None else str(spec.checkpoint),
        "model_args": dict(spec.model_args),
        "weights": "random" if spec.random_init else "loaded",
        "weights_sha256": digest(model.module),
    }
    notes = [*([spec.note] if spec.note else []), *model.notes]
    if spec.random_init:
        notes.append("random weights: nothing was learned")
    return replace(model, towers=towers, notes=tuple(dict.fromkeys(notes)), facts={**facts, **model.facts})


def in_single_precision(tower: Tower) -> Tower:
    """The tower as its library meant it: what it makes as it runs is float32 unless it says else."""
    from diag.models.loading import single_precision

    steps = {name: getattr(tower, name) for name in ("prepare", "encode", "forward", "language_head")}
    return replace(tower, **{name: single_precision()(step) for name, step in steps.items() if step})
