"""What a builder hands over: a model, two inputs or more, and how attnbias is asked for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class NotBuiltError(Exception):
    """A model that cannot be built small here, with the reason."""


@dataclass
class Case:
    """A model to be judged.

    batch: of at least two different inputs, one per row of `axis`. prefix: tokens before the patches that are
    known of the architecture, where content cannot tell (by name only).
    """

    library: str
    name: str
    module: nn.Module
    batch: Tensor | Mapping[str, Tensor]
    folder: Path | None = None
    prefix: int | None = None
    axis: int = 0


def part(x: Tensor, row: int, rows: int, axis: int = 0) -> Tensor:
    """What belongs to one of the inputs that a tensor holds, one after another, in equal parts."""
    size = x.shape[axis] // rows
    return x.narrow(axis, row * size, size).clone()


def inputs_of(case: Case) -> list[Tensor | dict[str, Tensor]]:
    """Each input as a batch of its own."""
    batch, axis = case.batch, case.axis
    if isinstance(batch, Tensor):
        return [x.clone() for x in batch.split(1, axis)]
    rows = min(x.shape[axis] for x in batch.values())
    return [{name: part(x, row, rows, axis) for name, x in batch.items()} for row in range(rows)]


def forward(module: nn.Module, batch: Any) -> Any:
    """A module on a batch, as `diag.probe` runs it."""
    return module(**batch) if isinstance(batch, Mapping) else module(batch)


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draws parameters that start at constants: biases and scales would hide what loses them.

    Small weights make all tokens alike; those of more than one axis are enlarged.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point() and parameter.numel() and not parameter.is_meta:
                if not parameter.isfinite().all():  # memory that was never filled in
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
                flat = parameter.ndim <= 1 or float(parameter.std()) == 0 if parameter.numel() > 1 else False
                if flat:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return module.eval()
