"""Fields of configurations that the generic shrinker of transformers' models cannot guess, by model type."""

from __future__ import annotations

from typing import Any

FIELDS: dict[str, dict[str, Any]] = {}
