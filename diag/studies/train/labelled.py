"""The image task: naming the class of an image, on labelled folders `DIR/class/*.jpg` or WebDataset tars."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diag.errors import UnreadableInput, UserError
from diag.inputs import images as inputs
from diag.inputs import tars
from diag.inputs.labels import class_names
from diag.inputs.outside import reason
from diag.studies.train.fit import Batch
from diag.studies.train.image_task import EVALUATED_AT_ONCE, ImageTask
from diag.studies.train.plan import TrainPlan

MEAN = STD = (0.5, 0.5, 0.5)
WATCHED = 32
"""Images that are looked at while training."""


class Labelled:
    """The images of a source, and the class of each."""

    def __init__(self, source: str) -> None:
        self.items = inputs.images(source).items
        self.classes = classes_of(source, [item.id for item in self.items])

    def spread(self, most: int) -> np.ndarray:
        """Places of at most so many images, evenly over all."""
        count = len(self.classes)
        return np.linspace(0, count - 1, min(most, count)).round().astype(int)


class LabelledTask(ImageTask):
    """Images of `train` in random crops, those of `validation` whole, resized and cut at the centre.

    Raises UserError if an image of either has no class, or validation has a class that training lacks.
    """

    def __init__(self, plan: TrainPlan) -> None:
        assert plan.train is not None
        assert plan.validation is not None
        self.training, self.testing = Labelled(plan.train), Labelled(plan.validation)
        super().__init__(plan, sorted(set(self.training.classes)))
        lacking = set(self.testing.classes) - set(self.classes)
        if lacking:
            raise UserError(
                f"'{plan.validation}' has the class '{min(lacking)}', which '{plan.train}' lacks",
                "give both the same classes",
            )

    @cached_property
    def transforms(self) -> tuple[Any, Any]:
        """What is done to training and to validation images."""
        from torchvision.transforms import v2

        last = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        middle = [v2.Resize(self.size, antialias=True), v2.CenterCrop(self.size)]
        drawn = [v2.RandomResizedCrop(self.size, antialias=True), v2.RandomHorizontalFlip()]
        return v2.Compose([*drawn, *last]), v2.Compose([*middle, *last])

    def batch(self, generator: np.random.Generator) -> Batch:
        """Random crops of random images; torchvision draws the crops, seeded by the generator."""
        chosen = generator.integers(0, len(self.training.classes), self.plan.recipe.batch_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(generator.integers(2**62)))
            return self._read(self.training, chosen, self.transforms[0])

    def held_out(self) -> Iterator[Batch]:
        """The first `held_out` validation images, spread evenly over the folder."""
        places = self.testing.spread(self.plan.recipe.held_out)
        for first in range(0, len(places), EVALUATED_AT_ONCE):
            yield self._read(self.testing, places[first : first + EVALUATED_AT_ONCE], self.transforms[1])

    def watched(self) -> Batch:
        """Validation images, spread evenly over the folder."""
        return {
            "images": self._read(self.testing, self.testing.spread(WATCHED), self.transforms[1])["images"]
        }

    def probed(self, folder: Any) -> dict[str, str]:
        return {"images": os.path.abspath(os.path.expanduser(str(self.plan.validation)))}

    def _read(self, given: Labelled, places: Any, transform: Any) -> Batch:
        """A batch without the images that cannot be read, each of which is warned of.

        Raises UserError if none can.
        """
        images, labels, why = list[torch.Tensor](), list[int](), ""
        for place in places:
            item = given.items[int(place)]
            try:
                images.append(transform(item.read()))
            except UnreadableInput as error:
                why = f"{item.id} is left out: {error}"
                warnings.warn(why, RuntimeWarning, stacklevel=2)
                continue
            labels.append(self.classes.index(given.classes[int(place)]))
        if not images:
            raise UserError(f"no image of a batch can be read; {why}", "mend the images, or take them out")
        return {"images": torch.stack(images), "labels": torch.tensor(labels)}


def classes_of(source: str, ids: Sequence[str]) -> list[str]:
    """The class of each image: its folder in `DIR/class/*.jpg`, or the `.cls` member beside it in a tar.

    source: what the ids were listed from. Raises UserError for an image that has neither.
    """
    if not any(".tar/" in name for name in ids):
        class_names(ids)
        return [name.partition("/")[0] for name in ids]
    named = tars.named_tars(source)
    root = tars.common_root(named) if named else Path(source).expanduser()
    index = tars.listed(named or tars.tars_below(root), root, (".cls",))
    classes = {}
    for place, name in enumerate(index.ids):
        try:
            classes[_key(name)] = index.read(place).decode("utf-8-sig").strip()
        except (UnreadableInput, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read the class '{name}': {reason(error)}", "pack the tar anew"
            ) from error
    for name in ids:
        if _key(name) not in classes:
            raise UserError(f"image '{name}' has no class", f"put {_key(name)}.cls beside it in the tar")
    return [classes[_key(name)] for name in ids]


def _key(name: str) -> str:
    """What members of one sample share, as WebDataset has it: all before the first dot of the file's name."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"
