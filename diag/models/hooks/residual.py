"""The residual stream around blocks as a model runs, and changes of what a branch adds to it.

`stream_states` hands the stream before, between and after the two updates of each block to a function;
`branch_edits` changes an update before it is added. `check_states` is the gate: the updates must rebuild
what the block returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils.hooks import RemovableHandle

from diag.attention.states import BlockStates
from diag.errors import MeasurementError, UserError
from diag.models.hooks.block_parts import PARALLEL, Block, to_stream

VISIBLE = BaseTorchFunctionMode
"""Any mode that is on keeps `nn.TransformerEncoder` off its fused path, which runs no hook and nests padded
batches."""

WORDS = {
    "attention_update": "attention branch",
    "middle": "stream between its branches",
    "mlp_update": "MLP branch",
}


@contextmanager
def stream_states(blocks: Sequence[Block], on_block: Callable[[BlockStates], None]) -> Iterator[None]:
    """Under this, the stream around each block is handed to `on_block` when the block has finished.

    Tensors are those that the model used, as `[batch, token, dim]`: a packed sequence is one input, a grid is
    flattened. The states of one block are held at a time.

    Raises MeasurementError, naming the layer, if a block or one of its branches never ran.
    """
    watches = [_Watch(block, on_block) for block in blocks]
    with VISIBLE(), ExitStack() as hooks:
        for watch in watches:
            for handle in watch.attached():
                hooks.callback(handle.remove)
        yield
    for watch in watches:
        if not watch.runs:
            raise MeasurementError(
                f"the block of layer '{watch.block.path}' was never run: something bypassed it",
                "leave it out with --layers if that is meant",
            )


BranchEdit = Callable[[Tensor, Tensor | None], Tensor]
"""`(update [batch, token, dim], real [batch, token] or None) → update` of the same shape."""


@contextmanager
def branch_edits(
    blocks: Sequence[Block],
    edits: Mapping[int, BranchEdit],
    which: Literal["attention", "mlp"],
    real: Tensor | None = None,
) -> Iterator[None]:
    """Under this, the update of a branch is replaced before it is added to the stream.

    edits: by layer index. real: False at padding, for the batches that run inside; None if there is none.
    Raises UserError for a layer that has no block here.
    """
    known = {block.index: block for block in blocks}
    for index in edits:
        if index not in known:
            raise UserError(f"no block for layer {index}", f"layers are {', '.join(map(str, known))}")
    with VISIBLE(), ExitStack() as hooks:
        for index, edit in edits.items():
            block, shaped = known[index], _Shaped(known[index])
            branch = block.attention_branch if which == "attention" else block.mlp_branch
            hooks.callback(block.module.register_forward_pre_hook(shaped.entered, with_kwargs=True).remove)
            # before any hook that watches, so that what is seen is what is added
            change = partial(_changed, shaped, edit, real)
            hooks.callback(branch.register_forward_hook(change, prepend=True).remove)
        yield


def rebuild_error(block: Block, states: BlockStates) -> float:
    """Largest relative error of the stream between and after the adds, rebuilt from the updates."""
    first, second = states.attention_update, states.mlp_update
    if block.arrangement == PARALLEL:
        middle, after = states.before, states.before + first + second
    else:
        middle, after = states.before + first, states.middle + second
    if block.norms:
        # forward, not the call: a hook on a norm sees only what the model does
        middle, after = block.norms[0].forward(middle), block.norms[1].forward(after)
    return max(relative_error(middle, states.middle), relative_error(after, states.after))


def projection_error(block: Block, states: BlockStates) -> float:
    """Relative error of the attention update rebuilt from the heads' outputs; infinite where it cannot be."""
    project, call = to_stream(block), states.call
    if project is None or call is None or (call.batch, call.tokens) != (states.batch, states.tokens):
        return float("inf")
    rebuilt = project(call.output)
    bias = getattr(block.output_projection, "bias", None)
    if bias is not None:
        rebuilt = rebuilt + bias.float() * (1.0 if block.scale is None else block.scale.float())
    return relative_error(rebuilt, states.attention_update)


def check_states(block: Block, states: BlockStates) -> None:
    """Raises MeasurementError if a block is not what its names say, UserError for NaN or infinity."""
    if not states.after.isfinite().all():
        raise UserError(
            f"the block of layer '{block.path}' gives values that are not finite",
            "the weights or activations hold NaN or infinity; try --dtype float32",
        )
    error, allowed = rebuild_error(block, states), tolerance(states.after.dtype)
    if not error < allowed:
        raise MeasurementError(
            f"the block of layer '{block.path}' ({type(block.module).__name__}), read as {block.arrangement},"
            f" does not add up (relative error {error:.1e}, allowed {allowed:.0e})",
            "leave the stream metrics out, and please report the model",
        )


def tolerance(dtype: torch.dtype) -> float:
    """Relative error that a rebuilt tensor of a format may have."""
    return 1e-5 if dtype in (torch.float32, torch.float64) else 1e-2


def relative_error(rebuilt: Tensor, used: Tensor) -> float:
    """How far a rebuilt tensor is from the one that was used, beside the norm of that."""
    rebuilt, used = rebuilt.float(), used.float()
    return ((rebuilt - used).norm() / used.norm().clamp(min=torch.finfo(torch.float32).tiny)).item()


# --- hooks


class _Shaped:
    """Tensors of one run of a block as `[batch, token, dim]`, whatever shape the block gives them."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.shape: torch.Size | None = None

    def entered(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.shape = _tensor_in((*args, *kwargs.values())).shape

    def standard(self, x: Tensor) -> Tensor:
        assert self.shape is not None
        if x.numel() != self.shape.numel() or len(self.shape) not in (2, 3, 4):
            raise self.wrong(x)
        # OPT flattens tokens for its MLP, Swin the grid
        x = x.reshape(self.shape)
        if x.ndim == 2:
            return x[None]
        if x.ndim == 4:
            width = getattr(self.block.output_projection, "out_features", x.shape[-1])
            if x.shape[-1] != width:
                raise self.wrong(x)
            return x.flatten(1, 2)
        return x if self.block.batch_first else x.transpose(0, 1)

    def back(self, x: Tensor, like: Tensor) -> Tensor:
        assert self.shape is not None
        if len(self.shape) == 3 and not self.block.batch_first:
            x = x.transpose(0, 1)
        return x.reshape(like.shape)

    def wrong(self, x: Tensor) -> MeasurementError:
        return MeasurementError(
            f"the block of layer '{self.block.path}' turns {tuple(self.shape or ())} into {tuple(x.shape)}: "
            "its stream is not understood",
            "leave it out with --layers, or leave the stream metrics out",
        )


class _Watch(_Shaped):
    """One block of which the states are being collected."""

    def __init__(self, block: Block, on_block: Callable[[BlockStates], None]) -> None:
        super().__init__(block)
        self.on_block = on_block
        self.runs = 0
        self.seen: dict[str, Tensor] = {}

    def attached(self) -> Iterator[RemovableHandle]:
        block = self.block
        yield block.module.register_forward_pre_hook(self.entered, with_kwargs=True)
        yield block.attention_branch.register_forward_hook(partial(self.after, "attention_update"))
        yield block.mlp_branch.register_forward_hook(partial(self.after, "mlp_update"))
        if block.mlp_input is not None:
            yield block.mlp_input.register_forward_pre_hook(self.between, with_kwargs=True)
        yield block.module.register_forward_hook(self.left)

    def entered(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        super().entered(module, args, kwargs)
        self.seen = {"before": self.standard(_tensor_in((*args, *kwargs.values())))}

    def between(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.after("middle", module, args, (*args, *kwargs.values()))

    def after(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if "before" in self.seen:  # a part may be called outside its block
            self.seen[name] = self.standard(_tensor_in(output))

    def left(self, module: nn.Module, args: Any, output: Any) -> None:
        seen, block = self.seen, self.block
        self.seen = {}
        self.runs += 1
        if block.mlp_input is None:
            seen["middle"] = seen["before"]
        for name in WORDS:
            if name not in seen:
                raise MeasurementError(
                    f"the block of layer '{block.path}' finished without its {WORDS[name]}: "
                    "something bypassed it",
                    "leave it out with --layers if that is meant",
                )
        self.on_block(
            BlockStates(
                layer=block.index,
                path=block.path,
                arrangement=block.arrangement,
                before=seen["before"],
                attention_update=seen["attention_update"],
                middle=seen["middle"],
                mlp_update=seen["mlp_update"],
                after=self.standard(_tensor_in(output)),
                to_stream=to_stream(block),
            )
        )


def _changed(
    shaped: _Shaped, edit: BranchEdit, real: Tensor | None, module: nn.Module, args: Any, output: Any
) -> Any:
    """A hook on a branch: what it returns, with another update."""
    if shaped.shape is None:  # called outside its block
        return None
    update = _tensor_in(output)
    changed = shaped.back(edit(shaped.standard(update), real).to(update.dtype), update)
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _tensor_in(values: Any) -> Tensor:
    """The hidden states: the tensor itself, or the first one of several."""
    if isinstance(values, Tensor):
        return values
    return next(value for value in values if isinstance(value, Tensor))
