"""Trained models as folders in the formats of timm and transformers, with the variant remembered.

`timm.create_model("local-dir:FOLDER")` and `AutoModel.from_pretrained(FOLDER)` take them too, as the
unchanged model: only attnbias knows the variant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diag.errors import UserError, need
from diag.variants import METADATA, variants_in

ARCHITECTURE = "vit_tiny_patch16_224"
"""Whose constructor is used where a plan names none; its sizes are arguments."""


def timm_model(arguments: Mapping[str, Any], patch_size: int | None, classes: int) -> nn.Module:
    """A timm ViT with random weights from a plan's `model`.

    Raises UserError for arguments that timm refuses, and where it is not installed.
    """
    need("an image model to train", "timm")
    import timm

    sizes = {key: value for key, value in arguments.items() if key != "architecture"}
    name = str(arguments.get("architecture", ARCHITECTURE))
    try:
        return timm.create_model(name, num_classes=classes, patch_size=patch_size, **sizes)
    except Exception as error:  # of any constructor, and of memory that is not there
        raise UserError(
            f"timm cannot build '{name}' with patch size {patch_size} and {sizes}: {str(error)[:120]}",
            "model: takes architecture and arguments of its constructor",
        ) from None


def save_timm(model: Any, arguments: Mapping[str, Any], folder: Path, classes: Sequence[str]) -> None:
    """config.json and model.safetensors as timm reads them from a local folder."""
    embed = model.patch_embed
    size = list(embed.img_size)
    sizes = {key: value for key, value in arguments.items() if key != "architecture"}
    config = {
        "architecture": arguments.get("architecture", ARCHITECTURE),
        "num_classes": len(classes),
        "label_names": list(classes),
        "model_args": {**sizes, "patch_size": embed.patch_size[0]},
        "pretrained_cfg": {
            "input_size": [3, *size],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "num_classes": len(classes),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        METADATA: variants_in(model),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_weights(model, folder / "model.safetensors")


def save_transformers(model: Any, tokenizer: Any, folder: Path) -> None:
    """config.json, model.safetensors and the tokenizer's files as transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    setattr(model.config, METADATA, variants_in(model))
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    save_weights(model, folder / "model.safetensors", without=tied)


def save_weights(model: nn.Module, file: Path, without: set[str] | None = None) -> None:
    """A model's state as safetensors, its variant in the header."""
    tensors: dict[str, Tensor] = {
        name: tensor.detach().cpu().contiguous().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
        if name not in (without or ())
    }
    save_file(tensors, file, metadata={"format": "pt", METADATA: json.dumps(variants_in(model))})
