"""What a name stands for, once it is resolved: `ModelSpec`, and how arguments are written behind a name."""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHECKPOINT = "checkpoint"
"""The argument that no constructor gets: a file with the weights."""

CHECKPOINT_KEY = "checkpoint_key"
"""The argument beside it: which of several sets of weights in that file."""

HUB = "hf-hub:"
LOCAL = "local-dir:"
SCHEMAS = (HUB, LOCAL)
"""What stands before a hub repository or a folder in the names of some families."""

_WORDS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class ModelSpec:
    """Which model, of which family, with which weights.

    given: what the user typed. name: the name inside the family.
    checkpoint: a file with the weights; None for the published ones. checkpoint_key: which part of it.
    random_init: no weights at all, for tests and floors. seed: of what is drawn in their place.
    trust_remote_code: whether code inside a hub repository may run.
    note: what the user should know about the resolution; printed with it.
    """

    given: str
    family: str
    name: str
    revision: str | None = None
    checkpoint: Path | None = None
    checkpoint_key: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    random_init: bool = False
    seed: int = 0
    trust_remote_code: bool = False
    note: str | None = None

    @property
    def published(self) -> bool:
        """Whether it takes the weights that its name stands for, neither one's own nor random ones."""
        return self.checkpoint is None and not self.random_init

    @property
    def base(self) -> str:
        """The full name without arguments."""
        return f"{self.family}:{self.name}" + (f"@{self.revision}" if self.revision else "")

    @property
    def resolved(self) -> str:
        """The full name that resolves to the same model without any alias, arguments in order."""
        file = {CHECKPOINT: self.checkpoint, CHECKPOINT_KEY: self.checkpoint_key}
        given = {key: value for key, value in file.items() if value is not None}
        return self.base + written({**self.model_args, **given})


def expanded(name: str) -> Path:
    """A path as typed, with the home folder in place of `~`; `~nobody` stands for itself."""
    return Path(os.path.expanduser(name))


def folder_named(name: str) -> Path | None:
    """The folder on this disk that a name stands for, if there is one."""
    path = expanded(name)
    return path if name and os.path.isdir(path) else None  # also for what is too long to be a path


def looks_like_path(name: str) -> bool:
    """Whether a name can only be a path."""
    return name.startswith(("./", "../", "/", "~")) or name.endswith("/") or name.count("/") > 1


def written(arguments: Mapping[str, Any]) -> str:
    """Arguments as the end of a name, sorted, such that `diag.models.names.arguments.read` gives them back.

    >>> written({"patch_size": 24, "img_size": 240})
    ',img_size=240,patch_size=24'
    """
    return "".join(f",{key}={as_text(arguments[key])}" for key in sorted(arguments))


def as_text(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str):
        return value if literal(value) == value else repr(value)
    return repr(value)


def literal(text: str) -> Any:
    """What a typed value means: a Python literal, true, false or none; anything else is itself."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
