"""Runs as one self-contained HTML page: words, curves, tables, heads, pictures, provenance. No torch.

    write_report([Path("runs/demo-vision")], Path("report.html"))

The page holds all it needs: no file beside it, no request to anywhere. The same folders give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from diag.errors import UserError
from diag.results.collect import Collection, collect
from diag.results.manifest import ATTEND
from diag.results.writing import sweep_beside, write_text
from diag.show.report.attended import read_attended
from diag.show.report.render import GENERATOR, default_title, page
from diag.show.report.studied import STUDIES, kind_of, read_studies

__all__ = ["Report", "default_title", "page", "write_report"]


@dataclass(frozen=True)
class Report:
    """A report that was written: where, its size in bytes, how many lines, and folders that were left out.

    notes: what is to be said of those that are in it.
    """

    path: Path
    size: int
    lines: int
    problems: Mapping[str, str]
    notes: Sequence[str] = ()


def write_report(folders: Iterable[Path], path: Path, *, title: str | None = None) -> Report:
    """Reads folders of probe, attend, compare, intervene and train, and writes the page.

    Raises UserError if none can be read, or if `path` holds something that is no report.
    """
    check_free(path)
    given = list(dict.fromkeys(folders))
    if not given:
        raise UserError(
            "no run was given",
            "give at least one run folder, for example: attnbias report runs/demo-vision",
        )
    kinds = {folder: kind_of(folder) for folder in given}
    attended, unseen = read_attended([folder for folder in given if kinds[folder] == ATTEND])
    studies, unread = read_studies([folder for folder in given if kinds[folder] in STUDIES])
    problems = {**unseen, **unread}
    runs = [folder for folder in given if kinds[folder] not in (ATTEND, *STUDIES)]
    collection = collect_beside(runs, others=bool(attended or studies))
    if not (collection.labels or attended or studies):
        raise UserError(next(iter(problems.values())), "give folders that are finished and whole")
    notes = [
        *(note for look in attended for note in look.notes),
        *(note for study in studies for note in study.notes),
    ]
    collection = replace(collection, notes=[*collection.notes, *notes])
    problems = {**collection.problems, **problems}
    text = page(collection, attended, studies, title=title, problems=problems)
    sweep_beside(path)
    write_text(text, path)
    return Report(path, len(text.encode("utf-8")), len(collection.labels), problems, collection.notes)


def collect_beside(runs: Sequence[Path], *, others: bool) -> Collection:
    """The runs as a collection, which may be empty: none is given, or none can be read and there are others.

    Raises UserError where nothing else is there and none of them can be read.
    """
    nothing = pd.DataFrame({"label": [], "metric": []})
    empty = Collection(nothing, nothing, nothing)
    if not runs:
        return empty
    try:
        return collect(runs)
    except UserError:
        if not others:
            raise
    problems = {}
    for folder in runs:  # none of them can be read: each says why
        try:
            collect([folder])
        except UserError as error:
            problems[str(folder)] = " ".join(str(error).split())
    return replace(empty, problems=problems)


def check_free(path: Path) -> None:
    """Raises UserError if writing to `path` would take the place of anything but a report."""
    if path.is_dir():
        raise UserError(f"'{path}' is a folder", "give a file with -o, for example -o report.html")
    if not path.exists():
        return
    start = b""
    if path.is_file():  # from a pipe, reading would wait for ever
        with path.open("rb") as file:
            start = file.read(2048)
    if f'<meta name="generator" content="{GENERATOR}">'.encode() not in start:
        raise UserError(
            f"'{path}' exists and was not made by attnbias report",
            "choose another name with -o, or remove the file",
        )
