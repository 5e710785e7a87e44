"""Words of options as Python values."""

from __future__ import annotations

import re

from diag.errors import UserError


def names(text: str | None) -> tuple[str, ...] | None:
    """`cos-y-vself, excess` → ("cos_y_vself", "excess")."""
    if text is None:
        return None
    return tuple(part.strip().replace("-", "_") for part in text.split(",") if part.strip())


def ranges(text: str | None) -> tuple[int, ...] | None:
    """`0,5-11` → (0, 5, …, 11). Raises UserError."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part.strip())
        span = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else range(0)
        if not span:
            raise UserError(f"--layers does not understand '{part.strip()}'", "for example --layers 0,5-11")
        found.extend(span)
    return tuple(dict.fromkeys(found))
