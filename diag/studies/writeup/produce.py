"""A plan carried out: what is missing is measured, all is drawn aside, then put in its place or compared.

Files are drawn aside first, so that `check` and writing are the same work, a file that did not change keeps
its time, and what is there stays until all of the new is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from diag.errors import UserError
from diag.inputs.document import Document
from diag.results.collect import collect
from diag.results.folder import PLAN, is_finished
from diag.results.hashes import edited
from diag.results.manifest import ATTEND, PROBE
from diag.results.manifest import read as manifest_of
from diag.results.staging import check_free, put_in_place, scratch, staged
from diag.results.tables import read_manifest
from diag.results.writing import write_json, write_text
from diag.run.cache import folder_of, measured
from diag.run.content import replaced
from diag.run.environment import version
from diag.run.plan import HOW, RUNS, ProbePlan, inputs_of
from diag.run.progress import Listener, Silent
from diag.show.figures.style import on_paper
from diag.studies.attend import run_attend
from diag.studies.attend.folder import read_manifest as read_look_manifest
from diag.studies.attend.plan import AttendPlan
from diag.studies.attend.plan import folder_of as folder_of_look
from diag.studies.writeup.captions import caption
from diag.studies.writeup.files import (
    EXTRA,
    MISSING,
    NEW,
    OWNER,
    REMOVED,
    SAME,
    compare,
    extra,
    files_of,
)
from diag.studies.writeup.material import Material
from diag.studies.writeup.needs import looks_of, runs_of
from diag.studies.writeup.schema import WriteupPlan, items_of, read_plan
from diag.studies.writeup.tables import Tabled


@dataclass(frozen=True)
class Shown:
    """One figure or table: its kind, the stem of its files, their endings."""

    kind: str
    stem: str
    endings: tuple[str, ...]


@dataclass
class Produced:
    """What became of a plan.

    files: name -> new, changed, same, removed; or, of a check, changed, missing, extra, same.
    measured, reused: runs and looks. failed: what is missing -> why. tables: for the terminal.
    """

    plan: Path
    folder: Path
    shown: list[Shown] = field(default_factory=list)
    files: Mapping[str, str] = field(default_factory=dict)
    measured: int = 0
    reused: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    tables: list[Tabled] = field(default_factory=list)
    first: UserError | None = None

    def fail(self, what: str, error: UserError) -> None:
        """Notes what is missing; `first` is the first of all errors."""
        self.failed[what] = " ".join(str(error).split())
        self.first = self.first or error

    @property
    def differing(self) -> dict[str, str]:
        """Files that are not as they would be drawn now."""
        return {name: state for name, state in self.files.items() if state != SAME}


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
) -> Produced:
    """Draws a plan into `out`/<name of the plan's file>, or compares what is there with what would be drawn.

    root: where finished runs lie and missing ones are put. A model that fails, and what cannot be drawn
    without it, is named in `failed`; the rest goes on.

    Raises UserError if nothing at all can be drawn.
    """
    outcome = Produced(document.file, out / document.file.stem)
    check_free(outcome.folder, OWNER)
    material = _material(plan, document, root, outcome, listener or Silent())
    with scratch() if check else staged(outcome.folder, OWNER) as drawn:
        _draw_all(plan, material, outcome, drawn)
        write_json(_document(plan, material, outcome, drawn), drawn / PLAN)
        files = compare(drawn, outcome.folder, complete=not outcome.failed)
        if check:
            names = {NEW: MISSING, REMOVED: EXTRA}
            files = {name: names.get(state, state) for name, state in files.items()}
            files |= extra(outcome.folder, files) if not outcome.failed else {}
        else:
            put_in_place(outcome.folder, OWNER, [name for name, state in files.items() if state == REMOVED])
    outcome.files = files
    return outcome


# --- measuring


def _material(
    plan: WriteupPlan, document: Document, root: Path, outcome: Produced, listener: Listener
) -> Material:
    material = Material()
    for name, runs in runs_of(plan, document).items():
        folders = {}
        for run in runs:
            what = f"{run.probe}: {run.words}"
            there = partial(folder_of, run.plan, root)
            carry_out = partial(measured, run.plan, root, listener=listener)
            known = partial(_of_what_is_there, run.plan)
            if folder := _there(what, run.probe, there, carry_out, known, outcome, listener):
                folders[folder] = run
        if not folders:
            continue
        material.runs[name] = {folder: run.plan for folder, run in folders.items()}
        names = {folder: _name_of(folder, manifest_of(folder, PROBE)) for folder in folders}
        found = material.collections[name] = collect(folders, names)
        material.lines[name] = {key: folders[folder].line for key, folder in found.folders.items()}
        for note in found.notes:
            listener.say(note)
        for place, why in found.problems.items():
            outcome.fail(f"{name}: {Path(place).name}", UserError(why))
    for look in looks_of(plan):
        what, there = f"attend: {', '.join(look.models)}", partial(folder_of_look, look, root)
        carry_out = partial(_looked, look, root, listener)
        if folder := _there(what, "attend", there, carry_out, read_look_manifest, outcome, listener):
            material.looks[look] = folder
            for note in edited(folder, read_look_manifest(folder)):
                listener.say(note)
    return material


def _looked(look: AttendPlan, root: Path, listener: Listener) -> Path:
    return run_attend(look, folder_of_look(look, root), listener=listener)


def _of_what_is_there(plan: ProbePlan, folder: Path) -> dict[str, Any]:
    """The manifest of a run. Raises UserError where other bytes were measured than inputs have now."""
    manifest = read_manifest(folder)
    if notes := replaced(plan, inputs_of(plan), folder, manifest):
        raise UserError(notes[0], f"measure them again: rm -r '{folder}', then the same command")
    return manifest


def _there(
    what: str,
    short: str,
    folder_of: Callable[[], Path],
    carry_out: Callable[[], Path],
    manifest_of: Callable[[Path], dict[str, Any]],
    outcome: Produced,
    listener: Listener,
) -> Path | None:
    """The folder of a run or look, measured if it is not there; None where that fails.

    what: it, in words; short: before the names of models and inputs that failed in it.
    """
    try:
        folder = folder_of()
        reused = is_finished(folder)
        if not reused:
            listener.say(f"{what}: not measured yet")
            carry_out()
        manifest = manifest_of(folder)
    except UserError as error:
        outcome.fail(what, error)
        return None
    outcome.reused, outcome.measured = outcome.reused + reused, outcome.measured + (not reused)
    for name, why in {**manifest["failed_models"], **manifest.get("failed_inputs", {})}.items():
        # an input that no run of a probe could read is one line, unless they say different things of it
        same = outcome.failed.get(f"{short}: {name}", why) == why
        outcome.fail(f"{short if same else what}: {name}", UserError(why))
    return folder


# --- drawing


def _draw_all(plan: WriteupPlan, material: Material, outcome: Produced, folder: Path) -> None:
    """Draws every figure and table. Raises UserError where that gives nothing, or one name twice."""
    about = [" ".join(plan.about.split())] if plan.about.strip() else []
    blocks = [f"# {plan.title}", *about]
    for _, stem, item in items_of(plan):
        try:
            with on_paper(getattr(item, "width", "page")):
                drawn = [(made, made.save(folder)) for made in item.made(stem, material)]
            for made, endings in drawn:
                said = caption(item.caption, made.words, made.rows, _inputs(item, plan))
                blocks.append(f"## {made.stem}\n\n{' '.join(filter(None, (said, made.settings)))}")
                outcome.shown.append(Shown(item.kind, made.stem, endings))
                outcome.tables += [made] if isinstance(made, Tabled) else []
        except UserError as error:
            outcome.fail(stem, error)
    # figures per line take the line's name into theirs, which only the runs tell
    stems = Counter(entry.stem.lower() for entry in outcome.shown)
    twice = [stem for stem, count in stems.items() if count > 1]
    if twice:
        raise UserError(f"two figures would be called '{twice[0]}'", "give one a name: of its own")
    if not outcome.shown:
        assert outcome.first is not None
        raise outcome.first
    write_text("\n\n".join(blocks) + "\n", folder / "captions.md")


def _inputs(item: Any, plan: WriteupPlan) -> list[str]:
    """What a figure's runs were given, in words."""
    if getattr(item, "probe", None) is None:
        return []
    probe = plan.probes[item.probe]
    named = {"images": probe.images, "texts": probe.texts}
    found = [f"{kind} ({portable(source)})" for kind, source in named.items() if source is not None]
    return found or ["inputs (demo)"]


# --- the resolved plan


def _document(plan: WriteupPlan, material: Material, outcome: Produced, drawn: Path) -> dict[str, Any]:
    """The resolved plan: no times, no absolute paths, so that it is the same wherever it was drawn."""
    items = {
        section: [_portable(item.model_dump(mode="json", exclude_defaults=True)) for item in shown]
        for section, shown in (("figures", plan.figures), ("tables", plan.tables))
    }
    return {
        "attnbias": version(),
        "title": plan.title,
        "about": plan.about,
        "probes": {
            name: [_resolved("run", run, folder) for folder, run in runs.items()]
            for name, runs in material.runs.items()
        },
        "looks": [_resolved("look", look, folder) for look, folder in material.looks.items()],
        **items,
        "failed": outcome.failed,
        "files": sorted([*(path.name for path in files_of(drawn)), PLAN]),
    }


def _resolved(what: str, plan: ProbePlan | AttendPlan, folder: Path) -> dict[str, Any]:
    """A run or look: its folder's name, and what was measured."""
    manifest, how = manifest_of(folder, PROBE if what == "run" else ATTEND), {*HOW, "save_activations"}
    resolved = {
        what: _name_of(folder, manifest),
        **({} if _timed(manifest) else {"key": manifest.get("key")}),
        "models": {
            entry["given"]: portable(entry.get("resolved") or entry["given"]) for entry in manifest["models"]
        },
    }
    if "inputs" in manifest:
        resolved["inputs"] = {
            kind: {name: told for name, told in given.items() if name != "stamp"}
            | {"source": portable(str(given.get("source")))}
            for kind, given in manifest["inputs"].items()
        }
    resolved["plan"] = _portable(plan.model_dump(mode="json", exclude=how, exclude_defaults=True))
    return resolved


def _timed(manifest: Mapping[str, Any]) -> bool:
    """Whether a run's key holds times of files: where it is shown, the hash of their bytes stands for it."""
    return any("content" in given for given in manifest.get("inputs", {}).values())


def _name_of(folder: Path, manifest: Mapping[str, Any]) -> str:
    """What a run is called: its folder, without a key that is another one wherever images are copied to."""
    return (
        folder.name.removesuffix(f"-{(manifest.get('key') or '')[:8]}") if _timed(manifest) else folder.name
    )


def portable(text: str) -> str:
    """A name or source without the folders of this machine: `hf:/data/models/x` becomes `hf:…/x`."""
    return re.sub(r"(^|[:=])(?:/|~/|[A-Za-z]:\\)(?:[^,/\\]*[/\\])*", r"\1…/", text)


PATHS = (
    *("models", "images", "texts", "image", "text"),
    *("checkpoint", "reference", "model_args", "probe", "model"),
)


def _portable(value: Any) -> Any:
    """A part of a plan with what `PATHS` names made portable, at any depth."""
    if isinstance(value, dict):
        inner = (*PATHS, "attend")
        return {key: _portable(part) if key in inner else part for key, part in value.items()}
    if isinstance(value, list):
        return [_portable(entry) for entry in value]
    return portable(value) if isinstance(value, str) else value
