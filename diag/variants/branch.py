"""MLP modules that broadcast the mean of their tokens: Context Broadcasting, by a swap of the class."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diag.variants.changes import Broadcast

MLP_NAMES = ("mlp", "ffn", "feed_forward")
"""What the MLP of a block is called beside its attention."""


class BroadcastingMlp(nn.Module):
    """What is mixed into the class of an MLP; the change lies under `change` in the module."""

    change: Broadcast

    def forward(self, x: Tensor, *args: Any, **settings: Any) -> Tensor:
        """As the library's, then broadcast."""
        return self.change(super().forward(x, *args, **settings))


_CLASSES: dict[type, type] = {}


def broadcasting_class(kind: type) -> type:
    """The subclass that an MLP's class is swapped for."""
    if kind not in _CLASSES:
        _CLASSES[kind] = type(
            f"Broadcasting{kind.__name__}", (BroadcastingMlp, kind), {"__module__": __name__}
        )
    return _CLASSES[kind]
