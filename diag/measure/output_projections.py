"""The output projections of heads, as what sinks do is read off them: made once per layer, if at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from diag.attention.call import AttentionCall
from diag.metrics.sink_events import roots_of
from diag.models.hooks.block_parts import Block, head_projections


class OutputProjections:
    """Layer by layer what W_O and layer scale make of values, where the block is understood.

    blocks: of the layers that are measured; others have no projection here.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = {block.index: block for block in blocks}
        self.roots: dict[int, Tensor] = {}

    def of(self, call: AttentionCall) -> Callable[[], Tensor] | None:
        """What gives the roots of a call's heads (`diag.metrics.sink_events.Roots`); None where unknown."""
        block = self.blocks.get(call.layer)
        if call.layer not in self.roots and (block is None or not _fits(block, call)):
            return None
        return lambda: self._roots_of(call)

    def _roots_of(self, call: AttentionCall) -> Tensor:
        if call.layer not in self.roots:
            weight = head_projections(self.blocks[call.layer], call.heads)
            assert weight is not None
            self.roots[call.layer] = roots_of(weight)
        return self.roots[call.layer]


def _fits(block: Block, call: AttentionCall) -> bool:
    """Whether a block's projection reads heads as wide as those of a call."""
    weight = head_projections(block, call.heads)
    return weight is not None and weight.shape[1] == call.value.shape[-1]
