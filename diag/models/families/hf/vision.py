"""The vision towers of Hugging Face models: preprocessing, prefix tokens, and other image sizes.

With `img_size=` the image processor is asked for that size, in its own proportion of resizing to cropping,
and the model interpolates its position embeddings; models without any take every size as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from diag.errors import UserError
from diag.models.base import Batch, Sample, Tower, device_of_module
from diag.models.encoding import each, image_encoder, image_preparation, image_samples, preparation
from diag.models.loading import layers_of, theirs
from diag.models.names.spec import ModelSpec
from diag.models.sizes import IMAGE, NATIVE, Fitted, fitted, grid, plain, refuse_remainder, sides, square

CLASS_TOKENS = ("cls_token", "class_embedding", "class_token", "distillation_token")
LEARNED_POSITIONS = ("position_embedding", "pos_embed", "relative_position_bias")
"""Parts of parameter names; a relative bias within windows (Swin) does not depend on the image size."""

FLAG = "interpolate_pos_encoding"
PROCESSOR_TIP = "save the one that belongs to the model: image_processor.save_pretrained(FOLDER)"


def vision_tower(
    spec: ModelSpec, module: Any, prefix: str, processor: Any, notes: list[str], dtype: torch.dtype
) -> Tower:
    """The tower of a vision transformer; what was done to its sizes is added to `notes`.

    Raises UserError for an image size that the processor or the model does not take.
    """
    size = square(spec.model_args, spec.base)
    sizes = {} if size is None else _sizes_of_processor(processor, size, spec)

    def transform(image: Image.Image) -> Tensor:
        return processor(images=image, return_tensors="pt", **sizes)["pixel_values"][0]

    with theirs(f"the image processor of '{spec.name}' cannot be used", PROCESSOR_TIP):
        height, width = transform(Image.new("RGB", (96, 64))).shape[-2:]
        preprocessing = _preprocessing(processor, sizes)
    if size is not None and (height, width) != (size, size):
        raise _refusal(spec, f"its image processor gives {height}×{width}")
    fit_to, flags = _fit(spec, module, (height, width))
    notes += fit_to.notes
    prepare = image_preparation(transform, dtype)
    return Tower(
        name="vision",
        layers=layers_of(module, spec.resolved, "vision", prefix=prefix),
        samples=image_samples,
        prepare=prepare,
        encode=image_encoder(prepare, device_of_module(module)),
        forward=lambda batch: module(pixel_values=batch.data, **flags),
        prefix=_prefix(module),
        facts={
            "patch_size": getattr(module.config, "patch_size", None),
            "image_size": plain((height, width)),
            **fit_to.facts,
            "preprocessing": preprocessing,
        },
    )


def packed_tower(spec: ModelSpec, module: Any, prefix: str, processor: Any, dtype: torch.dtype) -> Tower:
    """Qwen-VL's vision tower: patches of one image as one sequence, in the order of its windows.

    Several images in one forward would share a sequence, so a batch holds one.
    Raises UserError for an image size: every image has its own.
    """
    if IMAGE in spec.model_args:
        raise _refusal(spec, "it takes every image at the image's own size")

    def pack(image: Image.Image) -> tuple[Tensor, Tensor]:
        packed = processor(images=image, return_tensors="pt")
        return packed["pixel_values"].to(dtype), packed["image_grid_thw"]  # [patch, pixels of a patch]

    with theirs(f"the image processor of '{spec.name}' cannot be used", PROCESSOR_TIP):
        pack(Image.new("RGB", (96, 64)))
        preprocessing = _preprocessing(processor, {})
    prepare, device = preparation(pack), device_of_module(module)

    def encode(samples: Sequence[Sample]) -> Batch:
        ((pixels, grid),) = each(samples, lambda sample: prepare(sample.read()))
        return Batch((samples[0].id,), (pixels.to(device), grid.to(device)))

    full = getattr(module.config, "fullatt_block_indexes", None)
    return Tower(
        name="vision",
        layers=layers_of(module, spec.resolved, "vision", prefix=prefix),
        samples=image_samples,
        prepare=prepare,
        encode=encode,
        forward=lambda batch: module(batch.data[0], grid_thw=batch.data[1]),
        max_batch=1,
        facts={
            "patch_size": module.config.patch_size,
            "image_size": "native",
            **NATIVE.facts,
            "preprocessing": preprocessing,
            "full_attention_layers": "all" if full is None else list(full),
        },
    )


# --- sizes


def _sizes_of_processor(processor: Any, size: int, spec: ModelSpec) -> dict[str, dict[str, int]]:
    """The processor's `size` and `crop_size` for another image size: both scaled alike."""
    settings = processor.to_dict()
    resize = {key: side for key, side in (settings.get("size") or {}).items() if side is not None}
    crop = settings.get("crop_size") if settings.get("do_center_crop") else None
    given = crop or resize
    native = given.get("height") or given.get("shortest_edge")
    if not native or not resize.keys() <= {"height", "width", "shortest_edge"}:
        raise _refusal(spec, "its image processor resizes in a way of its own")
    scaled = {key: round(side * size / native) for key, side in resize.items()}
    return {"size": scaled} | ({"crop_size": {"height": size, "width": size}} if crop else {})


def _fit(spec: ModelSpec, module: Any, image: tuple[int, int]) -> tuple[Fitted, dict[str, bool]]:
    """What an image size does to the model's positions, and what its forward pass must be told."""
    patch = sides(getattr(module.config, "patch_size", None))
    stored = sides(getattr(module.config, "image_size", None))
    asked = IMAGE in spec.model_args
    if patch is None or stored is None:
        if asked:
            raise _refusal(spec, "its config names no image and patch size")
        return NATIVE, {}
    if asked and image != stored:
        refuse_remainder(image, patch, spec.base)
    kinds = LEARNED_POSITIONS[:2] if hasattr(module.config, "window_size") else LEARNED_POSITIONS
    learned = any(part in name for name, _ in module.named_parameters() for part in kinds)
    before, now = grid(stored, patch), grid(image, patch)
    if before == now or not learned:
        return NATIVE, {}
    done = fitted(str(module.config.model_type), image, positions=(before, now))
    flagged = FLAG in inspect.signature(module.forward).parameters
    if flagged and asked:
        return done, {FLAG: True}
    if not flagged and any(hasattr(part, FLAG) for part in module.modules()):  # DINOv2: always interpolated
        return done, {}
    if asked:
        raise _refusal(spec, "its position embeddings are of one size")
    return NATIVE, {}


def _refusal(spec: ModelSpec, why: str) -> UserError:
    return UserError(f"'{spec.base}' does not take {IMAGE}: {why}", f"leave {IMAGE} out")


def _prefix(module: nn.Module) -> tuple[str, ...]:
    names = [name.rpartition(".")[2] for name, _ in module.named_parameters()]
    registers = getattr(module.config, "num_register_tokens", 0) if "register_tokens" in names else 0
    return ("cls",) * sum(name in CLASS_TOKENS for name in names) + ("registers",) * registers


def _preprocessing(processor: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    def told(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: side for key, side in value.items() if side is not None}
        return list(value) if isinstance(value, list | tuple) else value

    settings = {**processor.to_dict(), **sizes}
    resample = settings.get("resample")
    return {
        "size": told(settings.get("size")),
        "crop": told(settings.get("crop_size")) if settings.get("do_center_crop") else None,
        "interpolation": None if resample is None else Image.Resampling(resample).name.lower(),
        "mean": told(settings.get("image_mean")) if settings.get("do_normalize") else None,
        "std": told(settings.get("image_std")) if settings.get("do_normalize") else None,
    }
