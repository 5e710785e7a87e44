"""Short names that people type for models of any family, from `aliases.toml`."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "aliases.toml"


@cache
def aliases() -> dict[str, dict[str, Any]]:
    """Short name -> `model` that it stands for, `tokens`, `licence`, and where there are any `model_args`,
    `note` and `with_checkpoint`."""
    found: dict[str, dict[str, Any]] = tomllib.loads(FILE.read_text(encoding="utf-8"))["aliases"]
    return found
