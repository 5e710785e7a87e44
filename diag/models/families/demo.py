"""The models that travel inside the package: ViTs that differ in patch size, and a language model.

`vit-p16`, `vit-p8` and `vit-p4` are trained well; `grid-p16-sa`, `grid-p16-xsa` and so on are pairs of seed 0
of the experiment in docs/experiments/patch-sizes.md, trained shorter. `tools/embedded_models.py` makes them.
Their weights are stored in float16 under `EMBEDDED`. The ViTs take `img_size=`: their position embeddings are
interpolated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diag.errors import UserError, need
from diag.models.family import Family, Listed
from diag.models.names.spec import ModelSpec

if TYPE_CHECKING:
    import torch
    from timm.models.vision_transformer import VisionTransformer
    from transformers import GPT2LMHeadModel

    from diag.models.base import Model

VIT_CONFIG: dict[str, Any] = {"img_size": 64, "embed_dim": 96, "depth": 6, "num_heads": 3}
LM_CONFIG: dict[str, Any] = {"vocab_size": 2048, "n_positions": 256, "n_embd": 96, "n_layer": 6, "n_head": 3}
CLASSES = 14
EMBEDDED = Path(__file__).parent / "embedded"
"""Folder of the weights: `vit-p16.safetensors` with its card `vit-p16.json` and so on, and `lm/`."""
MODELS = {
    **{f"vit-p{patch}": (f"{(64 // patch) ** 2} patches + 1", "embedded, 64 px") for patch in (16, 8, 4)},
    **{
        f"grid-p{patch}-{variant}": (
            f"{(64 // patch) ** 2} patches + 1",
            f"embedded, 64 px; docs/experiments/patch-sizes.md, {told}",
        )
        for patch in (16, 8, 4)
        for variant, told in (("sa", "baseline"), ("xsa", "trained with xsa"))
    },
    "lm": ("text, 256", "embedded, GPT-2 architecture"),
}
"""Name -> what one input becomes, and what the model is."""


def build_vit(patch_size: int, image_size: int = VIT_CONFIG["img_size"]) -> VisionTransformer:
    """A randomly initialised ViT with the bundled photographs as classes."""
    from timm.models.vision_transformer import VisionTransformer

    sizes = {**VIT_CONFIG, "img_size": image_size, "patch_size": patch_size}
    return VisionTransformer(num_classes=CLASSES, **sizes)


def build_lm() -> GPT2LMHeadModel:
    """A randomly initialised causal language model with the architecture of GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        **LM_CONFIG, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def load(spec: ModelSpec, *, device: str | torch.device, dtype: torch.dtype) -> Model:
    """Loads `demo:vit-pN`, `demo:grid-pN-sa|xsa` (N = 16, 8, 4) or `demo:lm`, or its architecture alone.

    Raises UserError if the package lacks its weights, or its library is not installed.
    """
    taken = set() if spec.name == "lm" else {"img_size"}
    if spec.checkpoint is not None or spec.model_args.keys() - taken:
        also = f", or with an image size: -m {spec.base},img_size=128" if taken else ""
        raise UserError(
            f"'{spec.base}' comes with its own weights and sizes", f"use it alone: -m {spec.base}{also}"
        )
    need(f"'{spec.given}'", *(("transformers",) if spec.name == "lm" else ("timm", "torchvision")))
    if spec.name == "lm":
        return _load_lm(spec, device=device, dtype=dtype)
    return _load_vit(spec, device=device, dtype=dtype)


def _load_vit(spec: ModelSpec, *, device: str | torch.device, dtype: torch.dtype) -> Model:
    from torchvision.transforms import v2

    from diag.models.families.timm.load import filled, vision_model
    from diag.models.sizes import NATIVE, refuse_remainder, square

    patch = int(re.search(r"-p(\d+)", spec.name)[1])  # type: ignore[index]
    size = square(spec.model_args, spec.base) or VIT_CONFIG["img_size"]
    refuse_remainder((size, size), (patch, patch), spec.base)
    module = build_vit(patch, size)
    weights = EMBEDDED / f"{spec.name}.safetensors"
    fit_to = NATIVE
    if not spec.random_init:
        fit_to = filled(module, weights, f"embedded model '{weights.name}'", resampled_as=spec.name)
    preprocessing = {
        "size": [size, size],
        "crop": "shortest side, centre",
        "interpolation": "bilinear",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(size, interpolation=v2.InterpolationMode.BILINEAR, antialias=True),
            v2.CenterCrop(size),
            v2.Lambda(lambda pixels: pixels.float() / 127.5 - 1),  # as in training
        ]
    )
    model = vision_model(
        spec, module, transform, preprocessing=preprocessing, fit_to=fit_to, device=device, dtype=dtype
    )
    return replace(model, facts=_card(EMBEDDED / f"{spec.name}.json"))


def _load_lm(spec: ModelSpec, *, device: str | torch.device, dtype: torch.dtype) -> Model:
    from diag.models.families.hf.load import load as load_folder

    folder = EMBEDDED / "lm"
    if not (folder / "model.safetensors").is_file():
        raise UserError("the package holds no weights of 'demo:lm'", "install it again")
    model = load_folder(replace(spec, family="hf", name=str(folder)), device=device, dtype=dtype)
    return replace(model, family=spec.family, resolved=spec.resolved, facts=_card(folder / "card.json"))


def _card(file: Path) -> dict[str, Any]:
    return {"card": json.loads(file.read_text("utf-8"))} if file.is_file() else {}


def _named(spec: ModelSpec) -> ModelSpec:
    if spec.name not in MODELS:
        raise UserError(f"model '{spec.given}' not found", f"embedded models: {', '.join(_names())}")
    if spec.revision:
        raise UserError(f"model '{spec.given}': embedded models have no revisions", f"write demo:{spec.name}")
    return spec


def _names() -> Sequence[str]:
    return [f"demo:{name}" for name in MODELS]


def _row(name: str) -> Listed:
    tokens, note = MODELS[name.removeprefix("demo:")]
    return Listed(name, name, tokens, "this package's", note)


def _architecture(name: str) -> str:
    if name not in MODELS:
        return name
    return "GPT-2" if name == "lm" else "ViT with xsa" if name.endswith("-xsa") else "ViT"


FAMILY = Family(
    "demo",
    load=load,
    named=_named,
    names=_names,
    row=_row,
    always_listed=True,
    architecture=_architecture,
    reads_text=lambda spec: spec.name == "lm",
)
