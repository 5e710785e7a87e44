"""Patches and pixels: which patch holds a point, and the same point in another model's grid. No torch.

A point is a pair of fractions of the image's width and height, exact, so that a centre that falls on
the border of two patches of a finer grid always goes to the same one (the right or lower).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from diag.errors import UserError

Point = tuple[Fraction, Fraction]
"""(fraction of the width from the left, fraction of the height from the top)."""

MIDDLE: Point = (Fraction(1, 2), Fraction(1, 2))


@dataclass(frozen=True)
class Grid:
    """A model's resized image, `height` × `width` pixels, in `rows` × `columns` patches."""

    model: str
    height: int
    width: int
    rows: int
    columns: int

    def centre(self, patch: tuple[int, int]) -> Point:
        """The centre of a patch (row, column). Raises UserError, with the allowed range, outside the grid."""
        row, column = patch
        if not (0 <= row < self.rows and 0 <= column < self.columns):
            raise UserError(
                f"--patch {row},{column} is outside the {self.rows} × {self.columns} patches "
                f"of '{self.model}'",
                f"rows are 0 to {self.rows - 1}, columns 0 to {self.columns - 1}",
            )
        return Fraction(2 * column + 1, 2 * self.columns), Fraction(2 * row + 1, 2 * self.rows)

    def at_pixel(self, pixel: tuple[int, int]) -> Point:
        """The centre of a pixel (x, y). Raises UserError, with the allowed range, outside the image."""
        x, y = pixel
        if not (0 <= x < self.width and 0 <= y < self.height):
            raise UserError(
                f"--pixel {x},{y} is outside the {self.width} × {self.height} pixels of '{self.model}'",
                f"x is 0 to {self.width - 1}, y 0 to {self.height - 1}",
            )
        return Fraction(2 * x + 1, 2 * self.width), Fraction(2 * y + 1, 2 * self.height)

    def patch_at(self, point: Point) -> tuple[int, int]:
        """The patch (row, column) that holds a point."""
        return int(point[1] * self.rows), int(point[0] * self.columns)
