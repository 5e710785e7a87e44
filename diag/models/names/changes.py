"""A change to attention as people type it, `NAME[=STRENGTH][:LAYERS[/HEADS]]`, taken apart. No torch."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from diag.models.names.spec import expanded

WRITTEN = re.compile(r"([^=:]+)(?:=(.+?))?(?::((?:[0-9,-]|last)+)(?:/([0-9,-]+))?)?")
"""Name, strength, layers and heads; those that are not there are None."""


def strengths_file(text: str) -> Path | None:
    """The file of strengths that a change names, if it names one that is there.

    >>> strengths_file("gated_xsa=0.5:8-11")
    """
    match = WRITTEN.fullmatch(text.strip())
    if match is None or match[2] is None:
        return None
    with suppress(ValueError):
        float(match[2])
        return None
    path = expanded(match[2])
    return path if os.path.isfile(path) else None
