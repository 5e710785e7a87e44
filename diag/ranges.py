"""Numbers as people write them: `0,5-11`."""

from __future__ import annotations

import re

from diag.errors import UserError


def ranges(text: str, said: str, example: str) -> tuple[int, ...]:
    """`0,5-11` → (0, 5, …, 11), each once, in the order written.

    said: where it was written, for the error; example: what to write instead. Raises UserError where a part
    is no number or range.
    """
    found: dict[int, None] = {}
    for part in text.split(","):
        ends = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part.strip())
        span = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else range(0)
        if not span:
            raise UserError(f"{said} does not understand '{part.strip()}'", f"for example {example}")
        found |= dict.fromkeys(span)
    return tuple(found)
