"""Image and patch sizes other than those of the weights: what was asked for, and what that does to a model.

Learned position embeddings belong to one grid of patches, and the patch embedding to one patch size. At
another size they are interpolated and resampled, which the model was mostly not trained for. Every table
must be able to say so, hence `Fitted`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diag.errors import UserError

IMAGE, PATCH = "img_size", "patch_size"
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
    if found is None or min(found) < 1:
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
