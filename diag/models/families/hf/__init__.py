"""Hugging Face models: folders that `save_pretrained` wrote, hub repositories, and short names of these.

What a name means is told here; `load.py` and its neighbours load files, towers and heads.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diag.errors import UserError, one_of
from diag.inputs.outside import json_of
from diag.models.families.hf.formats import adapted, gguf_in, refuse_part_of_pipeline
from diag.models.family import Family, loaded_by
from diag.models.names.aliases import aliases
from diag.models.names.spec import ModelSpec, expanded, folder_named, looks_like_path

OF_IMAGES = frozenset({"vision_config", "image_size", "num_channels", "patch_size", "image_token_id"})
"""Keys of the configs of models that take images."""

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
    if os.path.isfile(expanded(spec.name)):  # also for what is too long to be a path
        raise UserError(f"'{spec.name}' is a file", f"{spec.family}: takes the folder around it, or ORG/NAME")
    if looks_like_path(spec.name):
        raise UserError(f"folder '{spec.name}' does not exist", f"{spec.family}: takes a folder or ORG/NAME")
    return spec


def _in_folder(folder: Path, given: str) -> str:
    """Any folder with a config, or what else is read. Raises UserError as `config_of` and `adapted` do."""
    if adapted(folder) is None and gguf_in(folder) is None:
        config_of(folder, given)
    return str(folder)


def commit_of(spec: ModelSpec) -> str | None:
    """The commit of the hub repository that a spec names; None for a folder, and where it cannot be told.

    Where the cache knows none, the repository is asked for its config, as loading it would do: a first run
    has the key of the next one.
    """
    if folder_named(spec.name) or find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        file = try_to_load_from_cache(spec.name, "config.json", revision=spec.revision)
        if file is None:
            file = hf_hub_download(spec.name, "config.json", revision=spec.revision)
    except Exception:  # of a name, a network or a licence; loading it tells which
        return None
    return Path(file).parent.name if isinstance(file, str) else None


def reads_text(spec: ModelSpec) -> bool:
    """Whether nothing in a model's config is about images; also where there is no config yet.

    Most names on the hub that are typed without a family are of language models.
    """
    folder = folder_named(spec.name)
    if folder is None:
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(spec.name, "config.json", revision=spec.revision)
        folder = Path(file).parent if isinstance(file, str) else None
    try:
        config = {} if folder is None else config_of(folder)
    except UserError:  # which is told where it is loaded
        return True
    return OF_IMAGES.isdisjoint(config)


def config_of(folder: Path, given: str | None = None) -> dict[str, Any]:
    """What the config of a folder says, which names its model type.

    given: the folder as it was typed.
    Raises UserError for a folder without one, saying what it is instead, and for one that cannot be read.
    """
    file, given = folder / "config.json", given or str(folder)
    if not os.path.lexists(file):
        raise _no_model(folder, given)
    config = json_of(file, "config", tip="save the model again with save_pretrained")
    refuse_part_of_pipeline(folder, config)
    if not isinstance(config.get("model_type"), str):
        raise UserError(
            f"'{file}' names no model_type",
            "-m takes a folder that save_pretrained or timm wrote, or a model's name",
        )
    return config


def _no_model(folder: Path, given: str) -> UserError:
    """What a folder without a config is, and what to type instead."""
    if (folder / "model_index.json").exists():
        parts = [part.parent.name for part in sorted(folder.glob("*encoder*/config.json"))]
        return UserError(
            f"folder '{given}' holds a pipeline of diffusers, not a model",
            f"give one of its encoders: -m {one_of(str(folder / part) for part in parts)}"
            if parts
            else "give the folder of a text or vision transformer",
        )
    return UserError(
        f"folder '{given}' has no config.json",
        "-m takes a folder that save_pretrained wrote, or a model's name",
    )


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
    needs=("transformers",),
    packages=("transformers",),
    commit=commit_of,
    reads_text=reads_text,
)
