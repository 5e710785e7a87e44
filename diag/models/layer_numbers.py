"""Layers as people name them: the model's own numbers, counted from 0, or with -1 for its last layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from diag.errors import UserError, spans
from diag.models.hooks.depth import Place
from diag.models.hooks.layers import Layer


def own_numbers(
    named: Iterable[int],
    layers: Sequence[Layer],
    places: Sequence[Place] = (),
    *,
    before: str = "",
    missing: str = "no layer {}",
) -> list[int]:
    """What the named numbers are on the depth axis of a tower, each once, in order.

    named: -1 is the last of the model, also where that layer is not measured. places: all of the axis, with
        why one is not measured; the layers alone where nothing else is known of it.
    before, missing: how the error begins, and what it says of a number that is not there.
    Raises UserError for a number beyond the axis, with the range, and for one that is not measured, with
    its layer and the reason.
    """
    measured = {layer.index for layer in layers}
    if not measured:
        raise UserError("the model has no attention layer", "attnbias measures transformers")
    depth = max(len(places), max(measured) + 1)
    others = {place.index: place for place in places if place.why is not None}
    found = set[int]()
    for number in named:
        own = number + depth if number < 0 else number
        if own in others:
            which = f"layer {number} is layer {own}" if number < 0 else f"layer {own}"
            is_not = "which is not" if number < 0 else "is not"
            place = others[own]
            raise UserError(
                f"{before}{which} ('{place.path}'){',' * (number < 0)} {is_not} measured: {place.why}",
                f"layers that are measured: {spans(measured)}",
            )
        if own not in measured:
            known = f"0 to {depth - 1}" if places or len(measured) == depth else spans(measured)
            raise UserError(
                before + missing.format(number), f"layers are {known}, or -1 to -{depth} from the last"
            )
        found.add(own)
    return sorted(found)


def numbered(
    layers: Sequence[Layer], named: Iterable[int] | None, places: Sequence[Place] = ()
) -> list[Layer]:
    """The layers with these numbers, in depth order; all if None. Raises UserError as `own_numbers` does."""
    known = {layer.index: layer for layer in layers}
    return [known[number] for number in own_numbers(known if named is None else named, layers, places)]
