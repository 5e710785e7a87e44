"""The null across inputs: each input's next one, whatever the batches and shards, and by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from reference import cosine, float64
from tiny_towers import IMAGES, Attention, InBatch, InTurn, run, samples_of, table, text_tower, vision_tower
from torch import Tensor

from diag.errors import UnreadableInput
from diag.measure.batch_readings import Incidents
from diag.measure.loop import capture, measure
from diag.metrics.nulls import NULL_METRICS
from diag.models.base import Batch, Sample, Tower

NAMES = list(NULL_METRICS)
NULL = "cos_y_vother_input"
TEXTS = samples_of(9, 9, 14, 9, 11)
TOWERS: dict[str, tuple[Callable[[], Tower], list[Sample]]] = {
    "vision": (vision_tower, IMAGES),
    "texts of several lengths": (text_tower, TEXTS),
    "windows in the batch": (lambda: vision_tower(Attention(), InBatch(), prefix=()), IMAGES),
    "windows in turn": (lambda: vision_tower(InTurn(), Attention(), prefix=()), IMAGES),
}


def by_hand(tower: Tower, samples: Sequence[Sample], token_set: str) -> np.ndarray:
    """cos(y_i, v_i of the next input) from a forward pass of each input alone, `[layer, input, head]`."""
    alone = [capture(tower, tower.encode([sample])) for sample in samples]
    found = np.full((len(tower.layers), len(samples), 4), np.nan)
    for number, calls in enumerate(alone):
        following = alone[(number + 1) % len(alone)]
        for layer in range(len(tower.layers)):
            numbers: list[list[float]] = [[], [], [], []]
            ours, theirs = ([call for call in some if call.layer == layer] for some in (calls, following))
            for own, other in zip(ours, theirs, strict=True):
                if own.output.shape != other.output.shape:
                    continue
                inside = tower.tokens_in(token_set, own.tokens, own.batch)
                first = 1 if own.visibility.rule == "causal" else 0
                for row, head, i in np.ndindex(*own.output.shape[:3]):
                    if inside.expand(own.batch, -1)[row, i] and i >= first:
                        value = float64(other.value)[row, head // own.group, i]
                        numbers[head].append(cosine(float64(own.output)[row, head, i], value))
            found[layer, number] = [np.mean(some) if some else np.nan for some in numbers]
    return found


@pytest.mark.parametrize("name", TOWERS)
def test_each_input_is_compared_with_the_next_one(name: str) -> None:
    build, samples = TOWERS[name]
    tower = build()
    sets = tower.token_sets[:2]
    found = run(tower, samples, metrics=[NULL], token_sets=sets, batch_size=len(samples))
    for place, token_set in enumerate(sets):
        np.testing.assert_allclose(found[:, place, 0], by_hand(tower, samples, token_set), atol=2e-6)
    lost = np.isnan(found).all((0, 1, 2, 4))  # those whose next input is of another length
    assert lost.tolist() == ([False, True, True, True, True] if name.startswith("texts") else [False] * 5)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_neither_batches_nor_shards_change_a_null(name: str, batch_size: int) -> None:
    build, samples = TOWERS[name]
    tower = build()
    together = run(tower, samples, metrics=NAMES, batch_size=len(samples))
    shards = [samples[:2], samples[2:]]
    streamed = [
        batch
        for shard in shards
        for batch in measure(tower, iter(shard), metrics=NAMES, batch_size=batch_size, order=samples)
    ]
    np.testing.assert_allclose(table(streamed), together, rtol=2e-6, atol=1e-6)
    alone = [batch for shard in shards for batch in measure(tower, shard, metrics=NAMES)]
    # the control: other partners give other numbers, or have none
    assert not np.allclose(table(alone), together, atol=1e-3, equal_nan=True)


def test_of_a_batch_only_the_last_next_input_has_a_pass_of_its_own() -> None:
    passes: list[int] = []
    tower = vision_tower()

    def forward(batch: Batch) -> object:
        passes.append(len(batch.ids))
        return tower.forward(batch)

    counted = replace(tower, forward=forward)
    run(counted, IMAGES, metrics=NAMES, batch_size=2)
    assert passes == [1, 2, 1, 2, 1, 1]  # the next input first, then the batch
    passes.clear()
    run(counted, IMAGES, metrics=["cos_y_vnear", "excess_across_groups"], batch_size=2)
    assert passes == [2, 2, 1]


def unreadable() -> Tensor:
    raise UnreadableInput("no image", "give one")


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_an_input_that_cannot_be_read_is_passed_over(batch_size: int) -> None:
    tower = vision_tower()
    broken = [*IMAGES[:2], Sample("broken", unreadable), *IMAGES[2:]]
    incidents = Incidents()
    found = run(tower, broken, metrics=[NULL], batch_size=batch_size, incidents=incidents)
    assert list(incidents.failed) == ["broken"]
    np.testing.assert_allclose(found, run(tower, IMAGES, metrics=[NULL]), atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_an_input_that_is_not_finite_is_no_other_inputs_fault(batch_size: int) -> None:
    """It is listed itself; the input before it has nothing to be compared with."""
    bad = Sample("bad", partial(torch.full, (12, 16), torch.inf))
    incidents = Incidents()
    given = [*IMAGES[:2], bad, *IMAGES[2:]]
    found = run(vision_tower(), given, metrics=[NULL], batch_size=batch_size, incidents=incidents)
    assert list(incidents.failed) == ["bad"]
    assert np.isnan(found).all((0, 1, 2, 4)).tolist() == [False, True, False, False, False]


def test_one_input_has_no_other() -> None:
    found = run(vision_tower(), IMAGES[:1], metrics=[NULL, "cos_y_vother_group"])
    assert np.isnan(found[:, :, 0]).all()
    assert np.isfinite(found[:, :, 1]).all()  # the control


def test_the_rows_of_a_ready_batch_follow_each_other() -> None:
    """A module is given batches as they are: the next of a row is the row behind it; the first follows."""
    tower = vision_tower()
    together = run(tower, IMAGES, metrics=[NULL], batch_size=5)
    data = torch.stack([sample.read() for sample in IMAGES])
    batch = Batch(tuple(sample.id for sample in IMAGES), (data, None))
    held = replace(tower, encode=lambda samples: samples[0].read(), max_batch=1)
    ready = run(held, [Sample.holding("batch", batch)], metrics=[NULL], batch_size=1)
    np.testing.assert_allclose(ready, together, atol=1e-6)
