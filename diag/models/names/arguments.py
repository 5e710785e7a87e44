"""Arguments inside a model's name: `NAME,key=value,key=value`, taken off, read, and merged with the options.

They say what a name alone cannot: an image size, a patch size, a file with one's own weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diag.errors import UserError
from diag.models.families import all_families
from diag.models.names.spec import CHECKPOINT, SCHEMAS, as_text, expanded, literal

_COMMA = re.compile(r",\s*(?=[A-Za-z_]\w*=)")


def split(text: str) -> tuple[str, tuple[str, ...]]:
    """Takes the arguments off a name. A comma without a `=` behind it belongs to the name (open_clip's tag).

    A folder whose name looks like that has no arguments, nor has a file of weights that is there.

    >>> split("ViT-B-16,datacomp_xl_s13b_b90k,img_size=384")
    ('ViT-B-16,datacomp_xl_s13b_b90k', ('img_size=384',))
    """
    text = text.strip()
    starts = [0, *(comma.end() for comma in _COMMA.finditer(text))]
    ends = [*(comma.start() for comma in _COMMA.finditer(text)), len(text)]
    parts, at = [], 0
    while at < len(starts):
        # the longest part that is a folder or a file on this disk, whatever commas are in its name
        longer = range(len(ends) - 1, at, -1)
        last = next((to for to in longer if _is_there(text[starts[at] : ends[to]], first=not at)), at)
        parts.append(text[starts[at] : ends[last]].strip())
        at = last + 1
    return parts[0], tuple(parts[1:])


def _is_there(part: str, *, first: bool) -> bool:
    if first:
        return os.path.isdir(_path(part))  # also for what is too long to be a path
    key, _, file = part.partition("=")
    return key == CHECKPOINT and os.path.isfile(expanded(file))


def read(pairs: Iterable[str], given: str | None = None) -> dict[str, Any]:
    """`["img_size=224", "class_token=false"]` to `{"img_size": 224, "class_token": False}`.

    Values are Python literals, anything else is a string; a checkpoint is a path.
    given: the name that the pairs come from; None if they come from --model-arg.

    Raises UserError for what is not `key=value`, and for a key that is given twice in one name.
    """
    result: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier() or not value:
            if given is None:
                raise UserError(
                    f"--model-arg '{pair}' is not key=value", "for example: --model-arg img_size=224"
                )
            raise UserError(f"'{pair}' in '{given}' is not key=value", f"give {key} a value: {key}=VALUE")
        if given is not None and key in result:
            raise UserError(f"'{given}' gives {key} twice", f"leave one {key}= out")
        result[key] = expanded(value) if key == CHECKPOINT else literal(value)
    return result


def merged(named: Mapping[str, Any], common: Mapping[str, Any], given: str) -> dict[str, Any]:
    """Arguments of one name and those for all models. Raises UserError where they disagree."""
    for key in named:
        if key in common and common[key] != named[key]:
            flag = "--checkpoint " if key == CHECKPOINT else f"--model-arg {key}="
            raise UserError(
                f"'{given}' and {flag}{as_text(common[key])} disagree",
                f"give {key} in one place: in each name, or once for all models",
            )
    return {**common, **named}


def local_files(text: str) -> list[Path]:
    """What a name points to on this disk: a folder, a checkpoint, both or nothing."""
    name, pairs = split(text)
    checkpoint = read(pairs, text).get(CHECKPOINT)
    return [path for path in (_path(name), checkpoint) if path is not None and os.path.exists(path)]


def _path(name: str) -> Path:
    """What a name would be as a folder, without family and schema."""
    for prefix in (*(f"{family.prefix}:" for family in all_families() if family.folders), *SCHEMAS):
        name = name.removeprefix(prefix)
    return expanded(name)
