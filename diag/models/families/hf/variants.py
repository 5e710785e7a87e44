"""Trained attention variants in Hugging Face folders: config.json says which module is what.

transformers itself loads such a folder as the unchanged model, and leaves out what a change has learned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diag.models.weights import fit, read_checkpoint
from diag.variants import METADATA, restore


def restore_variants(module: Any, folder: Path) -> None:
    """Makes a model that transformers loaded from `folder` what it was when it was saved.

    Nothing happens where the config names no change. Raises UserError where weights of a change are missing.
    """
    kinds = getattr(module.config, METADATA, None)
    if not kinds:
        return
    prefix = f"{module.base_model_prefix}."  # the folder may hold the model with its head
    restore(module, {path.removeprefix(prefix): kind for path, kind in kinds.items()})
    stored = {
        name.removeprefix(prefix): tensor
        for name, tensor in read_checkpoint(folder / "model.safetensors").items()
        if ".change." in name
    }
    for path in kinds:
        within = f"{path.removeprefix(prefix)}.change."
        own = {name.removeprefix(within): t for name, t in stored.items() if name.startswith(within)}
        fit(module.get_submodule(within[:-1]), own, f"'{folder / 'model.safetensors'}'")
