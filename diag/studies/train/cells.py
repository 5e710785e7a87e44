"""Cells of a grid: what each is called, how it is trained, and what it leaves in its folder.

log.csv         step, loss, learning_rate, gradient_norm
monitor.csv     step, layer, metric, value, while training
model/          the trained model, for `attnbias probe -m`
card.json       written last: accuracy, loss, sizes, seeds, hash of the initial weights, versions
checkpoint.pt   of an unfinished cell
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from diag.errors import UserError
from diag.inputs.outside import json_of
from diag.models.weights import digest
from diag.results.writing import beside, on_disk, write, write_json, writing
from diag.run.environment import environment
from diag.studies.monitor.monitor import Monitor
from diag.studies.train.fit import Batch, Training
from diag.studies.train.plan import TrainPlan
from diag.studies.train.tasks import Task
from diag.variants import alphas, apply, parse


@dataclass(frozen=True)
class Cell:
    """One training run of a grid."""

    task: str
    patch_size: int | None
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder: `p8-xsa-s0`, or `language-xsa-s0`."""
        first = self.task if self.patch_size is None else f"p{self.patch_size}"
        return f"{first}-{re.sub('[^a-z0-9_-]+', '.', self.variant)}-s{self.seed}"

    @property
    def facts(self) -> dict[str, Any]:
        """The columns that name it in every table."""
        return {"cell": self.name, **asdict(self)}


def cells_of(plan: TrainPlan) -> list[Cell]:
    """The grid, seeds outermost, so that an unfinished one holds whole comparisons."""
    sizes: tuple[int | None, ...] = plan.patch_sizes or (None,)
    return [
        Cell(plan.task, size, variant, seed)
        for seed in plan.seeds
        for size in sizes
        for variant in plan.variants
    ]


def train_cell(
    plan: TrainPlan,
    cell: Cell,
    task: Task,
    folder: Path,
    *,
    device: torch.device,
    workers: int = 0,
    advance: Callable[[int], object] = lambda steps: None,
) -> None:
    """Trains a cell in its folder, from its checkpoint if there is one; a finished one is left alone.

    workers: processes that make batches. advance: told how many steps are done. The last checkpoint stays:
    who owns the folder removes it.
    """
    if (folder / "card.json").exists():
        advance(plan.recipe.steps)
        return
    torch.manual_seed(cell.seed)
    model = task.build(cell.patch_size)
    initial = digest(model)  # before the change: the same for all variants of a seed
    apply(model, parse(cell.variant), seed=cell.seed)
    training = Training(model.to(device), plan.recipe, device)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        training.resume(checkpoint)
        advance(training.step)
    training.run(
        _batches(task, cell.seed, training.step, plan.recipe.steps, workers),
        task.loss,
        checkpoint=checkpoint,
        watch=_watcher(model, task.watched(), plan.monitor_every, plan.recipe.steps),
        advance=advance,
    )
    result = training.result.eval()
    with torch.inference_mode():
        outcome = task.evaluate(result, device)
    _save(task, result, folder / "model")
    write(pd.DataFrame(training.log), folder / "log.csv")
    write(pd.DataFrame(training.watched), folder / "monitor.csv")
    write_json(
        {
            **cell.facts,
            **outcome,
            "steps": training.step,
            "parameters": sum(parameter.numel() for parameter in result.parameters()),
            "seconds_per_step": training.seconds / training.step,
            "initial_sha256": initial,
            "sha256": digest(result),
            "alphas": {layer: found.tolist() for layer, found in alphas(result).items()},
            "recipe": plan.recipe.model_dump(mode="json"),
            "threads": torch.get_num_threads(),
            "device": str(device),
            "environment": environment(),
        },
        folder / "card.json",
    )


def _save(task: Task, model: nn.Module, folder: Path) -> None:
    """Writes the model's folder: every file aside, then renamed into its place."""
    aside = beside(folder)
    try:
        with writing(folder):
            task.save(model, aside)
            folder.mkdir(exist_ok=True)
            for file in sorted(aside.iterdir()):
                on_disk(file)
                file.replace(folder / file.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def card_of(folder: Path) -> dict[str, Any]:
    """What a finished cell says of itself. Raises UserError if its card cannot be read."""
    tip = f"remove '{folder}' and run the same command again"
    card = json_of(folder / "card.json", "card", tip=tip)
    if not isinstance(card.get("alphas"), dict):
        raise UserError(f"cannot read card '{folder / 'card.json'}': 'alphas' is no mapping", tip)
    return card


def _watcher(model: nn.Module, batch: Batch, every: int, last: int) -> Callable[[int], list[dict[str, Any]]]:
    """A function from a step to rows of step, layer, metric, value: every so many steps and at the last.

    The batch is measured whole; every token counts.
    """
    if not every:
        return lambda step: []
    monitor = Monitor(model, batch.get("images", batch), every=every)

    def look(step: int) -> list[Any]:
        if step % every and step != last:
            return []
        monitor.measure(step)
        return monitor.history.query("step == @step").to_dict("records")

    return look


class _Steps(Dataset[Batch]):
    """The batches of a seed, by step: the same for all its variants."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed

    def __getitem__(self, step: int) -> Batch:
        return self.task.batch(np.random.default_rng((self.seed, step)))


def _batches(task: Task, seed: int, first: int, last: int, workers: int) -> Iterator[Batch]:
    # a loader draws a seed when it begins: not from the generator of dropout, which a checkpoint restores
    own = torch.Generator().manual_seed(seed)
    steps: Any = range(first, last)
    loader = DataLoader(
        _Steps(task, seed), sampler=steps, batch_size=None, num_workers=workers, generator=own
    )
    return iter(loader)
