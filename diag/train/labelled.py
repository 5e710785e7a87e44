"""The image task: naming the class of an image, on labelled folders `DIR/class/*.jpg`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diag import inputs
from diag.errors import UserError
from diag.intervene.labels import class_names
from diag.train.plan import TrainPlan
from diag.train.tasks import EVALUATED_AT_ONCE, ImageTask

MEAN = STD = (0.5, 0.5, 0.5)
WATCHED = 32
"""Images that are looked at while training."""


class LabelledTask(ImageTask):
    """Images of `train` in random crops, those of `validation` whole, resized and cut at the centre.

    Raises UserError if either is no labelled folder, or validation has a class that training lacks.
    """

    def __init__(self, plan: TrainPlan) -> None:
        assert plan.train is not None
        assert plan.validation is not None
        self.training, self.testing = inputs.images(plan.train), inputs.images(plan.validation)
        super().__init__(plan, class_names([item.id for item in self.training]))
        for item in self.testing:
            if item.id.partition("/")[0] not in self.classes:
                raise UserError(
                    f"'{plan.validation}' has the class of '{item.id}', which '{plan.train}' lacks",
                    "give both the same class folders",
                )

    @cached_property
    def transforms(self) -> tuple[Any, Any]:
        """What is done to training and to validation images."""
        from torchvision.transforms import v2

        last = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        middle = [v2.Resize(self.size, antialias=True), v2.CenterCrop(self.size)]
        drawn = [v2.RandomResizedCrop(self.size, antialias=True), v2.RandomHorizontalFlip()]
        return v2.Compose([*drawn, *last]), v2.Compose([*middle, *last])

    def batch(self, seed: int, step: int) -> dict[str, Tensor]:
        """Random crops of random images; the crops are drawn from a generator of their own."""
        generator = np.random.default_rng((seed, step))
        chosen = generator.integers(0, len(self.training), self.plan.recipe.batch_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(generator.integers(2**62)))
            return self._read(self.training, chosen, self.transforms[0])

    def held_out(self) -> Iterator[dict[str, Tensor]]:
        """The first `held_out` validation images, spread evenly over the folder."""
        count = min(self.plan.recipe.held_out, len(self.testing))
        places = np.linspace(0, len(self.testing) - 1, count).round().astype(int)
        for first in range(0, count, EVALUATED_AT_ONCE):
            yield self._read(self.testing, places[first : first + EVALUATED_AT_ONCE], self.transforms[1])

    def watched(self) -> dict[str, Tensor]:
        """Validation images, spread evenly over the folder."""
        places = np.linspace(0, len(self.testing) - 1, min(WATCHED, len(self.testing))).round().astype(int)
        return {"images": self._read(self.testing, places, self.transforms[1])["images"]}

    def probed(self, folder: Any) -> dict[str, str]:
        """The validation images where they lie."""
        return {"images": str(self.plan.validation)}

    def _read(self, given: inputs.Inputs, places: Any, transform: Any) -> dict[str, Tensor]:
        items = [given.items[int(place)] for place in places]
        labels = [self.classes.index(item.id.partition("/")[0]) for item in items]
        return {
            "images": torch.stack([transform(item.read()) for item in items]),
            "labels": torch.tensor(labels),
        }
