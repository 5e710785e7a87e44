"""What a vision tower's first attention layer reads: how far apart its tokens are, and which are no patches.

Both are found in one forward pass of two images of noise, which ends at that layer: the step from token to
token is the product of the strides on the way to it, and a row that both images share is no piece of an
image. Only what such rows are called is read off the names of the model's parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from math import isqrt
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from diag.errors import UserError
from diag.models.base import Batch, Sample, Tower
from diag.models.hooks.layers import Layer
from diag.models.loading import theirs
from diag.models.sizes import Sides, plain, sides

KINDS = (
    ("cls", re.compile(r"(cls|class)_?(token|embedding|embed)s?(_?\d+)?|dist(illation)?_tokens?")),
    ("registers", re.compile(r"(reg(ister)?|storage|mem(ory)?)_?(tokens?|embeddings?)")),
    ("prompt", re.compile(r"(prompt|visual_prompt)_?(tokens?|embeddings?)")),
    ("detection", re.compile(r"det(ection)?_tokens?")),
)
"""Kinds of tokens that are no patches, in the order in which models put them together, and what parameters
that hold them are called. A distillation token (DeiT) is a second class token."""

TOGETHER = re.compile(r"(cls|class)_reg(ister)?_tokens?")
"""A parameter with class tokens, as many as the model's config says, and registers behind them (RADIO)."""

UNKNOWN = "registers"
"""The kind of such tokens whose parameters are not known by name."""

STRIDES: dict[Any, tuple[int, str, int | None]] = {
    **dict.fromkeys((F.conv2d, F.conv3d), (3, "stride", None)),
    **dict.fromkeys((F.avg_pool2d, F.max_pool2d, F.max_pool2d_with_indices), (2, "stride", 1)),
    torch.max_pool2d: (2, "stride", 1),
    F.unfold: (4, "stride", None),
}
"""Functions that go over an image in steps: which argument says how far, its name, and which says it where
that one is left out."""

RESIZES = (F.interpolate, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.pixel_unshuffle, F.pixel_shuffle)
"""Functions whose step is how much smaller they make an image."""

MODEL_TIP = "its config, weights and image processor must belong together; on a GPU, try --device cpu"
NOISE = 256
"""Side of the images of noise, before the tower's own preprocessing: square, so that none is padded."""


def kinds_of(front: int, back: int, module: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Kinds of the tokens before and behind the patches, as the names of the model's parameters have them.

    front, back: how many there are. More than the parameters account for are "registers"; where there are
    fewer, such as in one of CrossViT's two branches, the last ones are left out.

    >>> kinds_of(1, 100, yolos)
    (("cls",), ("detection", …))
    """
    declared = declared_kinds(module)
    last = [kind for kind in declared if kind == "detection"]
    first = [kind for kind in declared if kind != "detection"]
    before = (first + [UNKNOWN] * front)[:front]
    behind = (last or first[front:]) + [UNKNOWN] * back
    return tuple(before), tuple(behind[:back])


def declared_kinds(module: nn.Module) -> list[str]:
    """Kinds of all tokens that a model has parameters for, one for each token."""
    found = []
    for kind, pattern in KINDS:
        for path, parameter in module.named_parameters():
            if pattern.fullmatch(path.rpartition(".")[2]) and parameter.numel():
                found += [kind] * (parameter.numel() // parameter.shape[-1])
    for path, parameter in module.named_parameters():
        if TOGETHER.fullmatch(path.rpartition(".")[2]):
            classes = getattr(getattr(module, "config", None), "num_cls_tokens", 1)
            found = ["cls"] * classes + found + ["registers"] * (len(parameter) - classes)
    return found


def placed(tower: Tower, module: nn.Module, declared: Any) -> Tower:
    """A vision tower that knows its `prefix`, its `suffix` and its `patch_size` at the first attention layer.

    module: what holds its tokens. declared: the size of a patch that the model names, in pixels.
    patch_size is one number, or height and width where they differ; None where the step is not known, or is
    no whole number of pixels. Where tokens are not understood, in windows or with some of them left out, the
    parameters say what stands before the patches. A model that puts the images of a batch into one sequence
    gets them one by one.
    Raises UserError where the model fails on its own input.
    """
    named = declared_kinds(module)
    first = first_tokens(tower, len(named))
    constant = None if first is None else first.beside_patches
    if constant is None:
        back = named.count("detection")
        prefix, suffix = kinds_of(len(named) - back, back, module)
    else:
        front = sum(1 for _ in takewhile(bool, constant.tolist()))
        prefix, suffix = kinds_of(front, int(constant.sum()) - front, module)
    step = None if first is None else first.step_in_pixels
    if first is None or (step is None and first.step == (1, 1)):
        step = sides(declared)
    joined = first is not None and first.joined
    return replace(
        tower,
        prefix=prefix,
        suffix=suffix,
        max_batch=1 if joined else tower.max_batch,
        facts={**tower.facts, "patch_size": None if step is None else plain(step)},
    )


@dataclass(frozen=True)
class FirstTokens:
    """What the first attention layer of a vision tower reads, of two images.

    states: as it reads them. step: pixels downwards and sideways from one token to the next; 1 where nothing
    went over the image in steps. grid: rows and columns that this made, None for none. image: of the pixels.
    declared: how many tokens the model has parameters for.
    """

    states: Tensor
    step: tuple[float, float]
    grid: Sides | None
    image: Sides | None
    declared: int

    @property
    def rows(self) -> Tensor | None:
        """The tokens of both images, `[2, token, dim]`; None where they lie otherwise, such as in windows."""
        if self.states.ndim == 4 and self.states.shape[:3] == (2, *(self.grid or ())):
            return self.states.flatten(1, 2)
        if self.states.ndim != 3 or 2 not in self.states.shape[:2]:
            return None
        return self.states if len(self.states) == 2 else self.states.transpose(0, 1)

    @property
    def joined(self) -> bool:
        """Whether both images are in one sequence (Pixtral), so that a batch must hold one alone."""
        return self.rows is None and len(self.states) % 2 == 1

    @property
    def beside_patches(self) -> Bool[Tensor, " token"] | None:
        """Which tokens are no patches: those that no image changes. None where it cannot be told."""
        if self.rows is None or self.rows.is_meta:  # shapes without values
            return None
        first, second = self.rows.float()
        same = torch.isclose(first, second, rtol=1e-5, atol=1e-6).all(-1).cpu()
        # without a grid, what parameters do not account for may be padding (Gemma 4)
        beside = self.declared if self.grid is None else len(same) - self.grid[0] * self.grid[1]
        inner = same.tolist()
        between = len(list(takewhile(bool, inner))) + len(list(takewhile(bool, inner[::-1])))
        return same if beside == int(same.sum()) and between >= int(same.sum()) < len(same) else None

    @property
    def step_in_pixels(self) -> Sides | None:
        """The step in whole pixels: the product of strides, or else what follows from image and tokens."""
        if self.step != (1, 1):
            down, across = (round(side) for side in self.step)
            return (down, across) if (down, across) == self.step else None
        beside = self.beside_patches
        if self.image is None or beside is None:
            return None
        patches = int((~beside).sum())
        side = isqrt(self.image[0] * self.image[1] // patches)
        exact = side > 0 and not self.image[0] % side and not self.image[1] % side
        return (side, side) if exact and self.image[0] * self.image[1] == patches * side**2 else None


def first_tokens(tower: Tower, declared: int) -> FirstTokens | None:
    """What the tower's first attention layer reads; None if it reads no tensor that comes of the image.

    declared: how many tokens the model has parameters for.
    Raises UserError where the model fails on its own input.
    """
    generator = np.random.default_rng(0)
    noise = [Image.fromarray(generator.integers(0, 256, (NOISE, NOISE, 3), dtype=np.uint8)) for _ in range(2)]
    samples = [Sample.holding(f"noise-{i}", image) for i, image in enumerate(noise)]
    seen: list[Tensor] = []
    for group in [samples] if tower.max_batch != 1 else [[sample] for sample in samples]:
        batch = tower.encode(group)
        pixels = [x for x in _tensors(batch.data) if x.is_floating_point()]
        steps = _Steps(pixels)
        _run(tower, batch, steps)
        if steps.found is None:
            return None
        states, (step, grid) = steps.found
        seen.append(states if states.ndim > 2 else states[None])
    height, width = pixels[0].shape[-2:]
    return FirstTokens(
        torch.cat(seen), step, grid, (height, width) if pixels[0].ndim == 4 else None, declared
    )


def _run(tower: Tower, batch: Batch, steps: _Steps) -> None:
    """Runs the tower up to its first attention layer. Random numbers that it draws leave no trace."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), torch.inference_mode():
        try:
            with _ending_at(tower.layers, steps):
                tower.forward(batch)
        except UserError:
            raise
        except Exception:  # a model may raise anything; whose it is, it is asked alone
            with theirs(f"the model's {tower.name} tower fails on its own input", MODEL_TIP):
                tower.forward(batch)
            raise


Place = tuple[tuple[float, float], Sides | None]
"""Of a tensor that comes of an image: pixels from place to place, and rows and columns of places."""


class _Steps(TorchFunctionMode):
    """Follows how far apart in the image the places of a tensor are, from function to function."""

    def __init__(self, pixels: Sequence[Tensor]) -> None:
        super().__init__()
        self.places: Any = WeakTensorKeyDictionary()
        for tensor in pixels:
            self.places[tensor] = ((1.0, 1.0), None)
        self.found: tuple[Tensor, Place] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        place = self.of((args, kwargs))
        if place is not None:
            for tensor in _tensors(output):
                self.places[tensor] = _moved(place, func, args, kwargs, tensor)
        return output

    def of(self, values: Any) -> Place | None:
        """The place of the coarsest tensor among some values; None if none of them comes of an image."""
        known = [self.places[tensor] for tensor in _tensors(values) if tensor in self.places]
        return max(known, key=lambda place: place[0][0] * place[0][1], default=None)

    def read(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The forward pre-hook of an attention layer. Raises _Reached at the first that reads the image."""
        states = next((x for x in _tensors((args, kwargs)) if x in self.places and x.ndim > 1), None)
        if states is not None:
            self.found = states, self.places[states]
            raise _Reached


class _Reached(Exception):  # noqa: N818  it is no error
    """The first attention layer is about to run."""


def _moved(place: Place, func: Any, args: Any, kwargs: Any, output: Tensor) -> Place:
    """Where the places of a function's output lie, from those of its input."""
    (down, across), grid = place
    if func in STRIDES:
        index, name, otherwise = STRIDES[func]
        stride = args[index] if len(args) > index else kwargs.get(name)
        if not stride and otherwise is not None:
            stride = args[otherwise] if len(args) > otherwise else kwargs["kernel_size"]
        steps = [stride] * 2 if isinstance(stride, int) else [*(stride or (1,))][-2:] * 2
        if func is not F.unfold:
            grid = output.shape[2:-1].numel(), output.shape[-1]  # of a clip one time step below the other
        return (down * steps[0], across * steps[1]), grid
    if func in RESIZES and args and output.ndim == args[0].ndim == 4:
        before, now = args[0].shape[-2:], output.shape[-2:]
        return (down * before[0] / now[0], across * before[1] / now[1]), (now[0], now[1])
    return place


def _tensors(values: Any) -> Iterator[Tensor]:
    """Every tensor in nested arguments or results."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


@contextmanager
def _ending_at(layers: Sequence[Layer], steps: _Steps) -> Iterator[None]:
    """Under this, a forward pass is followed and ends where the first of the layers reads the image."""
    with ExitStack() as undone:
        for layer in layers:
            handle = layer.module.register_forward_pre_hook(steps.read, prepend=True, with_kwargs=True)
            undone.callback(handle.remove)
        with suppress(_Reached), steps:
            yield
