"""A plan carried out: what is missing is measured, all is drawn aside, then put in its place or compared.

Files are drawn into a temporary folder first, so that `check` and writing are the same work, a file that
did not change keeps its time, and what is there stays until all of the new is.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from diag.errors import UserError
from diag.results.collect import Collection, collect
from diag.results.files import write, write_json
from diag.results.folder import is_finished
from diag.results.tables import read_manifest
from diag.run.cache import folder_of, measured
from diag.run.environment import version
from diag.run.plan import HOW, RUNS
from diag.studies.attend import run_attend
from diag.studies.attend.folder import read as read_look
from diag.studies.attend.folder import read_manifest as read_look_manifest
from diag.studies.attend.plan import AttendPlan
from diag.studies.attend.plan import folder_of as folder_of_look
from diag.studies.writeup.captions import caption, look_settings
from diag.studies.writeup.document import Document
from diag.studies.writeup.drawing import figures_of
from diag.studies.writeup.files import EXTRA, MISSING, NEW, REMOVED, SAME, compare, extra, put
from diag.studies.writeup.material import Material
from diag.studies.writeup.needs import PlannedRun, looks_of, runs_of
from diag.studies.writeup.schema import AttendFigure, WriteupPlan, attend_plan_of, items_of, read_plan
from diag.studies.writeup.tables import Tabled, table

if TYPE_CHECKING:
    from diag.run.cache import Listener

TABLE_SUFFIXES = (".csv", ".tex", ".md")


@dataclass(frozen=True)
class Shown:
    """One figure or table: its kind, the stem of its files, their endings."""

    kind: str
    stem: str
    endings: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a plan.

    files: name -> new, changed, same, removed; or, of a check, changed, missing, extra, same.
    measured, reused: runs and looks. failed: what is missing -> why. tables: for the terminal.
    """

    plan: Path
    folder: Path
    shown: tuple[Shown, ...]
    files: Mapping[str, str]
    measured: int
    reused: int
    failed: Mapping[str, str]
    tables: tuple[Tabled, ...] = ()

    @property
    def differing(self) -> dict[str, str]:
        """Files that are not as they would be drawn now."""
        return {name: state for name, state in self.files.items() if state != SAME}


@dataclass
class _Account:
    """What is collected while a plan is carried out."""

    folders: dict[str, dict[PlannedRun, Path]] = field(default_factory=dict)
    looks: dict[AttendPlan, Path] = field(default_factory=dict)
    measured: int = 0
    reused: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    first: UserError | None = None

    def fail(self, what: str, error: UserError) -> None:
        self.failed[what] = " ".join(str(error).split())
        self.first = self.first or error


def read_plans(files: Sequence[Path]) -> list[tuple[WriteupPlan, Document]]:
    """All plans, checked before anything runs. Raises UserError, also where two have one name."""
    stems: dict[str, Path] = {}
    for file in files:
        if stems.setdefault(file.stem, file) != file:
            raise UserError(
                f"'{stems[file.stem]}' and '{file}' would write into the same folder", "give one another name"
            )
    found = [read_plan(file) for file in dict.fromkeys(files)]
    for plan, document in found:
        runs_of(plan, document)  # series and models of figures are known
    return found


def produce(
    plan: WriteupPlan,
    document: Document,
    out: Path,
    *,
    root: Path = RUNS,
    check: bool = False,
    listener: Listener | None = None,
) -> Outcome:
    """Draws a plan into `out`/<name of the plan's file>, or compares what is there with what would be drawn.

    root: where finished runs lie and missing ones are put. A model that fails, and what cannot be drawn
    without it, is named in `failed`; the rest goes on.

    Raises UserError if nothing at all can be drawn.
    """
    folder = out / document.file.stem
    account = _Account()
    material = _material(plan, document, root, account, listener)
    with tempfile.TemporaryDirectory(prefix="attnbias-") as temporary:
        drawn = Path(temporary)
        shown, tables = _draw_all(plan, material, account, drawn)
        if not shown:
            assert account.first is not None
            raise account.first
        write_json(_document(plan, material, account, drawn), drawn / "plan.json")
        files = compare(drawn, folder, complete=not account.failed)
        if check:
            names = {NEW: MISSING, REMOVED: EXTRA}
            files = {name: names.get(state, state) for name, state in files.items()}
            files |= extra(folder, files) if not account.failed else {}
        else:
            put(drawn, folder, files)
    return Outcome(
        document.file,
        folder,
        tuple(shown),
        files,
        account.measured,
        account.reused,
        account.failed,
        tuple(tables),
    )


# --- measuring


def _material(
    plan: WriteupPlan, document: Document, root: Path, account: _Account, listener: Listener | None
) -> Material:
    collections: dict[str, Collection] = {}
    lines: dict[str, dict[str, str]] = {}
    for name, runs in runs_of(plan, document).items():
        for run in runs:
            _measure(run, root, account, listener)
        folders = account.folders.get(name, {})
        if not folders:
            continue
        collections[name] = collect(folders.values())
        lines[name] = {
            key: run.line
            for key, folder in collections[name].folders.items()
            for run in folders
            if folders[run] == folder
        }
        for folder, why in collections[name].problems.items():
            account.fail(f"{name}: {Path(folder).name}", UserError(why))
    for look in looks_of(plan):
        _look(look, root, account, listener)
    return Material(collections, lines, account.looks)


def _measure(run: PlannedRun, root: Path, account: _Account, listener: Listener | None) -> None:
    what = f"{run.probe}: {run.words}"
    try:
        there = is_finished(folder_of(run.plan, root))
        if not there and listener is not None:
            listener.say(f"{what}: not measured yet")
        folder = measured(run.plan, root, listener=listener)
        manifest = read_manifest(folder)
    except UserError as error:
        account.fail(what, error)
        return
    account.reused, account.measured = account.reused + there, account.measured + (not there)
    account.folders.setdefault(run.probe, {})[run] = folder
    for name, why in {**manifest["failed_models"], **manifest["failed_inputs"]}.items():
        account.fail(f"{what}: {name}", UserError(why))


def _look(look: AttendPlan, root: Path, account: _Account, listener: Listener | None) -> None:
    what = f"attend: {', '.join(look.models)}"
    try:
        folder = folder_of_look(look, root)
        there = is_finished(folder)
        if not there:
            if listener is not None:
                listener.say(f"{what}: not measured yet")
            run_attend(look, folder, listener=listener)
        manifest = read_look_manifest(folder)
    except UserError as error:
        account.fail(what, error)
        return
    account.reused, account.measured = account.reused + there, account.measured + (not there)
    account.looks[look] = folder
    for name, why in manifest["failed_models"].items():
        account.fail(f"attend: {name}", UserError(why))


# --- drawing


def _draw_all(
    plan: WriteupPlan, material: Material, account: _Account, folder: Path
) -> tuple[list[Shown], list[Tabled]]:
    from diag.show.figures.write import save

    shown: list[Shown] = []
    tables: list[Tabled] = []
    captions: dict[str, str] = {}
    for (section, _), stem, item in items_of(plan):
        try:
            if isinstance(item, AttendFigure) and attend_plan_of(item) not in material.looks:
                raise UserError("its look at a target is not there", "see what failed above")
            if section == "tables":
                made = table(item, stem, material)
                for suffix in TABLE_SUFFIXES:
                    # the file's ending picks the writer
                    write(made.data if suffix == ".csv" else made.shown, folder / f"{stem}{suffix}")
                captions[stem] = caption(item.caption, made.words, made.rows, _inputs(item, plan))
                shown.append(Shown(item.kind, stem, TABLE_SUFFIXES))
                tables.append(made)
                continue
            for figure in figures_of(item, stem, material):
                paths = save(figure.figure, figure.data, folder, figure.stem)
                captions[figure.stem] = _caption(item, figure.words, figure.data, plan, material)
                shown.append(Shown(item.kind, figure.stem, tuple(path.suffix for path in paths)))
        except UserError as error:
            account.fail(stem, error)
    _refuse_collisions(shown)
    (folder / "captions.md").write_text(_captions(plan, captions), encoding="utf-8")
    return shown, tables


def _refuse_collisions(shown: Sequence[Shown]) -> None:
    """Figures per line take the line's name into theirs, which only the runs tell."""
    twice = [stem for stem, count in Counter(entry.stem.lower() for entry in shown).items() if count > 1]
    if twice:
        raise UserError(f"two figures would be called '{twice[0]}'", "give one a name: of its own")


def _caption(item: Any, words: str, data: pd.DataFrame, plan: WriteupPlan, material: Material) -> str:
    if not isinstance(item, AttendFigure):
        measured_rows = data[data["n"].notna()] if "n" in data else pd.DataFrame()
        return caption(item.caption, words, measured_rows, _inputs(item, plan))
    found = read_look(material.looks[attend_plan_of(item)])
    entries = [{**entry, "input": found.tokens["input"].iloc[0]} for entry in found.models]
    head = str(found.tokens["head"].iloc[0])
    return f"{caption(item.caption, words, pd.DataFrame(), ())} {look_settings(entries, head)}"


def _inputs(item: Any, plan: WriteupPlan) -> list[str]:
    """What a figure's runs were given, in words."""
    if getattr(item, "probe", None) is None:
        return []
    probe = plan.probes[item.probe]
    named = {"images": probe.images, "texts": probe.texts}
    found = [f"{kind} ({portable(source)})" for kind, source in named.items() if source is not None]
    return found or ["inputs (demo)"]


def _captions(plan: WriteupPlan, captions: Mapping[str, str]) -> str:
    about = [" ".join(plan.about.split())] if plan.about.strip() else []
    blocks = [f"# {plan.title}", *about, *(f"## {stem}\n\n{text}" for stem, text in captions.items())]
    return "\n\n".join(blocks) + "\n"


# --- the resolved plan


def _document(plan: WriteupPlan, material: Material, account: _Account, drawn: Path) -> dict[str, Any]:
    """The resolved plan: no times, no absolute paths, so that it is the same wherever it was drawn."""
    shown = [(section, item) for (section, _), _, item in items_of(plan)]
    return {
        "attnbias": version(),
        "title": plan.title,
        "about": plan.about,
        "probes": {
            name: [_resolved(run, folder) for run, folder in folders.items()]
            for name, folders in account.folders.items()
        },
        "looks": [_resolved_look(look, folder) for look, folder in material.looks.items()],
        **{
            section: [
                _portable(item.model_dump(mode="json", exclude_defaults=True))
                for at, item in shown
                if at == section
            ]
            for section in ("figures", "tables")
        },
        "failed": dict(account.failed),
        "files": sorted([*(path.name for path in drawn.iterdir()), "plan.json"]),
    }


def _resolved(run: PlannedRun, folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    how = HOW | {"save_activations"}
    return {
        "run": folder.name,
        "key": manifest["key"],
        "models": {entry["given"]: portable(entry["resolved"]) for entry in manifest["models"]},
        "inputs": {
            kind: {**given, "source": portable(str(given["source"]))}
            for kind, given in manifest["inputs"].items()
        },
        "plan": _portable(run.plan.model_dump(mode="json", exclude=set(how), exclude_defaults=True)),
    }


def _resolved_look(look: AttendPlan, folder: Path) -> dict[str, Any]:
    manifest = read_look_manifest(folder)
    return {
        "look": folder.name,
        "key": manifest["key"],
        "models": {entry["given"]: portable(entry["resolved"]) for entry in manifest["models"]},
        "plan": _portable(look.model_dump(mode="json", exclude={"device"}, exclude_defaults=True)),
    }


def portable(text: str) -> str:
    """A name or source without the folders of this machine: `hf:/data/models/x` becomes `hf:…/x`."""
    return re.sub(r"(^|[:=])(?:/|~/|[A-Za-z]:\\)(?:[^,/\\]*[/\\])*", r"\1…/", text)


PATHS = (
    "models",
    "images",
    "texts",
    "image",
    "text",
    "checkpoint",
    "reference",
    "model_args",
    "probe",
    "model",
)


def _portable(document: dict[str, Any]) -> dict[str, Any]:
    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: cleaned(inner) if key in PATHS or isinstance(inner, dict) else inner
                for key, inner in value.items()
            }
        if isinstance(value, list):
            return [cleaned(entry) for entry in value]
        return portable(value) if isinstance(value, str) else value

    return {key: cleaned(value) if key in (*PATHS, "attend") else value for key, value in document.items()}
