"""A readout carried out: features of every layer, classifiers on them, tables, a figure, a manifest."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from diag.errors import UserError
from diag.inputs.items import content_digest
from diag.inputs.labels import class_names
from diag.inputs.tables import read_table
from diag.measure.batch_readings import Incidents
from diag.measure.batch_size import BatchSize
from diag.measure.loop import pick_layers
from diag.measure.meaning import understood
from diag.models import load
from diag.models.base import Sample, Tower
from diag.results.caveats import columns_of, with_caveats
from diag.results.folder import MANIFEST, PLAN, SAMPLES
from diag.results.hashes import hashes
from diag.results.manifest import again, finished
from diag.results.staging import Owner, pictures, remove, settle
from diag.results.writing import write, write_json, writing
from diag.run.environment import environment
from diag.run.plan import RUNS, default_folder
from diag.run.prepared import Prepared
from diag.run.progress import Listener, Silent
from diag.run.shards import tower_samples
from diag.studies.once import once
from diag.studies.readout.classifiers import held_out, parts_of
from diag.studies.readout.features import FILES, Features, features_of, metrics_of
from diag.studies.readout.plan import ReadoutPlan
from diag.studies.readout.tables import ATTENTIVE, CLS, LAYOUTS, MEAN, PREDICTORS, readout, relations, samples
from diag.studies.readout.words import sentences

OWNER = Owner(
    "readout",
    result=(PLAN, MANIFEST, SAMPLES, *LAYOUTS, *pictures("readout-*")),
    work=(f"{FILES}/*.npy",),
)


@dataclass(frozen=True)
class Readout:
    """A finished readout: its folder and tables.

    readout: per readout, measure and layer: statistics over images. relations: Spearman's ρ over layers
    between what a probe measures and the accuracy.
    """

    folder: Path
    readout: pd.DataFrame
    relations: pd.DataFrame
    manifest: Mapping[str, Any]


def run_readout(
    plan: ReadoutPlan,
    folder: Path | None = None,
    *,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> Readout:
    """Carries out a readout in `folder` (default: `runs/readout-NAME-KEY`); one that is there is read.

    Raises UserError for what the user can mend.
    """
    listener = listener or Silent()
    prepared = Prepared.of(plan)
    if "vision" not in prepared.inputs or plan.images in (None, "demo"):
        raise UserError(
            "a readout needs images whose class is known",
            "--images DIR with DIR/class/*.jpg, or demo-crops",
        )
    folder = folder or RUNS / f"readout-{default_folder(plan, prepared.key).name}"
    once(
        plan,
        prepared.key,
        folder,
        OWNER,
        lambda place, document: _carry_out(plan, prepared, place, document, listener),
        overwrite=overwrite,
        listener=listener,
    )
    return open_readout(folder)


def open_readout(folder: Path) -> Readout:
    """A finished readout. Raises UserError if it is none."""
    manifest = finished(folder, OWNER.verb, "readout", "attnbias readout -m MODEL … -o FOLDER")
    tip = again(folder, OWNER.verb)
    read, related = (read_table(folder / name, layout, "table", tip=tip) for name, layout in LAYOUTS.items())
    return Readout(folder, read, related, manifest)


def _carry_out(
    plan: ReadoutPlan, prepared: Prepared, folder: Path, document: Mapping[str, Any], listener: Listener
) -> None:
    started, (spec,), given = time.time(), prepared.specs, prepared.inputs["vision"]
    _divided(
        [given.items[place].id for place in _evenly(len(given.items), plan.limit)], plan
    )  # before loading
    model = load(spec, device=prepared.device, dtype=prepared.dtype)
    tower = model.tower("vision")
    chosen, places = _spread(tower, given, plan.limit)
    tower = understood(model, tower, chosen, allow_random=plan.allow_random)
    tower.check_set("patch")
    layers, incidents = pick_layers(tower.layers, plan.layers, tower.places), Incidents()
    size, note = BatchSize.of(plan.batch_size, model.module), f"{spec.given} read"
    listener.start(note, 2 * len(chosen))
    found = features_of(
        model,
        tower,
        chosen,
        layers,
        folder / FILES,
        batch_size=size,
        incidents=incidents,
        advance=listener.advance,
    )
    measured = metrics_of(tower, chosen, layers, PREDICTORS, batch_size=size, advance=listener.advance)
    names, labels, parts = _divided(found.ids, plan)
    predicted = _predicted(found, labels, parts, next(model.module.parameters()).device, listener)
    remove(folder, OWNER, [f"{FILES}/{path.name}" for path in (folder / FILES).iterdir()])
    rows = samples(predicted, found.ids)
    table = readout(rows, seed=plan.seed)
    relation = relations(predicted, found.ids, measured, seed=plan.seed)
    inputs: dict[str, Any] = {"source": given.source, "sha256": given.digest, "n": len(found.ids)}
    if given.files is not None:
        ids = [sample.id for sample in chosen]
        inputs["content"] = content_digest(
            {name: given.files.sha256(place) for name, place in zip(ids, places, strict=True)}
        )
        for place in places:
            given.files.check(place)
    caveated = columns_of(model.facts, tower.facts) | {"inputs": plan.named}
    for name, frame in ((SAMPLES, rows), ("readout.csv", table), ("relations.csv", relation)):
        write(frame.assign(model=spec.given, tower=tower.name, **caveated), folder / name)
    chance = float(np.bincount(labels).max() / len(labels))
    figures = _draw(table, folder / "figures", title=with_caveats(spec.given, caveated), chance=chance)
    settle(folder)
    write_json(
        {
            **document,
            "figures": [str(path.relative_to(folder)) for path in figures],
            "status": "partial" if incidents.failed else "complete",
            "model": {"given": spec.given, "resolved": model.resolved, **dict(model.facts), **caveated},
            "tower": tower.name,
            "classes": len(names),
            "chance": chance,
            "words": list(sentences(table, relation, list(table["readout"].unique()))),
            "inputs": inputs,
            "tables": hashes(folder, (SAMPLES, *LAYOUTS)),
            "failed_inputs": incidents.failed,
            "seconds": round(time.time() - started, 3),
            "environment": environment(),
        },
        folder / MANIFEST,
    )


def _spread(tower: Tower, given: Any, limit: int) -> tuple[list[Sample], list[int]]:
    """At most so many samples, evenly over all, with their places: folders come class by class."""
    every = tower_samples(tower, given, limit=len(given), seq_len=None)
    places = _evenly(len(every), limit)
    return [every[place] for place in places], places


def _evenly(count: int, limit: int) -> list[int]:
    """At most `limit` places of so many, evenly over all of them."""
    return np.linspace(0, count - 1, min(limit, count)).round().astype(int).tolist()


def _divided(ids: Sequence[str], plan: ReadoutPlan) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The classes of images, the class of each, and its part. Raises UserError as `parts_of` does."""
    names = class_names(ids)
    labels = np.array([names.index(name.partition("/")[0]) for name in ids])
    return names, labels, parts_of(labels, plan.folds, names, plan.seed)


def _predicted(
    found: Features, labels: np.ndarray, parts: np.ndarray, device: torch.device, listener: Listener
) -> dict[str, dict[int, np.ndarray]]:
    """Readout → layer → what `held_out` gives; tokens take the penalties that were chosen for their mean."""
    truth, predicted = torch.from_numpy(labels).to(device), dict[str, dict[int, np.ndarray]]()
    listener.start("classifiers", len(found.tokens))
    for layer, array in found.tokens.items():
        tokens = torch.from_numpy(np.array(array)).to(device)
        right, strengths = held_out(tokens.mean(1), truth, parts)
        results = {MEAN: right}
        if layer in found.cls:
            vectors = torch.from_numpy(np.array(found.cls[layer])).to(device)
            results[CLS] = held_out(vectors, truth, parts)[0]
        results[ATTENTIVE] = held_out(tokens, truth, parts, strengths)[0]
        for name, values in results.items():
            predicted.setdefault(name, {})[layer] = values.double().cpu().numpy()
        listener.advance(1)
    return predicted


def _draw(table: pd.DataFrame, folder: Path, *, title: str, chance: float) -> list[Path]:
    from diag.show.figures.readout import readout_over_depth
    from diag.show.figures.write import save

    with writing(folder):
        return save(readout_over_depth(table, title=title, chance=chance), table, folder, "readout-depth")
