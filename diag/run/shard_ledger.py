"""The shards of an unfinished run: where they lie, which are there, and what their processes noted.

    plan.json                          what is run, and how it is cut; written by the first process
    shards/00-NAME-TOWER.json          what one tower of one model is, and how many shards it has
    shards/00-NAME-TOWER-00007.json    what could not be read, before the shard itself
    shards/00-NAME-TOWER-00007.cells.parquet   moments, where samples are not all kept; before the shard
    shards/00-NAME-TOWER-00007.parquet samples; a shard is done when it is there
    shards/00-NAME.failed-1-of-4.json  why a model failed in one of four processes

Every file is renamed into place, and two processes that write one write the same. No torch here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diag.errors import UserError
from diag.results.folder import PLAN
from diag.results.writing import file_stem
from diag.run.processes import Share

TOWERS = ("vision", "text", "language")
"""Every tower that a model can have."""

MERGE = 0
"""The lock of the process that finishes a run; those of shards are above."""


SHARDS_LOCK = "shards/.lock"
"""The file that holds the locks of a run, within its folder. It goes with the shards."""


def lock_file(folder: Path) -> Path:
    """The file that holds the locks of a run."""
    return folder / SHARDS_LOCK


def read_plan(folder: Path) -> dict[str, Any]:
    """What a folder runs, as its first process wrote it. Raises UserError where nothing was begun."""
    file = folder / PLAN
    document = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "shard_inputs" not in document:
        raise UserError(
            f"'{folder}' holds no run of attnbias probe",
            "give the folder that probe was given with -o, or has named",
        )
    return document


@dataclass(frozen=True)
class Part:
    """One tower of one model within a run, and its files.

    number: the model's place in the plan. given: its name there.
    """

    folder: Path
    number: int
    given: str
    tower: str

    @cached_property
    def name(self) -> str:
        return f"{self.number:02d}-{file_stem(self.given)}-{self.tower}"

    @property
    def note(self) -> Path:
        return self.folder / "shards" / f"{self.name}.json"

    # not with_suffix: names of models hold dots
    def shard(self, place: int) -> Path:
        return self.folder / "shards" / f"{self.name}-{place:05d}.parquet"

    def cells(self, place: int) -> Path:
        return self.folder / "shards" / f"{self.name}-{place:05d}.cells.parquet"

    def account(self, place: int) -> Path:
        return self.folder / "shards" / f"{self.name}-{place:05d}.json"

    def lock(self, place: int) -> int:
        """The lock of a shard: its number among all that a run can have."""
        return 1 + ((self.number * len(TOWERS) + TOWERS.index(self.tower)) << 32) + place


def failure_file(folder: Path, number: int, given: str, share: Share) -> Path:
    """Where a process notes that a model failed."""
    return folder / "shards" / f"{number:02d}-{file_stem(given)}.failed-{share.rank}-of-{share.of}.json"


def forget_failures(folder: Path, share: Share) -> None:
    """Removes what this process noted when it ran before, and what processes of another division did.

    Those of the same division may have noted theirs a moment ago.
    """
    for file in (folder / "shards").glob("*.failed-*-of-*.json"):
        rank, _, of = file.name.removesuffix(".json").rpartition(".failed-")[2].partition("-of-")
        if int(of) != share.of or int(rank) == share.rank:
            file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Standing:
    """How far a run has come, all processes together.

    parts: towers whose shards are all there, in the order of the plan, with their notes. failed: models
    that failed and why. missing: what is still to be measured, in words; nothing if the run can be finished.
    done, total: shards of the models that were begun.
    """

    parts: list[tuple[Part, dict[str, Any]]]
    failed: dict[str, str]
    missing: list[str]
    done: int
    total: int


def standing(folder: Path, document: Mapping[str, Any]) -> Standing:
    """How far the run in a folder has come. document: its `plan.json`."""
    shards = folder / "shards"
    there = set(os.listdir(shards)) if shards.is_dir() else set()
    found = Standing([], {}, [], 0, 0)
    done = total = 0
    for number, given in enumerate(document["plan"]["models"]):
        given = given.strip()
        parts = {tower: Part(folder, number, given, tower) for tower in TOWERS}
        begun = {tower: part.note for tower, part in parts.items() if part.note.name in there}
        notes = {tower: json.loads(file.read_text(encoding="utf-8")) for tower, file in begun.items()}
        why = sorted(name for name in there if name.startswith(f"{number:02d}-{file_stem(given)}.failed-"))
        missing = [] if notes else [f"'{given}' was not begun"]
        for tower in next(iter(notes.values()))["towers"] if notes else ():
            if tower not in notes:
                missing.append(f"the {tower} tower of '{given}' was not begun")
                continue
            count = notes[tower]["shards"]
            have = sum(parts[tower].shard(place).name in there for place in range(count))
            done, total = done + have, total + count
            if have == count:
                found.parts.append((parts[tower], notes[tower]))
            else:
                missing.append(f"{count - have} of {count} shards of '{given}'")
        if missing and why:
            found.failed[given] = json.loads((shards / why[0]).read_text(encoding="utf-8"))["error"]
        else:
            found.missing.extend(missing)
    return Standing(found.parts, found.failed, found.missing, done, total)
