"""Folders that hold something else than a whole model in safetensors, and what reads them.

An adapter is read with peft, onto the model that it names; GGUF with gguf; quantised weights with whatever
library their config names. Where that is not installed, one sentence says so. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diag.errors import UserError, one_of
from diag.inputs.outside import json_of

ADAPTER = "adapter_config.json"
CONFIG = "config.json"


def adapted(folder: Path) -> str | None:
    """The model that a folder with an adapter alone is an adapter of; None for any other folder.

    Raises UserError where peft is not installed, and for an adapter that names no model.
    """
    file = folder / ADAPTER
    if not file.is_file() or (folder / CONFIG).exists():
        return None
    what = f"folder '{folder}' holds an adapter, not a model"
    merge = "merge it into its model: merge_and_unload(), then save_pretrained(FOLDER)"
    if find_spec("peft") is None:
        raise UserError(
            f"{what}, and peft, which reads it, is not installed", f"pip install peft, or {merge}"
        )
    base = json_of(file, "adapter config", tip="save it again with save_pretrained").get(
        "base_model_name_or_path"
    )
    if not isinstance(base, str) or not base:
        raise UserError(f"{what}, and does not say of which", merge)
    return base


def gguf_in(folder: Path) -> str | None:
    """The file that holds the model of a folder in GGUF; None for any other folder.

    Raises UserError where gguf is not installed, and for several such files.
    """
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if not files or (folder / CONFIG).exists() or (folder / ADAPTER).exists():
        return None
    if find_spec("gguf") is None:
        raise UserError(
            f"folder '{folder}' holds a model in GGUF, and gguf, which reads it, is not installed",
            "pip install gguf, or give the model that it was made from, with config.json and safetensors",
        )
    if len(files) > 1:
        raise UserError(f"folder '{folder}' holds several models in GGUF: {one_of(files)}", "leave one there")
    return files[0]


def refuse_part_of_pipeline(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError for a part of a pipeline of diffusers, which is no model of transformers."""
    if "_diffusers_version" in config:
        kind = config.get("_class_name", "a part of a pipeline")
        raise UserError(
            f"folder '{folder}' holds {kind} of diffusers, not a model of transformers",
            "give a text or vision encoder of its pipeline, or a diffusion transformer as diffusers:FOLDER",
        )


def quantisation(config: Any) -> str | None:
    """The method by which the weights of a config are quantised; None where they are not."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    return None if found is None else str(getattr(method, "value", method))
