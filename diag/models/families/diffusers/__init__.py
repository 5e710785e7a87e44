"""Diffusion transformers: folders and hub repositories of pipelines of diffusers, or a transformer's folder.

What a name means is told here without diffusers; `load.py` loads it, `feeding.py` says how each class is
run, and `streams.py` which of its tokens are of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diag.inputs.outside import mapping_in
from diag.models.families.hf import folder_or_repository
from diag.models.family import Family, loaded_by

PIPELINE, TRANSFORMER = "model_index.json", "config.json"
"""What lies in the folder of a pipeline, and in that of a transformer alone."""

CLASSES = {
    "SD3Transformer2DModel": "Stable Diffusion 3",
    "FluxTransformer2DModel": "Flux",
    "PixArtTransformer2DModel": "PixArt",
    "SanaTransformer2DModel": "Sana",
}
"""Classes of diffusers that can be run here -> what people call them."""

TIME, MOST, USUAL = "t", 1000, 500
"""The argument behind a name that says how far an image is noised; all of it; and where none is given."""


def class_in(document: Mapping[str, Any]) -> str | None:
    """The class of the transformer that the document of a pipeline, or of a transformer alone, names."""
    part = document.get("transformer")
    named = part[-1] if isinstance(part, list) and part else document.get("_class_name")
    return named if isinstance(named, str) else None


def _in_folder(folder: Path, given: str) -> str | None:
    document = mapping_in(folder / PIPELINE) or mapping_in(folder / TRANSFORMER)
    return str(folder) if class_in(document) in CLASSES else None


FAMILY = Family(
    "diffusers",
    load=loaded_by("diag.models.families.diffusers.load"),
    named=folder_or_repository,
    in_folder=_in_folder,
    form="ORG/NAME",
    folders=True,
    needs=("diffusers", "torchvision"),
    packages=("diffusers",),
)
