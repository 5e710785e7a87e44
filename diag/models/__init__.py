"""The model families, one file each; this is the table that finds them, and imports none until it is used."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

from diag.errors import UserError

if TYPE_CHECKING:
    import torch

    from diag.models.base import Model
    from diag.models.names.resolve import ModelSpec

FAMILIES = {
    "timm": "diag.models.families.timm",
    "open_clip": "diag.models.families.open_clip",
    "hf": "diag.models.families.hf.load",
    "tl": "diag.models.families.lens",
    "demo": "diag.models.families.demo",
}
"""Family -> the module whose `load(spec, *, device, dtype) -> Model` loads it."""


def load(spec: ModelSpec, *, device: str | torch.device, dtype: torch.dtype) -> Model:
    """Loads what a spec names, in evaluation mode, with finite weights, and says which weights they are.

    Raises UserError if the weights are missing, damaged, do not fit, or if no attention of the
    model can be seen.
    """
    from diag.models.families.hf.device_map import SPREAD
    from diag.models.weights import digest

    if device == SPREAD and spec.family != "hf":
        raise UserError(
            f"'{spec.given}' is loaded onto one device, only hf: models can be spread",
            "--device auto or cuda:0",
        )
    model = import_module(FAMILIES[spec.family]).load(spec, device=device, dtype=dtype)
    facts = {
        "revision": spec.revision,
        "checkpoint": None if spec.checkpoint is None else str(spec.checkpoint),
        "model_args": dict(spec.model_args),
        "weights": "random" if spec.random_init else "loaded",
        "weights_sha256": digest(model.module),
    }
    notes = (*model.notes, "random weights: nothing was learned") if spec.random_init else model.notes
    return replace(model, notes=notes, facts={**facts, **model.facts})
