"""Whether files are still as they were written: what a shard's account and a manifest hold of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file. Raises OSError where it cannot be read."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of files in a folder by name, those that are there. Raises OSError as `sha256_of` does."""
    return {name: sha256_of(folder / name) for name in names if (folder / name).is_file()}


def edited(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """The tables of a finished folder that are not as the run has written them, a sentence each.

    Nothing for a folder whose manifest tells no hashes. Raises OSError where a table cannot be read.
    """
    # of a training, "tables" are names
    told = [manifest.get(name) for name in ("tables", "hashes")]
    written = next((found for found in told if isinstance(found, dict)), {})
    found = hashes(folder, [name for name in written if name == Path(name).name])
    return [
        f"{name} of '{folder}' is not as the run wrote it"
        for name, sha256 in found.items()
        if sha256 != written[name]
    ]
