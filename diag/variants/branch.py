"""MLP modules that broadcast the mean of their tokens: Context Broadcasting, by a swap of the class."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diag.errors import UserError
from diag.variants.attention import mixed
from diag.variants.formulas import Broadcast

MLP_NAMES = ("mlp", "ffn", "feed_forward")
"""What the MLP of a block is called beside its attention."""


class BroadcastingMlp(nn.Module):
    """What is mixed into the class of an MLP; the change lies under `change` in the module."""

    change: Broadcast

    def forward(self, x: Tensor, *args: Any, **settings: Any) -> Tensor:
        """As the library's, then broadcast."""
        return self.change(super().forward(x, *args, **settings))


def mlp_beside(model: nn.Module, attention: str) -> str:
    """Path of the MLP in the block of an attention module. Raises UserError where there is none."""
    block = attention.rpartition(".")[0]
    for name in MLP_NAMES:
        if isinstance(getattr(model.get_submodule(block), name, None), nn.Module):
            return f"{block}.{name}"
    raise UserError(
        f"block '{block}' has no module called {', '.join(MLP_NAMES)}", "cb and cb_s are put at the MLP's end"
    )


def swap(model: nn.Module, path: str, *, scaled: bool) -> None:
    """Makes the MLP at a path one that broadcasts; scaled: with a learned λ per channel."""
    module: Any = model.get_submodule(path)
    parameter = list(module.parameters())[-1]  # the output's bias, or its weight
    config = getattr(model, "config", None)
    channels = parameter.shape[0] if config is None else config.hidden_size
    # transformers' attention says whether it is causal; a vision tower's has nothing to say
    beside = model.get_submodule(path.rpartition(".")[0]).children()
    causal = any(getattr(child, "is_causal", False) for child in beside)
    module.change = Broadcast(scaled, channels, causal).to(parameter.device)
    module.__class__ = mixed(BroadcastingMlp, type(module), "Broadcasting")
