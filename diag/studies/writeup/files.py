"""Files drawn aside, compared with those in their place, and put there: unchanged ones keep their time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from diag.results.writing import atomically, writing

NEW, CHANGED, SAME, REMOVED, MISSING, EXTRA = "new", "changed", "same", "removed", "missing", "extra"


def compare(drawn: Path, folder: Path, *, complete: bool) -> dict[str, str]:
    """State of every file: as drawn now against what is in the folder; removed: drawn before, not now."""
    states = {}
    for file in sorted(drawn.iterdir()):
        there = folder / file.name
        if not there.is_file():
            states[file.name] = NEW
        else:
            states[file.name] = SAME if there.read_bytes() == file.read_bytes() else CHANGED
    if complete:  # where something failed, its earlier files stay
        states |= {name: REMOVED for name in _drawn_before(folder) if name not in states}
    return states


def _drawn_before(folder: Path) -> list[str]:
    """The files that an earlier plan.json lists and that are there: ours to remove, and no others."""
    try:
        listed = json.loads((folder / "plan.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    names = [name for name in listed if isinstance(name, str) and Path(name).name == name]
    return [name for name in names if (folder / name).is_file()]


def extra(folder: Path, known: Mapping[str, str]) -> dict[str, str]:
    """Files in a folder that are neither drawn now nor were drawn before."""
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return {name: EXTRA for name in there if name not in known and not name.startswith(".")}


def put(drawn: Path, folder: Path, states: Mapping[str, str]) -> None:
    """New and changed files into the folder, the resolved plan last."""
    with writing(folder):
        for name, state in sorted(states.items(), key=lambda entry: entry[0] == "plan.json"):
            if state == REMOVED:
                (folder / name).unlink(missing_ok=True)
            elif state in (NEW, CHANGED):
                atomically(folder / name, partial(shutil.copyfile, drawn / name))
