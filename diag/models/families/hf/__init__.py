"""Hugging Face models: folders that `save_pretrained` wrote, hub repositories, and short names of these.

What a name means is told here; `load.py` and its neighbours load files, towers and heads.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from diag.errors import UserError
from diag.models.family import Family, loaded_by
from diag.models.names.aliases import aliases
from diag.models.names.spec import ModelSpec, folder_named, looks_like_path

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


FAMILY = Family(
    "hf",
    load=loaded_by("diag.models.families.hf.load"),
    named=folder_or_repository,
    claims=lambda spec: _HUB_NAME.fullmatch(spec.name) is not None,
    in_folder=_in_folder,
    fallback=True,
    form="ORG/NAME",
    folders=True,
    spreads=True,
    packages=("transformers",),
)
