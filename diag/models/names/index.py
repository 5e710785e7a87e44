"""What a library knows about its names, kept on this disk, so that a name is checked without importing it.

An index lies in the user's folder of caches, one file per installation of a library, and holds for as long as
the files of that installation are the same. It is a convenience: where it cannot be read or written, the
library is asked, as if there were none.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diag.inputs.outside import mapping_in

FORMAT = 1
"""Another one whenever an index holds something else than before."""


def caches() -> Path | None:
    """The folder of this program's caches, whether it is there or not; None where a user has no home.

    A relative `XDG_CACHE_HOME` counts for nothing, as its specification has it.
    """
    for base in (Path(os.environ.get("XDG_CACHE_HOME", "")), Path(os.path.expanduser("~"), ".cache")):
        if base.is_absolute():
            return base / "attnbias"
    return None


def kept(package: str, parts: Sequence[str] = ("",)) -> dict[str, Any]:
    """The index of an installed library; empty where there is none of just this installation."""
    file, stamp = _place(package, parts)
    found = mapping_in(file) if file is not None else {}
    names = found.get("names")
    return names if found.get("stamp") == stamp and isinstance(names, dict) else {}


def keep(package: str, names: Mapping[str, Any], parts: Sequence[str] = ("",)) -> None:
    """Writes the index of an installed library, as two processes may at once. Nothing where that fails."""
    file, stamp = _place(package, parts)
    if file is None:
        return
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, own = tempfile.mkstemp(prefix=f".{file.stem}-", dir=file.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump({"stamp": stamp, "names": names}, stream)
            os.replace(own, file)
        except BaseException:
            os.unlink(own)
            raise


def _place(package: str, parts: Sequence[str]) -> tuple[Path | None, str]:
    """Where the index of an installation lies, and what identifies it: its version and its files.

    An installation that is worked on keeps its version while its files change.
    """
    folder, spec = caches(), find_spec(package)
    if folder is None or spec is None or not spec.submodule_search_locations:
        return None, ""
    root = spec.submodule_search_locations[0]
    try:
        files = [entry for part in parts for entry in os.scandir(os.path.join(root, part))]
        told = [(file.path, file.stat().st_size, file.stat().st_mtime_ns) for file in files if _code(file)]
        released = version(package)
    except (OSError, PackageNotFoundError):  # such as a library inside a zip file
        return None, ""
    return folder / f"{package}-{_sha256(root)[:8]}.json", _sha256(repr([FORMAT, released, sorted(told)]))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _code(file: os.DirEntry[str]) -> bool:
    return file.name.endswith(".py") and file.is_file()
