"""A task of image classification: what every data set of images with classes shares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diag.studies.train.plan import TrainPlan

HELD_OUT_SEED = 2**31
"""Of what is evaluated; no training batch is drawn from it."""


EVALUATED_AT_ONCE = 100


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
        from diag.studies.train.folders import timm_model

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
        from diag.studies.train.folders import save_timm

        save_timm(model, self.plan.model, folder, self.classes)
