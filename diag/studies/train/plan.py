"""What `attnbias train` does: a grid of patch sizes × variants × seeds on one task, checked before work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from diag.errors import UserError
from diag.inputs.document import read_document
from diag.inputs.images import images
from diag.inputs.items import sha256
from diag.inputs.mistakes import mistake
from diag.inputs.texts import read_text
from diag.models.sizes import MOST_LAYERS
from diag.run.plan import Plan
from diag.variants import BASELINE, parse

LIKE = "configs/train-smoke.yaml"

MOST = 1_000_000_000
"""Of steps, examples and inputs."""
MOST_CELLS = 10_000
"""Trainings of a grid."""
MOST_SIZE = 1_000_000
"""Of a number that a model is built with: building more would not end."""
LAYERS = ("depth", "n_layer")
"""What the builders call the number of layers."""
SIZES = ("img_size", "n_positions", "vocab_size")
"""What is read of a model before it is built."""


class Recipe(BaseModel):
    """One training run: AdamW, linear warm-up, cosine decay to 0, clipped gradients.

    clip: largest norm of the gradient. ema: decay of a moving average of the weights, which is then what is
        kept; none if empty. precision: of the forward pass; bfloat16 by autocast.
    gate_rate: learning rate of learned α and λ over that of the weights. Adam moves a number by about its
        rate in a step, so that few steps at the weights' rate could not open a gate.
    held_out: examples (images, or windows of text) of the evaluation. checkpoint_every: steps that an
        interruption can lose.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int = Field(gt=0, le=MOST)
    batch_size: int = Field(gt=0, le=1_000_000)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    warmup: int = Field(default=50, ge=0, le=MOST)
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = Field(default=1.0, gt=0)
    gate_rate: float = Field(default=10.0, gt=0)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    ema: float | None = Field(default=None, gt=0, lt=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    held_out: int = Field(default=1400, gt=0, le=MOST)
    checkpoint_every: int = Field(default=100, gt=0, le=MOST)


class TrainPlan(Plan):
    """A grid of cells.

    task: "crops" (name the bundled photograph that a crop comes from), "images" (a labelled folder or
        WebDataset tars) or "language" (next token).
    train, validation: the data of "images"; train alone, a text file, that of "language" (empty: the
        bundled text, of which the last tenth is held out).
    model: for images the name of a timm ViT under `architecture`, and arguments of its constructor; for
        language those of transformers' GPT2Config.
    variants: as `attnbias variants` lists them; the baseline `sa` is what gains are measured against.
    monitor_every: steps between two measurements while training; 0 for none.
    probe_limit: inputs of the probe of every finished cell.
    """

    title: str
    about: str = ""
    task: Literal["crops", "images", "language"]
    train: str | None = None
    validation: str | None = None
    patch_sizes: tuple[Annotated[int, Field(gt=0, le=10_000)], ...] = ()
    variants: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field(min_length=1)
    model: dict[str, Any] = Field(default_factory=dict)
    recipe: Recipe
    monitor_every: int = Field(default=50, ge=0, le=MOST)
    probe_limit: int = Field(default=64, gt=0, le=MOST)

    @field_validator("variants")
    @classmethod
    def _known(cls, variants: tuple[str, ...]) -> tuple[str, ...]:
        try:
            for variant in variants:
                parse(variant)
        except UserError as error:
            raise ValueError(f"{error} ({error.tip})") from None
        if BASELINE not in variants:
            raise ValueError(f"lack the baseline {BASELINE}: gains are measured against it")
        return variants

    @model_validator(mode="after")
    def _fits_task(self) -> TrainPlan:
        if bool(self.patch_sizes) == (self.task == "language"):
            raise ValueError(
                "task language takes no patch_sizes" if self.patch_sizes else "patch_sizes are missing"
            )
        if self.task == "images" and not (self.train and self.validation):
            raise ValueError("task images takes train: and validation:, DIR/class/*.jpg or tars with .cls")
        if self.task == "crops" and (self.train or self.validation):
            raise ValueError("task crops brings its own images: leave train and validation out")
        for name in ("patch_sizes", "variants", "seeds"):
            given = getattr(self, name)
            if len(set(given)) != len(given):
                raise ValueError(f"{name} name something twice")
        cells = max(len(self.patch_sizes), 1) * len(self.variants) * len(self.seeds)
        if cells > MOST_CELLS:
            raise ValueError(
                f"patch_sizes × variants × seeds are {cells:,} cells, {MOST_CELLS:,} are the most"
            )
        return self

    @field_validator("model")
    @classmethod
    def _buildable(cls, model: dict[str, Any]) -> dict[str, Any]:
        for name, size in model.items():
            numbers = size if isinstance(size, list) else [size]
            if any(isinstance(number, int | float) and not abs(number) <= MOST_SIZE for number in numbers):
                raise ValueError(f"{name} is {size!s:.40}, {MOST_SIZE:,} is the most")
        for name in SIZES:
            if name in model and (not isinstance(model[name], int) or model[name] < 1):
                raise ValueError(f"{name} is {model[name]!s:.40}, a whole number above 0 is due")
        for name in LAYERS:
            if isinstance(count := model.get(name), int) and count > MOST_LAYERS:
                raise ValueError(f"has {count:,} layers, {MOST_LAYERS:,} are the most")
        return model

    def stamps(self) -> dict[str, str]:
        """What tells whether one's own data were replaced, by the field that names them.

        Names, sizes and times of images and tars, the content of a text. Raises UserError where they are not
        there.
        """
        if self.task == "crops" or self.train is None:
            return {}
        if self.task == "language":
            return {"train": sha256(read_text(Path(self.train)))}
        return {name: images(getattr(self, name)).stamp for name in ("train", "validation")}

    @property
    def key(self) -> str:
        """Identifies the result. Raises UserError as `stamps` does."""
        return self.key_of(self.stamps())

    def key_of(self, stamps: Mapping[str, str]) -> str:
        """The key: everything but the words about it; of one's own data their stamps, not their place."""
        document = self.model_dump(mode="json", exclude={"title", "about", *stamps})
        if stamps:
            document["inputs"] = dict(stamps)
        return sha256(json.dumps(document, sort_keys=True))


def read_plan(file: Path) -> TrainPlan:
    """A plan from YAML. Raises UserError that names line and key."""
    document = read_document(file, like=LIKE)
    if not isinstance(document.data, dict):
        raise UserError(f"plan '{file}' is no mapping", f"see {LIKE}")
    try:
        return TrainPlan.model_validate(document.data)
    except ValidationError as error:
        place, reason, _ = mistake(error)
        where = f"{'.'.join(map(str, place))} " if place else ""
        raise document.error(place, f"{where}{reason}", "see docs/train.md") from None
