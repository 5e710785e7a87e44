"""Where the tokens of one softmax lie, how far they are from each other, and which are near."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diag.attention.pattern import BLOCK_ELEMENTS

EXACT = "donot_use_mm_for_euclid_dist"
"""How PyTorch computes distances of few places without rounding them away."""

NEAR_TOKENS = 16
"""How far apart two tokens of a text may be and still be near each other."""

NEAR_PATCHES = 1
"""The same for patches, up or down and sideways: the 3 × 3 patches around one."""


@dataclass(frozen=True)
class Geometry:
    """Where the tokens of one softmax lie: a line of tokens (text), or a grid of patches (image).

    prefix: tokens before the first position (class token, registers); they have no place.
    rows, cols: patches downwards and sideways; the default is one line of all tokens.
    patch_size: from a position to the next, in pixels; 1 for tokens of a text.
    """

    prefix: int = 0
    rows: int = 1
    cols: int | None = None
    patch_size: float = 1.0

    @staticmethod
    def unknown(prefix: int = 0) -> Geometry:
        """Of tokens whose places are not known: distances are undefined, the prefix is known."""
        return Geometry(prefix, 0, 0)

    @staticmethod
    def of_image(tokens: int, prefix: int, image_size: Any, windows: int = 1) -> Geometry:
        """The grid of one call of a vision model, from the size of the whole image.

        image_size: one side in pixels, or (height, width); anything else is not known.
        windows: how many softmaxes the image is split over. They are taken for squares of neighbouring
            patches (Swin); windows of scattered patches (the grid attention of MaxViT) would read too near.
        """
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        patches = tokens - prefix
        if not isinstance(sides, tuple | list) or len(sides) != 2 or patches < 1 or windows < 1:
            return Geometry.unknown(prefix)
        height, width = sides
        step = math.sqrt(height * width / (patches * windows))
        rows, cols = round(height / step), round(width / step)
        if rows * cols != patches * windows:
            return Geometry.unknown(prefix)
        if windows > 1:
            rows = cols = math.isqrt(patches)
            if rows * cols != patches:
                return Geometry.unknown(prefix)
        return Geometry(prefix, rows, cols, step)

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """(rows, cols) of so many tokens; None where the places are not known."""
        cols = tokens - self.prefix if self.cols is None else self.cols
        fits = self.rows > 0 and cols > 0 and self.prefix + self.rows * cols == tokens
        return (self.rows, cols) if fits else None

    def of_keys(self, tokens: int, keys: int) -> Geometry:
        """Where keys lie that so many tokens were pooled or strided to; unknown where these are no squares.

        The prefix may have been left out.
        """
        rows, cols = self.grid(tokens) or (0, 0)
        for prefix in (self.prefix, 0):
            places = keys - prefix
            if places < 1 or not rows * cols or rows * cols % places:
                continue
            stride = rows * cols // places if rows == 1 else math.isqrt(rows * cols // places)
            fewer = (1 if rows == 1 else rows // stride, cols // stride)
            if math.prod(fewer) == places and cols % stride == 0 and (rows == 1 or rows % stride == 0):
                return Geometry(prefix, *fewer, self.patch_size * stride)
        return Geometry.unknown()

    def steps(self, tokens: int) -> Float[Tensor, "rows cols rows cols"]:
        """Euclidean distance of all pairs of places as a view of O(token) numbers.

        Entry [-1 - r, -1 - c] is the map of distances from the place (r, c).
        """
        rows, cols = self.grid(tokens) or (0, 0)
        down = torch.arange(1 - rows, rows, dtype=torch.float32)
        sideways = torch.arange(1 - cols, cols, dtype=torch.float32)
        table = torch.hypot(down[:, None], sideways) * self.patch_size
        return table.unfold(0, rows, 1).unfold(1, cols, 1)

    def places(self, tokens: int) -> Float[Tensor, "token 2"]:
        """Where each token lies; a prefix token, which has no place, at (0, 0)."""
        rows, cols = self.grid(tokens) or (0, 0)
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).view(-1, 2) * self.patch_size
        return torch.cat([torch.zeros(self.prefix, 2, dtype=torch.float32), grid.float()])

    def near(self, places: Tensor, others: Tensor, tokens: int) -> Tensor:
        """Whether two places, counted after the prefix, are near each other; both broadcast."""
        rows, cols = self.grid(tokens) or (1, 1)
        reach = NEAR_TOKENS if rows == 1 else NEAR_PATCHES
        down = places // cols - others // cols
        sideways = places % cols - others % cols
        return (down.abs() <= reach) & (sideways.abs() <= reach)

    def around(self, tokens: int) -> Int[Tensor, " near"]:
        """How far apart in the sequence a token and one near it can be: all steps from one to the other."""
        rows, cols = self.grid(tokens) or (1, 1)
        if rows == 1:
            return torch.arange(-NEAR_TOKENS, NEAR_TOKENS + 1)
        side = torch.arange(-NEAR_PATCHES, NEAR_PATCHES + 1)
        return (side[:, None] * cols + side).flatten().unique()


TEXT = Geometry()
"""One line of tokens, without a prefix."""


class Distances:
    """Blocks of the distances from query rows to all places of keys; kept where all of them are small."""

    def __init__(
        self,
        geometry: Geometry,
        tokens: int,
        device: torch.device,
        *,
        keep: bool = True,
        of_keys: tuple[Geometry, int] | None = None,
    ) -> None:
        """of_keys: where keys lie that are not the tokens' own, and how many there are."""
        self.places = None
        if of_keys is not None:
            coarse, keys = of_keys
            each = (geometry.places(tokens), coarse.places(keys)[coarse.prefix :])
            # a key lies in the middle of the tokens that it was made of
            middle = (coarse.patch_size - geometry.patch_size) / 2
            middles = torch.tensor([0.0 if coarse.rows == 1 and geometry.rows == 1 else middle, middle])
            self.places = (each[0].to(device), (each[1] + middles).to(device))
        self.prefix = geometry.prefix
        self.cols = (geometry.grid(tokens) or (1, 1))[1]
        self.steps = geometry.steps(tokens).to(device)
        self.keep = keep and tokens**2 <= BLOCK_ELEMENTS[device.type]
        self.kept: dict[int, Tensor] = {}

    def block(self, rows: Int[Tensor, " row"], start: int) -> Float[Tensor, "row place"]:
        """From the query rows to the places, in order; of a prefix row, which has no place, any numbers.

        start: tells blocks of rows apart, if they are to be kept.
        """
        if start in self.kept:
            return self.kept[start]
        if self.places is not None:
            return torch.cdist(self.places[0][rows], self.places[1], compute_mode=EXACT)
        place = (rows - self.prefix).clamp(min=0)
        down, sideways = place // self.cols, place % self.cols
        height, width = self.steps.shape[:2]
        block = self.steps[height - 1 - down, width - 1 - sideways].flatten(1)
        if self.keep:
            self.kept[start] = block
        return block
