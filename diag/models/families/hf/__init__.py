"""Hugging Face models: folders that `save_pretrained` wrote, hub repositories, and short names of these.

What a name means is told here; `load.py` and its neighbours load files, towers and heads.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diag.errors import UserError
from diag.models.family import Family
from diag.models.names.aliases import aliases
from diag.models.names.spec import ModelSpec, folder_named, looks_like_path

if TYPE_CHECKING:
    import torch

    from diag.models.base import Model

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def folder_or_repository(spec: ModelSpec) -> ModelSpec:
    """A spec whose name is a folder or ORG/NAME, also where it was the short name of one.

    Raises UserError for a folder that is not there.
    """
    if folder_named(spec.name):
        return spec
    alias = aliases().get(spec.name.lower(), {}).get("model", "")
    if alias.startswith("hf:"):
        return replace(spec, name=alias.removeprefix("hf:"))
    if looks_like_path(spec.name):
        raise UserError(f"folder '{spec.name}' does not exist", f"{spec.family}: takes a folder or ORG/NAME")
    return spec


def _claims(spec: ModelSpec) -> bool:
    return _HUB_NAME.fullmatch(spec.name) is not None


def _in_folder(folder: Path, given: str) -> str:
    """Any folder with a config. Raises UserError for one without, or whose config is not JSON."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(
            f"folder '{given}' has no config.json",
            "-m takes a folder that save_pretrained wrote, or a model's name",
        )
    try:
        json.loads(file.read_text())
    except ValueError as error:
        raise UserError(
            f"'{file}' is not JSON: {error}", "save the model again with save_pretrained"
        ) from None
    return str(folder)


def _load(spec: ModelSpec, *, device: str | torch.device, dtype: torch.dtype) -> Model:
    from diag.models.families.hf.load import load

    return load(spec, device=device, dtype=dtype)


FAMILY = Family(
    "hf",
    load=_load,
    named=folder_or_repository,
    claims=_claims,
    in_folder=_in_folder,
    fallback=True,
    folders=True,
    spreads=True,
    packages=("transformers",),
)
