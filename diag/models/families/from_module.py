"""A user's own `nn.Module` with ready batches: no name, no preprocessing, no tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diag.errors import UserError
from diag.models.base import Batch, Model, Sample, Tower, device_of_module
from diag.models.hooks.seam import discover
from diag.models.weights import digest

TOWER = "module"


def from_module(
    module: nn.Module, batches: Iterable[Tensor | Mapping[str, Tensor]], limit: int | None = None
) -> tuple[Model, Tower, list[Sample]]:
    """A model with one tower, that tower, and one sample for each ready batch.

    batches: a tensor, given to the module as its only argument, or a dict of tensors, given by
        name; every row is one input. A two-dimensional `attention_mask` in a dict says which
        tokens are real.
    limit: the most inputs (rows) that are used.
    The attention layers are those that the first batch runs through. The module keeps its mode and
    its device; batches are moved to the device.

    Raises UserError if there is no batch, if a batch is neither, or if the module makes no
    attention call that can be seen.
    """
    ready = list(_ready(batches, limit))
    if not ready:
        raise UserError("no batch was given", "pass an iterable of tensors, or of dicts of tensors")
    device = device_of_module(module)

    def forward(batch: Batch) -> Any:
        return module(**batch.data) if isinstance(batch.data, Mapping) else module(batch.data)

    def run() -> None:
        with torch.inference_mode():
            forward(_on_device(ready[0], device))

    def encode(group: Sequence[Sample]) -> Batch:
        (sample,) = group
        return _on_device(sample.read(), device)

    samples = [
        Sample(f"batch-{number:05d}", lambda batch=batch: batch)  # type: ignore[misc]
        for number, batch in enumerate(ready)
    ]

    name = type(module).__name__
    tower = Tower(
        TOWER, discover(module, run), lambda inputs, seq_len: iter(samples), encode, forward, max_batch=1
    )
    facts = {"weights_sha256": digest(module)}
    return Model(name, "module", f"module:{name}", module, {TOWER: tower}, facts=facts), tower, samples


def _ready(batches: Iterable[Tensor | Mapping[str, Tensor]], limit: int | None) -> Iterator[Batch]:
    """The batches where they lie, with inputs numbered from one to the next."""
    first = 0
    for data in batches:
        left = None if limit is None else limit - first
        if left is not None and left <= 0:
            return
        cut = _first_rows(data, left)
        rows = len(cut if isinstance(cut, Tensor) else next(iter(cut.values())))
        yield Batch(tuple(f"{first + row:06d}" for row in range(rows)), cut)
        first += rows


def _first_rows(data: Tensor | Mapping[str, Tensor], most: int | None) -> Tensor | dict[str, Tensor]:
    if isinstance(data, Tensor) and data.ndim:
        return data[:most]
    if isinstance(data, Mapping) and data and all(isinstance(value, Tensor) for value in data.values()):
        lengths = {key: len(value) for key, value in data.items()}
        if len(set(lengths.values())) != 1:
            raise UserError(
                f"tensors of one batch differ in rows: {lengths}", "give every tensor one row per input"
            )
        return {key: value[:most] for key, value in data.items()}
    raise UserError(
        f"a batch is a {type(data).__name__}",
        "a batch is a tensor, or a dict of tensors, with one input per row",
    )


def _on_device(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch.data, Tensor):
        return replace(batch, data=batch.data.to(device))
    moved = {key: value.to(device) for key, value in batch.data.items()}
    mask = moved.get("attention_mask")
    return replace(batch, data=moved, real=mask.bool() if mask is not None and mask.ndim == 2 else None)
