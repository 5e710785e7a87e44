"""The vision towers of Hugging Face models: preprocessing, prefix tokens, and other image sizes.

With `img_size=` the image processor is asked for that size, in its own proportion of resizing to cropping,
and the model interpolates its position embeddings; models without any take every size as it is.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diag.errors import UserError
from diag.inputs.images import rgb
from diag.models.base import Batch, Sample, Tower, device_of_module
from diag.models.encoding import each, image_encoder, image_preparation, image_samples, preparation
from diag.models.first_layer import placed
from diag.models.hooks.layers import Layer
from diag.models.loading import theirs
from diag.models.names.spec import ModelSpec
from diag.models.sizes import IMAGE, NATIVE, Fitted, fitted, grid, plain, refuse_remainder, sides, square
from diag.models.weights import up_to_three

LEARNED_POSITIONS = ("position_embedding", "pos_embed", "relative_position_bias")
"""Parts of parameter names; a relative bias within windows (Swin) does not depend on the image size."""

MASKS = ("pixel_mask", "pixel_attention_mask", "attention_mask")
"""What an image processor says of padded pixels; an image alone has none."""

TRIALS = ((96, 64), (64, 96))
"""Width and height of images by which an image processor is tried."""

FLAG = "interpolate_pos_encoding"
PROCESSOR_TIP = "save the one that belongs to the model: image_processor.save_pretrained(FOLDER)"


def seen(
    spec: ModelSpec,
    whole: Any,
    part: Any,
    layers: tuple[Layer, ...],
    processor: Any,
    notes: list[str],
    dtype: torch.dtype,
) -> Tower:
    """The vision tower of a model, whatever its image processor makes of an image: pixels, patches, tiles.

    whole: the model. part: its vision tower, which is all of it where it has no other.
    What was done to its sizes is added to `notes`.
    Raises UserError for a tower that needs what the image processor does not give, and for an image size that
    one of them does not take.
    """
    with theirs(f"the image processor of '{spec.name}' cannot be used", PROCESSOR_TIP):
        trial = _processed(processor, Image.new("RGB", TRIALS[0]))
    pixels = trial.get("pixel_values")
    takes = inspect.signature(part.forward).parameters
    alone = len(_required(getattr(whole, "get_image_features", part.forward)) | _required(part.forward)) < 2
    others = trial.keys() & takes.keys() - {"pixel_values", *MASKS}
    if pixels is not None and pixels.ndim == 4 and len(pixels) == 1 and alone and not others:
        return vision_tower(spec, part, config_around(part, whole), layers, processor, notes, dtype)
    return native_tower(spec, whole, part, layers, processor, trial, dtype)


def vision_tower(
    spec: ModelSpec,
    module: Any,
    config: Any,
    layers: tuple[Layer, ...],
    processor: Any,
    notes: list[str],
    dtype: torch.dtype,
) -> Tower:
    """The tower of a vision transformer that takes pixels `[batch, 3, height, width]`.

    config: the module's. A batch holds one image where the image processor gives images of different sizes.
    Raises UserError for an image size that the processor or the model does not take.
    """
    size = square(spec.model_args, spec.base)
    sizes = {} if size is None else _sizes_of_processor(processor, size, spec)

    def transform(image: Image.Image) -> Tensor:
        return _processed(processor, image, **sizes)["pixel_values"][0]

    with theirs(f"the image processor of '{spec.name}' cannot be used", PROCESSOR_TIP):
        pixels = [transform(Image.new("RGB", trial)) for trial in TRIALS]
        preprocessing = preprocessing_of(processor, sizes)
    shapes = [(image.shape[-2], image.shape[-1]) for image in pixels]
    alike, (height, width) = shapes[0] == shapes[1], shapes[0]
    if size is not None and set(shapes) != {(size, size)}:
        raise _refusal(spec, f"its image processor gives {height}×{width}")
    fits = [_fit(spec, module, config, shape, alike) for shape in dict.fromkeys(shapes)]
    fit_to, flags = next((fit for fit in fits if fit[0] is not NATIVE), fits[0])
    notes += fit_to.notes
    prepare = image_preparation(transform, dtype)
    names = {
        name: name
        for name in ("pixel_values", *MASKS)
        if name in inspect.signature(module.forward).parameters
    }
    named = "pixel_values" in names
    tower = Tower(
        name="vision",
        layers=layers,
        samples=image_samples,
        prepare=prepare,
        encode=image_encoder(prepare, device_of_module(module)),
        forward=lambda batch: (
            module(**batch.data, **flags)
            if isinstance(batch.data, Mapping)
            else module(pixel_values=batch.data, **flags)
            if named
            else module(batch.data, **flags)
        ),
        max_batch=None if alike else 1,
        padded=padding_of(partial(_processed, processor, **sizes), module, dtype, names) if named else None,
        facts={
            "image_size": plain((height, width)) if alike else "native",
            **fit_to.facts,
            "preprocessing": preprocessing,
        },
    )
    return placed(tower, module, getattr(config, "patch_size", None))


def native_tower(
    spec: ModelSpec,
    whole: Any,
    part: Any,
    layers: tuple[Layer, ...],
    processor: Any,
    trial: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> Tower:
    """A tower that takes each image as its processor gives it: patches as one sequence (Qwen-VL), tiles
    (LLaVA-NeXT, SmolVLM), patches with a mask (SigLIP 2).

    Several images in one forward would share a sequence, or differ in shape, so a batch holds one. The model
    itself says how its vision tower is run, where it has `get_image_features`.
    trial: what the processor gives for an image.
    Raises UserError for an image size, and for a model that needs more than its processor gives.
    """
    if IMAGE in spec.model_args:
        raise _refusal(spec, "it takes every image at the image's own size")
    packed, config = "grid_thw" in inspect.signature(part.forward).parameters, config_around(part, whole)
    qwen = packed and len(_required(part.forward)) == 2 and hasattr(config, "spatial_merge_size")
    call = part.forward if qwen else getattr(whole, "get_image_features", part.forward)
    takes = inspect.signature(call).parameters
    names = {name: other for name in trial if (other := _argument(name, list(takes))) is not None}
    missing = _required(call) - set(names.values())
    pixels = next((name for name in names if trial[name].is_floating_point()), "")
    if missing or not pixels:
        named = up_to_three([f"'{name}'" for name in sorted(missing or {"pixel_values"})])
        raise UserError(
            f"the vision tower of '{spec.name}' needs {named}, which its image processor does not give",
            "give the folder of an image encoder",
        )

    def pack(image: Image.Image) -> dict[str, Tensor]:
        made = _processed(processor, image)
        if call == part.forward and made[pixels].ndim == 5:  # of one input, tile by tile
            made[pixels] = made[pixels].flatten(0, 1)
        return {
            name: made[name].to(dtype) if made[name].is_floating_point() else made[name] for name in names
        }

    with theirs(f"the image processor of '{spec.name}' cannot be used", PROCESSOR_TIP):
        pack(Image.new("RGB", TRIALS[1]))
        preprocessing = preprocessing_of(processor, {})
    prepare, device = preparation(pack), device_of_module(part)

    def encode(samples: Sequence[Sample]) -> Batch:
        (made,) = each(samples, lambda sample: prepare(sample.read()))
        data = {names[name]: value.to(device) for name, value in made.items()}
        mask = data.get("pixel_attention_mask")
        of_patches = mask is not None and made[pixels].ndim == 3 and mask.shape == made[pixels].shape[:2]
        real = mask.bool() if mask is not None and of_patches else None  # and neither of pixels nor of tiles
        return Batch((samples[0].id,), data, real)

    full = getattr(config, "fullatt_block_indexes", None)
    sized = sides(getattr(config, "image_size", None)) == tuple(trial[pixels].shape[-2:])
    learned = any(kind in name for name, _ in part.named_parameters() for kind in LEARNED_POSITIONS[:2])
    tower = Tower(
        name="vision",
        layers=layers,
        samples=image_samples,
        prepare=prepare,
        encode=encode,
        forward=lambda batch: call(**batch.data),
        max_batch=1,
        padded=padding_of(partial(_processed, processor), part, dtype, names),
        facts={
            "image_size": "native",
            **NATIVE.facts,
            "positions": "interpolated" if learned and not sized else "native",  # tiles are of one size
            "preprocessing": preprocessing,
            **({"full_attention_layers": "all" if full is None else list(full)} if packed else {}),
        },
    )
    return placed(tower, part, getattr(config, "patch_size", None))


def padding_of(
    process: Callable[[Any], Mapping[str, Tensor]],
    module: Any,
    dtype: torch.dtype,
    names: Mapping[str, str],
) -> Callable[[Sequence[Sample]], tuple[Batch, Tensor]] | None:
    """`Tower.padded`, of an image processor that fills images of different sizes up to one, and says so.

    process: what the processor gives for a list of images. names: a tensor's name there -> what it is called
    by whatever runs the module. None where nothing is filled up, or each image has tensors of its own.
    """
    device, trial = device_of_module(module), dict[str, Tensor]()
    with suppress(Exception):  # a processor of one image at a time says whatever breaks first
        trial = dict(process([Image.new("RGB", size) for size in TRIALS]))
    masked = next((name for name in MASKS if name in trial), None)
    if masked is None or "pixel_values" not in trial or bool(trial[masked].all()):
        return None

    def padded(samples: Sequence[Sample]) -> tuple[Batch, Tensor]:
        found = process([rgb(sample.read()) for sample in samples])
        data = {
            other: found[name].to(device, dtype)
            if found[name].is_floating_point()
            else found[name].to(device)
            for name, other in names.items()
            if name in found
        }
        return Batch(tuple(sample.id for sample in samples), data), found[masked].bool()

    return padded


def config_around(part: Any, whole: Any) -> Any:
    """The configuration of a part of a model, or of the model where the part has none of its own."""
    return getattr(part, "config", whole.config)


def _processed(processor: Any, image: Any, **sizes: Any) -> dict[str, Tensor]:
    """The tensors that an image processor makes of one image, or of a list of them."""
    found = processor(images=image, return_tensors="pt", **sizes)
    found = {"pixel_values": found} if isinstance(found, Tensor) else found
    tensors = {name: _as_tensor(value) for name, value in found.items()}
    return {name: value for name, value in tensors.items() if value is not None}


def _as_tensor(value: Any) -> Tensor | None:
    """Tensors and numbers, also in lists, as one tensor; None for anything else, and for tensors unlike."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, int | float):
        return torch.tensor(value)
    if not isinstance(value, list | tuple) or not value:
        return None
    parts = [_as_tensor(part) for part in value]
    alike = {None if part is None else part.shape for part in parts}
    return torch.stack([x for x in parts if x is not None]) if len(alike) == 1 and None not in alike else None


def _argument(name: str, takes: Sequence[str]) -> str | None:
    """What a vision tower calls a tensor of its image processor; None where it takes no such.

    Inside of a larger model `image_grid_thw` is `grid_thw`, and pixels may be the first argument, whatever it
    is called.
    """
    bare = re.compile(r"^(image|pixel)_")
    if name in takes or name == "pixel_values":
        return name if name in takes else takes[0]
    return next((other for other in takes if bare.sub("", other) == bare.sub("", name)), None)


def _required(call: Callable[..., Any]) -> set[str]:
    """Names of the arguments that a function cannot do without."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    arguments = inspect.signature(call).parameters.values()
    return {one.name for one in arguments if one.default is inspect.Parameter.empty and one.kind not in kinds}


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


def _fit(
    spec: ModelSpec, module: Any, config: Any, image: tuple[int, int], alike: bool
) -> tuple[Fitted, dict[str, bool]]:
    """What an image size does to the model's positions, and what its forward pass must be told.

    alike: whether every image has it.
    """
    patch = sides(getattr(config, "patch_size", None))
    stored = sides(getattr(config, "image_size", None))
    asked = IMAGE in spec.model_args
    if patch is None or stored is None:
        if asked:
            raise _refusal(spec, "its config names no image and patch size")
        return NATIVE, {}
    if asked and image != stored:
        refuse_remainder(image, patch, spec.base)
    kinds = LEARNED_POSITIONS[:2] if hasattr(config, "window_size") else LEARNED_POSITIONS
    learned = any(part in name for name, _ in module.named_parameters() for part in kinds)
    before, now = grid(stored, patch), grid(image, patch)
    if before == now or not learned:
        return NATIVE, {}
    done = fitted(str(config.model_type), image, positions=(before, now))
    if not alike:
        words = f"position embeddings interpolated from {before[0]}×{before[1]} to the grid of each image"
        done = replace(done, notes=(words,))
    flagged = FLAG in inspect.signature(module.forward).parameters
    as_many = before[0] * before[1] == now[0] * now[1]  # as they are they would fit another grid
    if flagged and (asked or as_many):
        return done, {FLAG: True}
    if not flagged and any(hasattr(part, FLAG) for part in module.modules()):  # DINOv2: always interpolated
        return done, {}
    if asked:
        raise _refusal(spec, "its position embeddings are of one size")
    if as_many and alike:
        raise UserError(
            f"the position embeddings of '{spec.name}' are of {before[0]}×{before[1]} patches, "
            f"its image processor gives {now[0]}×{now[1]}",
            PROCESSOR_TIP,
        )
    return done, {}  # a forward pass that goes through with another number has interpolated them (YOLOS)


def _refusal(spec: ModelSpec, why: str) -> UserError:
    return UserError(f"'{spec.base}' does not take {IMAGE}: {why}", f"leave {IMAGE} out")


def preprocessing_of(processor: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """What an image processor does, as a tower's facts have it. sizes: what it is told besides."""

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
