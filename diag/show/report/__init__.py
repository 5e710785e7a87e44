"""Runs as one self-contained HTML page: words, curves, tables, heads, pictures, provenance. No torch.

    write_report([Path("runs/demo-vision")], Path("report.html"))

The page holds all it needs: no file beside it, no request to anywhere. The same folders give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diag.errors import UserError
from diag.results.collect import Collection, collect
from diag.results.folder import MANIFEST
from diag.results.manifest import ATTEND, PROBE
from diag.results.writing import sweep_beside, write_text
from diag.show.report.attended import read_attended
from diag.show.report.render import GENERATOR, default_title, page
from diag.show.report.studied import STUDIES, kind_of, read_studies

__all__ = ["Report", "default_title", "of_another_verb", "page", "write_page", "write_report"]


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
    """Reads folders of probe, attend, audit, compare, intervene, readout and train, and writes the page.

    Raises UserError if none can be read, or if `path` holds something that is no report.
    """
    check_free(path)
    given = list(dict.fromkeys(one for folder in folders for one in finished_in(folder)))
    if not given:
        raise UserError(
            "no run was given",
            "give at least one run folder, for example: attnbias report runs/demo-vision",
        )
    others = [folder for folder in given if of_another_verb(folder)]
    runs = [folder for folder in given if folder not in others]
    return write_page(collect(runs, needed=not others), others, path, title=title)


def write_page(
    collection: Collection, others: Sequence[Path], path: Path, *, title: str | None = None
) -> Report:
    """`write_report` of runs that are read already, if any. others: those that are `of_another_verb`."""
    check_free(path)
    kinds = {folder: kind_of(folder) for folder in others}
    attended, unseen = read_attended([folder for folder in others if kinds[folder] == ATTEND])
    studies, unread = read_studies([folder for folder in others if kinds[folder] in STUDIES])
    problems = {**unseen, **unread}
    if not (collection.labels or attended or studies):
        raise UserError(next(iter(problems.values())), "give folders that are finished and whole")
    notes = [
        *collection.notes,
        *(note for look in attended for note in look.notes),
        *(note for study in studies for note in study.notes),
    ]
    collection = replace(collection, notes=notes)
    problems = {**collection.problems, **problems}
    text = page(collection, attended, studies, title=title, problems=problems)
    sweep_beside(path)
    write_text(text, path)
    return Report(path, len(text.encode("utf-8")), len(collection.labels), problems, collection.notes)


def finished_in(folder: Path) -> list[Path]:
    """The folder itself; of one that only holds those of verbs, as that of several sweeps does, these."""
    if (folder / MANIFEST).exists() or not folder.is_dir():
        return [folder]
    made = sorted(manifest.parent for manifest in folder.glob(f"*/{MANIFEST}"))
    return [one for one in made if (kind_of(one) or PROBE) in (PROBE, ATTEND, *STUDIES)] or [folder]


def of_another_verb(folder: Path) -> bool:
    """Whether a folder is of a verb, other than probe, that the page has a section for."""
    return kind_of(folder) in (ATTEND, *STUDIES)


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
