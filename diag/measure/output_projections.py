"""The output projections of heads, as what sinks do is read off them: made once per layer, if at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diag.attention.call import AttentionCall
from diag.metrics.sink_events import roots_of
from diag.models.hooks.block_parts import Block, head_projections


class OutputProjections:
    """Layer by layer what W_O and layer scale make of values, where the block is understood.

    blocks: of the layers that are measured; others have no projection here.
    Which of them read what heads return, and nothing else, is seen in a first pass (`watched`, `read`).
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = {block.index: block for block in blocks}
        self.roots: dict[int, Tensor] = {}
        self.returned: dict[int, Tensor] = {}
        self.read = set[int]()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Under this, it is seen which projections read, as it is, what `saw` was given last."""
        with ExitStack() as hooks:
            for block in self.blocks.values():
                if block.output_projection is not None:
                    hook = partial(self._reads, block.index)
                    hooks.callback(block.output_projection.register_forward_pre_hook(hook).remove)
            yield
        self.returned.clear()

    def saw(self, layer: int, output: Float[Tensor, "batch head token dim"]) -> None:
        """What the heads of a layer return, as the model goes on with it."""
        self.returned[layer] = output

    def _reads(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        output, read = self.returned.pop(layer, None), args[0] if args else None
        if output is not None and isinstance(read, Tensor) and read.numel() == output.numel():
            same = torch.equal(read.reshape(-1), output.transpose(1, 2).reshape(-1))
            self.read |= {layer} if same else set()

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
