"""Naming the class of an image: the model, loss and evaluation that every data set with classes shares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diag.studies.train.fit import Batch
from diag.studies.train.folders import save_timm, timm_model
from diag.studies.train.plan import TrainPlan

EVALUATED_AT_ONCE = 100
"""Held-out images of a batch."""


class ImageTask:
    """What `crops` and `images` have in common; they bring `batch`, `held_out`, `watched` and `probed`.

    classes: their names, by number.
    """

    def __init__(self, plan: TrainPlan, classes: Sequence[str]) -> None:
        self.plan, self.classes = plan, tuple(classes)
        self.size = int(plan.model.get("img_size", 224))

    def build(self, patch_size: int | None) -> nn.Module:
        return timm_model(self.plan.model, patch_size, len(self.classes))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy with the recipe's label smoothing."""
        smoothing = self.plan.recipe.label_smoothing
        return F.cross_entropy(model(batch["images"]), batch["labels"], label_smoothing=smoothing)

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        return classified(model, self.held_out(), device)

    def held_out(self) -> Iterator[Batch]:
        """Batches of what is evaluated, the same at every call."""
        raise NotImplementedError

    def save(self, model: nn.Module, folder: Path) -> None:
        save_timm(model, self.plan.model, folder, self.classes)


def classified(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> dict[str, float]:
    """Accuracy, cross entropy in nats without smoothing, and the number of images as `held_out`."""
    correct, total, count = 0, 0.0, 0
    for batch in batches:
        logits, labels = model(batch["images"].to(device)).float(), batch["labels"].to(device)
        correct += int((logits.argmax(-1) == labels).sum())
        total += float(F.cross_entropy(logits, labels, reduction="sum"))
        count += len(labels)
    return {"accuracy": correct / count, "loss": total / count, "held_out": count}
