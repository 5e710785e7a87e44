"""Values and words that nobody expects in a field, or on the command line."""

from __future__ import annotations

import math
from random import Random
from typing import Any

ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**40,
    -(10**12),
    0.5,
    math.nan,
    math.inf,
    -math.inf,
    1e308,
    "",
    " ",
    "x",
    "nan",
    "-1",
    "1e9",
    "é",
    "a" * 5000,
    "\x1b[31mred",
    "two\nlines",
    "\u202e",
    "\ud800",
    "../up",
    "/",
    "~nouser",
    "=1+1",
    [],
    [[]],
    [None],
    [0] * 1000,
    {},
    {"a": None},
    {"": {}},
)
"""Stands in for any value of a document."""

WORDS = (
    "",
    " ",
    "x",
    "-1",
    "0",
    "1",
    "2",
    "0.5",
    "1e400",
    "nan",
    "inf",
    "-inf",
    "9" * 30,
    "99999999999",
    "9" * 5000,
    "0-99999999999",
    "1,2",
    "2,1",
    "0,0",
    "1,1,1",
    ",",
    "=",
    ":",
    "a=b",
    "é",
    "²",
    "٣",
    "\udcff",
    "\x1b[31mred",
    "two\nlines",
    "a" * 300,
    "a" * 5000,
    "~nouser",
    "images",
    "images/b.png",
    "texts/notes.txt",
    "nowhere",
    "run",
    "demo",
    "hf:",
    "none",
    "null",
    "{0..99999999999}",
    "{0..99999999999}.tar",
    "{00..09}.tar",
    "--",
    "*",
    "[",
    "%s",
    "{}",
    "{0}",
    "\\",
    "'",
    '"',
    "$HOME",
    "/dev/null",
    "/dev/zero",
    "/proc/self/mem",
)
"""Stands in for the word after any option, but for those that say where to write."""

OUTPUTS = (
    "",
    "run",
    "images",
    "images/b.png",
    "a" * 300,
    "a/" * 2500 + "b",
    "\udcff",
    "é",
    "new/deep",
    "~nouser/x",
)
"""Where to write: all of it inside the folder of the try."""


def near(draw: Random, old: Any) -> Any:
    """A value that looks like the one it replaces, or any odd one."""
    if draw.random() < 0.4:
        return draw.choice(ODD)
    if isinstance(old, bool):
        return draw.choice([not old, str(old), int(old), None])
    if isinstance(old, int | float):
        return draw.choice([-old, 0, old + 1, old * 10**9, str(old), old + 0.5, [old], None, math.nan])
    if isinstance(old, str):
        place = draw.randrange(len(old) + 1)
        edits = (
            old[:place],
            old[place + 1 :],
            f"{old[:place]}{draw.choice(WORDS)}{old[place:]}",
            old.upper(),
        )
        return draw.choice([*edits, [old], {old: old}, len(old), f"{old},{old}", None])
    if isinstance(old, list):
        return draw.choice([old[1:], old[::-1], old * 2, [old], {"a": old}, str(old), old[:1] * 50, []])
    if isinstance(old, dict):
        return draw.choice([list(old.items()), list(old), {}, [old], str(old), dict(list(old.items())[1:])])
    return draw.choice(ODD)
