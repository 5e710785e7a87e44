"""How layers call attention, by the size of what the model is given.

What fills windows up depends on how large an input is: an image of seven by seven patches fills a window, one
of five by five does not. What was found of one size is therefore held of another one only while every layer
has as many tokens as follow from the input; where it has others, inputs of that size are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

from torch import Tensor

from diag.errors import MeasurementError
from diag.models.base import Batch
from diag.models.hooks.content import OTHERWISE
from diag.models.hooks.layers import UNCLEAR, Form, Layer
from diag.models.hooks.meaning import Meaning, Understood

Shape = tuple[int, ...]


class _Given(NamedTuple):
    """One tensor that an input is of.

    shape: without the axis of inputs, where it has one. length: of a sequence its tokens, else all numbers.
    """

    shape: Shape
    length: Fraction
    is_sequence: bool


class BySize:
    """What is known of layers, by the size of inputs.

    found: of the inputs of a batch. tested: that batch. axis: along which inputs lie. tensors: takes the data
        of a batch and returns its tensors, by name or a single one.
    """

    def __init__(
        self,
        found: Sequence[Understood],
        tested: Batch,
        axis: int = 0,
        tensors: Callable[[Any], Any] = lambda data: data,
    ) -> None:
        self.found, self.axis, self.tensors = found, axis, tensors
        self.tested = self._sizes(tested)
        self.forms: dict[tuple, Mapping[str, Form]] = {_key(self.tested): {}}

    def sized(self, batch: Batch) -> Batch:
        """The batch, with how layers call attention in inputs of its size, or how many tokens they must have.

        These are such that a window cannot be filled up: more tokens, or fewer, are told by the seam.
        """
        sizes = self._sizes(batch)
        known = self.forms.get(_key(sizes))
        if known is None:
            known = {
                layer.name: replace(layer.form, total=self._total(one, layer, sizes, len(batch.ids)))
                for one in self.found
                for layer in one.layers
            }
        return replace(batch, forms=known)

    def keep(self, batch: Batch, found: Meaning) -> None:
        """Keeps what was found of inputs of the size of a batch.

        Raises MeasurementError where layers are others than in the first size, or rows not those of inputs.
        """
        sizes, inputs = self._sizes(batch), len(batch.ids)
        forms = {layer.name: layer.form for one in found.towers for layer in one.layers}
        for layer in (layer for one in self.found for layer in one.layers):
            form = forms.get(layer.name)
            if form is None or _apart(form) != _apart(layer.form) or (found.rows == OTHERWISE and inputs > 1):
                raise MeasurementError(
                    f"layer '{layer.name}' attends otherwise in inputs of another size: {_told(sizes)} here, "
                    f"{_told(self.tested)} in the first one",
                    "give inputs of one size, and those of another size in a run of their own",
                )
        self.forms[_key(sizes)] = forms

    def _sizes(self, batch: Batch) -> dict[str, _Given]:
        """Of each tensor that holds something; none where it is not known what a batch is."""
        data, inputs = self.tensors(batch.data), len(batch.ids)
        tensors: Iterable[tuple[Any, Any]] = data.items() if isinstance(data, Mapping) else [("", data)]
        return {
            str(name): _given(x, inputs, self.axis)
            for name, x in tensors
            if isinstance(x, Tensor) and x.numel()
        }

    def _total(self, of: Understood, layer: Layer, sizes: Mapping[str, _Given], inputs: int) -> int:
        """How many tokens a layer must have for a batch in which nothing is filled up."""
        total = of.totals.get(layer.name)
        padded = any(x is not None for x in layer.form.padding)
        each = None if total is None or padded else _follows(total, of.prefix, self.tested, sizes)
        return UNCLEAR if each is None else inputs * each


def _follows(total: int, prefix: int, before: Mapping[str, _Given], now: Mapping[str, _Given]) -> int | None:
    """How many tokens a layer has of an input, from the sizes of two; None where that is not clear.

    total: what it had of the first one. prefix: tokens of the first layer that are the same for all inputs.
    """
    if before.keys() != now.keys():
        return None
    options = list[tuple[Fraction, Fraction]]()
    for name, (shape, length, is_sequence) in before.items():
        other = now[name]
        if other.shape == shape:
            continue
        if other.is_sequence != is_sequence or (is_sequence and other.shape[1:] != shape[1:]):
            return None
        beside = total - length if is_sequence else Fraction(prefix)
        options.append((abs(beside), (total - beside) * other.length / length + beside))
    # of two sequences it is the one that is as long as the layer
    nearest = {each for beside, each in options if beside == min(options)[0]}
    each = nearest.pop() if len(nearest) == 1 else None
    return int(each) if each is not None and each.denominator == 1 else None


def _given(x: Tensor, inputs: int, axis: int) -> _Given:
    shape = tuple(x.shape)
    if x.ndim <= axis or shape[axis] != inputs:
        return _Given(shape, Fraction(x.numel(), inputs), False)
    shape = shape[:axis] + shape[axis + 1 :]
    is_sequence = 0 < len(shape) <= 2
    return _Given(shape, Fraction(shape[0] if is_sequence else math.prod(shape)), is_sequence)


def _key(sizes: Mapping[str, _Given]) -> tuple:
    return tuple((name, of.shape) for name, of in sizes.items())


def _told(sizes: Mapping[str, _Given]) -> str:
    return ", ".join(f"{name} {list(of.shape)}".strip() for name, of in sizes.items())


def _apart(form: Form) -> tuple:
    """What of a layer must be the same in all sizes, for its numbers to be of one thing."""
    return form.runs, form.adds_up, form.value_from, form.keys_of, form.in_turn, form.recurrence
