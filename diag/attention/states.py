"""The residual stream around one block: what its branches added, and where that was seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from diag.attention.call import AttentionCall


@dataclass(frozen=True, eq=False)
class Updates:
    """What the block before has added: its attention update, and all of it."""

    attention: Float[Tensor, "batch token dim"]
    block: Float[Tensor, "batch token dim"]


@dataclass(frozen=True, eq=False)
class BlockStates:
    """The stream around one block in one forward pass, in the model's format.

    arrangement: "pre-norm" (x + Δ), "res-post-norm" (x + Δ, the norm being the last part of Δ), "post-norm"
        (norm(x + Δ)) or "parallel" (both updates read and are added to the same x).
    before: what the attention update is added to. middle: what the MLP update is added to, `before` itself
        in a parallel block. after: what the block returns. Updates are as they are added, after layer scale.
    call: the layer's attention call, where it made just one over the same tokens.
    to_stream: what W_O (with layer scale, without its bias) makes of `[batch, head, token, dim]`; None
        where the projection is not known, or a norm stands between it and the stream.
    real: False at padding; None if there is none.
    previous: updates of the block before, where it was seen and has the same shape.
    """

    layer: int
    path: str
    arrangement: str
    before: Float[Tensor, "batch token dim"]
    attention_update: Float[Tensor, "batch token dim"]
    middle: Float[Tensor, "batch token dim"]
    mlp_update: Float[Tensor, "batch token dim"]
    after: Float[Tensor, "batch token dim"]
    call: AttentionCall | None = None
    to_stream: Callable[[Tensor], Tensor] | None = None
    real: Bool[Tensor, "#batch token"] | None = None
    previous: Updates | None = None

    @property
    def batch(self) -> int:
        """Inputs."""
        return self.before.shape[0]

    @property
    def tokens(self) -> int:
        """Tokens of the stream."""
        return self.before.shape[1]
