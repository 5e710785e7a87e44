"""Fixtures of the model tests: tiny checkpoints, written once per session, and inputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import (
    TEXT,
    save_language_model,
    save_tokenizer,
    save_vision_language_model,
    save_vision_model,
)
from PIL import Image
from safetensors.torch import save_file

from diag.inputs.items import Inputs, Item


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind of model -> its Hugging Face folder, written when first asked for."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            text = kind in ("gpt2", "neox", "llama", "qwen3", "gemma2", "gpt-oss", "bert", "t5")
            save = save_language_model if text else save_vision_model
            if kind in ("llava", "qwen2_5_vl_whole"):
                save = save_vision_language_model
            made[kind] = save(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins for the embedded models: their architectures with random weights, in float16."""
    from diag.models.families.demo import build_lm, build_vit

    folder = tmp_path_factory.mktemp("embedded")
    torch.manual_seed(0)
    for patch_size in (16, 8, 4):
        state = {name: value.half() for name, value in build_vit(patch_size).state_dict().items()}
        save_file(state, folder / f"vit-p{patch_size}.safetensors")
        (folder / f"vit-p{patch_size}.json").write_text(json.dumps({"name": f"vit-p{patch_size}"}))
    model = build_lm()
    model.config.save_pretrained(folder / "lm")
    state = {name: value.half() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / "lm" / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(folder / "lm")
    return folder


@pytest.fixture(scope="session")
def photographs() -> Inputs:
    """Three random images of different modes and sizes."""
    noise = np.random.default_rng(0).integers(0, 256, (80, 100, 4), dtype=np.uint8)
    images = [
        Image.fromarray(noise[..., :3]),
        Image.fromarray(noise[:60, :, 0]),
        Image.fromarray(noise[:, :90]),
    ]
    items = [Item(f"image-{i}", lambda image=image: image) for i, image in enumerate(images)]
    return Inputs("images", "noise", items, "0")


@pytest.fixture(scope="session")
def texts() -> Inputs:
    """One text of some hundred tokens, and one that is too short for a window."""
    return Inputs("texts", "cats", [Item("long", lambda: TEXT), Item("short", lambda: "cat")], "0")
