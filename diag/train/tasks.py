"""What a cell learns: data, loss, evaluation, and how its model is built and saved.

Batches are a function of (seed, step) alone: variants of one seed see the same data in the same order, and
a resumed run continues where it stopped without any state of a loader.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from diag.inputs import PHOTOGRAPHS
from diag.train.crops import HELD_OUT_REGION, TRAIN_REGION, Crops
from diag.train.plan import TrainPlan

HELD_OUT_SEED = 2**31
"""Of what is evaluated; no training batch is drawn from it."""

EVALUATED_AT_ONCE = 100
PROBE_CROPS = 4
"""Held-out crops of each photograph that are probed."""

Batch = dict[str, Tensor]


class Task(Protocol):
    """One kind of training."""

    def build(self, patch_size: int | None) -> nn.Module:
        """A model with random weights, drawn from the global generator."""

    def batch(self, seed: int, step: int) -> Batch:
        """The training batch of a step, on the CPU."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """What is minimised."""

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """`loss` in nats on what is held out and, where there are classes, `accuracy`."""

    def watched(self) -> Batch:
        """A held-out batch to look at while training."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes the model as a folder that `attnbias probe -m FOLDER` takes."""

    def probed(self, folder: Path) -> dict[str, str]:
        """What finished cells are probed on: options of a probe; files it needs are written to `folder`."""


class ImageTask:
    """Naming classes: `crops`, and the base of others that have images and labels.

    classes: their names, by number.
    """

    def __init__(self, plan: TrainPlan, classes: Sequence[str]) -> None:
        self.plan, self.classes = plan, tuple(classes)
        self.size = int(plan.model.get("img_size", 224))

    def build(self, patch_size: int | None) -> nn.Module:
        """A timm ViT with random weights."""
        from diag.train.folders import timm_model

        return timm_model(self.plan.model, patch_size, len(self.classes))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy with the recipe's label smoothing."""
        smoothing = self.plan.recipe.label_smoothing
        return F.cross_entropy(model(batch["images"]), batch["labels"], label_smoothing=smoothing)

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Accuracy, and cross entropy in nats without smoothing, on `held_out` images."""
        correct, total, count = 0, 0.0, 0
        for batch in self.held_out():
            logits, labels = model(batch["images"].to(device)).float(), batch["labels"].to(device)
            correct += int((logits.argmax(-1) == labels).sum())
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
        return {"accuracy": correct / count, "loss": total / count, "held_out": count}

    def held_out(self) -> Any:
        """Batches of what is evaluated, the same at every call."""
        raise NotImplementedError

    def save(self, model: nn.Module, folder: Path) -> None:
        """timm's folder: config.json and model.safetensors."""
        from diag.train.folders import save_timm

        save_timm(model, self.plan.model, folder, self.classes)


class CropsTask(ImageTask):
    """Naming the bundled photograph that a crop comes from."""

    def __init__(self, plan: TrainPlan) -> None:
        super().__init__(plan, tuple(PHOTOGRAPHS))
        self.training = Crops(TRAIN_REGION, self.size, augment=True)
        self.testing = Crops(HELD_OUT_REGION, self.size, augment=False)

    def batch(self, seed: int, step: int) -> Batch:
        """Random crops, augmented."""
        drawn = self.training.batch(self.plan.recipe.batch_size, np.random.default_rng((seed, step)))
        return dict(zip(("images", "labels"), drawn, strict=True))

    def held_out(self) -> Any:
        """The recipe's number of held-out crops."""
        generator = np.random.default_rng(HELD_OUT_SEED)
        left = self.plan.recipe.held_out
        while left > 0:
            drawn = self.testing.batch(min(left, EVALUATED_AT_ONCE), generator)
            yield dict(zip(("images", "labels"), drawn, strict=True))
            left -= EVALUATED_AT_ONCE

    def watched(self) -> Batch:
        """Two held-out crops of each photograph."""
        generator = np.random.default_rng(HELD_OUT_SEED + 1)
        crops = [self.testing.one(label, generator) for label in range(len(self.classes)) for _ in range(2)]
        return {"images": torch.stack(crops)}

    def probed(self, folder: Path) -> dict[str, str]:
        """Four held-out crops of each photograph, as PNG files."""
        generator = np.random.default_rng(HELD_OUT_SEED + 2)
        folder.mkdir(parents=True, exist_ok=True)
        for label, name in enumerate(self.classes):
            for number in range(PROBE_CROPS):
                pixels = (self.testing.one(label, generator) + 1) * 127.5
                array = pixels.round().byte().permute(1, 2, 0).numpy()
                Image.fromarray(array).save(folder / f"{name}-{number}.png")
        return {"images": str(folder)}


def task_of(plan: TrainPlan) -> Task:
    """The plan's task, with its data at hand. Raises UserError where data cannot be read."""
    if plan.task == "crops":
        return CropsTask(plan)
    if plan.task == "images":
        from diag.train.labelled import LabelledTask

        return LabelledTask(plan)
    from diag.train.language import LanguageTask

    return LanguageTask(plan)
