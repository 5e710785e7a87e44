"""Cross-attention as a tower of its own: the layers of a decoder whose keys are an encoder's tokens.

The tests of meaning leave such layers out, because no token has a value v_i there. Whoever asks for them gets
a tower `cross` beside the others: it runs the same model, its rows are the decoder's tokens, and its layers
have the numbers of the blocks that they stand in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

from torch import Tensor, nn

from diag.errors import UserError
from diag.models.base import Batch, Sample, Tower
from diag.models.hooks.depth import CROSS as REASON
from diag.models.hooks.depth import Place
from diag.models.hooks.layers import Form, Layer
from diag.models.hooks.meaning import BESIDE_OWN, EAGER_ELSEWHERE

CROSS = "cross"
"""The tower's name, and what stands in its verdict (`Tower.meaning`)."""
REAL_ROWS = "decoder_attention_mask"
"""What says, of all that a model is given, which of a decoder's tokens are no padding."""


def with_cross(towers: Sequence[Tower], root: nn.Module) -> tuple[Tower, ...]:
    """The towers, and behind each that attends to another stack's tokens as well the tower of those layers.

    What such a tower holds no longer stands among what is not measured.
    Raises UserError where no tower has any.
    """
    found = [(tower, cross_layers(tower, root)) for tower in towers]
    several = sum(bool(layers) for _, layers in found) > 1
    made = list[Tower]()
    for tower, layers in found:
        paths = {layer.path for layer in layers}
        left = {path: why for path, why in tower.skipped.items() if path not in paths}
        made.append(replace(tower, skipped=left))
        if layers:
            made.append(_tower(tower, layers, f"{tower.name} {CROSS}" if several else CROSS))
    if len(made) == len(found):
        raise UserError(
            f"{type(root).__name__} has no cross-attention that is seen beside its self-attention",
            "give an encoder–decoder model and batches for both of its parts, or leave cross=True out",
        )
    return tuple(made)


def cross_layers(tower: Tower, root: nn.Module) -> tuple[Layer, ...]:
    """What a tower leaves out as cross-attention and stands in one of its blocks, with the block's number.

    A pooling head has other keys than queries, too, and stands in no block.
    """
    found = list[Layer]()
    for path, why in tower.skipped.items():
        if REASON not in why or why in (BESIDE_OWN, EAGER_ELSEWHERE):
            continue
        place = _block_of(path, tower.places)
        if place is not None:
            form = Form(keys_of="others", value_from="others")
            found.append(Layer(place.index, path, root.get_submodule(path), form=form))
    return tuple(sorted(found, key=lambda layer: layer.index))


def _block_of(path: str, places: Sequence[Place]) -> Place | None:
    """The place of the block that a module stands in: they share all up to a number, and more than others."""

    def shared(place: Place) -> list[str]:
        pairs = zip(path.split("."), place.path.split("."), strict=False)
        return [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]

    numbered = [place for place in places if any(part.isdigit() for part in shared(place))]
    return max(numbered, key=lambda place: len(shared(place)), default=None)


def _tower(decoder: Tower, layers: tuple[Layer, ...], name: str) -> Tower:
    def encode(samples: Sequence[Sample]) -> Batch:
        batch = decoder.encode(samples)
        mask = batch.data.get(REAL_ROWS) if isinstance(batch.data, dict) else None
        return replace(batch, real=mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None)

    return replace(
        decoder,
        name=name,
        layers=layers,
        encode=encode,
        places=tuple(Place(layer.index, layer.path) for layer in layers),
        skipped={},
        meaning={**decoder.meaning, CROSS: True},
    )
