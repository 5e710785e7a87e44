"""A model that is being trained, run on the side: what it was given, and a pass that leaves it as it was.

    with untouched(module), torch.no_grad():
        given.call(module)

The original module under data parallel and compiled wrappers is what can be seen into (`unwrapped`). What a
forward pass was given is caught by a hook (`InputRecorder`), cut to a few rows and copied, because training
loops write new batches into old memory.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diag.errors import UserError
from diag.models.base import device_of_module

WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}
"""Class of a wrapper -> its attribute that holds the module."""

SHARDED = ("FullyShardedDataParallel", "DeepSpeedEngine")


@dataclass(frozen=True)
class Precision:
    """The autocast under which a forward pass ran."""

    enabled: bool
    dtype: torch.dtype

    @staticmethod
    def now(device: torch.device) -> Precision:
        """What is in force where this is called."""
        return Precision(torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))


@dataclass(frozen=True)
class Given:
    """What one forward pass was given: arguments as the module takes them, one input per row.

    precision: the autocast around it; None for that of the moment at which it is called again.
    """

    positional: tuple[Any, ...]
    named: Mapping[str, Any]
    rows: int
    precision: Precision | None = None

    @property
    def real(self) -> Tensor | None:
        """`[row, token]`, False at padding, where a two-dimensional `attention_mask` was given by name."""
        mask = self.named.get("attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def tensors(self) -> dict[str, Any]:
        """Its arguments by name; those that have none, by place."""
        return {**{str(place): x for place, x in enumerate(self.positional)}, **self.named}

    def on(self, device: torch.device) -> Given:
        """The same with its tensors on a device."""
        move = partial(Tensor.to, device=device)
        return replace(self, positional=_each(self.positional, move), named=_each(self.named, move))

    def any(self, holds: Callable[[Tensor], bool]) -> bool:
        """Whether something holds of any of its tensors."""
        tensors: list[Tensor] = []
        _each((self.positional, self.named), tensors.append)
        return any(map(holds, tensors))

    def with_first(self, other: Callable[[Tensor], Tensor]) -> Given:
        """The same with another first input, made of that of each tensor."""

        def changed(tensor: Tensor) -> Tensor:
            if not tensor.ndim or len(tensor) != self.rows:
                return tensor
            return torch.cat([other(tensor[:1]), tensor[1:]])

        return replace(self, positional=_each(self.positional, changed), named=_each(self.named, changed))

    def call(self, module: nn.Module) -> Any:
        """Runs the module on it."""
        return module(*self.positional, **self.named)


def fixed(batch: Tensor | Mapping[str, Tensor]) -> Given:
    """A ready batch as `diag.probe` takes one: a tensor, or tensors by name; every row is one input.

    Raises UserError for anything else.
    """
    positional, named = ((batch,), {}) if isinstance(batch, Tensor) else ((), batch)
    tensors = isinstance(named, Mapping) and all(isinstance(value, Tensor) for value in named.values())
    rows = _rows((positional, named)) if tensors else None
    if rows is None:
        raise UserError(
            f"the fixed batch is a {type(batch).__name__}",
            "a batch is a tensor, or a dict of tensors, with one input per row",
        )
    return Given(positional, dict(named), rows)


class InputRecorder:
    """A forward pre-hook that keeps what a module was last given, cut to its first rows and copied.

    Only passes with gradients count: those of validation and of measuring are not what is trained on.
    A class of its own, so that a model with the hook can be copied and saved whole.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.heard: Given | None = None

    def __call__(self, module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        # inside torch.compile nothing can be kept; the hook of the compiled wrapper runs outside of it
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        total = _rows((positional, named))
        if total is None:
            return
        rows = min(self.rows, total)

        def cut(tensor: Tensor) -> Tensor:
            part = tensor[:rows] if tensor.ndim and len(tensor) == total else tensor
            return part.detach().clone()

        with torch.no_grad():
            autocast = Precision.now(device_of_module(module))
            self.heard = Given(_each(positional, cut), _each(named, cut), rows, autocast)


def unwrapped(model: nn.Module) -> nn.Module:
    """The original module under data parallel and compiled wrappers.

    Raises UserError for a model whose parameters are spread over processes: one process alone cannot run it.
    """
    while (inner := WRAPPERS.get(type(model).__name__)) is not None:
        model = getattr(model, inner)
    spread = any(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
    for module in model.modules():
        if spread or type(module).__name__ in SHARDED:
            raise UserError(
                f"the parameters of {type(model).__name__} are spread over processes (FSDP or the like): "
                "one process alone cannot run it",
                "probe its checkpoints with attnbias probe instead",
            )
    return model


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, nothing compiled; on the way out, also after an exception, everything is as it was.

    That is: the mode of every submodule; what `module.compile()` made of it; buffers, of which the pass gets
    copies; the state of random generators (Python's, numpy's, PyTorch's on the CPU and the module's device);
    and the precision of matrix products, which is full float32 in between, as outputs are checked more
    closely than TF32 allows.
    """
    modules = list(module.modules())
    modes = [(each.training, each._compiled_call_impl) for each in modules]
    buffers = [(each, name, buffer) for each in modules for name, buffer in each._buffers.items()]
    copies = {id(buffer): buffer.clone() for *_, buffer in buffers if buffer is not None}
    numbers, draws = random.getstate(), np.random.get_state()
    device = device_of_module(module)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), _full_precision():
            for each in modules:
                each.training = False  # train() may do more, such as merging adapters into weights
                each._compiled_call_impl = None
            for each, name, buffer in buffers:
                # writing to the original would spoil a backward pass that is still to come
                each._buffers[name] = copies.get(id(buffer))
            yield
    finally:
        for each, (mode, compiled) in zip(modules, modes, strict=True):
            each.training, each._compiled_call_impl = mode, compiled
        for each, name, buffer in buffers:
            each._buffers[name] = buffer
        random.setstate(numbers)
        np.random.set_state(draws)


def precision(device: torch.device, chosen: Precision) -> torch.autocast:
    """Autocast as it was in another pass.

    Casts of the weights are not cached: where a training step's autocast is around this, they would be kept,
    and be at hand to its next pass although they were made without gradients.
    """
    return torch.autocast(device.type, dtype=chosen.dtype, enabled=chosen.enabled, cache_enabled=False)


@contextmanager
def _full_precision() -> Iterator[None]:
    products: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [each.fp32_precision for each in products]
    try:
        for each in products:
            each.fp32_precision = "ieee"
        yield
    finally:
        for each, chosen in zip(products, before, strict=True):
            each.fp32_precision = chosen


def _rows(given: Any) -> int | None:
    """Rows of the first tensor that has any; None where there is no tensor."""
    tensors: list[Tensor] = []
    _each(given, tensors.append)
    return next((len(tensor) for tensor in tensors if tensor.ndim), None)


def _each(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A nest of tuples, lists and mappings with every tensor changed; all else is passed on as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_each(part, change) for part in value)
    if isinstance(value, Mapping):
        copied: Any = copy.copy(value)  # a tokenizer's batch has attributes that a dict has not
        for key, part in value.items():
            copied[key] = _each(part, change)
        return copied
    return value
