"""What a run did not measure, in words: layers, one phrase per reason, and metrics that are empty in some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
            said.append(f"{_first(others)}: {why}")
    return said


def emptied(unprojected: Sequence[str], sinks_unprojected: Sequence[str]) -> list[str]:
    """What is empty in layers, given by path, of which the way from heads to the stream is not known.

    unprojected: as the stream metrics found; sinks_unprojected: as the classes of sinks did.
    """
    stream = (
        "value_stream_cosine and output_value_cosine are empty where the way from heads to the stream is not "
        "understood"
    )
    sinks = (
        "what sinks do (no-op, broadcast) is empty where the output projection is not known, or does not "
        "read the heads' outputs as they are"
    )
    found = ((stream, unprojected), (sinks, sinks_unprojected))
    return [f"{said}: {_first(paths)}" for said, paths in found if paths]


def _first(paths: Sequence[str]) -> str:
    return (paths[0] or "the module itself") + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
