"""The values of another input at the same places: of each input, those of the next one.

Inputs follow each other as the run lists them, and the first one follows the last, so that what an input is
compared with depends on nothing but the list: not on batches, shards or processes. Of a batch, all but the
last are compared with values of the same forward pass; the next of the last one has a pass of its own. An
input that cannot be read is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.errors import BadInputs, UnreadableInput
from diag.metrics.nulls import OtherInput
from diag.models.base import Batch, Sample, Tower


@dataclass(frozen=True, eq=False)
class Seen:
    """One call of a forward pass, as far as another one is compared with it.

    real: tokens that stand for something. sets: those of each token set among them.
    """

    value: Float[Tensor, "batch kv_head token value_dim"]
    real: Bool[Tensor, "batch token"]
    sets: Sequence[Bool[Tensor, "batch token"]]

    @staticmethod
    def of(call: AttentionCall, batch: Batch, masks: Sequence[Tensor]) -> Seen:
        """masks: the token sets, `[batch or 1, token]` each."""
        shape = (call.batch, call.tokens)
        seen, real = call.visibility.keys, torch.ones(shape, dtype=torch.bool, device=call.value.device)
        if seen is not None:
            real = real & seen
        if batch.real is not None and batch.real.shape == shape:
            real = real & batch.real.to(real.device)
        return Seen(call.value, real, [mask.expand(shape) & real for mask in masks])


class NextInputs:
    """Where the next input of each input of a batch is, and the values that were seen of it.

    places: by input, its place in the batch, or the calls of its own forward pass by layer, in their order;
        None where no other input can be read.
    """

    def __init__(self, batch: Batch, places: Sequence[int | dict[int, list[Seen]] | None]) -> None:
        self.batch, self.places = batch, places

    def of(self, call: AttentionCall, masks: Sequence[Tensor]) -> list[OtherInput | None]:
        """For each token set the values of the next inputs, aligned with the call's own tokens.

        An input whose next one has another number of tokens has no such values.
        """
        if not call.own_keys:
            return [None] * len(masks)
        own = Seen.of(call, self.batch, masks)
        inputs = len(self.batch.ids)
        windows = call.batch // inputs
        value = torch.zeros_like(call.value)
        there = [torch.zeros_like(own.real) for _ in masks]
        others = [
            place if place is None or isinstance(place, int) else _next(place, call.layer)
            for place in self.places
        ]
        for number, place in enumerate(others):
            other, first = (own, place * windows) if isinstance(place, int) else (place, 0)
            if other is None or (other is not own and len(other.value) != windows):
                continue
            for window in range(windows):
                row, of = number * windows + window, first + window
                _align(own, row, other, of, value, there)
        finite = value.isfinite().all(-1).all(1)
        return [OtherInput(value, one & finite) for one in there]


def next_inputs(
    tower: Tower,
    batch: Batch,
    samples: Sequence[Sample],
    order: Sequence[Sample],
    seen_in: Callable[[Batch], dict[int, list[Seen]]],
) -> NextInputs:
    """Finds the next input of each input of a batch, and runs those that are not in it.

    samples: the batch's. order: all inputs of the run. seen_in: runs the tower over a batch, and gives the
    calls of each layer. A batch that one sample holds is all there is: its rows follow each other, and the
    first one follows the last.
    """
    if len(samples) != len(batch.ids):
        count = len(batch.ids)
        return NextInputs(batch, [(number + 1) % count for number in range(count)])
    within = {sample.id: place for place, sample in enumerate(samples)}
    numbers = {sample.id: number for number, sample in enumerate(order)}
    found: list[int | dict[int, list[Seen]] | None] = []
    for sample in samples:
        start = numbers[sample.id]
        following = (order[(start + step) % len(order)] for step in range(1, len(order)))
        found.append(_first(tower, following, within, seen_in))
    return NextInputs(batch, found)


def _first(
    tower: Tower,
    following: Iterator[Sample],
    within: Mapping[str, int],
    seen_in: Callable[[Batch], dict[int, list[Seen]]],
) -> int | dict[int, list[Seen]] | None:
    """The first of the following inputs that can be read, and takes one row."""
    for sample in following:
        if sample.id in within:
            return within[sample.id]
        try:
            content = sample.read() if tower.prepare is None else tower.prepare(sample.read())
            batch = tower.encode([Sample.holding(sample.id, content)])
        except (UnreadableInput, BadInputs):
            continue
        return seen_in(batch) if len(batch.ids) == 1 else None
    return None


def _next(calls: dict[int, list[Seen]], layer: int) -> Seen | None:
    of_layer = calls.get(layer)
    return of_layer.pop(0) if of_layer else None


def _align(own: Seen, row: int, other: Seen, of: int, value: Tensor, there: Sequence[Tensor]) -> None:
    """Writes the values of one row of another pass to the places of the same tokens, if both have as many."""
    here, elsewhere = own.real[row].nonzero()[:, 0], other.real[of].nonzero()[:, 0]
    if len(here) != len(elsewhere):
        return
    value[row][:, here] = other.value[of][:, elsewhere].to(value)
    for mask, of_set in zip(there, other.sets, strict=True):
        mask[row, here] = of_set[of, elsewhere]
