"""A plan carried out: models × shards of inputs → shard files → tables, figures and manifest in a run folder.

Every shard is written under a temporary name and renamed, and holds the samples themselves, so the
folder can be finished from its shards whatever happened in between: running the same command again
skips what is there.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch

from diag.activations import save_activations
from diag.collected import Report
from diag.config import (
    SHARD_INPUTS,
    ProbePlan,
    command_line,
    environment,
    inputs_of,
    run_folder,
    specs_of,
)
from diag.errors import UserError
from diag.figures import file_stem
from diag.groups import metric_names
from diag.inputs import Inputs
from diag.models import load
from diag.models.base import Model, Tower
from diag.models.names import ModelSpec
from diag.records import (
    FORMAT,
    claim,
    one_kind,
    read_heads,
    read_layers,
    read_manifest,
    release,
    tables,
    write,
    write_json,
    writing,
)
from diag.shards import Work, edits_of, shard_frames, tower_samples


class Listener(Protocol):
    """Hears how a run is going; the CLI draws it, tests and Python users need not."""

    def say(self, text: str) -> None:
        """A line worth reading: what a name resolved to, what was left out."""

    def start(self, what: str, total: int) -> None:
        """A model begins, with so many inputs."""

    def advance(self, inputs: int) -> None:
        """So many more inputs are done."""


class Silent:
    """Hears nothing."""

    def say(self, text: str) -> None: ...
    def start(self, what: str, total: int) -> None: ...
    def advance(self, inputs: int) -> None: ...


@dataclass
class Progress:
    """How far a run has come; told when it is interrupted."""

    shards_done: int = 0
    shards_total: int = 0


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and what it holds."""

    folder: Path
    layers: pd.DataFrame
    heads: pd.DataFrame
    manifest: Mapping[str, Any]

    @property
    def complete(self) -> bool:
        """Whether every model and input was measured."""
        return self.manifest["status"] == "complete"


@dataclass
class _Account:
    """What the manifest says beside the plan, collected while the run goes on."""

    models: list[dict[str, Any]] = field(default_factory=list)
    shards: list[Path] = field(default_factory=list)
    failed_models: dict[str, str] = field(default_factory=dict)
    failed_inputs: dict[str, str] = field(default_factory=dict)


def run_probe(
    plan: ProbePlan,
    folder: Path | None = None,
    *,
    overwrite: bool = False,
    listener: Listener | None = None,
    progress: Progress | None = None,
) -> Run:
    """Carries out a plan in `folder` (default: `config.run_folder(plan)`), resuming what is already there.

    Raises UserError for anything the user can mend: before any work where that is possible. A model
    that fails among several is noted in the manifest, and the run goes on.
    """
    listener, progress = listener or Silent(), progress or Progress()
    specs, given = prepared(plan)
    key = plan.key({kind: found.digest for kind, found in given.items()})
    folder = folder or run_folder(plan, key)
    document = {"key": key, "plan": plan.model_dump(mode="json"), "command": command_line()}
    if claim(folder, document, overwrite=overwrite):
        listener.say(f"already complete: {folder} (measure again with --overwrite)")
        return open_run(folder)
    started = time.time()
    account = _Account()
    for number, spec in enumerate(specs):
        try:
            _run_model(spec, number, given, plan, folder, account, listener, progress)
        except UserError as error:
            account.failed_models[spec.given] = str(error)
            if len(account.failed_models) == len(specs):
                release(folder)
                raise
            listener.say(f"{spec.given} failed: {error}")
    return _finish(folder, plan, document, given, account, started)


def open_run(folder: Path) -> Run:
    """A finished run folder. Raises UserError if it is not one."""
    return Run(folder, read_layers(folder), read_heads(folder), read_manifest(folder))


def prepared(plan: ProbePlan) -> tuple[list[ModelSpec], dict[str, Inputs]]:
    """What a plan's names stand for, with everything checked that needs no model. Raises UserError."""
    metric_names(plan.metrics)
    edits_of(plan)
    device_of(plan.device)
    return specs_of(plan), inputs_of(plan)


def device_of(name: str) -> torch.device:
    """`auto` is the first CUDA device, else the CPU. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{name}' is not available", "--device auto, cpu or cuda:0") from error
    return device


def _run_model(
    spec: ModelSpec,
    number: int,
    given: Mapping[str, Inputs],
    plan: ProbePlan,
    folder: Path,
    account: _Account,
    listener: Listener,
    progress: Progress,
) -> None:
    model = load(spec, device=device_of(plan.device), dtype=getattr(torch, plan.dtype))
    for note in (f"{spec.given} → {model.resolved}", *model.notes):
        listener.say(note)
    kinds = [kind for kind in given if model.takers(kind)]
    if not kinds:
        model.tower(next(iter(given)))
    named = {kind for kind, flag in (("vision", plan.images), ("text", plan.texts)) if flag is not None}
    if not named:
        kinds = kinds[:1]
    for kind in kinds:
        for tower in model.takers(kind, plan.tokens):
            own = plan.tokens and tuple(name for name in plan.tokens if name in tower.token_sets)
            part = plan.model_copy(update={"tokens": own})
            _run_tower(spec, number, model, tower, given[kind], part, folder, account, listener, progress)


def _run_tower(
    spec: ModelSpec,
    number: int,
    model: Model,
    tower: Tower,
    given: Inputs,
    plan: ProbePlan,
    folder: Path,
    account: _Account,
    listener: Listener,
    progress: Progress,
) -> None:
    samples = tower_samples(tower, given, plan)
    work = Work.of(model, tower, plan)
    shards = [samples[i : i + SHARD_INPUTS] for i in range(0, len(samples), SHARD_INPUTS)]
    progress.shards_total += len(shards)
    listener.start(f"{spec.given} {tower.name}", len(samples))
    name = f"{number:02d}-{file_stem(spec.given)}-{tower.name}"
    for place, shard in enumerate(shards):
        # not with_suffix: names of models hold dots
        file = folder / "shards" / f"{name}-{place:05d}.parquet"
        if file.exists():
            listener.advance(len(shard))
        else:
            report = Report()
            frames = list(
                shard_frames(work, shard, report, first_input=place * SHARD_INPUTS, advance=listener.advance)
            )
            # the account of a shard is there before the shard is
            write_json(asdict(report), file.with_name(f"{name}-{place:05d}.json"))
            write(pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(), file)
        progress.shards_done += 1
    told = [json.loads(file.read_text()) for file in sorted((folder / "shards").glob(f"{name}-*.json"))]
    for part in told:
        account.failed_inputs |= part["failed"]
    if all(sample.id in account.failed_inputs for sample in samples):
        for file in (folder / "shards").glob(f"{name}-*"):
            file.unlink()  # they hold nothing, and the inputs may be mended
        raise UserError(
            f"no input of '{given.source}' could be read: {account.failed_inputs[samples[0].id]}",
            "give images in JPEG, PNG or WebP",
        )
    if plan.save_activations:
        kept = folder / "activations" / f"{file_stem(spec.given)}-{tower.name}"
        save_activations(tower, samples[: plan.save_activations], kept, plan.layers)
    skipped = told[0]["skipped_layers"] if told else {}
    for path, why in skipped.items():
        listener.say(f"{spec.given}: {path} left out, {why}")
    if unprojected := told[0].get("unprojected", []) if told else []:
        more = f" and {len(unprojected) - 1} more" if len(unprojected) > 1 else ""
        listener.say(
            f"{spec.given}: value_stream_cosine and output_value_cosine are empty where the way from "
            f"heads to the stream is not understood: {unprojected[0]}{more}"
        )
    account.shards += sorted((folder / "shards").glob(f"{name}-*.parquet"))
    account.models.append(
        {
            "given": spec.given,
            "resolved": model.resolved,
            "family": model.family,
            "tower": tower.name,
            "takes": tower.input_kind,
            "layers": len(tower.layers),
            "inputs": len(samples),
            "notes": list(model.notes),
            "skipped_layers": skipped,
            **dict(model.facts),
            **dict(tower.facts),
        }
    )


def _finish(
    folder: Path,
    plan: ProbePlan,
    document: Mapping[str, Any],
    given: Mapping[str, Inputs],
    account: _Account,
    started: float,
) -> Run:
    parts = [pd.read_parquet(file) for file in account.shards]
    samples = one_kind(pd.concat([part for part in parts if len(part)], ignore_index=True))
    layers, heads = tables(samples, seed=plan.seed)
    write(samples, folder / "samples.parquet")
    write(layers, folder / "layers.csv")
    write(heads, folder / "heads.parquet")
    figures = draw(layers, heads, folder / "figures")
    write_json(
        {
            "format": FORMAT,
            "status": "partial" if account.failed_models or account.failed_inputs else "complete",
            **document,
            "inputs": {
                kind: {"source": found.source, "count": len(found), "sha256": found.digest}
                for kind, found in given.items()
                if any(entry["takes"] == kind for entry in account.models)
            },
            "models": account.models,
            "failed_models": account.failed_models,
            "failed_inputs": account.failed_inputs,
            "device": str(device_of(plan.device)),
            "seconds": round(time.time() - started, 3),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "environment": environment(),
            "figures": [str(path.relative_to(folder)) for path in figures],
        },
        folder / "manifest.json",
    )
    shutil.rmtree(folder / "shards", ignore_errors=True)
    return open_run(folder)


def draw(layers: pd.DataFrame, heads: pd.DataFrame, folder: Path) -> list[Path]:
    """Every figure of a run, written as PDF, PNG and the CSV behind it."""
    from diag.figures import draw_run
    from diag.figures.write import save

    with writing(folder):
        return [
            path
            for stem, (figure, data) in draw_run(layers, heads).items()
            for path in save(figure, data, folder, stem)
        ]
