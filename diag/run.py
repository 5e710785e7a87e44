"""A plan carried out: models × shards of inputs → shard files → tables, figures and manifest in a run folder.

Every shard is written under a temporary name and renamed, and holds the samples themselves, so the
folder can be finished from its shards whatever happened in between: running the same command again
skips what is there.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch
from torch import Tensor

from diag.activations import save_activations
from diag.blocks import Block, find_blocks
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
from diag.interventions import Edit
from diag.interventions import parse as parse_edit
from diag.measure import Report, measure, pick_layers
from diag.models import load
from diag.models.base import Model, Sample, Tower
from diag.models.names import ModelSpec
from diag.models.value_constants import value_constants
from diag.records import (
    FORMAT,
    RATIOS,
    claim,
    one_kind,
    read_heads,
    read_layers,
    read_manifest,
    release,
    samples_frame,
    tables,
    write,
    write_json,
    writing,
)
from diag.stream import STREAM_METRICS


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


def tower_samples(tower: Tower, given: Inputs, plan: ProbePlan) -> list[Sample]:
    """The first `limit` samples of a tower. Raises UserError if there is none."""
    found = list(itertools.islice(tower.samples(given, plan.seq_len), plan.limit))
    if not found:
        raise UserError(
            f"'{given.source}' gives no sample for the {tower.name} tower",
            "the text is shorter than one window: give more text, or a smaller --seq-len",
        )
    return found


def constants_of(model: Model, tower: Tower, plan: ProbePlan) -> dict[str, Any]:
    """The columns that are the same in every row of one tower."""
    return {
        "model": model.name,
        "tower": tower.name,
        "patch_size": _size(tower.facts.get("patch_size")),
        "image_size": _size(tower.facts.get("image_size")),
        "positions": tower.facts.get("positions"),
        "patch_embedding": tower.facts.get("patch_embedding"),
        "values": plan.values,
        "intervention": " ".join(plan.intervene) or "none",
        "dtype": _dtype_of(model),
        "seed": plan.seed,
    }


def constants_to_remove(model: Model, tower: Tower, plan: ProbePlan) -> dict[int, Tensor] | None:
    """What `--values bias-free` takes out of each layer's values; None for values as computed.

    Raises UserError, naming the layer, if one of the plan's layers cannot be made bias-free.
    """
    if plan.values == "as_computed":
        return None
    return value_constants(model.module, pick_layers(tower.layers, plan.layers))


def edits_of(plan: ProbePlan) -> list[Edit]:
    """What the plan does to the model. Raises UserError for an unknown intervention."""
    return [replace(parse_edit(text), seed=plan.seed) for text in plan.intervene]


def blocks_of(model: Model, tower: Tower, plan: ProbePlan) -> Sequence[Block]:
    """The tower's blocks where the plan changes whole branches, those of its layers for stream metrics.

    None where neither needs them. Raises UserError, naming the layer, if a block is not understood.
    """
    if any(edit.where != "attention" for edit in edits_of(plan)):
        return find_blocks(model.module, tower.layers)
    if STREAM_METRICS.keys().isdisjoint(metric_names(plan.metrics)):
        return ()
    return find_blocks(model.module, pick_layers(tower.layers, plan.layers))


def _dtype_of(model: Model) -> str:
    """The format that the model runs in, `float32` for one without parameters."""
    found = next((parameter.dtype for parameter in model.module.parameters()), torch.float32)
    return str(found).removeprefix("torch.")


def _size(size: Any) -> Any:
    """A size as a table has it: one number, or `64x32` where height and width differ."""
    return "x".join(map(str, size)) if isinstance(size, tuple | list) else size


def shard_frames(
    tower: Tower,
    samples: Sequence[Sample],
    plan: ProbePlan,
    constants: Mapping[str, Any],
    report: Report,
    *,
    removed: Mapping[int, Tensor] | None = None,
    blocks: Sequence[Block] = (),
    first_input: int = 0,
    listener: Listener | None = None,
) -> Iterator[pd.DataFrame]:
    """Measures samples and yields a long-form frame per batch and layer.

    removed: what `constants_to_remove` gave. blocks: what `blocks_of` gave.
    """
    edits = edits_of(plan)
    position = first_input
    names = metric_names(plan.metrics)
    needed = list(dict.fromkeys(part for name in names for part in RATIOS.get(name, (name,))))
    sets = plan.tokens or (tower.token_sets[0],)
    for batch in measure(
        tower,
        samples,
        metrics=needed,
        token_sets=sets,
        layers=plan.layers,
        value_constants=removed,
        edits=edits,
        blocks=blocks,
        batch_size=plan.batch_size,
        report=report,
    ):
        for block in batch.layers:
            yield samples_frame(
                block.values,
                ids=batch.ids,
                first_input=position,
                token_sets=sets,
                metrics=block.metrics,
                of_heads=block.of_heads,
                ratios={name: RATIOS[name] for name in RATIOS if name in names},
                constants={
                    **constants,
                    "layer": block.layer.index,
                    "module": block.layer.path,
                    "n_tokens": block.facts.n_tokens,
                    "attn_scope": block.facts.attn_scope,
                    "first_token": block.facts.first_token,
                    "projection": block.facts.projection,
                    "gate_error": block.facts.gate_error,
                },
            )
        position += len(batch.ids)
        if listener is not None:
            listener.advance(len(batch.ids))


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
    kinds = [kind for kind in given if kind in model.towers]
    if not kinds:
        model.tower(next(iter(given)))
    named = {kind for kind, flag in (("vision", plan.images), ("text", plan.texts)) if flag is not None}
    if not named:
        kinds = kinds[:1]
    for kind in kinds:
        tower = model.tower(kind)
        samples = tower_samples(tower, given[kind], plan)
        shards = [samples[i : i + SHARD_INPUTS] for i in range(0, len(samples), SHARD_INPUTS)]
        progress.shards_total += len(shards)
        listener.start(f"{spec.given} {kind}", len(samples))
        constants = constants_of(model, tower, plan)
        removed, blocks = constants_to_remove(model, tower, plan), blocks_of(model, tower, plan)
        name = f"{number:02d}-{file_stem(spec.given)}-{kind}"
        for place, shard in enumerate(shards):
            # not with_suffix: names of models hold dots
            file = folder / "shards" / f"{name}-{place:05d}.parquet"
            if file.exists():
                listener.advance(len(shard))
            else:
                first, report = place * SHARD_INPUTS, Report()
                frames = list(
                    shard_frames(
                        tower,
                        shard,
                        plan,
                        constants,
                        report,
                        removed=removed,
                        blocks=blocks,
                        first_input=first,
                        listener=listener,
                    )
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
                f"no input of '{given[kind].source}' could be read: {account.failed_inputs[samples[0].id]}",
                "give images in JPEG, PNG or WebP",
            )
        if plan.save_activations:
            kept = folder / "activations" / f"{file_stem(spec.given)}-{kind}"
            save_activations(tower, samples[: plan.save_activations], kept, plan.layers)
        skipped = told[0]["skipped_layers"] if told else {}
        for path, why in skipped.items():
            listener.say(f"{spec.given}: {path} left out, {why}")
        unprojected = told[0].get("unprojected", []) if told else []
        if unprojected:
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
                "tower": kind,
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
                if any(entry["tower"] == kind for entry in account.models)
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
