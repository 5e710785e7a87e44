"""The language model of a vision-language model, fed with image and prompt as its processor encodes them.

Image and prompt are one causal sequence; which positions hold the image is read off the token ids, so that
the token sets `image` and `text` of one table come from the same forward pass. The vision tower of the same
model is an ordinary one (`vision.py`) and runs in a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import isqrt
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diag.errors import UserError
from diag.inputs.images import rgb
from diag.models.base import Batch, Sample, Tower, device_of_module
from diag.models.encoding import each, image_samples, preparation, token_text, vocabulary_digest
from diag.models.loading import layers_of, theirs
from diag.models.names.spec import ModelSpec
from diag.models.sizes import IMAGE

PROMPT = "prompt"
"""The model argument that names the text beside the image."""

TRIALS = ((96, 64), (256, 128))
"""Width and height of images by which a processor is tried."""

PROCESSOR_TIP = "save the processor that belongs to the model: processor.save_pretrained(FOLDER)"

DEFAULT_PROMPT = "Describe this image."


def image_token(config: Any) -> int | None:
    """The id of the token that stands for a piece of an image; None for a model without one."""
    return getattr(config, "image_token_id", None)


def language_tower(
    spec: ModelSpec, module: Any, prefix: str, processor: Any, token: int, dtype: torch.dtype
) -> Tower:
    """The tower of the language model below `prefix`, which reads image and prompt.

    token: the id of the image's tokens. A batch holds several inputs only if every image gives equally many
    tokens, so that nothing is padded.
    Raises UserError for an image size, and where the processor gives no image tokens.
    """
    if IMAGE in spec.model_args:
        raise UserError(
            f"'{spec.base}' does not take {IMAGE} with a prompt: its processor prepares the image",
            f"leave {IMAGE} out to measure its language model",
        )
    asked = str(spec.model_args.get(PROMPT, DEFAULT_PROMPT))
    lacking = UserError(f"the processor of '{spec.name}' puts no image tokens into a prompt", PROCESSOR_TIP)
    if not hasattr(processor, "tokenizer"):  # a tokenizer or an image processor alone
        raise lacking
    with theirs(f"the processor of '{spec.name}' cannot be used", PROCESSOR_TIP):
        text, templated = _written(processor, asked)
    tokenizer, device = processor.tokenizer, device_of_module(module)
    # a template that writes the first special token itself would have it twice
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)

    def packed(images: Sequence[Image.Image], *, nested: bool = False) -> dict[str, Tensor]:
        found = processor(
            images=[[image] for image in images] if nested else list(images),
            text=[text] * len(images),
            add_special_tokens=not begins,
            return_tensors="pt",
        )
        return {name: x for name, x in found.items() if isinstance(x, Tensor)}

    with theirs(f"the processor of '{spec.name}' cannot be used", PROCESSOR_TIP):
        trials = [packed([Image.new("RGB", size)]) for size in TRIALS]
    pixels = next((name for name, x in trials[0].items() if x.is_floating_point()), None)
    if pixels is None or not bool((trials[0]["input_ids"] == token).any()):
        raise lacking
    in_grid = trials[0][pixels].ndim > 3
    # several images in a flat list are those of one text to some processors
    alike = all(trials[0][name].shape == trials[1][name].shape for name in (pixels, "input_ids"))
    nested = _nested(packed) if alike else None
    alone = preparation(lambda image: packed([image]))

    def encode(samples: Sequence[Sample]) -> Batch:
        try:
            found = packed([rgb(sample.read()) for sample in samples], nested=bool(nested))
        except Exception:  # the processor refuses an odd image with whatever breaks first: which one is it?
            each(samples, lambda sample: alone(sample.read()))
            raise
        ids = found["input_ids"]
        if "attention_mask" in found and not found["attention_mask"].bool().all():
            raise UserError(f"'{spec.base}' pads images of different sizes", "try --batch-size 1")
        of_image = ids == token
        last = torch.zeros_like(of_image)
        last[:, -1] = True
        data = {
            name: x.to(device=device, dtype=dtype) if x.is_floating_point() else x.to(device)
            for name, x in found.items()
        }
        sets = {"image": of_image, "text": ~of_image, "last": last}
        return Batch(tuple(sample.id for sample in samples), data, sets=sets)

    def asking(question: str) -> Tower:
        other = replace(spec, model_args={**spec.model_args, PROMPT: question})
        return language_tower(other, module, prefix, processor, token, dtype)

    return Tower(
        name="language",
        takes="vision",
        layers=layers_of(getattr(module, prefix[:-1]), spec.resolved, "language", prefix=prefix),
        samples=image_samples,
        encode=encode,
        forward=lambda batch: module(**batch.data, use_cache=False),
        marks=("image", "text", "last"),
        together=("image", "text"),
        max_batch=1 if nested is None else None,
        token_text=token_text(tokenizer),
        asking=asking,
        facts={
            "patch_size": _side(trials[0], pixels, token, getattr(module.config, "vision_config", None)),
            "image_size": tuple(trials[0][pixels].shape[-2:]) if in_grid and alike else "native",
            "prompt": asked,
            "prompt_format": "chat template" if templated else "bare",
            "vision_feature_layer": getattr(module.config, "vision_feature_layer", None),
            "tokenizer": vocabulary_digest(tokenizer),
        },
    )


def _nested(packed: Callable[..., Mapping[str, Tensor]]) -> bool | None:
    """Whether a processor wants images of several texts in lists of their own; None where it takes one."""
    images = [Image.new("RGB", size) for size in TRIALS]
    for nested in (False, True):
        with suppress(Exception):  # a processor says whatever breaks first
            if len(packed(images, nested=nested)["input_ids"]) == len(images):
                return nested
    return None


def _written(processor: Any, prompt: str) -> tuple[str, bool]:
    """Image and prompt as the model is asked, and whether its own chat template wrote them."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        conversation = [{"role": "user", "content": content}]
        written = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        return str(written), True
    return f"{processor.image_token}\n{prompt}", False


def _side(packed: Mapping[str, Tensor], named: str, token: int, vision: Any) -> int | None:
    """Side of the square of pixels that one image token stands for: patches may be merged.

    It follows from the pixels and tokens of one input; where that is no whole number, as with tokens between
    rows of patches, from the config of the vision tower. None where neither says. named: the pixels.
    """
    pixels, patch = packed[named], getattr(vision, "patch_size", None)
    if pixels.ndim < 4:  # patches in a row, of whose places in time and colours nothing follows
        mask = packed.get("pixel_attention_mask")
        padded = mask is not None and mask.shape == pixels.shape[:-1]
        patches = int(mask.sum()) if mask is not None and padded else pixels.shape[:-1].numel()
        area = patches * patch**2 if isinstance(patch, int) else 0
    else:
        area = pixels.numel() // pixels.shape[-3]
    tokens = int((packed["input_ids"] == token).sum())
    side = isqrt(area // tokens)
    if side and side**2 * tokens == area:
        return side
    return patch * getattr(vision, "spatial_merge_size", 1) if isinstance(patch, int) else None
