"""A folder that a verb writes: the names of its files, and when it is finished.

Whatever the verb, `manifest.json` is written last: a folder that has one is whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

PLAN = "plan.json"
"""What is run, written first; whose folder it is."""

MANIFEST = "manifest.json"

LAYERS, HEADS, SAMPLES, QUANTILES = "layers.csv", "heads.parquet", "samples.parquet", "quantiles.parquet"
"""The tables of a run; quantiles only where samples are not all kept."""

SINK_PLACES = "sink_places.csv"
"""Where the sinks of heads are, and whether they stay there; of runs that measured sink events."""

TOKENS = "tokens.parquet"
"""Numbers of single tokens, where they were kept (`diag.probe`)."""


def once(folders: Iterable[Path]) -> list[Path]:
    """Folders, each once however it is spelled: as it was named first."""
    first: dict[str, Path] = {}
    for folder in folders:
        first.setdefault(os.path.realpath(folder), folder)
    return list(first.values())


def is_finished(folder: Path) -> bool:
    """Whether a folder holds the whole of what a verb writes."""
    return (folder / MANIFEST).is_file()
