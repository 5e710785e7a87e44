"""Whose folder it is: made for one run, shared by its processes, given up if nothing came of it.

A folder that holds anything else is left alone. A result that is there stays until the new one, which is
built in `.next` (`diag.results.staging`), is whole.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diag.errors import UserError
from diag.inputs.outside import json_of, mapping_in
from diag.results.folder import (
    HEADS,
    LAYERS,
    MANIFEST,
    PLAN,
    QUANTILES,
    SAMPLES,
    SINK_PLACES,
    TOKENS,
    is_finished,
)
from diag.results.staging import (
    NEXT,
    Owner,
    alone,
    begin,
    check_free,
    clear,
    discard,
    go_on,
    is_empty,
    pictures,
    put_in_place,
    sweep,
)
from diag.results.writing import CannotWrite, beside, json_text, write_json, writing
from diag.run.locks import PATIENCE, PRESENT, Locks
from diag.run.plan import what_differs

SHARDS = ("shards/*.parquet", "shards/*.json", "shards/.lock")

PROBE = Owner(
    "probe",
    result=(
        *(
            PLAN,
            MANIFEST,
            LAYERS,
            HEADS,
            SAMPLES,
            QUANTILES,
            SINK_PLACES,
            TOKENS,
            "activations/*/*.safetensors",
        ),
        *pictures("curves-*", "nulls-*", "heads-*", "sinks-*", "ledger-*", "comparison", "comparison-*"),
    ),
    work=SHARDS,
    kept=("shards/*.parquet",),
)


class Vanished(UserError):  # noqa: N818  it says what happened
    """What was being measured is not there any more: nothing the user gave was wrong."""

    exit_code = 1


@dataclass(frozen=True)
class Work:
    """A folder that this process works in, perhaps beside others that carry out the same.

    place: where results are written: the folder, or `.next` in it while an earlier result stays there.
    locks: of the folder's processes among each other.
    """

    folder: Path
    place: Path
    locks: Locks

    def holds(self, key: str) -> bool:
        """Whether what is being carried out is here, finished or not, and no other."""
        return any(key_of(place) == key for place in (self.place, self.folder))


def key_of(folder: Path) -> str | None:
    """The key of what a folder is for; None where there is none."""
    return mapping_in(folder / PLAN).get("key")


@contextmanager
def at_work(
    folder: Path,
    owner: Owner,
    document: Mapping[str, Any],
    *,
    lock: str,
    overwrite: bool = False,
    keep: bool = False,
) -> Iterator[Work | None]:
    """`with` it, a process works in a folder among others; None if what it would do is done already.

    document, overwrite: see `claim`. lock: the file with the locks of the processes. keep: do not give the
    folder up where nothing came of it: others will come. In the end the last process out puts a whole result
    in the place of an earlier one.

    Raises UserError as `claim` does, CannotWrite if nothing can be written, and Vanished if what this process
    worked on was removed by somebody.
    """
    check_free(folder, owner)
    with alone(folder) as made:
        place = claim(folder, owner, document, lock=lock, overwrite=overwrite)
        if place is not None:
            try:
                work = Work(folder, place, Locks.at(place / lock))
            except CannotWrite:
                release(folder, place, owner, made)
                raise
            work.locks.share(PRESENT)
    if place is None:
        yield None
        return
    with work.locks as locks:
        try:
            yield work
            if not work.holds(document["key"]):
                raise _vanished(folder)
        except BaseException as error:
            gone = not work.holds(document["key"])
            with alone(folder):
                if locks.take(PRESENT) and (gone or not keep):
                    release(folder, place, owner, made)
            if gone and isinstance(error, UserError | OSError):
                raise _vanished(folder) from error
            raise
        if place != folder:
            _hand_over(work, owner, lock)


def _vanished(folder: Path) -> Vanished:
    return Vanished(f"'{folder}' was removed while it was written", "run the same command again")


@contextmanager
def alone_at_work(
    folder: Path,
    owner: Owner,
    document: Mapping[str, Any],
    *,
    overwrite: bool = False,
    waiting: Callable[[str], object] = lambda text: None,
) -> Iterator[Path | None]:
    """`with` it, this process alone writes a folder: where; None if what it would do is done already.

    document, overwrite: see `claim`. waiting: told, if another process has to be waited for. A failure gives
    the folder up. Raises UserError as `claim` does.
    """
    check_free(folder, owner)
    with alone(folder, waiting):
        place = claim(folder, owner, document, overwrite=overwrite)
        try:
            yield place
        except BaseException:
            if place is not None:
                release(folder, place, owner)
            raise
        if place not in (None, folder):
            put_in_place(folder, owner)


def _hand_over(work: Work, owner: Owner, lock: str) -> None:
    """Puts a whole result in its place when nobody works on it, or on the earlier one, any more."""
    work.locks.give(PRESENT)
    while is_finished(work.place):
        with alone(work.folder):
            if not is_finished(work.place):  # another process was the last one
                return
            if work.locks.take(PRESENT) and nobody(work.folder / lock):
                put_in_place(work.folder, owner)
                return
        time.sleep(PATIENCE)


def nobody(lock: Path) -> bool:
    """Whether no other process works in the folder of a lock file."""
    if not lock.is_file():
        return True
    with Locks(lock) as locks:
        return locks.take(PRESENT)


def claim(
    folder: Path, owner: Owner, document: Mapping[str, Any], *, lock: str = "", overwrite: bool = False
) -> Path | None:
    """Makes a folder this run's own with its `plan.json`: where to work. None if it holds this run, finished.

    document: what is to be run; its "key" tells runs apart. lock: the file that shows who works in it.
    overwrite: build anew what another run (or this one) left, and put it in its place when it is whole.
    Raises UserError if the folder holds anything else. Call it `alone` in the folder.
    """
    check_free(folder, owner)
    sweep(folder)
    key, next_key = document["key"], key_of(folder / NEXT)
    renewed = go_on(folder, owner)
    if not renewed and is_finished(folder / NEXT) and _idle(folder, lock):  # stopped just before
        put_in_place(folder, owner)
        renewed = True
    plan = folder / PLAN
    # before the plan is looked for: another process may be writing it at this moment
    foreign = not is_empty(folder)
    if not plan.exists():
        if foreign:
            raise UserError(f"'{folder}' is not empty and holds no run", "give another folder with -o")
        if not _written_first(document, plan):
            return claim(folder, owner, document, lock=lock)
        return folder
    tip = "give another folder with -o, or --overwrite"
    there = json_of(plan, "the plan of a run", tip=tip)
    same = there.get("key") == key
    if same and is_finished(folder) and (renewed or not overwrite):
        return None
    if not (same or overwrite):
        raise UserError(f"'{folder}' holds another run{what_differs(document, there)}", tip)
    again = same and there.get("command") == document.get("command", "")
    if not overwrite or (again and not is_finished(folder)):  # the same command was stopped before
        return folder
    if next_key == key and (folder / NEXT).is_dir():
        return folder / NEXT
    if not _idle(folder, lock):
        raise UserError(
            f"another process is at work in '{folder}'", "wait for it, or give another folder with -o"
        )
    place = begin(folder, owner)
    write_json(document, place / PLAN)
    return place


def _idle(folder: Path, lock: str) -> bool:
    return not lock or all(nobody(place / lock) for place in (folder, folder / NEXT))


def _written_first(document: Mapping[str, Any], path: Path) -> bool:
    """Writes a document unless another process has; False if one has."""
    own = beside(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(json_text(document), encoding="utf-8")
        try:
            path.hardlink_to(own)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            own.replace(path)
        finally:
            own.unlink(missing_ok=True)
    return True


def release(folder: Path, place: Path, owner: Owner, made: Sequence[Path] = ()) -> None:
    """Gives up a claim of which nothing came, so that a corrected command can have the folder.

    made: folders that were made for it. Call it `alone` in the folder, when nobody else is at work in it.
    """
    if is_finished(place) or (key_of(place) and owner.files(place, owner.kept)):
        return
    if place != folder:
        discard(folder, owner)
        return
    clear(folder, owner)
    with suppress(OSError):
        for empty in (folder, *made[1:]):
            empty.rmdir()


def check_room(folder: Path, needed: int) -> None:
    """Raises CannotWrite if the disk of a folder has not so many bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CannotWrite(
            f"'{folder}' needs about {needed / 1e6:.0f} MB more, and {free / 1e6:.0f} MB are free",
            "make room and run the same command again, or choose another folder with -o",
        )
