"""The plan of one look at one token: which models, which input, which layer, head and target. No torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from diag.errors import LARGEST, UserError, did_you_mean, one_of, visible
from diag.inputs.given import as_inputs
from diag.inputs.images import MOST_BYTES, PHOTOGRAPHS, image_in, photograph
from diag.inputs.items import Inputs, Item, existing, sha256
from diag.inputs.outside import reason, regular
from diag.inputs.texts import texts
from diag.models.names.spec import expanded
from diag.results.writing import file_stem
from diag.run.plan import MOST_TOKENS, RUNS, Dtype, Plan, ProbePlan

Place = Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
"""Where something is, counted from the front or, negative, from the end."""

ASKED: Mapping[str, Any] = {"saliency": False, "question": None, "general": None}
"""Fields that came later, and what they are where nothing is asked for."""
DEMO = "demo:"
IMAGE_TIP = "--image takes an image file, or demo:NAME such as demo:astronaut"


class AttendPlan(Plan):
    """Everything that `attnbias attend` needs to know.

    image: a file, or `demo:NAME`; text: a file, `demo`, or the text itself. One of them.
    layer: the model's own number, negative from its last; depth: relative, 0 the first and 1 the last layer.
        One of them.
    head: query head; None for the mean over heads.
    patch: (row, column) in the first model's grid; pixel: (x, y) in the first model's resized image. Without
        either, the patch in the middle.
    token: position in the window of text, negative from the end.
    saliency: whether attention is compared with gradients of the answer, in all layers.
    question: what a vision-language model is asked beside the image; its language model is looked at then,
        and `token` counts in image and question. general: what it is asked in general, for contrast.
    """

    models: tuple[str, ...] = Field(min_length=1)
    image: str | None = None
    text: str | None = None
    layer: Place | None = None
    depth: float | None = Field(default=None, ge=0, le=1)
    head: Place | None = None
    patch: tuple[Place, Place] | None = None
    pixel: tuple[Place, Place] | None = None
    token: Place | None = None
    seq_len: int | None = Field(default=None, ge=2, le=MOST_TOKENS)  # one token has no others to attend to
    top: int = Field(default=10, gt=0, le=LARGEST)
    saliency: bool = False
    question: str | None = Field(default=None, min_length=1)
    general: str | None = Field(default=None, min_length=1)
    checkpoint: Path | None = None
    model_args: tuple[str, ...] = ()
    random_init: bool = False
    trust_remote_code: bool = False
    dtype: Dtype = "float32"
    # below: how, not what; it does not change the result
    device: str = "auto"

    @field_validator("models")
    @classmethod
    def _once(cls, models: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(models))

    @model_validator(mode="after")
    def _one_target(self) -> AttendPlan:
        """Raises UserError, which pydantic lets through."""
        if (self.image is None) == (self.text is None):
            both = "both --image and --text are given" if self.image else "no input is given"
            raise UserError(both, "give --image FILE or --text 'STRING'")
        if (self.layer is None) == (self.depth is None):
            both = "both --layer and --depth are given" if self.depth is not None else "no layer is given"
            raise UserError(both, "give --layer L (-1 is the last), or --depth 0.5 for the middle")
        if self.question is not None or self.general is not None:
            self._check_question()
        elif self.image is not None:
            if self.patch is not None and self.pixel is not None:
                raise UserError(
                    "both --patch and --pixel are given", "give --patch ROW,COLUMN or --pixel X,Y"
                )
            if self.token is not None or self.seq_len is not None:
                flag = "--token" if self.token is not None else "--seq-len"
                raise UserError(f"{flag} belongs to --text", "an image takes --patch or --pixel")
        else:
            if self.patch or self.pixel:
                raise UserError(
                    f"{'--patch' if self.patch else '--pixel'} belongs to --image", "a text takes --token I"
                )
            if self.token is None:
                raise UserError("no target is given", "give --token I (0 is the first, -1 the last)")
        return self

    def _check_question(self) -> None:
        """Raises UserError."""
        if self.question is None:
            raise UserError(
                "--general is what --question is compared with", "give --question 'STRING' as well"
            )
        if self.image is None:
            raise UserError("--question is asked about an image", "give --image FILE; a text takes --token I")
        for flag, given in (("--patch", self.patch), ("--pixel", self.pixel), ("--seq-len", self.seq_len)):
            if given is not None:
                raise UserError(
                    f"{flag} does not go with --question",
                    "the target is the last token, or another with --token I",
                )
        if self.saliency:
            raise UserError(
                "--saliency does not go with --question: no answer is scored", "leave one of them out"
            )

    @property
    def tower(self) -> str:
        """The tower that is looked at: "vision" or "text"."""
        return "vision" if self.image is not None else "text"

    def probe_plan(self) -> ProbePlan:
        """The part that names models and weights, as a probe has it."""
        return ProbePlan(
            models=self.models,
            checkpoint=self.checkpoint,
            model_args=self.model_args,
            random_init=self.random_init,
            trust_remote_code=self.trust_remote_code,
            dtype=self.dtype,
        )

    def inputs(self) -> Inputs:
        """The one input, read as it is now; its digest is of its content. UserError if it is not there."""
        if self.image is not None:
            return _one_image(self.image)
        assert self.text is not None
        return _one_text(self.text)

    def identity(self) -> dict[str, Any]:
        """What is looked at, but for the input; without what came later and is not asked for, so that looks
        from before are still found.
        """
        what = self.model_dump(mode="json", exclude={"device", "image", "text"})
        return {name: x for name, x in what.items() if name not in ASKED or x != ASKED[name]}

    def key(self, given: Inputs | None = None) -> str:
        """Identifies the result: the plan without its `how`, the input's name and content, and local weights.

        given: the input, where it was read already; where it lies and how that was typed is not in the key.
        Raises UserError if the input is not there.
        """
        stamp = (given or self.inputs()).stamp
        document = {"attend": self.identity(), "probe": self.probe_plan().key({self.tower: stamp})}
        return sha256(json.dumps(document, sort_keys=True))


def folder_of(plan: AttendPlan, root: Path = RUNS, given: Inputs | None = None) -> Path:
    """The folder that a plan's result has unless the user says otherwise, whether it is there or not.

    given: the input, where it was read already.
    """
    return root / f"{file_stem('attend', '+'.join(plan.models))[:60]}-{plan.key(given)[:8]}"


def _one_image(given: str) -> Inputs:
    if given.startswith(DEMO):
        name = given.removeprefix(DEMO)
        if name not in PHOTOGRAPHS:
            near = did_you_mean(name, PHOTOGRAPHS) or f"choose from {one_of(PHOTOGRAPHS)}"
            raise UserError(f"no demo image is called '{name}'", near)
        return _in_memory(given, photograph(name), name)
    path = existing(given, IMAGE_TIP)
    if path.is_dir():
        raise UserError(f"'{given}' is a folder, not one image", IMAGE_TIP)
    regular(path, "image", IMAGE_TIP, most=MOST_BYTES)
    return _in_memory(given, path, visible(path.name))


def _in_memory(given: str, file: Path, name: str) -> Inputs:
    """An image file, read once: what is hashed is what is measured."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read '{given}': {reason(error)}", IMAGE_TIP) from error
    digest = hashlib.sha256(content).hexdigest()
    items = [Item(name, partial(image_in, content, file.name))]
    return Inputs("images", given, items, digest, sha256(f"{digest}\0{name}"))


def _one_text(given: str) -> Inputs:
    if given == "demo":
        return texts(given)
    if not given.strip():
        raise UserError("the text is empty", "give --text 'STRING' or a text file")
    if _names_a_file(given):
        tip = "--text takes a UTF-8 text file, 'demo', or the text itself"
        path = existing(given, tip)
        if path.is_dir():
            raise UserError(f"'{given}' is a folder", tip)
        return texts(path)
    found = as_inputs([given], "text")
    # "0" would be its name in tables and captions
    items = [Item("text", item.read) for item in found]
    return Inputs("texts", "text", items, found.digest, sha256(f"{found.digest}\0text"))


def _names_a_file(given: str) -> bool:
    """Whether a text is the name of a file: it is one, or it looks like one and like nothing else."""
    return (" " not in given and given.endswith(".txt")) or os.path.exists(expanded(given))
