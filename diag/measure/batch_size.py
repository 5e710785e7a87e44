"""How many inputs go through a model at once: as many as asked for, or as memory allows.

The size of a batch changes no result, so a batch that does not fit is run again in halves.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import nn

from diag.errors import UserError
from diag.measure.memory import available, peak, restart_peak
from diag.models.base import device_of_module

GROWN_MOST = {"cpu": 16, "cuda": 256}
"""Larger batches are no faster."""

SAFE = 0.8
"""The share of the memory there is that a larger batch may be expected to take."""

SIGNS = ("can't allocate memory", "out of memory", "not enough memory")
"""What PyTorch's errors say; not all of them have a type of their own."""

Sample = TypeVar("Sample")


@dataclass
class BatchSize:
    """The size of the next batch; it lives as long as a run, so that a shard begins where the last ended.

    now: inputs in the next batch. most: what it may grow to, doubled while the memory of `device` allows.
    """

    now: int
    most: int = 0
    device: torch.device | None = None

    @staticmethod
    def of(inputs: int, module: nn.Module) -> BatchSize:
        """So many inputs; 0 for as many as the memory of the module's device allows."""
        device = device_of_module(module)
        return BatchSize(inputs) if inputs else BatchSize(1, GROWN_MOST[device.type], device)

    def begin(self) -> int:
        """Before a batch: what is held now, where the size may still grow."""
        return restart_peak(self.device) if self.device is not None and self.now < self.most else 0

    def grow(self, inputs: int, before: int) -> None:
        """After a batch of so many; `before`: what `begin` said. Twice as many take twice as much at most."""
        if self.device is None or not self.now == inputs < self.most:
            return
        taken = max(0, peak(self.device) - before)
        if 2 * taken < SAFE * available(self.device):
            self.now = min(2 * self.now, self.most)

    def halve(self, inputs: int, reason: str) -> None:
        """After a batch of so many did not fit. Raises UserError if it was a single input."""
        if inputs == 1:
            why = reason.strip().partition("\n")[0] or "none is left"
            raise UserError(
                f"a single input does not fit into memory: {why}",
                "a shorter --seq-len or a smaller image, --dtype bfloat16, or another --device",
            )
        self.now = self.most = inputs // 2
        warnings.warn(
            f"{inputs} inputs at once do not fit into memory; going on with {self.now}",
            RuntimeWarning,
            stacklevel=2,
        )


class Batches(Generic[Sample]):
    """Samples in batches; one that did not fit can be given back and comes again in smaller ones.

    most: what no batch is to exceed, whatever its size says.
    """

    def __init__(self, samples: Iterable[Sample], size: BatchSize, *, most: int | None = None) -> None:
        self.samples, self.size, self.most = iter(samples), size, most
        self.waiting: list[Sample] = []

    def __iter__(self) -> Iterator[list[Sample]]:
        while True:
            now = min(self.size.now, self.most or self.size.now)
            self.waiting += itertools.islice(self.samples, max(0, now - len(self.waiting)))
            batch, self.waiting = self.waiting[:now], self.waiting[now:]
            if not batch:
                return
            yield batch

    def give_back(self, batch: list[Sample], reason: str) -> None:
        """Takes back a batch that did not fit. Raises UserError if it was a single input."""
        self.size.halve(len(batch), reason)
        self.put_back(batch)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def put_back(self, batch: list[Sample]) -> None:
        """Takes back what comes first again, filled up from what follows."""
        self.waiting = batch + self.waiting


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: of the device, the CPU's allocator or Python."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)
