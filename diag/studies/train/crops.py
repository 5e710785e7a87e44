"""Crops of the bundled photographs: a task that needs no download, with regions that share no pixel.

Training crops come from the left 60 % of each photograph, held-out crops from the right 35 %; the 5 %
between them belongs to neither.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diag.inputs.images import PHOTOGRAPHS, demo_images
from diag.results.writing import keep
from diag.studies.train.fit import Batch
from diag.studies.train.image_task import EVALUATED_AT_ONCE, ImageTask
from diag.studies.train.plan import TrainPlan

TRAIN_REGION = (0.0, 0.60)
HELD_OUT_REGION = (0.65, 1.0)
SMALLEST_SIDE = 48
"""Of a crop before it is resized, in pixels."""
HELD_OUT_SEED = 2**31
"""Of what is evaluated; no training batch is drawn from it."""
PROBE_CROPS = 4
"""Held-out crops of each photograph that are probed."""


class Crops:
    """Random square crops of one horizontal region of each photograph, with the photograph's number.

    region: its left and right end, as shares of the width. size: side of a crop as it is given out, in
    pixels. augment: flips, brightness, contrast and grey.
    """

    def __init__(self, region: tuple[float, float], size: int, *, augment: bool) -> None:
        self.size, self.augment = size, augment
        self.images = []
        for item in demo_images():
            image = torch.from_numpy(np.asarray(item.read()).copy()).permute(2, 0, 1)
            width = image.shape[2]
            self.images.append(image[:, :, round(region[0] * width) : round(region[1] * width)])

    def one(self, label: int, generator: np.random.Generator) -> Tensor:
        """A crop `[3, size, size]` in [-1, 1]; its side is log-uniform between 48 pixels and the region's."""
        image = self.images[label]
        height, width = image.shape[1:]
        largest = min(height, width)
        side = round(math.exp(generator.uniform(math.log(SMALLEST_SIDE), math.log(largest))))
        top = generator.integers(0, height - side + 1)
        left = generator.integers(0, width - side + 1)
        crop = image[:, top : top + side, left : left + side].float()[None]
        crop = F.interpolate(crop, size=(self.size, self.size), mode="bilinear", antialias=True)[0]
        if self.augment:
            if generator.random() < 0.5:
                crop = crop.flip(-1)
            crop = crop * generator.uniform(0.7, 1.3) + generator.uniform(-25, 25)
            if generator.random() < 0.3:
                crop = crop.mean(0, keepdim=True).expand(3, -1, -1)
        return crop.clamp(0, 255) / 127.5 - 1

    def batch(self, count: int, generator: np.random.Generator) -> Batch:
        """`count` crops: images `[count, 3, size, size]` and labels `[count]`."""
        labels = generator.integers(0, len(self.images), count)
        crops = torch.stack([self.one(int(label), generator) for label in labels])
        return {"images": crops, "labels": torch.from_numpy(labels)}

    def batches(self, count: int, generator: np.random.Generator) -> Iterator[Batch]:
        """`count` crops in batches that are evaluated at once."""
        for first in range(0, count, EVALUATED_AT_ONCE):
            yield self.batch(min(count - first, EVALUATED_AT_ONCE), generator)


class CropsTask(ImageTask):
    """Naming the bundled photograph that a crop comes from."""

    def __init__(self, plan: TrainPlan) -> None:
        super().__init__(plan, tuple(PHOTOGRAPHS))
        self.training = Crops(TRAIN_REGION, self.size, augment=True)
        self.testing = Crops(HELD_OUT_REGION, self.size, augment=False)

    def batch(self, generator: np.random.Generator) -> Batch:
        return self.training.batch(self.plan.recipe.batch_size, generator)

    def held_out(self) -> Iterator[Batch]:
        return self.testing.batches(self.plan.recipe.held_out, np.random.default_rng(HELD_OUT_SEED))

    def watched(self) -> Batch:
        """Two held-out crops of each photograph."""
        generator = np.random.default_rng(HELD_OUT_SEED + 1)
        crops = [self.testing.one(label, generator) for label in range(len(self.classes)) for _ in range(2)]
        return {"images": torch.stack(crops)}

    def probed(self, folder: Path) -> dict[str, str]:
        """Four held-out crops of each photograph, as PNG files."""
        generator = np.random.default_rng(HELD_OUT_SEED + 2)
        for label, name in enumerate(self.classes):
            for number in range(PROBE_CROPS):
                pixels = (self.testing.one(label, generator) + 1) * 127.5
                array = pixels.round().byte().permute(1, 2, 0).numpy()
                content = io.BytesIO()
                Image.fromarray(array).save(content, "png")
                keep(folder / f"{name}-{number}.png", content.getvalue())
        return {"images": str(folder)}
