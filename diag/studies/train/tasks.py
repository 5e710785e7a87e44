"""What a cell learns: data, loss, evaluation, and how its model is built and saved.

Batches are a function of (seed, step) alone: variants of one seed see the same data in the same order, and
a resumed run continues where it stopped without any state of a loader.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from diag.studies.train.crops import CropsTask
from diag.studies.train.fit import Batch
from diag.studies.train.labelled import LabelledTask
from diag.studies.train.language import LanguageTask
from diag.studies.train.plan import TrainPlan


class Task(Protocol):
    """One kind of training."""

    def build(self, patch_size: int | None) -> nn.Module:
        """A model with random weights, drawn from torch's global generator."""

    def batch(self, generator: np.random.Generator) -> Batch:
        """A training batch, on the CPU; all that is random in it comes from the generator."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """What is minimised."""

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """`loss` in nats on what is held out, `held_out` (its count) and, of classes, `accuracy`."""

    def watched(self) -> Batch:
        """A held-out batch to look at while training."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes the model as a folder that `attnbias probe -m FOLDER` takes."""

    def probed(self, folder: Path) -> dict[str, str]:
        """What finished cells are probed on: options of a probe; files it needs are written to `folder`."""


TASKS: dict[str, type[CropsTask | LabelledTask | LanguageTask]] = {
    "crops": CropsTask,
    "images": LabelledTask,
    "language": LanguageTask,
}


def task_of(plan: TrainPlan) -> Task:
    """The plan's task, with its data at hand. Raises UserError where data cannot be read."""
    return TASKS[plan.task](plan)
