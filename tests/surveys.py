"""The tests of meaning on a module and its arguments; the first input is replaced for the second pass.

Of two inputs they are run with the shorter pass that may stand for the second one, and without: what is found
must be the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diag.models.families.from_module import another
from diag.models.hooks.content import OTHERWISE
from diag.models.hooks.layers import Layer
from diag.models.hooks.meaning import Meaning, meaning_of
from diag.models.hooks.other_inputs import are_ids


def meaning_on(
    module: nn.Module, *arguments: Any, inputs: int = 2, real: Tensor | None = None, **named: Any
) -> Meaning:
    def replaced(x: Any) -> Any:
        alike = isinstance(x, Tensor) and x.ndim and len(x) == inputs
        return torch.cat([another(x[:1], 2), x[1:]]) if alike else x

    def second(x: Any) -> Any:
        return x[1:] if isinstance(x, Tensor) and x.ndim and len(x) == 2 else x

    def third(x: Any) -> Any:
        return another(x[:1], 2) if isinstance(x, Tensor) and x.ndim and len(x) == 2 else x

    first = (arguments, named)
    last = ([second(x) for x in arguments], {name: second(x) for name, x in named.items()})
    instead = ([third(x) for x in arguments], {name: third(x) for name, x in named.items()})
    other = ([replaced(x) for x in arguments], {name: replaced(x) for name, x in named.items()})
    everywhere = not any(isinstance(x, Tensor) and are_ids(x) for x in (*arguments, *named.values()))

    def found(last: Any) -> Meaning:
        return meaning_of(
            module,
            lambda given: module(*given[0], **given[1]),
            first,
            other,
            inputs=inputs,
            everywhere=everywhere,
            real=real,
            last=last,
            instead=None if last is None else instead,
        )

    both = found(None)
    if inputs == 2:
        shorter = found(last)
        if both.rows != OTHERWISE:
            assert summary(shorter) == summary(both)
        # where rows are laid out otherwise, tokens are told of inputs that run alone
        assert summary(shorter)[:4] == summary(both)[:4]
        return shorter if both.rows == OTHERWISE else both
    return both


def summary(found: Meaning) -> list[Any]:
    """All that was found, to be compared."""
    towers = [
        (one.name, one.places, one.skipped, one.joined, one.side_by_side, one.hides_padding, one.alone)
        for one in found.towers
    ]
    layers = [
        (layer.index, layer.name, vars(replace(layer.form, padding=())), padding_of(layer))
        for one in found.towers
        for layer in one.layers
    ]
    return [found.rows, found.random, found.sequence_first, found.untested, towers, layers]


def padding_of(layer: Layer) -> list[Any]:
    """Which tokens of a layer's calls are padding."""
    return [None if x is None else x.tolist() for x in layer.form.padding]


def layers_on(module: nn.Module, *arguments: Any, **named: Any) -> list[Layer]:
    """The layers of a module with one tower."""
    (tower,) = meaning_on(module, *arguments, **named).towers
    return list(tower.layers)
