"""A model's own output gate, Y ⊙ σ(X W_θ) between attention and W_O: where it is, and how to change it.

What is changed are the gate's logits, where the model computes them, and the model's own code goes on with
them. A gate is known by the class of its attention module; others are refused by name, nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diag.errors import UserError
from diag.models.hooks.layers import Layer

IN_QUERIES = ("Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention")
"""transformers: the query projection gives queries and gate logits, side by side for each head."""

OF_ITS_OWN = {
    "AfmoeAttention": "gate_proj",
    "Attention": "gate",
    "AttentionRope": "gate",
    "EvaAttention": "gate",
}
"""transformers and timm: class of the attention module -> the projection that gives the gate's logits."""

ChangeOfLogits = Callable[[Tensor], Tensor]


@contextmanager
def gate_edits(layers: Sequence[Layer], change: ChangeOfLogits) -> Iterator[None]:
    """Under this, the logits of the layers' gates are replaced by `change(logits)` of the same shape.

    Raises UserError, naming the layer, where there is no gate.
    """
    with ExitStack() as stack:
        for layer in layers:
            projection, hook = _hook_of(layer, change)
            stack.callback(projection.register_forward_hook(hook).remove)
        yield


def check_gates(layers: Sequence[Layer]) -> None:
    """Raises UserError, naming the layer, for a layer without an output gate."""
    for layer in layers:
        _projection(layer)


def _projection(layer: Layer) -> nn.Linear:
    """The projection whose output holds the gate's logits."""
    kind = type(layer.module).__name__
    name = "q_proj" if kind in IN_QUERIES else OF_ITS_OWN.get(kind, "")
    found = layer.module._modules.get(name)
    if not isinstance(found, nn.Linear):
        raise UserError(
            f"layer '{layer.path}' ({kind}) has no output gate that is known",
            f"gates are known of {', '.join((*IN_QUERIES, 'AfmoeAttention'))} and of timm's gated attention",
        )
    return found


def _hook_of(layer: Layer, change: ChangeOfLogits) -> tuple[nn.Linear, Callable[..., Tensor]]:
    projection = _projection(layer)
    if type(layer.module).__name__ not in IN_QUERIES:
        return projection, lambda module, args, output: change(output)
    head_dim: Any = layer.module.head_dim

    def in_queries(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        query, logits = output.unflatten(-1, (-1, 2, head_dim)).unbind(-2)  # [batch, token, head, dim]
        return torch.stack((query, change(logits)), -2).flatten(-3)

    return projection, in_queries
