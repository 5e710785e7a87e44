"""The tests of meaning on a module and its arguments; the first input is replaced for the second pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diag.models.families.from_module import another
from diag.models.hooks.layers import Layer
from diag.models.hooks.meaning import Meaning, meaning_of
from diag.models.hooks.survey import are_ids


def meaning_on(
    module: nn.Module, *arguments: Any, inputs: int = 2, real: Tensor | None = None, **named: Any
) -> Meaning:
    def replaced(x: Any) -> Any:
        alike = isinstance(x, Tensor) and x.ndim and len(x) == inputs
        return torch.cat([another(x[:1], 2), x[1:]]) if alike else x

    first = (arguments, named)
    other = ([replaced(x) for x in arguments], {name: replaced(x) for name, x in named.items()})
    everywhere = not any(isinstance(x, Tensor) and are_ids(x) for x in (*arguments, *named.values()))
    return meaning_of(
        module,
        lambda given: module(*given[0], **given[1]),
        first,
        other,
        inputs=inputs,
        everywhere=everywhere,
        real=real,
    )


def layers_on(module: nn.Module, *arguments: Any, **named: Any) -> list[Layer]:
    """The layers of a module with one tower."""
    (tower,) = meaning_on(module, *arguments, **named).towers
    return list(tower.layers)
