"""Folders of the other verbs on the page: their sentences, key figures and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diag.errors import UserError
from diag.inputs.images import open_image
from diag.inputs.outside import MEGABYTE, mapping_in, regular, text_of
from diag.inputs.tables import COUNT, NAME, OPEN, PLACE, Layout, read_table
from diag.models.names.changes import CONTROLS, is_control, labelled
from diag.results.caveats import with_caveats
from diag.results.decimals import fixed
from diag.results.folder import MANIFEST, is_finished, once
from diag.results.hashes import edited
from diag.results.manifest import again
from diag.results.manifest import read as manifest_of
from diag.show.figures.sensitivity import LABELS, SCOPES
from diag.show.report.attended import PICTURE_BYTES, Picture, pictures_of

Row = tuple[str, ...]
Told = tuple[str, tuple[str, ...], Row, tuple[Row, ...]]
"""What it is about, its sentences, the headings of its table, the rows below them."""

FIRST_PICTURES = 2
"""Pictures of a folder that stand open."""

QUANTITIES = {
    "bias": "bias",
    "excess_over_partner": "excess over partner null",
    "excess_over_uniform": "excess over uniform null",
    "value_similarity": "value similarity",
}
"""Columns of the differences that are shown."""
DIFFERENCES = Layout(
    {"a": NAME, "b": NAME, "quantity": NAME, "difference": OPEN, "ci_low": OPEN, "ci_high": OPEN}
)
SENSITIVITY = Layout(
    {"intervention": NAME, "strength": OPEN, "scope": NAME, "layer": PLACE, "head": PLACE, "effect": NAME}
    | {"mean": OPEN, "ci_low": OPEN, "ci_high": OPEN, "n": COUNT},
    rows=True,
)
READOUT = Layout(
    {"readout": NAME, "measure": NAME, "layer": PLACE}
    | {"mean": OPEN, "ci_low": OPEN, "ci_high": OPEN, "n": COUNT},
    rows=True,
)
OUTCOMES = Layout({"task": NAME, "variant": NAME, "n": COUNT})


@dataclass(frozen=True)
class StudyFolder:
    """One folder. kind: the verb that made it. headings, rows: its key figures. notes: edited tables."""

    name: str
    kind: str
    manifest: Mapping[str, Any]
    title: str
    sentences: tuple[str, ...]
    headings: Row
    rows: tuple[Row, ...]
    pictures: tuple[Picture, ...]
    notes: tuple[str, ...] = ()


def read_studies(folders: Iterable[Path]) -> tuple[list[StudyFolder], dict[str, str]]:
    """Folders of `STUDIES`, and those that could not be read with the reason."""
    found: list[tuple[Path, str, Mapping[str, Any], Told, list[Path]]] = []
    problems: dict[str, str] = {}
    for folder, kind in ((folder, kind_of(folder)) for folder in once(folders)):
        tip = again(folder, kind)
        try:
            if not is_finished(folder):
                raise UserError(f"'{folder}' is not finished (no {MANIFEST})", tip)
            manifest = manifest_of(folder, kind)
            told = STUDIES[kind](folder, manifest, tip)
            paths = sorted((folder / "figures").glob("*.png"))
            for path in paths:
                regular(path, "picture", tip)
                open_image(path)  # decoded, so that one that is damaged is told here
        except UserError as error:
            problems[str(folder)] = " ".join(str(error).split())
            continue
        found.append((folder, kind, manifest, told, paths))
    small = sum(path.stat().st_size for *_, paths in found for path in paths) > PICTURE_BYTES
    studies = [
        StudyFolder(
            folder.resolve().name,
            kind,
            manifest,
            *told,
            pictures_of(paths, small),
            tuple(edited(folder, manifest)),
        )
        for folder, kind, manifest, told, paths in found
    ]
    return studies, problems


def kind_of(folder: Path) -> str:
    """The verb that a folder's manifest names, `""` where it names none."""
    return str(mapping_in(folder / MANIFEST).get("kind") or "")


def _compared(folder: Path, manifest: Mapping[str, Any], tip: str) -> Told:
    """The verdict, and a row for each pair of lines with their differences."""
    text = text_of(folder / "verdict.txt", "verdict", tip=tip, most=MEGABYTE)
    sentences = tuple(" ".join(part.split()) for part in text.split("\n\n") if part.strip())
    table = read_table(folder / "differences.csv", DIFFERENCES, "table", tip=tip)
    shown = [name for name in QUANTITIES if (table["quantity"] == name).any()]
    rows = []
    for (a, b), part in table.groupby(["a", "b"], sort=False):
        by = {row["quantity"]: row for row in part.to_dict("records")}
        rows.append(
            (
                f"{b} − {a}",
                *(_number(by[name], "difference") if name in by else "–" for name in shown),
            )
        )
    labels = manifest.get("labels")
    title = f"Comparison of {len(labels)} lines" if isinstance(labels, list) and labels else "Comparison"
    return (
        title,
        sentences,
        ("difference", *(QUANTITIES[name] for name in shown)) if rows else (),
        tuple(rows),
    )


def _intervened(folder: Path, manifest: Mapping[str, Any], tip: str) -> Told:
    """For each change and scope, the layer in which its most telling effect is farthest from none."""
    table = read_table(folder / "sensitivity.csv", SENSITIVITY, "table", tip=tip)
    table = table[(table["head"] < 0) & table["mean"].notna()]
    effect = next((name for name in LABELS if name in set(table["effect"])), None)
    model = manifest["model"]
    title = f"Interventions on {with_caveats(str(model['given']), model)}"
    if effect is None:
        return title, ("No effect of whole layers was measured.",), (), ()
    table = table[table["effect"] == effect]
    rows, said = [], []
    by_case = table.groupby(["intervention", "strength", "scope"], sort=False, dropna=False)
    for _, part in by_case:
        most = max(part.to_dict("records"), key=lambda row: abs(row["mean"]))
        scope, name, strength = str(most["scope"]), str(most["intervention"]), float(most["strength"])
        label, at, number = labelled(name, strength), str(int(most["layer"])), _number(most)
        rows.append((label, SCOPES.get(scope, scope), at, number, str(int(most["n"]))))
        if scope != "one" or is_control(name):
            continue
        other = CONTROLS.get(name)
        alike = (table["intervention"] == other) & (table["strength"].isin([strength]))
        there = table[alike & (table["scope"] == scope) & (table["layer"] == most["layer"])].to_dict(
            "records"
        )
        beside = f"; its control, {labelled(str(other), strength)}, {_number(there[0])}" if there else ""
        said.append(
            f"{label} in one layer: most in layer {at}, {number}, n = {int(most['n'])}{beside} "
            f"({LABELS[effect]})."
        )
    return title, tuple(said), ("change", "scope", "layer of most", LABELS[effect], "n"), tuple(rows)


def _trained(folder: Path, manifest: Mapping[str, Any], tip: str) -> Told:
    """The grid's sentences, and its outcomes by patch size and variant."""
    table = read_table(folder / "outcomes.csv", OUTCOMES, "table", tip=tip)
    plan = manifest.get("plan") or {}
    title = f"Training: {plan['title']}" if plan.get("title") else "Training"
    shown = [name for name in ("accuracy", "loss") if name in table and table[name].notna().any()]
    sizes = "patch_size" in table and table["patch_size"].notna().any()
    headings = ["task", *(["patch size"] if sizes else []), "variant", "seeds"]
    headings += [heading for name in shown for heading in (name, f"{name} − baseline")]
    rows = []
    for row in table.to_dict("records"):
        cells = [
            str(row["task"]),
            *([f"{row['patch_size']}"] if sizes else []),
            str(row["variant"]),
            str(row["n"]),
        ]
        for name in shown:
            cells.append(_number(row, name))
            gain = {end: row.get(f"{name}_gain{end}") for end in ("", "_low", "_high")}
            cells.append(_number({"mean": gain[""], "ci_low": gain["_low"], "ci_high": gain["_high"]}))
        rows.append(tuple(cells))
    return title, tuple(map(str, manifest["words"])), tuple(headings), tuple(rows)


def _read_out(folder: Path, manifest: Mapping[str, Any], tip: str) -> Told:
    """The readout's sentences, and the accuracy of each readout by layer."""
    table = read_table(folder / "readout.csv", READOUT, "table", tip=tip)
    table = table[table["measure"] == "accuracy"]
    names = list(table["readout"].unique())
    model = manifest["model"]
    title = f"Classes read from {with_caveats(str(model['given']), model)}"
    rows = []
    for layer, part in table.groupby("layer"):
        by = {row["readout"]: row for row in part.to_dict("records")}
        rows.append((f"layer {layer}", *(_number(by[name]) if name in by else "–" for name in names)))
    chance = f"{manifest['classes']} classes; the largest holds {fixed(manifest['chance'])} of the images."
    return title, (*manifest["words"], chance), ("accuracy", *names), tuple(rows)


def _audited(folder: Path, manifest: Mapping[str, Any], tip: str) -> Told:
    """The verdicts on hooks and leaks, tower by tower."""
    found = manifest["verdicts"].items()
    rows = tuple((name, said.get("hooks", "–"), said.get("leaks", "–")) for name, said in found)
    return "Audit of hooks and batches", (), ("model", "hooks", "leaks"), rows


STUDIES: Mapping[str, Callable[[Path, Mapping[str, Any], str], Told]] = {
    "compare": _compared,
    "intervene": _intervened,
    "train": _trained,
    "readout": _read_out,
    "audit": _audited,
}
"""Verb -> what is told of its folder."""


def _number(row: Mapping[Any, Any], name: str = "mean") -> str:
    """`0.210 (0.100 to 0.300)`, without what is not known."""
    value, low, high = (
        math.nan if row.get(key) is None else float(row[key]) for key in (name, "ci_low", "ci_high")
    )
    if math.isnan(value):
        return "–"
    known = not (math.isnan(low) or math.isnan(high))
    said = fixed(value) + (f" ({fixed(low)} to {fixed(high)})" if known else "")
    return said.replace("-", "−")
