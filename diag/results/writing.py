"""How results reach the disk: renamed into place whole, in the format that a file's name says."""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from diag.errors import UserError, one_of, visible
from diag.inputs.csv_injection import to_csv
from diag.inputs.outside import reason

if TYPE_CHECKING:
    import pandas as pd


class CannotWrite(UserError):  # noqa: N818  it says what is the matter
    """A full disk, or a folder that cannot be written: nothing that follows could be kept either."""


def write(frame: pd.DataFrame, path: Path) -> None:
    """Writes a table in the format of the path's suffix, atomically. Raises UserError for an unknown one."""
    if path.suffix not in WRITERS:
        raise UserError(f"cannot write '{path.name}'", f"known formats: {one_of(WRITERS)}")
    atomically(path, lambda temporary: WRITERS[path.suffix](frame, temporary))


def write_json(document: Mapping[str, Any], path: Path) -> None:
    """Writes a JSON document, atomically."""
    write_text(json_text(document), path)


def write_text(text: str, path: Path) -> None:
    """Writes a text in UTF-8, atomically."""
    atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def json_text(document: Mapping[str, Any]) -> str:
    """A JSON document as it is written."""
    # a file name need not be UTF-8, and a document must
    return visible(json.dumps(document, indent=2, ensure_ascii=False, default=str), keep="\n") + "\n"


def atomically(path: Path, write_to: Callable[[Path], object]) -> None:
    """`replacing`, but raises CannotWrite if the disk is full or the folder cannot be written."""
    with writing(path):
        replacing(path, write_to)


def keep(path: Path, content: bytes) -> None:
    """Writes a file unless it is there as it should be: its time tells whether it changed."""
    if not path.is_file() or path.read_bytes() != content:
        atomically(path, lambda temporary: temporary.write_bytes(content))


def replacing(path: Path, write_to: Callable[[Path], object]) -> None:
    """Calls `write_to` with a temporary name beside `path`, then renames: readers see all or nothing."""
    temporary = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_to(temporary)
        # a file system may find only now that it is full
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


HOST = re.sub(r"[^A-Za-z0-9]+", "-", platform.node())[:32].strip("-")

TEMPORARY = re.compile(r"\..+?\.(?:(?P<host>[A-Za-z0-9-]*)\.)?(?P<process>[0-9]+)(?:-[0-9a-f]+)?\.tmp")
"""The name of a file that is being written; earlier versions named no machine."""

STALE = 24 * 3600
"""Seconds after which a temporary file of another machine, or of a number that lives again, is nobody's."""


def beside(path: Path) -> Path:
    """A temporary name beside a path that says whose it is: two machines may have a process of one number."""
    return path.with_name(f".{path.name}.{HOST}.{os.getpid()}-{secrets.token_hex(3)}.tmp")


def left_behind(file: Path) -> bool:
    """Whether a path is a temporary one of a process that is gone, by its name and by its time."""
    named = TEMPORARY.fullmatch(file.name)
    if named is None:
        return False
    if named["host"] == HOST and not _alive(int(named["process"])):
        return True
    try:
        return time.time() - file.lstat().st_mtime > STALE
    except FileNotFoundError:
        return False


def sweep_beside(path: Path) -> None:
    """Removes what a process that was killed left of a file that it was writing."""
    for file in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        if left_behind(file):
            file.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    if os.name == "nt":  # where os.kill(process, 0) is Ctrl-C
        import psutil

        return psutil.pid_exists(process)
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def on_disk(path: Path) -> None:
    """Brings a file, or the names in a folder, to disk, where file systems can do that for folders."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a full disk or a folder that cannot be written into CannotWrite, which names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        tip = "make room and run the same command again, or choose another folder with -o"
        if isinstance(error, FileNotFoundError):
            tip = "a folder on the way was removed: run the same command again, from a folder that is there"
        raise CannotWrite(f"cannot write '{path}': {reason(error)}", tip) from error


def _latex(frame: pd.DataFrame) -> str:
    from diag.results.latex import latex  # naming a file needs no tables

    return latex(frame)


def _markdown(frame: pd.DataFrame) -> str:
    """A pipe table. A bar inside a cell would end it."""
    cells = frame.map(lambda cell: cell.replace("|", "\\|") if isinstance(cell, str) else cell)
    # numbers that are text already keep their digits
    return cells.to_markdown(index=False, disable_numparse=True) + "\n"


WRITERS: dict[str, Callable[[pd.DataFrame, Path], object]] = {
    ".csv": lambda frame, path: to_csv(frame, path, float_format="%.9g"),
    ".parquet": lambda frame, path: frame.to_parquet(path, index=False, compression="zstd"),
    ".json": lambda frame, path: frame.to_json(path, orient="records", indent=1),
    ".tex": lambda frame, path: path.write_text(_latex(frame), encoding="utf-8"),
    ".md": lambda frame, path: path.write_text(_markdown(frame), encoding="utf-8"),
}


STEM_LENGTH = 120
"""Characters of a file stem; file systems allow 255 bytes for the whole name."""


def file_stem(*words: object) -> str:
    """Words as the stem of a file name: `/`, `:` and all else that a shell or file system minds become `-`.

    >>> file_stem("curves", "open_clip:ViT-B-16/datacomp", "vision", "patch")
    'curves-open_clip-ViT-B-16-datacomp-vision-patch'
    """
    stem = re.sub(r"[^A-Za-z0-9_.+]+", "-", "-".join(str(word) for word in words)).strip("-.")
    return stem if len(stem) <= STEM_LENGTH else f"{stem[:40]}--{stem[-(STEM_LENGTH - 42) :]}"


def free_stem(stem: str, taken: set[str]) -> str:
    """The stem, numbered if another file has it; some disks do not tell `A` from `a`."""
    free, number = stem, 2
    while free.lower() in taken:
        free, number = f"{stem}-{number}", number + 1
    taken.add(free.lower())
    return free
