"""timm vision transformers: published weights, hub and local folders, or one's own checkpoint.

At another image or patch size timm interpolates position embeddings and resamples the patch embedding of
published weights while it loads them; `resampled` does the same, with timm's functions, to other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from diag.errors import UserError
from diag.inputs.outside import json_of
from diag.models.base import Model, Tower
from diag.models.checkpoint import read_checkpoint, read_variants
from diag.models.encoding import image_encoder, image_preparation, image_samples
from diag.models.first_layer import placed
from diag.models.hooks.layers import Layer
from diag.models.loading import constructing, hub, layers_of, quiet, ready, theirs
from diag.models.names.spec import HUB, LOCAL, SCHEMAS, ModelSpec
from diag.models.sizes import (
    IMAGE,
    NATIVE,
    PATCH,
    Fitted,
    Sides,
    fitted,
    plain,
    refuse_remainder,
    refuse_too_large,
    refuse_unreasonable,
    requested,
    sides,
)
from diag.models.weights import fit
from diag.variants import described, restore

MODEL_ARGUMENTS = ("img_size", "patch_size", "num_classes", "embed_dim", "depth", "num_heads")


def load(spec: ModelSpec, *, device: str | torch.device, dtype: torch.dtype) -> Model:
    """Loads `timm:NAME`. Raises UserError as `diag.models.load` does."""
    file = spec.checkpoint or _changed_weights(spec)
    _check_config(spec)
    sizes = _sizes(spec)
    if spec.model_args or spec.name.startswith(LOCAL):
        with torch.device("meta"):
            refuse_too_large(_create(spec, pretrained=False), spec.resolved)
    try:
        module = _create(spec, pretrained=file is None and not spec.random_init)
    except UserError:
        if spec.published and not spec.name.startswith(SCHEMAS):
            with torch.device("meta"):  # what has no attention need not be downloaded
                _layers(_create(spec, pretrained=False).eval(), spec)
        raise
    fit_to = NATIVE
    if file is not None:
        resampled_as = spec.name if sizes else None
        fit_to = filled(module, file, f"checkpoint '{file}'", resampled_as, key=spec.checkpoint_key)
    elif sizes and not spec.random_init:
        stretched(module, sizes, lambda: _create(_at_own_size(spec), pretrained=True))
        fit_to = fitted_by_timm(module, sizes, spec.name)
    with theirs(f"the preprocessing of '{spec.base}' cannot be used", "save the model again with timm"):
        config = _data_config(module)
        transform = timm.data.create_transform(**config, is_training=False)
        preprocessing = {
            "size": list(config["input_size"][1:]),
            "crop": f"{config['crop_mode']} {config['crop_pct']}",
            "interpolation": config["interpolation"],
            "mean": list(config["mean"]),
            "std": list(config["std"]),
        }
    model = vision_model(
        spec,
        module,
        transform,
        preprocessing=preprocessing,
        fit_to=fit_to,
        device=device,
        dtype=dtype,
    )
    licence = getattr(module, "pretrained_cfg", {}).get("license")
    return replace(model, facts={"licence": licence} if licence else {})


def filled(
    module: nn.Module, file: Path, source: str, resampled_as: str | None, *, key: str | None = None
) -> Fitted:
    """Loads weights into a module, with what training changed in its attention, and says how they fitted.

    resampled_as: the model's name where they may be of other sizes; None where that is an error.
    key: which part of a training checkpoint; None for what timm takes, the averaged weights before others.
    Raises UserError for weights that do not fit.
    """
    found, fit_to = read_checkpoint(file, module, key=key, averaged=True), NATIVE
    restore(module, found.variants)
    tensors = found.tensors
    if resampled_as:
        tensors, fit_to = resampled(module, tensors, resampled_as)
    fit(module, tensors, source)
    return replace(fit_to, notes=(*found.notes, *fit_to.notes))


def _changed_weights(spec: ModelSpec) -> Path | None:
    """The weights of a local folder whose attention was changed in training: timm would lose the change."""
    file = Path(spec.name.removeprefix(LOCAL)) / "model.safetensors"
    local = spec.name.startswith(LOCAL) and not spec.random_init and file.is_file()
    return file if local and read_variants(file) else None


def vision_model(
    spec: ModelSpec,
    module: nn.Module,
    transform: Callable[..., Tensor],
    *,
    preprocessing: Mapping[str, Any],
    fit_to: Fitted = NATIVE,
    device: str | torch.device,
    dtype: torch.dtype,
) -> Model:
    """The model of a timm module with its weights; `transform` takes an RGB image to `[3, height, width]`."""
    fuse(module)
    ready(module, spec.resolved, device=device, dtype=dtype)
    prepare = image_preparation(transform, dtype)
    tower = Tower(
        name="vision",
        layers=_layers(module, spec),
        samples=image_samples,
        prepare=prepare,
        encode=image_encoder(prepare, device),
        forward=lambda batch: module(batch.data),
        ending="class logits" if getattr(module, "num_classes", 0) else "embedding",
        facts={
            "image_size": plain(preprocessing["size"]),
            **fit_to.facts,
            "preprocessing": dict(preprocessing),
        },
    )
    tower = placed(tower, module, patch_size_of(module))
    notes = (*fit_to.notes, *described(module))
    return Model(spec.given, spec.family, spec.resolved, module, {"vision": tower}, notes)


def _layers(module: nn.Module, spec: ModelSpec) -> tuple[Layer, ...]:
    size = _data_config(module)["input_size"]
    weight = next(module.parameters())
    pixels = torch.zeros(1, *size, dtype=weight.dtype, device=weight.device)
    return layers_of(module, spec.resolved, "vision", run=lambda: module(pixels))


def fuse(module: nn.Module) -> None:
    """Lets every timm attention module call PyTorch's attention.

    They compute softmax themselves under TIMM_FUSED_ATTN=0, and Swin's windows do so by default.
    """
    child: Any
    for child in module.modules():
        if hasattr(child, "fused_attn"):
            child.fused_attn = True


def patch_size_of(module: nn.Module) -> int | tuple[int, int] | None:
    """The side of a patch in pixels as the model names it; None where it has no patch embedding."""
    for holder in (getattr(module, "patch_embed", None), getattr(module, "embeds", None)):
        size = getattr(holder, "patch_size", None)
        if size is not None:
            return size if isinstance(size, int) else plain(size)
    return None


# --- other sizes than those of the weights


def resampled(
    module: nn.Module, tensors: Mapping[str, Tensor], name: str, prefix: str = ""
) -> tuple[dict[str, Tensor], Fitted]:
    """Weights with position and patch embeddings brought to the sizes of `module`, and what that was.

    name: of the model, for the words. prefix: what stands before timm's names in `tensors`.
    Only absolute position embeddings on a square grid are interpolated, and as many of them as a square has
    are taken for one; whatever else differs is left for `fit` to refuse.
    """
    embed: Any = module.patch_embed
    now, positions, kernels = dict(tensors), None, None
    position, kernel = now.get(f"{prefix}pos_embed"), now.get(f"{prefix}patch_embed.proj.weight")
    own = getattr(module, "pos_embed", None)
    if isinstance(own, Tensor) and position is not None and (position.ndim, own.ndim) == (3, 3):
        before = _without_patch(module)
        side = isqrt(max(position.shape[1] - before, 0))
        if side**2 + before == position.shape[1] and (side, side) != embed.grid_size:
            positions = ((side, side), embed.grid_size)
            now[f"{prefix}pos_embed"] = on_grid(position.float(), *positions, before)
    if kernel is not None and kernel.ndim == 4 and kernel.shape[-2:] != embed.proj.weight.shape[-2:]:
        kernels = (kernel.shape[-2:], embed.patch_size)
        now[f"{prefix}patch_embed.proj.weight"] = resample_patch_embed(kernel.float(), list(embed.patch_size))
    return now, fitted(name, embed.img_size, positions=positions, patch_embedding=kernels)


def _without_patch(module: Any) -> int:
    """How many of a timm model's position embeddings belong to no patch."""
    return 0 if getattr(module, "no_embed_class", False) else getattr(module, "num_prefix_tokens", 0)


def on_grid(position: Tensor, before: Sides, now: Sides, prefix: int = 1) -> Tensor:
    """Position embeddings `[1, token, dim]` of one grid, interpolated for another; those of a prefix stay."""
    return resample_abs_pos_embed(
        position, new_size=list(now), old_size=list(before), num_prefix_tokens=prefix
    )


def stretched(module: Any, native: Any, stored: Callable[[], Any]) -> None:
    """Interpolates the position embeddings of published weights that a library took as they are.

    That is what it does where another grid has as many patches: 2 × 8 in place of 4 × 4. Weights that were
    changed already are left alone.
    native: the model at the size of its weights, without them. stored: loads it with them.
    """
    own, grids = (
        getattr(module, "pos_embed", None),
        (native.patch_embed.grid_size, module.patch_embed.grid_size),
    )
    if (
        isinstance(own, Tensor)
        and own.ndim == 3
        and own.shape == native.pos_embed.shape
        and grids[0] != grids[1]
    ):
        weights = stored().pos_embed
        if torch.equal(own, weights):
            own.data = on_grid(weights.data, *grids, _without_patch(module))


def _sizes(spec: ModelSpec) -> nn.Module | None:
    """The model at its own size, without weights, if the arguments ask for a size; None if they do not.

    Raises UserError for a size that is none, or that patches do not fill.
    """
    image, patch = (requested(spec.model_args, key, spec.base) for key in (IMAGE, PATCH))
    if image is None and patch is None:
        return None
    with torch.device("meta"):
        native = _create(_at_own_size(spec), pretrained=False)
    embed: Any = getattr(native, "patch_embed", None)
    size, step = sides(getattr(embed, "img_size", None)), sides(patch_size_of(native))
    if size is None or step is None:
        raise UserError(
            f"'{spec.base}' has no grid of patches whose size could be changed",
            "leave img_size and patch_size out",
        )
    if (image or size, patch or step) != (size, step):
        refuse_remainder(image or size, patch or step, spec.base)
    return native


def _at_own_size(spec: ModelSpec) -> ModelSpec:
    others = {key: value for key, value in spec.model_args.items() if key not in (IMAGE, PATCH)}
    return replace(spec, model_args=others)


def fitted_by_timm(module: nn.Module, native: nn.Module, name: str) -> Fitted:
    """What timm did to published weights: any parameter of another shape than at the model's own size."""
    now: Any = module.patch_embed
    before: Any = native.patch_embed
    shapes = {key: parameter.shape for key, parameter in native.named_parameters()}
    changed = {key for key, parameter in module.named_parameters() if shapes.get(key) != parameter.shape}
    moved = isinstance(getattr(module, "pos_embed", None), Tensor) and now.grid_size != before.grid_size
    positions = kernels = None
    if moved or changed - {"patch_embed.proj.weight"}:
        positions = (before.grid_size, now.grid_size)
    if "patch_embed.proj.weight" in changed:
        kernels = (before.patch_size, now.patch_size)
    return fitted(name, now.img_size, positions=positions, patch_embedding=kernels)


def _check_config(spec: ModelSpec) -> None:
    """Raises UserError for a folder's config that is none, and for sizes that no model has."""
    refuse_unreasonable({k: v for k, v in spec.model_args.items() if k not in (IMAGE, PATCH)}, spec.base)
    if spec.name.startswith(LOCAL):
        file = Path(spec.name.removeprefix(LOCAL)) / "config.json"
        tip = "timm: takes a folder that timm saved, whose config.json names an architecture"
        config = json_of(file, "config", tip=tip)
        if not isinstance(config.get("architecture"), str):
            raise UserError(f"'{file}' names no architecture of timm", tip)
        refuse_unreasonable(config, f"'{file}'")


def _create(spec: ModelSpec, *, pretrained: bool) -> nn.Module:
    name, arguments = spec.name, dict(spec.model_args)
    remote = name.startswith(HUB)
    repository = name.removeprefix(HUB)
    files = "config.json model.safetensors" if remote else "model.safetensors"
    if pretrained and not name.startswith(SCHEMAS):
        config = get_pretrained_cfg(name)
        if config is None or not config.has_weights:
            raise UserError(
                f"'{spec.base}' has no published weights",
                "give your own with --checkpoint FILE, or --random-init",
            )
        repository = config.hf_hub_id or name
        if spec.revision:
            arguments["pretrained_cfg_overlay"] = {"hf_hub_id": f"{config.hf_hub_id}@{spec.revision}"}
    elif remote and spec.revision:
        name = f"{name}@{spec.revision}"
    with (
        constructing(spec, MODEL_ARGUMENTS),
        quiet(),
        hub(repository, "model.safetensors", download=files, revision=spec.revision),
    ):
        return timm.create_model(name, pretrained=pretrained, **arguments)


def _data_config(module: nn.Module) -> dict[str, Any]:
    """timm's preprocessing of the weights, at the size that the model was built for."""
    config = timm.data.resolve_model_data_config(module)
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    return config if size is None else {**config, "input_size": (3, *size)}
