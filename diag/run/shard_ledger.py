"""The shards of an unfinished run: where they lie, which are there, and what their processes noted.

    plan.json                          what is run, and how it is cut; written by the first process
    shards/00-NAME-TOWER.json          what one tower of one model is, and how many shards it has
    shards/00-NAME-TOWER-00007.json    its account, before the shard itself: the run that it belongs to, the
                                       hashes of its files, what could not be read
    shards/00-NAME-TOWER-00007.cells.parquet   moments, where samples are not all kept; before the shard
    shards/00-NAME-TOWER-00007.parquet samples; a shard is done when it is there and as its account says
    shards/00-NAME-TOWER-untrained-0…  the same of an untrained twin, by its seed
    shards/00-NAME.failed-1-of-4.json  why a model failed in one of four processes

Every file is renamed into place, and two processes that write one write the same. What a shard's account does
not vouch for (half a file, one of another run, one that was edited) counts as missing. No torch here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from diag.errors import UserError
from diag.inputs.outside import json_of
from diag.results.folder import PLAN
from diag.results.hashes import sha256_of
from diag.results.staging import remove
from diag.results.writing import file_stem
from diag.run.plan import seeds_in
from diag.run.processes import Share
from diag.run.run_folder import PROBE

TOWERS = ("vision", "text", "language")
"""Every tower that a model can have."""

MERGE = 0
"""The lock of the process that finishes a run; those of shards are above."""

Fields = Mapping[str, Any]

PLAN_FIELDS: Fields = {
    "key": str,
    "command": str,
    "shard_inputs": int,
    "inputs": dict,
    "plan.models": list,
    "plan.seed": int,
}
NOTE_FIELDS: Fields = {
    "towers": list,
    "shards": int,
    "source": str,
    "device": str,
    "entry": dict,
    "entry.takes": str,
}
ACCOUNT_FIELDS: Fields = {
    "run": str,
    "files": dict,
    "failed": dict,
    "skipped_layers": dict,
    "unprojected": list,
    "measured": int,
    "seconds": float,
    "content": dict,
}
"""What a document must hold to be used, and of which type; lists are of text."""

KINDS: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    dict: "a mapping",
    list: "a list of text",
}

SHARDS_LOCK = "shards/.lock"
"""The file that holds the locks of a run, within its folder. It goes with the shards."""


def read_plan(folder: Path) -> dict[str, Any]:
    """What a folder runs, as its first process wrote it.

    Raises UserError where nothing was begun, or its plan is damaged.
    """
    file = folder / PLAN
    tip = "if it is a run of attnbias probe, measure it again in another folder: attnbias probe … -o FOLDER"
    document = json_of(file, "the plan of a run", tip=tip) if os.path.lexists(file) else {}
    if "shard_inputs" not in document:
        raise UserError(
            f"'{folder}' holds no run of attnbias probe",
            "give the folder that probe was given with -o, or has named",
        )
    _check(document, file, PLAN_FIELDS, tip)
    return document


def _read(file: Path, what: str, fields: Fields, tip: str) -> dict[str, Any]:
    """A document about shards. Raises UserError, naming it, where it does not hold what it must."""
    document = json_of(file, what, tip=tip)
    _check(document, file, fields, tip)
    return document


def _check(document: Mapping[str, Any], file: Path, fields: Fields, tip: str) -> None:
    for name, kind in fields.items():
        found: Any = document
        for part in name.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        right = isinstance(found, (int, float) if kind is float else kind) and not isinstance(found, bool)
        right = right and (kind is not int or found >= 0)
        if not right or (kind is list and not all(isinstance(one, str) for one in found)):
            raise UserError(f"'{file}' is damaged: '{name}' is not {KINDS[kind]}", tip)


@dataclass(frozen=True)
class Part:
    """One tower of one model within a run, and its files.

    number: the model's place in the plan. given: its name there. seed: of an untrained twin of it; None for
    the model itself.
    """

    folder: Path
    number: int
    given: str
    tower: str
    seed: int | None = None

    @cached_property
    def name(self) -> str:
        twin = "" if self.seed is None else f"-untrained-{self.seed}"
        return f"{self.number:02d}-{file_stem(self.given)}-{self.tower}{twin}"

    @property
    def said(self) -> str:
        """The model, in words."""
        return f"'{self.given}'" + ("" if self.seed is None else f" (untrained, seed {self.seed})")

    def and_twins(self, seeds: int) -> list[Part]:
        """Itself, and the same tower of so many untrained twins."""
        return [self, *(replace(self, seed=seed) for seed in range(seeds))]

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

    def read_note(self, tip: str) -> dict[str, Any]:
        """What the tower is. Raises UserError where its note is damaged."""
        note = _read(self.note, "the note of a tower", NOTE_FIELDS, tip)
        if self.tower not in note["towers"] or not set(note["towers"]) <= set(TOWERS):
            raise UserError(f"'{self.note}' is damaged: 'towers' are not those of a model", tip)
        if not note["shards"]:
            raise UserError(f"'{self.note}' is damaged: 'shards' is 0", tip)
        return note

    def read_account(self, place: int) -> dict[str, Any]:
        """What a shard's process noted beside it. Raises UserError where that is missing or damaged."""
        tip = f"rm '{self.account(place)}', then run the same command again"
        return _read(self.account(place), "the account of a shard", ACCOUNT_FIELDS, tip)

    def problem(self, place: int, key: str) -> str | None:
        """Why a shard does not count: nothing if it does, empty words where it is simply not there.

        key: of the run that it must belong to.
        """
        if not self.shard(place).exists():
            return ""
        try:
            account = self.read_account(place)
        except UserError:
            return "its account is missing or damaged"
        if account["run"] != key:
            return "it belongs to another run"
        told = account["files"]
        files = [self.shard(place), *(file for file in [self.cells(place)] if file.name in told)]
        try:
            same = all(file.is_file() and sha256_of(file) == told.get(file.name) for file in files)
        except OSError:
            same = False
        return None if same else "it is not what was measured"

    def problems(self, names: Collection[str], count: int, key: str) -> dict[str, str | None]:
        """`problem` of each of the first `count` shards that is among file names, by the shard's name."""
        places = [re.fullmatch(re.escape(self.name) + r"-([0-9]{5,9})\.parquet", name) for name in names]
        there = sorted({int(found[1]) for found in places if found and int(found[1]) < count})
        return {self.shard(place).stem: self.problem(place, key) for place in there}

    def lock(self, place: int) -> int:
        """The lock of a shard: its number among all that a run can have."""
        twin = 0 if self.seed is None else self.seed + 1
        number = (twin << 24) + self.number * len(TOWERS) + TOWERS.index(self.tower)
        return 1 + (number << 32) + place


def failure_file(folder: Path, number: int, given: str, share: Share) -> Path:
    """Where a process notes that a model failed."""
    return folder / "shards" / f"{number:02d}-{file_stem(given)}.failed-{share.rank}-of-{share.of}.json"


def forget_failures(folder: Path, share: Share) -> None:
    """Removes what this process noted when it ran before, and what processes of another division did.

    Those of the same division may have noted theirs a moment ago.
    """
    for name in PROBE.files(folder, ["shards/*.failed-*-of-*.json"]):
        told = re.search(r"\.failed-([0-9]{1,9})-of-([0-9]{1,9})\.json$", name)
        if told and (int(told[2]) != share.of or int(told[1]) == share.rank):
            remove(folder, PROBE, [name])


@dataclass(frozen=True)
class Standing:
    """How far a run has come, all processes together.

    parts: towers whose shards are all there, in the order of the plan, with their notes; the untrained twins
    of one stand behind it. failed: models that failed and why. missing: what is still to be measured, in
    words; nothing if the run can be finished. done, total: shards of the models that were begun.
    """

    parts: list[tuple[Part, dict[str, Any]]]
    failed: dict[str, str]
    missing: list[str]
    done: int
    total: int


def standing(folder: Path, document: Mapping[str, Any]) -> Standing:
    """How far the run in a folder has come. document: its `plan.json`.

    Raises UserError, naming the file, where a note is damaged.
    """
    again = f"run its command again: {document['command']}"
    shards = folder / "shards"
    there = set(os.listdir(shards)) if shards.is_dir() else set()
    seeds = seeds_in(document["plan"].get("null"))
    found = Standing([], {}, [], 0, 0)
    done = total = 0
    for number, given in enumerate(document["plan"]["models"]):
        given = given.strip()
        parts = {tower: Part(folder, number, given, tower) for tower in TOWERS}
        begun = [tower for tower, part in parts.items() if part.note.name in there]
        notes = {tower: parts[tower].read_note(again) for tower in begun}
        why = sorted(name for name in there if name.startswith(f"{number:02d}-{file_stem(given)}.failed-"))
        missing = [] if notes else [f"'{given}' was not begun"]
        towers = next(iter(notes.values()))["towers"] if notes else ()
        for part in (part for tower in towers for part in parts[tower].and_twins(seeds)):
            if part.note.name not in there:
                missing.append(f"the {part.tower} tower of {part.said} was not begun")
                continue
            note = part.read_note(again)
            count = note["shards"]
            wrong = part.problems(there, count, document["key"])
            have = sum(problem is None for problem in wrong.values())
            done, total = done + have, total + count
            if have == count:
                found.parts.append((part, note))
            else:
                told = [f" ({name}: {problem})" for name, problem in wrong.items() if problem]
                missing.append(f"{count - have} of {count} shards of {part.said}{''.join(told[:1])}")
        if missing and why:
            tip = f"rm '{shards / why[0]}', then run the same command again"
            note = _read(shards / why[0], "why a model failed", {"error": str}, tip)
            found.failed[given] = note["error"]
        else:
            found.missing.extend(missing)
    return Standing(found.parts, found.failed, found.missing, done, total)
