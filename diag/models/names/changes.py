"""A change to attention as people type it, `NAME[=STRENGTH][:LAYERS[/HEADS]]`, taken apart. No torch."""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from pathlib import Path

from diag.models.names.spec import expanded

WRITTEN = re.compile(r"([^=:]+)(?:=(.+?))?(?::((?:[0-9,-]|last)+)(?:/([0-9,-]+))?)?")
"""Name, strength, layers and heads; those that are not there are None."""


MATCHED = "matched_direction"
"""The control of projections. A fixed random direction removes next to nothing: its line lies on zero."""

CONTROLS = {
    "xsa": MATCHED,
    "gated_xsa": MATCHED,
    "zero": "mean",
    "window": "random_window",
    "neighbourhood": "random_neighbourhood",
    "top_keys": "random_keys",
    "redistribute": "random_redistribute",
    **dict.fromkeys(("sink_zero", "sink_mean", "sink_donor", "sink_ordinary"), "random_zero"),
    "sink_masked": "random_masked",
    "skip": "random_skip",
}
"""Change -> what is done beside it, with the same strength: as much surgery, without its point."""


OF_EVERY_HEAD = frozenset(name for name in (*CONTROLS, *CONTROLS.values()) if "sink" in name) | {
    "random_zero",
    "random_masked",
}
"""Changes of which a strength of 0 asks nothing of a head."""


def is_control(name: str) -> bool:
    """Whether a change is there for others to be compared with."""
    return name.startswith("random_") or name == MATCHED


def labelled(name: str, strength: float) -> str:
    """A change as tables and figures call it.

    >>> labelled("random_window", 8.0), labelled("sink_zero", 0.0), labelled("xsa", 1.0)
    ('random window 8', 'sink zero', 'xsa')
    """
    words = name.replace("_", " ")
    every = math.isnan(strength) or strength == 1 or (strength == 0 and name in OF_EVERY_HEAD)
    return words if every else f"{words} {strength:g}"


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
