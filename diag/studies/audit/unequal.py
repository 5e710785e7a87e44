"""Images of unequal sizes in one batch: does the other image, or what fills one up, reach its own tokens?

Which pixels or patches are an image's own is what its processor says. A token is watched if it holds own
pixels only, or stands beside the patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageOps
from torch import Tensor

from diag.inputs.images import rgb
from diag.models.base import Batch, Sample, Tower
from diag.studies.audit.leaks import WHOLE, Case
from diag.studies.audit.words import OTHER_INPUT, PADDING, UNEQUAL

SHAPES = ((2, 1), (1, 2), (1, 2))
"""Width to height of the watched image, of the other one, and of what takes its place."""


@dataclass(frozen=True)
class Own:
    """Picks the watched tokens of one image. real: its own pixels `[height, width]`, or patches `[patch]`."""

    tower: Tower
    real: Bool[Tensor, ...]

    def __call__(self, x: Float[Tensor, "token channel"]) -> Tensor | None:
        """The rows of the watched tokens; None where it is not known which they are, or there are none."""
        tokens = self.tokens(len(x))
        return None if tokens is None or not bool(tokens.any()) else x[tokens.to(x.device)]

    def tokens(self, count: int) -> Bool[Tensor, " token"] | None:
        """Which of `count` tokens in a row are watched; None where that is not known."""
        if self.real.ndim == 1:
            return self.real if len(self.real) == count else None
        front, back = self.tower.beside(count)
        height, width = self.real.shape
        cells = _cells(count - front - back, height, width, self.tower.facts.get("patch_size"))
        if cells is None:
            return None
        side, rows, columns = cells
        whole = self.real.new_zeros(rows * side, columns * side)
        whole[:height, :width] = self.real[: rows * side, : columns * side]
        own = whole.unflatten(1, (columns, side)).unflatten(0, (rows, side)).all(3).all(1)  # [row, column]
        return torch.cat([own.new_ones(front), own.flatten(), own.new_ones(back)])


def _cells(count: int, height: int, width: int, patch: Any) -> tuple[int, int, int] | None:
    """Side, rows and columns of `count` square cells of an image, a cut one at an edge counted or not.

    patch: the side, where it is known; otherwise it is a power of two. None where no side gives so many.
    """
    for side in (patch,) if isinstance(patch, int) else (1, 2, 4, 8, 16, 32, 64):
        for rows, columns in ((height // side, width // side), (-(-height // side), -(-width // side))):
            if rows * columns == count:
                return side, rows, columns
    return None


def unequal_cases(tower: Tower, samples: Sequence[Sample]) -> Iterator[Case]:
    """A wide image and a tall one, cut from the first three samples, as the tower's processor pads them.

    None of a tower whose processor pads no images (`Tower.padded`), or not these.
    """
    if tower.padded is None:
        return
    chosen = [samples[number % len(samples)] for number in range(3)]
    a, b, c = (
        replace(sample, id=f"{sample.id} {number}", read=partial(_cut, sample.read, shape, number))
        for number, (sample, shape) in enumerate(zip(chosen, SHAPES, strict=True))
    )
    batch, real = tower.padded([a, b])
    other, _ = tower.padded([a, c])
    alone, alone_real = tower.padded([a])
    if (case := padded_case(tower, batch, real, other)) is not None:
        yield replace(case, alone=alone, own_alone=Own(tower, alone_real[0]))


def _cut(read: Callable[[], Any], shape: tuple[int, int], number: int) -> Image.Image:
    """The middle of an image, in these proportions; turned by a half where the same may have been cut."""
    image = rgb(read())
    side = max(1, min(image.size) // 2)
    cut = ImageOps.fit(image, (shape[0] * side, shape[1] * side))
    return cut.rotate(180) if number == 2 else cut


def padded_case(tower: Tower, batch: Batch, real: Bool[Tensor, "image ..."], other: Batch) -> Case | None:
    """The first image of a batch watched, what fills it up and the other image changed.

    real: which pixels or patches of each image are its own. None where nothing fills the first one up.
    """
    if bool(real[0].all()):
        return None
    changed = {OTHER_INPUT: other}
    filled = {}
    for name, x in batch.data.items():
        if x.is_floating_point() and (own := _beside(real, x)) is not None:
            first = torch.arange(len(x), device=x.device).reshape(-1, *[1] * (x.ndim - 1)) == 0
            filled[name] = torch.where(own.to(x.device) | ~first, x, x.mean() + 1)
    if filled:
        changed[PADDING] = replace(batch, data={**batch.data, **filled})
    return Case(UNEQUAL, len(real), batch, WHOLE, changed, own=Own(tower, real[0]))


def _beside(real: Tensor, x: Tensor) -> Tensor | None:
    """A mask of pixels `[image, height, width]` or patches `[image, patch]` as it lies over a tensor of them;
    None where that is of something else."""
    if real.ndim == 2 and x.ndim > 2 and x.shape[:2] == real.shape:
        return real.reshape(*real.shape, *[1] * (x.ndim - 2))
    pixels = real.ndim == 3 and x.ndim == 4 and (x.shape[0], *x.shape[2:]) == real.shape
    return real[:, None] if pixels else None


def mask_in(data: Mapping[str, Tensor]) -> Bool[Tensor, "image ..."] | None:
    """Which pixels or patches of ready images are their own, if a tensor says that some are not."""
    for mask in data.values():
        flags = mask.ndim in (2, 3) and bool(((mask == 0) | (mask == 1)).all()) and not bool(mask[0].all())
        if flags and any(x is not mask and _beside(mask, x) is not None for x in data.values()):
            return mask.bool()
    return None
