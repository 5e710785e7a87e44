"""A sweep carried out: probe the untouched model, change it, write tables, figures and manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from diag.errors import UserError
from diag.inputs.items import content_digest
from diag.inputs.labels import class_names, labels
from diag.inputs.tables import read_table
from diag.measure.batch_readings import Incidents
from diag.measure.batch_size import BatchSize
from diag.measure.edited_model import by_own_numbers, check_layers
from diag.measure.held_out import HELD_OUT, held_out, held_out_samples
from diag.measure.loop import pick_layers
from diag.measure.meaning import understood
from diag.models import load
from diag.models.base import Model, Sample, Tower
from diag.models.hooks.beside import HeldOut
from diag.models.hooks.interventions import INTERVENTIONS
from diag.models.names.changes import is_control
from diag.results.caveats import columns_of, with_caveats
from diag.results.folder import MANIFEST, PLAN, SAMPLES
from diag.results.hashes import edited, hashes
from diag.results.manifest import again, finished
from diag.results.staging import Owner, pictures, settle
from diag.results.tables import layer_samples, read_layers, read_manifest, read_samples
from diag.results.writing import file_stem, write, write_json, writing
from diag.run.cache import measured
from diag.run.environment import environment
from diag.run.plan import RUNS, ProbePlan, default_folder
from diag.run.prepared import Prepared
from diag.run.progress import Listener, Silent
from diag.run.shards import tower_samples
from diag.studies.intervene.costs import costs
from diag.studies.intervene.plan import IntervenePlan
from diag.studies.intervene.sweep import cases, sweep
from diag.studies.intervene.tables import LAYOUTS, relations, sensitivity
from diag.studies.intervene.words import OF_SINKS, STUDY, main_effect
from diag.studies.once import once

OWNER = Owner(
    "intervene",
    result=(
        *(PLAN, MANIFEST, SAMPLES, *LAYOUTS),
        *pictures("sensitivity-*", "relation-*", "costs"),
    ),
)


@dataclass(frozen=True)
class Sweep:
    """A finished sweep: its folder and tables.

    sensitivity: per intervention, strength, scope, layer, head and effect: statistics over inputs.
    relations: Spearman's ρ between what the untouched model measures and the effect, over layers or heads.
    """

    folder: Path
    sensitivity: pd.DataFrame
    relations: pd.DataFrame
    manifest: Mapping[str, Any]


def run_intervene(
    plan: IntervenePlan,
    folder: Path | None = None,
    *,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> Sweep:
    """Carries out a sweep in `folder` (default: `runs/intervene-NAME-KEY`); one that is there is read.

    Raises UserError for what the user can mend.
    """
    listener = listener or Silent()
    prepared = Prepared.of(plan)
    key = prepared.key
    folder = folder or sweep_folder(plan, RUNS, key)
    once(
        plan,
        key,
        folder,
        OWNER,
        lambda place, document: _carry_out(plan, prepared, place, document, listener),
        overwrite=overwrite,
        listener=listener,
    )
    return open_sweep(folder)


def sweep_folder(plan: IntervenePlan, root: Path, key: str = "") -> Path:
    """The folder that a plan's sweep has to itself under `root`. Raises UserError as `run_intervene` does."""
    return root / f"intervene-{default_folder(plan, key or Prepared.of(plan).key).name}"


def _carry_out(
    plan: IntervenePlan,
    prepared: Prepared,
    folder: Path,
    document: Mapping[str, Any],
    listener: Listener,
) -> None:
    started = time.time()
    (spec,), given, edits = prepared.specs, prepared.inputs, plan.edits()
    shared = {name: getattr(plan, name) for name in ProbePlan.model_fields}
    if plan.labelled and "vision" in given:
        class_names([item.id for item in given["vision"].items[: plan.limit]])  # before anything is measured
    probed = measured(ProbePlan(**shared), listener=listener)
    for note in edited(probed, read_manifest(probed)):
        listener.say(note)
    model = load(spec, device=prepared.device, dtype=prepared.dtype)
    kind = next((kind for kind in given if model.takers(kind)), next(iter(given)))
    tower = next(iter(model.takers(kind, plan.tokens)), None) or model.tower(kind)
    samples = tower_samples(tower, given[kind], limit=plan.limit, seq_len=plan.seq_len)
    tower = understood(model, tower, samples, allow_random=plan.allow_random)
    layers = pick_layers(tower.layers, plan.layers, tower.places)
    edits = by_own_numbers(edits, tower.layers, tower.places)
    before = read_samples(probed)
    before = before[before["tower"] == tower.name]
    before = before[before["tokens"] == before["tokens"].iloc[0]]
    check_layers(edits, layers)
    heads = int(before["head"].max()) + 1 if plan.heads else 0
    todo = cases(edits, layers, plan.scopes, heads=heads)
    truth, classify = _truth(model, tower, samples) if plan.labelled else (None, None)
    counts = (len(layers), "layer"), (len(samples), "input")
    over = ", on ".join(f"{count} {word}{'s' if count != 1 else ''}" for count, word in counts)
    listener.say(f"{spec.given}: {len(todo)} changes of {over}")
    if tower.language_head is not None and any(edit.where == "mlp branch" for edit in edits):
        listener.say("cb averages over later tokens as well: the changed loss has seen what it predicts")
    listener.start(f"{spec.given} changed", len(samples))
    incidents, size = Incidents(), BatchSize.of(plan.batch_size, model.module)
    others: HeldOut | None = None
    if taking := [edit for edit in edits if INTERVENTIONS[edit.name].of_others]:
        more = tower_samples(tower, given[kind], limit=plan.limit + HELD_OUT, seq_len=plan.seq_len)
        taken = [layer for layer in layers if any(edit.at(layer.index) for edit in taking)]
        chosen = held_out_samples(more)
        others = held_out(tower, chosen, taken, seed=plan.seed, batch_size=size)
    rows = sweep(
        model,
        tower,
        samples,
        todo,
        batch_size=size,
        labels=truth,
        classify=classify,
        held_out=others,
        incidents=incidents,
        advance=listener.advance,
    )
    inputs = {"source": given[kind].source, "sha256": given[kind].digest, "n": len(samples)}
    if (files := given[kind].files) is not None and tower.frames is None:
        inputs["content"] = content_digest(files.content([sample.id for sample in samples]))
        for number in range(len(samples)):
            files.check(number)
    table = sensitivity(rows, seed=plan.seed)
    predicted = rows[rows["effect"] != "kept_mass"]  # which is no cost
    relation = pd.concat(
        [
            relations(predicted[predicted["head"] < 0], layer_samples(before), seed=plan.seed),
            relations(predicted[predicted["head"] >= 0], before, seed=plan.seed),
        ],
        ignore_index=True,
    ).reindex(columns=list(LAYOUTS["relations.csv"].needed))  # it has them also where it has no rows
    caveated = columns_of(model.facts, tower.facts) | {"inputs": plan.named}
    for name, frame in ((SAMPLES, rows), ("sensitivity.csv", table), ("relations.csv", relation)):
        write(frame.assign(model=spec.given, tower=tower.name, **caveated), folder / name)
    probe = read_layers(probed)
    probe = probe[(probe["tower"] == tower.name) & (probe["tokens"] == before["tokens"].iloc[0])]
    title = with_caveats(spec.given, caveated)
    figures = draw(table, relation, probe, folder / "figures", title=title)
    settle(folder)
    write_json(
        {
            **document,
            "figures": [str(path.relative_to(folder)) for path in figures],
            "status": "partial" if incidents.failed else "complete",
            "model": {"given": spec.given, "resolved": model.resolved, **dict(model.facts), **caveated},
            "tower": tower.name,
            "ends_in": tower.ending,
            "probe": probed.name,
            "inputs": inputs,
            **_told(others, samples),
            "tables": hashes(folder, (SAMPLES, *LAYOUTS)),
            "failed_inputs": incidents.failed,
            "seconds": round(time.time() - started, 3),
            "environment": environment(),
        },
        folder / MANIFEST,
    )


def _told(others: HeldOut | None, samples: Sequence[Sample]) -> dict[str, Any]:
    """What a manifest says of held-out inputs: which they are, and how many of them are measured as well."""
    if others is None:
        return {}
    again = len({sample.id for sample in samples} & set(others.ids))
    return {"held_out": {"ids": list(others.ids), "measured_as_well": again}}


def _truth(
    model: Model, tower: Tower, samples: Sequence[Sample]
) -> tuple[dict[str, int], Callable[[Tensor], Tensor] | None]:
    """The true classes, and what makes class logits of embeddings where the model has no classes."""
    ids = [sample.id for sample in samples]
    if tower.ending == "class logits":
        classes: Any = model.module.num_classes
        return labels(ids, int(classes)), None
    if model.zero_shot is None:
        raise UserError(
            f"'{model.name}' neither classifies nor takes class names: accuracy is not defined",
            "leave --labelled out, or give a timm classifier or a CLIP model (open_clip:, hf:)",
        )
    names = class_names(ids)
    return labels(ids, len(names), named=True), model.zero_shot(names)


def open_sweep(folder: Path) -> Sweep:
    """A finished sweep. Raises UserError if it is none."""
    manifest = finished(folder, OWNER.verb, "sweep", "attnbias intervene -m MODEL … -o FOLDER")
    tip = again(folder, OWNER.verb)
    sensed, related = (
        read_table(folder / name, layout, "table", tip=tip) for name, layout in LAYOUTS.items()
    )
    return Sweep(folder, sensed, related, manifest)


def draw(
    table: pd.DataFrame, relation: pd.DataFrame, layers: pd.DataFrame, folder: Path, *, title: str
) -> list[Path]:
    """Layer sensitivity, and what the untouched model measures against it, as PDF, PNG and CSV."""
    from diag.show.figures.sensitivity import bias_against_effect, layer_costs, layer_sensitivity
    from diag.show.figures.write import save

    effect = main_effect(table)
    paths = []
    with writing(folder):
        ranked = costs(table)
        if len(ranked) > 1:
            paths += save(layer_costs(ranked, title=title), ranked, folder, "costs")
        of_sinks = bool(table["intervention"].isin(OF_SINKS).any())
        for shown in dict.fromkeys([effect, STUDY] if of_sinks else [effect]):
            figure = layer_sensitivity(table, title=title, effects=[shown])
            paths += save(figure, table[table["effect"] == shown], folder, file_stem("sensitivity", shown))
        if relation.empty:
            return paths
        told = relation[(relation["effect"] == effect) & ~relation["intervention"].map(is_control)]
        strengths = told.groupby("intervention")["strength"].nunique()
        for case, rows in told.groupby(["intervention", "strength"], sort=False, dropna=False):
            name, strength = str(case[0]), float(str(case[1]))
            alike = table["strength"].eq(strength) | (table["strength"].isna() & pd.isna(strength))
            figure = bias_against_effect(
                table[alike], rows, layers, title=title, effect=effect, intervention=name
            )
            stem = f"{name}-{strength:g}" if strengths[name] > 1 else name
            paths += save(figure, rows, folder, file_stem("relation", stem, effect))
    return paths
