"""Layers as people name them: numbers of the model, from either end, and what is said of others."""

from __future__ import annotations

import pytest
from torch import nn

from diag.errors import UserError
from diag.models.hooks.depth import Place
from diag.models.hooks.layers import Layer
from diag.models.layer_numbers import numbered, own_numbers

LINEAR = "no softmax attention (GatedDeltaNet)"
HYBRID = tuple(Layer(index, f"layers.{index}.attn", nn.Identity()) for index in (3, 7))
PLACES = tuple(
    Place(index, f"layers.{index}" + ".attn" * (index in (3, 7)), 0, None if index in (3, 7) else LINEAR)
    for index in range(9)
)
PLAIN = tuple(Layer(index, f"blocks.{index}.attn", nn.Identity()) for index in range(4))


def test_numbers_are_the_models_own_from_either_end() -> None:
    assert own_numbers([7, 3, -2], HYBRID, PLACES) == [3, 7]
    assert own_numbers([-6], HYBRID, PLACES) == [3]
    assert own_numbers([-1, 0], PLAIN) == [0, 3]
    assert [layer.index for layer in numbered(HYBRID, None, PLACES)] == [3, 7]
    assert numbered(PLAIN, [-1, 3]) == [PLAIN[3]]


@pytest.mark.parametrize(
    ("number", "layers", "places", "message", "tip"),
    [
        (4, HYBRID, PLACES, f"layer 4 ('layers.4') is not measured: {LINEAR}", "that are measured: 3, 7"),
        # the last layer of the model, not the last that is measured
        (-1, HYBRID, PLACES, f"layer -1 is layer 8 ('layers.8'), which is not measured: {LINEAR}", "3, 7"),
        (9, HYBRID, PLACES, "no layer 9", "layers are 0 to 8, or -1 to -9 from the last"),
        (-10, HYBRID, PLACES, "no layer -10", "layers are 0 to 8, or -1 to -9 from the last"),
        (4, HYBRID, (), "no layer 4", "layers are 3, 7, or -1 to -8 from the last"),
        (4, PLAIN, (), "no layer 4", "layers are 0 to 3, or -1 to -4 from the last"),
        (0, (), (), "the model has no attention layer", "attnbias measures transformers"),
    ],
)
def test_other_numbers_are_refused_by_name(
    number: int, layers: tuple[Layer, ...], places: tuple[Place, ...], message: str, tip: str
) -> None:
    with pytest.raises(UserError) as told:
        own_numbers([number], layers, places)
    assert str(told.value) == message
    assert told.value.tip is not None
    assert told.value.tip.endswith(tip)
