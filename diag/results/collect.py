"""Several run folders as one collection of lines: what `compare`, `figures` and `report` read.

A *line* is one model, tower and token set, measured in one way: what is one curve in a figure. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from diag.errors import UserError, visible
from diag.results.caveats import COLUMNS, with_caveats
from diag.results.folder import once
from diag.results.hashes import edited
from diag.results.manifest import PROBE
from diag.results.tables import layer_samples, read_heads, read_layers, read_manifest, read_samples

LINE = ("run", "model", "tower", "tokens")
TELLING = ("tower", "tokens", "n_tokens", "values", "intervention", "dtype", "image_size", "run")
"""What tells lines of one model apart, in the order in which a label names it."""

WORDS = {"n_tokens": "T = {}", "image_size": "{} px", "values": "{}", "dtype": "{}"}


@dataclass(frozen=True)
class Collection:
    """Tables of several runs, one under the other.

    layers, heads: as in a run folder, with three more columns: `run`, the folder's name; `label`, a short
        text that is unique to each line; `layer_count`, how many layers the model has, also where only
        some were measured. Lines follow each other in the order given.
    samples: one value per input, layer and metric (mean over heads within each input), same columns, and
        `source`: lines of one source have the same input wherever they have the same `input` id.
    folders, manifests: by run. problems: folders that could not be read, with the reason.
    notes: sentences about those that were read: tables that were edited since.
    """

    layers: pd.DataFrame
    heads: pd.DataFrame
    samples: pd.DataFrame
    folders: Mapping[str, Path] = field(default_factory=dict)
    manifests: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @classmethod
    def empty(cls, problems: Mapping[str, str] | None = None) -> Collection:
        """A collection of no runs."""
        nothing = pd.DataFrame({"label": [], "metric": []})
        return cls(nothing, nothing, nothing, problems=problems or {})

    @property
    def labels(self) -> list[str]:
        """The labels of the lines, in order."""
        return list(self.layers["label"].unique())


@dataclass(frozen=True)
class Run:
    """One run, of a folder or in memory. samples: as `tables.layer_samples` has them. folder: where it lies.

    notes: sentences about it.
    """

    layers: pd.DataFrame
    heads: pd.DataFrame
    samples: pd.DataFrame
    manifest: Mapping[str, Any]
    folder: Path
    notes: Sequence[str] = ()


def read_run(folder: Path) -> Run:
    """A finished run folder. Raises UserError if it is none."""
    manifest = read_manifest(folder)
    if (kind := manifest.get("kind", PROBE)) != PROBE:
        raise UserError(f"'{folder}' was made by attnbias {kind}", "give folders of attnbias probe")
    tables = read_layers(folder), read_heads(folder), layer_samples(read_samples(folder))
    return Run(*tables, manifest, folder, edited(folder, manifest))


def collect(
    folders: Iterable[Path], names: Mapping[Path, str] | None = None, *, needed: bool = True
) -> Collection:
    """Reads finished run folders, each once; those that cannot be read are listed under `problems`.

    names: what runs are called where that is not their folder's name. needed: there must be one.
    Raises UserError if none can be read and one is needed.
    """
    runs = list[tuple[str, Run]]()
    problems: dict[str, str] = {}
    first: UserError | None = None
    for folder in once(folders):
        try:
            run = read_run(folder)
        except UserError as error:
            problems[str(folder)] = " ".join(str(error).split())
            first = first or error
            continue
        runs.append(((names or {}).get(folder) or folder.resolve().name, run))
    if not runs and not needed:
        return Collection.empty(problems)
    if first is not None and not runs:
        raise first
    return collected(runs, problems)


def collected(runs: Iterable[tuple[str, Run]], problems: Mapping[str, str] | None = None) -> Collection:
    """Runs by name as one collection; of those of one name, later ones get a number.

    problems: of folders that could not be read. Raises UserError where there is no run.
    """
    parts: list[tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]] = []
    found: dict[str, Path] = {}
    manifests: dict[str, Mapping[str, Any]] = {}
    notes: list[str] = []
    contents = _Contents()
    for called, run in runs:
        name, manifest = _free(called, found), run.manifest
        found[name], manifests[name] = run.folder, manifest
        notes += run.notes
        tables = run.layers, run.heads, run.samples
        layers, heads, samples = (_counted(table.assign(run=name), manifest) for table in tables)
        parts.append((layers, heads, samples.assign(source=_sources(samples, manifest, contents))))
    if not parts:
        raise UserError("no run was given", "give run folders, for example runs/demo-vision")
    layers, heads, samples = (pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True))
    labels = _labels(layers)
    layers, heads, samples = (table.join(labels, on=list(LINE)) for table in (layers, heads, samples))
    return Collection(layers, heads, samples, found, manifests, problems or {}, notes)


def _entries(manifest: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """What the manifest says of each model and tower."""
    return {(entry["given"], entry["tower"]): entry for entry in manifest.get("models", ())}


def _counted(table: pd.DataFrame, manifest: Mapping[str, Any]) -> pd.DataFrame:
    """The table with the number of layers that each model has: the measured ones may be fewer."""
    entries = _entries(manifest)
    measured = table.groupby(["model", "tower"], sort=False)["layer"].max() + 1
    counts = {
        line: max(int(entries.get(line, {}).get("layers") or 0), int(count))  # type: ignore[call-overload]
        for line, count in measured.items()
    }
    lines = list(zip(table["model"], table["tower"], strict=True))
    table = table.assign(layer_count=[counts[line] for line in lines])
    if "weights" not in table:  # of an earlier version
        table = table.assign(weights=[str(entries.get(line, {}).get("weights")) for line in lines])
    return table


class _Contents:
    """Which inputs of several runs are the same, by what their manifests tell of them.

    Runs of one digest have the same inputs unless it is known better: images that were replaced by others of
    the same names and sizes have another stamp and other bytes; a copy, or one that was only touched, has
    another stamp and the same bytes.
    """

    def __init__(self) -> None:
        self.groups: dict[str, list[list[Mapping[str, Any]]]] = {}

    def name(self, digest: str, given: Mapping[str, Any]) -> str:
        """What all runs with these inputs have in common."""
        groups = self.groups.setdefault(digest, [])
        places = (p for p, group in enumerate(groups) if all(_alike(given, one) for one in group))
        place = next(places, len(groups))
        if place == len(groups):
            groups.append([])
        groups[place].append(given)
        return digest[:16] + (f"~{place + 1}" if place else "")


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether inputs of one digest are the same; where it is of their content, there is no more to know."""
    known = "content" in one and "content" in other
    return not known or any(one.get(name) == other.get(name) for name in ("stamp", "content"))


def _sources(samples: pd.DataFrame, manifest: Mapping[str, Any], contents: _Contents) -> list[str]:
    """What makes an input id mean the same input: where it is from and, for texts, how they were cut.

    Window 7 of a text is another stretch of it where windows have another length or tokens are others.
    """
    entries, found = _entries(manifest), {}
    counted = samples.assign(n_tokens=samples.get("n_tokens", 0)).groupby(["model", "tower"])["n_tokens"]
    length = dict(counted.max())
    for line in set(zip(samples["model"], samples["tower"], strict=True)):
        model, tower = line
        entry = entries.get(line, {})
        takes = entry.get("takes", tower)
        given = manifest.get("inputs", {}).get(takes, {})
        content = contents.name(given.get("sha256") or manifest.get("key", "unknown"), given)
        tokens = entry.get("tokenizer") or str(entry.get("resolved", model)).split("@")[0].split(",")[0]
        cut = "" if takes == "vision" else f"/{tokens}/{length[line]}"
        found[line] = f"{content}{cut}"
    return [found[line] for line in zip(samples["model"], samples["tower"], strict=True)]


def _free(name: str, taken: Iterable[str]) -> str:
    """A name for a run that no other run has: folders in different places may share theirs."""
    free, number = name, 2
    while free in set(taken):
        free, number = f"{name}-{number}", number + 1
    return free


def _labels(layers: pd.DataFrame) -> pd.Series:
    """The label of every line: the model's name, what tells it from the model's other lines, caveats."""
    keys = list(LINE)
    telling = [name for name in TELLING if name in layers and name not in keys]
    told = [name for name in COLUMNS if name in layers and name not in telling]
    lines = layers.groupby(keys, sort=False)[[*telling, *told]].max().reset_index()
    label = lines["model"].astype(str).map(visible)
    for column in TELLING:
        if column not in lines:
            continue
        alike = lines.groupby(label)[column].transform(lambda part: part.nunique(dropna=False) > 1)
        said = lines[column].map(lambda value, column=column: WORDS.get(column, "{}").format(_plain(value)))
        label = label.where(~alike, label + " · " + said)
    label = pd.Series(
        [with_caveats(name, line) for name, (_, line) in zip(label, lines.iterrows(), strict=True)]
    )
    return pd.Series(label.to_numpy(), index=pd.MultiIndex.from_frame(lines[keys]), name="label")


def _plain(value: object) -> str:
    """`64` for 64.0, and words without underscores."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).replace("_", " ")
