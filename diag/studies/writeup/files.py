"""Files of a writeup: what they are called, and those drawn aside compared with those in their place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diag.inputs.outside import mapping_in
from diag.results.folder import PLAN
from diag.results.staging import PICTURES, Owner, equal

OWNER = Owner("figures", result=(PLAN, *(f"*.{ending}" for ending in (*PICTURES, "tex", "md"))), last=PLAN)

NEW, CHANGED, SAME, REMOVED, MISSING, EXTRA = "new", "changed", "same", "removed", "missing", "extra"


def compare(drawn: Path, folder: Path, *, complete: bool) -> dict[str, str]:
    """State of every file: as drawn now against what is in the folder; removed: drawn before, not now."""
    states = {}
    for file in files_of(drawn):
        there = folder / file.name
        states[file.name] = SAME if equal(file, there) else CHANGED if there.is_file() else NEW
    if complete:  # where something failed, its earlier files stay
        states |= {name: REMOVED for name in _drawn_before(folder) if name not in states}
    return states


def files_of(drawn: Path) -> list[Path]:
    """What was drawn."""
    return sorted(drawn / name for name in OWNER.files(drawn))


def _drawn_before(folder: Path) -> list[str]:
    """The files that an earlier plan.json lists and that are there: ours to remove, and no others."""
    listed = mapping_in(folder / PLAN).get("files")
    names = listed if isinstance(listed, list) else []
    return [name for name in names if isinstance(name, str) and OWNER.may_remove(folder, name)]


def extra(folder: Path, known: Mapping[str, str]) -> dict[str, str]:
    """Files in a folder that are neither drawn now nor were drawn before."""
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return {name: EXTRA for name in there if name not in known and not name.startswith(".")}
