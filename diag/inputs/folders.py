"""What lies in a folder of inputs: linked folders are entered, and what cannot be read there is told.

A link back to a folder that is being listed is passed over, and behind one link no folder is entered twice:
links in a circle end. What is hidden, or lies there for the system's own use, is no input (`is_hidden`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from diag.errors import UserError
from diag.inputs.outside import reason

File = tuple[str, int, int]
"""A file's path from the folder it was listed from, its bytes, and when it was written, in nanoseconds."""

Identity = tuple[int, int]

KERNEL = {os.stat(place).st_dev for place in ("/proc", "/sys") if os.path.isdir(place)}
"""File systems of which every look shows others: links of theirs lead through the whole machine."""

SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir"})
"""What macOS puts into archives, and some file servers beside images."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder is passed over: what editors and systems keep of images would count twice.

    >>> is_hidden(".ipynb_checkpoints"), is_hidden("._x.jpg"), is_hidden("@eaDir"), is_hidden("..")
    (True, True, True, False)
    """
    return name in SYSTEM_FOLDERS or (name.startswith(".") and name not in (".", ".."))


def files_below(folder: Path, wanted: Callable[[str], bool]) -> tuple[list[File], dict[str, str]]:
    """The files below a folder, in the order of their paths, and why some of them cannot be read.

    wanted: whether a file of such a name is. What has such a name and is no plain file is listed as well, and
    so are, with a slash behind them, folders that cannot be listed and links to nothing that may have been
    folders: those without a suffix.
    Raises UserError if the folder itself cannot be listed.
    """
    found, unreadable = list[File](), dict[str, str]()

    def unread(name: str, why: str) -> None:
        found.append((name, 0, 0))
        unreadable[name] = why

    # with each folder those that are not entered below it, and whether a link has led to it
    waiting: list[tuple[str, set[Identity], bool]] = [("", {_identity(folder)}, False)]
    while waiting:
        before, known, linked = waiting.pop()
        try:
            with os.scandir(folder / before) as listing:
                entries = [entry for entry in listing if not is_hidden(entry.name)]
        except OSError as error:
            if not before:
                raise UserError(f"cannot list '{folder}': {reason(error)}", "make it readable") from error
            unread(before, f"cannot list the folder: {reason(error)}")
            continue
        for entry in entries:
            name = before + entry.name
            try:
                is_folder = entry.is_dir()
                may_be_folder = is_folder or (entry.is_symlink() and not os.path.splitext(entry.name)[1])
                if not wanted(entry.name) and not may_be_folder:
                    continue
                status = entry.stat()
                # on Windows, what an entry tells of itself is zeros
                here = _identity(folder / name) if is_folder else (0, 0)
            except OSError as error:
                missing = isinstance(error, FileNotFoundError)
                unread(
                    name if wanted(entry.name) else f"{name}/",
                    "a link to nothing" if missing else reason(error),
                )
                continue
            if is_folder:
                if here in known or here[0] in KERNEL:
                    continue
                if linked:
                    known.add(here)
                    waiting.append((f"{name}/", known, True))
                else:
                    waiting.append((f"{name}/", known | {here}, entry.is_symlink()))
            elif not wanted(entry.name):
                continue
            elif not stat.S_ISREG(status.st_mode):
                unread(name, "no plain file")
            else:
                found.append((name, status.st_size, status.st_mtime_ns))
    return sorted(found, key=lambda file: file[0].split("/")), unreadable


def _identity(folder: Path) -> Identity:
    status = folder.stat()
    return status.st_dev, status.st_ino
