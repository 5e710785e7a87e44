"""Batches follow the memory: halved when it runs out, grown while there is some, and no number changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_towers import IMAGES, INPUTS, run, vision_tower

from diag.errors import UserError
from diag.measure import batch_size
from diag.measure.batch_size import Batches, BatchSize, is_out_of_memory
from diag.measure.loop import measure
from diag.models.base import Batch, Tower

ERRORS: dict[str, Callable[[], BaseException]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "allocator": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    "python": MemoryError,
}


def short_of_memory(most: int, error: Callable[[], BaseException], seen: list[int]) -> Tower:
    """A tower that does not fit more than `most` inputs, as it finds out in the middle of its forward."""
    tower = vision_tower()

    def forward(batch: Batch) -> object:
        seen.append(len(batch.ids))
        result = tower.forward(batch)
        if len(batch.ids) > most:
            raise error()
        return result

    return replace(tower, forward=forward)


@pytest.mark.parametrize("kind", ERRORS)
def test_what_does_not_fit_is_run_in_halves(kind: str) -> None:
    whole, seen = run(vision_tower(), IMAGES, batch_size=INPUTS), list[int]()
    tower = short_of_memory(1, ERRORS[kind], seen)
    with pytest.warns(RuntimeWarning, match=r"inputs at once do not fit into memory; going on with") as told:
        halved = run(tower, IMAGES, batch_size=INPUTS)
    assert [str(one.message).split()[-1] for one in told] == ["2", "1"]
    assert seen == [5, 2, 1, 1, 1, 1, 1]
    np.testing.assert_allclose(halved, whole, rtol=2e-6, atol=1e-6)


def test_one_input_that_does_not_fit_is_an_error() -> None:
    tower = short_of_memory(0, ERRORS["allocator"], [])
    with pytest.raises(UserError, match="a single input does not fit into memory: DefaultCPUAlloc") as error:
        list(measure(tower, IMAGES, batch_size=1))
    assert "--seq-len" in error.value.tip


def test_other_errors_pass() -> None:
    tower = short_of_memory(0, lambda: RuntimeError("shapes do not match"), [])
    with pytest.raises(UserError, match="fails on its own input: shapes do not match"):
        list(measure(tower, IMAGES))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_size_lives_as_long_as_the_run() -> None:
    size, seen = BatchSize(4), list[int]()
    tower = short_of_memory(2, ERRORS["python"], seen)
    with pytest.warns(RuntimeWarning):
        halved = list(measure(tower, IMAGES, batch_size=size))
    again = list(measure(tower, IMAGES, batch_size=size))
    assert seen == [4, 2, 2, 1, 2, 2, 1]
    assert [[block.first_input for block in batch] for batch in halved] == [[0] * 3, [2] * 3, [4] * 3]
    assert [batch[0].first_input for batch in again] == [0, 2, 4]


def test_batches_grow_while_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each input takes 10; twice the batch has to stay below .8 of what is left."""
    size = BatchSize.of(0, torch.nn.Module())
    held = [0]
    monkeypatch.setattr(batch_size, "restart_peak", lambda device: 100)
    monkeypatch.setattr(batch_size, "peak", lambda device: 100 + 10 * held[0])
    monkeypatch.setattr(batch_size, "available", lambda device: 110)
    given = []
    for chunk in Batches(range(20), size, most=None):
        before, held[0] = size.begin(), len(chunk)
        given.append(len(chunk))
        size.grow(len(chunk), before)
    assert given == [1, 2, 4, 8, 5]  # 16 would take 160
    again = Batches(range(7), BatchSize(8), most=3)
    assert [len(chunk) for chunk in again] == [3, 3, 1]


def test_an_automatic_size_changes_no_number() -> None:
    fixed = run(vision_tower(), IMAGES, batch_size=2)
    size = BatchSize.of(0, torch.nn.Module())
    found = list(measure(vision_tower(), IMAGES, batch_size=size))
    assert [len(batch[0].ids) for batch in found] == [1, 2, 2]
    grown = np.concatenate([np.stack([block.values for block in batch]) for batch in found], 3)
    np.testing.assert_allclose(grown, fixed, rtol=2e-6, atol=1e-6)
