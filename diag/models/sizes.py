"""Image and patch sizes other than those of the weights: what was asked for, and what that does to a model.

Learned position embeddings belong to one grid of patches, and the patch embedding to one patch size. At
another size they are interpolated and resampled, which the model was mostly not trained for. Every table
must be able to say so, hence `Fitted`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diag.errors import UserError

if TYPE_CHECKING:
    from torch import nn

IMAGE, PATCH = "img_size", "patch_size"
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "layers", "depth", "encoder_layers")
WIDTHS = (
    *("hidden_size", "d_model", "n_embd", "embed_dim", "width", "head_width", "intermediate_size", "d_ff"),
    *("num_attention_heads", "num_heads", "n_head", "n_heads", "heads", "head_dim", "d_kv", "vocab_size"),
    *("patch_size", "image_size", IMAGE, "num_channels", "in_chans", "num_local_experts", "num_experts"),
)
"""What config files and arguments call numbers of layers, and other sizes."""
OPTIONAL = ("head_dim", "num_local_experts", "num_experts")
"""Sizes of what a model may be without, which is 0 then."""
MOST_LAYERS, MOST_WIDTH = 1_000, 10_000_000

Sides = tuple[int, int]
"""Height and width."""

TRAINED = (
    ("flexivit", 240, "FlexiViT was trained so, at patch sizes from 48 to 8 and 240 px"),
    ("dinov2", 224, "DINOv2 was trained at 224 px, and at 518 px in the end"),
)
"""Part of a name, image size, and why another grid than the stored one is no surprise for such a model."""

SURPRISE = "off the training distribution"


@dataclass(frozen=True)
class Fitted:
    """What was done to fit weights to a size; the notes say it in words.

    positions: "native" or "interpolated". patch_embedding: "native" or "resampled".
    """

    positions: str = "native"
    patch_embedding: str = "native"
    notes: tuple[str, ...] = ()

    @property
    def facts(self) -> dict[str, str]:
        """Constants of a tower."""
        return {"positions": self.positions, "patch_embedding": self.patch_embedding}


NATIVE = Fitted()


def requested(arguments: Mapping[str, Any], key: str, source: str) -> Sides | None:
    """The size that a model's arguments ask for, or None.

    Raises UserError for what is not one or two positive numbers of pixels.
    """
    if key not in arguments:
        return None
    value = arguments[key]
    found = sides(value)
    if found is None or not all(1 <= side <= MOST_WIDTH for side in found):
        raise UserError(
            f"{source}: {key} is {value!r}, not a number of pixels",
            f"for example {key}={224 if key == IMAGE else 16}",
        )
    return found


def sides(size: Any) -> Sides | None:
    """One number, or two, as height and width; None for anything else."""
    values = (size, size) if isinstance(size, int) else size
    if not isinstance(values, Sequence) or len(values) != 2 or isinstance(size, bool | str):
        return None
    return (values[0], values[1]) if all(type(value) is int for value in values) else None


def square(arguments: Mapping[str, Any], source: str) -> int | None:
    """The side of the images that a model's arguments ask for, or None.

    Raises UserError for two sides that differ, and as `requested` does.
    """
    size = requested(arguments, IMAGE, source)
    if size is not None and size[0] != size[1]:
        raise UserError(f"'{source}' takes square images", f"give one number: {IMAGE}={size[0]}")
    return size and size[0]


def refuse_unreasonable(settings: Any, source: str, *, path: str = "") -> None:
    """Raises UserError for a size that no model has, before anything of that size is made.

    settings: a config or arguments, at any depth. source: what they are of, for the words.
    """
    if not isinstance(settings, Mapping):
        return
    for key, value in settings.items():
        refuse_unreasonable(value, source, path=f"{path}{key}.")
        most = MOST_LAYERS if key in LAYERS else MOST_WIDTH if key in WIDTHS else None
        for size in value if isinstance(value, list | tuple) else [value]:
            number = isinstance(size, int | float) and not isinstance(size, bool)
            least = 0 if key in OPTIONAL else 1
            if most is not None and number and not least <= size <= most:
                tip = f"it can be from {least} to {most:,}"
                raise UserError(f"{source}: {path}{key} is {str(size)[:40]}", tip)


def refuse_too_large(module: nn.Module, source: str) -> None:
    """Raises UserError for a model whose weights do not fit into this machine's memory in float32.

    module: built on the meta device, where weights have shapes only.
    """
    parameters = sum(parameter.numel() for parameter in module.parameters())
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * parameters > room:
        raise UserError(
            f"{source} would have {parameters:,} parameters, {4 * parameters / 1e9:,.0f} GB; "
            f"this machine has {room / 1e9:,.0f} GB",
            "give smaller sizes",
        )


def plain(size: Sequence[int]) -> int | Sides:
    """Height and width as one number where they are equal."""
    return size[0] if size[0] == size[1] else (size[0], size[1])


def grid(image: Sides, patch: Sides) -> Sides:
    """Rows and columns of patches; pixels beyond the last whole patch are not seen."""
    return image[0] // patch[0], image[1] // patch[1]


def refuse_remainder(image: Sides, patch: Sides, source: str) -> None:
    """Raises UserError for an image that patches do not fill, with the nearest sizes that they do."""
    for side, step in zip(image, patch, strict=True):
        if side % step:
            below, above = side // step * step, (side // step + 1) * step
            raise UserError(
                f"{source}: {side} px is not a multiple of the patch size {step}",
                f"use img_size={above}" if not below else f"use img_size={below} or img_size={above}",
            )


def fitted(
    name: str,
    image: Sequence[int],
    *,
    positions: tuple[Sequence[int], Sequence[int]] | None = None,
    patch_embedding: tuple[Sequence[int], Sequence[int]] | None = None,
) -> Fitted:
    """What was done, in facts and words.

    positions: grid of the stored position embeddings and grid now, where they were interpolated.
    patch_embedding: stored patch size and patch size now, where the kernel was resampled.
    """
    known = (words for part, size, words in TRAINED if part in name and tuple(image) == (size, size))
    verdict = next(known, SURPRISE)
    notes = []
    if positions:
        old, new = positions
        notes.append(f"position embeddings interpolated from {_times(old)} to {_times(new)}: {verdict}")
    if patch_embedding:
        before, now = patch_embedding
        how = "exact upward" if min(now) >= min(before) else "lossy below the stored kernel"
        notes.append(
            f"patch embedding resampled from {_times(before)} to {_times(now)} px ({how}): {verdict}"
        )
    return Fitted(
        "interpolated" if positions else "native",
        "resampled" if patch_embedding else "native",
        tuple(notes),
    )


def _times(size: Sequence[int]) -> str:
    return f"{size[0]}×{size[1]}"
