"""A folder's result replaced by a new one: built aside in `.next`, put in its place when it is whole.

    .next/               what is being built; `figures` and `compare` always build there, the others where
                         a result is overwritten
    .next/.staged.json   {"verb": …}, and once it is being put in place the lists of what comes and goes

Until then the old result stays as it is. Putting in place can be stopped anywhere, and the next command in
the folder goes on with it: readers see the old result, the new one, or an unfinished folder.

Every deletion goes by one rule. A verb declares what it writes (`Owner`); only such files are ever removed,
and only where they lie inside the folder when links are resolved. Whatever else lies there stays.
"""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from diag.errors import UserError
from diag.inputs.outside import mapping_in
from diag.results.folder import MANIFEST, PLAN
from diag.results.writing import atomically, beside, left_behind, on_disk, write_json, writing

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

NEXT = ".next"
NOTE = ".staged.json"

PICTURES = ("pdf", "png", "csv")
"""The endings of a figure's files."""


def pictures(*stems: str) -> tuple[str, ...]:
    """Patterns of figures by the patterns of their stems."""
    return tuple(f"figures/{stem}.{ending}" for stem in stems for ending in PICTURES)


@dataclass(frozen=True)
class Owner:
    """A verb and the files that it writes, as patterns relative to its folder; `*` stands for no slash.

    result: what stays. work: what only an unfinished folder has. kept: of the work, what a failure does not
    throw away, because the same command goes on with it. last: of the result, the file that makes it whole.
    """

    verb: str
    result: tuple[str, ...]
    work: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    last: str = MANIFEST

    def inside(self, folder: str) -> tuple[str, ...]:
        """The patterns of its result and work where it writes into a folder of another verb's folder."""
        return tuple(f"{folder}/{pattern}" for pattern in (*self.result, *self.work))

    def files(self, folder: Path, patterns: Iterable[str] | None = None) -> list[str]:
        """Names of the files of a folder that are this verb's, and that lie inside it."""
        found = set[str]()
        for pattern in (*self.result, *self.work) if patterns is None else patterns:
            found |= {file.relative_to(folder).as_posix() for file in folder.glob(pattern)}
        return sorted(name for name in found if self.may_remove(folder, name))

    def may_remove(self, folder: Path, name: str) -> bool:
        """Whether a name is that of a file of this verb's that is there, not somewhere where a link leads."""
        file = folder / name
        here = file.is_symlink() or file.is_file()  # of a link, only the link is removed
        return here and self.names(folder, name)

    def names(self, folder: Path, name: str) -> bool:
        """Whether this verb writes files of a name, and they would lie inside the folder."""
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            return False
        patterns = (one for one in (*self.result, *self.work) if one.count("/") == len(path.parts) - 1)
        if not any(map(path.match, patterns)):
            return False
        return (folder / path).parent.resolve().is_relative_to(folder.resolve())


# --- deletions


def remove(folder: Path, owner: Owner, names: Iterable[str]) -> None:
    """Removes files of a verb's, and the folders within `folder` that are empty then."""
    emptied = set[Path]()
    for name in names:
        if owner.may_remove(folder, name):
            (folder / name).unlink(missing_ok=True)
        if owner.names(folder, name):  # also where the file went before an interruption
            emptied |= {folder / parent for parent in PurePosixPath(name).parents[:-1]}
    for parent in sorted(emptied, reverse=True):
        with suppress(OSError):
            parent.rmdir()


def clear(folder: Path, owner: Owner, patterns: Collection[str] | None = None) -> None:
    """Removes a verb's files that match (all of them, if None), and folders that are empty then."""
    sweep(folder)
    remove(folder, owner, owner.files(folder, patterns))
    chosen = (*owner.result, *owner.work) if patterns is None else patterns
    parents = {str(parent) for pattern in chosen for parent in PurePosixPath(pattern).parents[:-1]}
    for place in sorted(parents, key=len, reverse=True):
        for parent in folder.glob(place):
            with suppress(OSError):  # empty from the start, or since an interruption
                parent.rmdir()


def sweep(folder: Path) -> None:
    """Removes what processes that were killed left half written, in a folder and below; no living one's."""
    for where, folders, files in os.walk(folder):
        for name in files:
            if left_behind(file := Path(where, name)):
                file.unlink(missing_ok=True)
        for name in folders:
            if left_behind(place := Path(where, name)):
                shutil.rmtree(place, ignore_errors=True)


# --- whose folder it is


@contextmanager
def alone(folder: Path, waiting: Callable[[str], object] = lambda text: None) -> Iterator[list[Path]]:
    """Makes a folder and keeps all other processes out that ask so; it goes again if nothing is put in it.

    Gives the folders that were not there, innermost first.
    waiting: told, if another process has to be waited for. A file system without locks keeps nobody out.
    Raises CannotWrite where the folder cannot be made.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    while True:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:  # a folder cannot be opened where it cannot be locked either
                descriptor = None if fcntl is None else os.open(folder, os.O_RDONLY)
            except FileNotFoundError:  # removed since
                continue
        try:
            _wait(descriptor, folder, waiting)
            if not _same(descriptor, folder):  # removed by the one that was waited for
                continue
            yield made
            return
        finally:
            with suppress(OSError):
                # a folder of this name that is not the one that was made is another process's
                for place in made if _same(descriptor, folder) else made[1:]:
                    place.rmdir()
            if descriptor is not None:
                os.close(descriptor)


def _wait(descriptor: int | None, folder: Path, waiting: Callable[[str], object]) -> None:
    if descriptor is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):  # no locks here
            return
        waiting(f"waiting for another process, which works in '{folder}'")
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _same(descriptor: int | None, folder: Path) -> bool:
    if descriptor is None:
        return folder.is_dir()
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except OSError:
        return False


def verb_of(folder: Path) -> str | None:
    """Which verb wrote a folder, finished or not; None where that cannot be told."""
    plan, manifest, note = (mapping_in(folder / name) for name in (PLAN, MANIFEST, f"{NEXT}/{NOTE}"))
    for document in (plan, manifest):
        if "kind" in document:
            return str(document["kind"])
    if "shard_inputs" in plan:
        return "probe"
    if {"attnbias", "files"} <= plan.keys():
        return "figures"
    return note.get("verb")


def check_free(folder: Path, owner: Owner) -> None:
    """Raises UserError if a folder is a file, or another verb's."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file", "give a folder with -o")
    verb = verb_of(folder)
    if verb not in (None, owner.verb):
        raise UserError(f"'{folder}' holds what attnbias {verb} wrote", "give another folder with -o")


def is_empty(folder: Path) -> bool:
    """Whether nothing lies in a folder but what is being built or written."""
    return not folder.exists() or all(file.suffix == ".tmp" or file.name == NEXT for file in folder.iterdir())


# --- built aside, put in place


@contextmanager
def staged(folder: Path, owner: Owner) -> Iterator[Path]:
    """A place to build a result, which takes that of an earlier one if all goes well; one process at a time.

    Raises UserError if the folder is another verb's, CannotWrite if it cannot be written.
    """
    check_free(folder, owner)
    with alone(folder):
        check_free(folder, owner)
        sweep(folder)
        go_on(folder, owner)
        place = begin(folder, owner)
        try:
            yield place
        except BaseException:
            discard(folder, owner)
            raise
        put_in_place(folder, owner)


def begin(folder: Path, owner: Owner) -> Path:
    """An empty place to build in. What was left there is removed."""
    discard(folder, owner)
    with writing(folder / NEXT):
        (folder / NEXT).mkdir(parents=True, exist_ok=True)
    write_json({"verb": owner.verb}, folder / NEXT / NOTE)
    return folder / NEXT


def discard(folder: Path, owner: Owner) -> None:
    """Removes what was built and will not be put in place."""
    place = folder / NEXT
    if place.is_dir() and not place.is_symlink():
        clear(place, owner)
        (place / NOTE).unlink(missing_ok=True)
        with suppress(OSError):
            place.rmdir()


def go_on(folder: Path, owner: Owner) -> bool:
    """Goes on with putting a result in place, where that had begun; whether it had."""
    if "comes" not in mapping_in(folder / NEXT / NOTE):
        return False
    put_in_place(folder, owner)
    return True


def put_in_place(folder: Path, owner: Owner, goes: Iterable[str] | None = None) -> None:
    """What was built takes the place of what was there. May be stopped anywhere, and begun again.

    goes: files of the earlier result to be removed; by default all that the new one has not.
    Raises CannotWrite. Nobody else may be at work in the folder.
    """
    place = folder / NEXT
    if not place.is_dir():
        return
    note = mapping_in(place / NOTE)
    if "comes" not in note:
        comes = owner.files(place, owner.result)
        if goes is None:
            goes = sorted({*owner.files(folder)} - {*comes})
        note = {"verb": owner.verb, "comes": comes, "goes": list(goes)}
        settle(place)
        write_json(note, place / NOTE)
        on_disk(place)
    comes = [name for name in note["comes"] if name != owner.last]
    if (place / owner.last).is_file():  # else all is in place, and only the rest is to be removed
        with writing(folder):
            if not equal(place / owner.last, folder / owner.last):
                remove(folder, owner, [owner.last])
            remove(folder, owner, note["goes"])
            for name in comes:
                _move(place / name, folder / name)
            settle(folder)
            _move(place / owner.last, folder / owner.last)
            on_disk(folder)
    discard(folder, owner)


def _move(source: Path, target: Path) -> None:
    if not source.is_file():  # moved before an interruption
        return
    if equal(source, target):  # what did not change keeps its time
        source.unlink()
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:  # a link leads to another disk
            raise
        atomically(target, partial(shutil.copyfile, source))
        source.unlink()


def equal(one: Path, other: Path) -> bool:
    """Whether two files are there and hold the same bytes."""
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in the system's place for such, removed in the end; so are those of killed processes."""
    home = Path(tempfile.gettempdir())
    for left in filter(left_behind, home.glob(".attnbias.*.tmp")):
        shutil.rmtree(left, ignore_errors=True)
    place = beside(home / "attnbias")
    with writing(place):
        place.mkdir(mode=0o700)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def settle(folder: Path) -> None:
    """Brings the names of all files of a folder to disk: a power cut may lose a rename."""
    for where, _, _ in os.walk(folder):
        on_disk(Path(where))
