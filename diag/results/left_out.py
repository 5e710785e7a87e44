"""Layers that a run did not measure, in words: one phrase per reason, with the model's own numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diag.errors import spans


def left_out(entry: Mapping[str, Any]) -> list[str]:
    """What is not measured of one model's tower: `layers 0-2, 4-6: no softmax attention (Mamba)`.

    entry: what the manifest says of it. What holds no place on the depth axis, such as cross-attention, and
    layers of runs that did not note numbers, are told by path, the first of those with one reason.
    """
    numbers: Mapping[str, int] = entry.get("skipped_numbers") or {}
    by_reason = dict[str, list[str]]()
    for path, why in (entry.get("skipped_layers") or {}).items():
        by_reason.setdefault(str(why), []).append(str(path))
    said = []
    for why, paths in by_reason.items():
        placed = sorted({numbers[path] for path in paths if path in numbers})
        others = [path for path in paths if path not in numbers]
        if placed:
            said.append(f"layer{'s' if len(placed) > 1 else ''} {spans(placed)}: {why}")
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            said.append(f"{others[0]}{more}: {why}")
    return said
