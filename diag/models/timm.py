"""timm vision transformers: published weights, hub and local folders, or one's own checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import timm
import timm.data
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from diag.errors import UserError
from diag.models.base import Model, Tower
from diag.models.loading import (
    first_line,
    hub,
    image_encoder,
    image_samples,
    layers_of,
    quiet,
    ready,
    unknown_argument,
)
from diag.models.names import ModelSpec
from diag.models.weights import fit, read_checkpoint

MODEL_ARGUMENTS = ("img_size", "patch_size", "num_classes", "embed_dim", "depth", "num_heads")


def load(spec: ModelSpec, *, device: str | torch.device, dtype: torch.dtype) -> Model:
    """Loads `timm:NAME`. Raises UserError as `diag.models.load` does."""
    own = spec.checkpoint is not None or spec.random_init
    module = _create(spec, pretrained=not own)
    if spec.checkpoint is not None:
        fit(module, read_checkpoint(spec.checkpoint), f"checkpoint '{spec.checkpoint}'")
    fuse(module)
    ready(module, spec.resolved, device=device, dtype=dtype)
    config = _data_config(module)
    tower = vision_tower(
        module,
        timm.data.create_transform(**config, is_training=False),
        source=spec.resolved,
        preprocessing=_preprocessing(config),
        image_size=config["input_size"][1:],
        device=device,
        dtype=dtype,
    )
    notes = (spec.note,) if spec.note else ()
    licence = getattr(module, "pretrained_cfg", {}).get("license")
    return Model(
        spec.given,
        spec.family,
        spec.resolved,
        module,
        {"vision": tower},
        notes,
        {"licence": licence} if licence else {},
    )


def vision_tower(
    module: nn.Module,
    transform: Callable[..., Tensor],
    *,
    source: str,
    preprocessing: Mapping[str, Any],
    image_size: tuple[int, int],
    device: str | torch.device,
    dtype: torch.dtype,
) -> Tower:
    """The tower of a timm module; `transform` takes an RGB image to `[3, height, width]`."""
    return Tower(
        name="vision",
        layers=layers_of(module, source, "vision"),
        samples=image_samples,
        encode=image_encoder(transform, device=device, dtype=dtype),
        forward=lambda batch: module(batch.data),
        prefix=prefix_of(module),
        facts={
            "patch_size": patch_size_of(module),
            "image_size": _plain(image_size),
            "preprocessing": dict(preprocessing),
        },
    )


def fuse(module: nn.Module) -> None:
    """Lets every timm attention module call PyTorch's attention.

    They compute softmax themselves under TIMM_FUSED_ATTN=0, and Swin's windows do so by default.
    """
    child: Any
    for child in module.modules():
        if hasattr(child, "fused_attn"):
            child.fused_attn = True


def prefix_of(module: nn.Module) -> tuple[str, ...]:
    """Kinds of the tokens before the patches. DeiT's distillation token is a second class token."""
    count = getattr(module, "num_prefix_tokens", 0)
    if not count:
        return ()
    holders = [module, getattr(module, "embeds", None)]
    kinds: list[str] = []
    for name, kind in (("cls_token", "cls"), ("dist_token", "cls"), ("reg_token", "registers")):
        tokens = [token for holder in holders if isinstance(token := getattr(holder, name, None), Tensor)]
        kinds += [kind] * (tokens[0].shape[1] if tokens else 0)
    if len(kinds) != count:
        raise UserError(
            f"{type(module).__name__} puts {count} tokens before its patches; {len(kinds)} are understood",
            "measure another model, or report this one",
        )
    return tuple(kinds)


def patch_size_of(module: nn.Module) -> int | tuple[int, int] | None:
    """The side of a patch in pixels; None where the model has no patch embedding."""
    for holder in (getattr(module, "patch_embed", None), getattr(module, "embeds", None)):
        size = getattr(holder, "patch_size", None)
        if size is not None:
            return size if isinstance(size, int) else _plain(size)
    return None


def _plain(size: tuple[int, int]) -> int | tuple[int, int]:
    return size[0] if size[0] == size[1] else (size[0], size[1])


def _create(spec: ModelSpec, *, pretrained: bool) -> nn.Module:
    name, arguments = spec.name, dict(spec.model_args)
    remote = name.startswith("hf-hub:")
    local = name.startswith("local-dir:")
    repository = name.removeprefix("hf-hub:")
    files = "config.json model.safetensors" if remote else "model.safetensors"
    if pretrained and not remote and not local:
        config = get_pretrained_cfg(name)
        if config is None or not config.has_weights:
            raise UserError(
                f"'{spec.resolved}' has no published weights",
                "give your own with --checkpoint FILE, or --random-init",
            )
        repository = config.hf_hub_id or name
        if spec.revision:
            arguments["pretrained_cfg_overlay"] = {"hf_hub_id": f"{config.hf_hub_id}@{spec.revision}"}
    elif remote and spec.revision:
        name = f"{name}@{spec.revision}"
    try:
        with quiet(), hub(repository, "model.safetensors", download=files, revision=spec.revision):
            return timm.create_model(name, pretrained=pretrained, **arguments)
    except UserError:
        raise
    except TypeError as error:
        match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if match and match[1] in spec.model_args:
            raise unknown_argument(match[1], MODEL_ARGUMENTS, spec.resolved) from None
        raise
    except (RuntimeError, ValueError, FileNotFoundError, AssertionError) as error:
        raise UserError(
            f"{spec.resolved} cannot be built: {first_line(error)}",
            "check --model-arg; 'attnbias models QUERY' shows what the published model takes",
        ) from error


def _data_config(module: nn.Module) -> dict[str, Any]:
    """timm's preprocessing of the weights, at the size that the model was built for."""
    config = timm.data.resolve_model_data_config(module)
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    return config if size is None else {**config, "input_size": (3, *size)}


def _preprocessing(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "size": list(config["input_size"][1:]),
        "crop": f"{config['crop_mode']} {config['crop_pct']}",
        "interpolation": config["interpolation"],
        "mean": list(config["mean"]),
        "std": list(config["std"]),
    }
