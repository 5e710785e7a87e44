"""A function mode that watches attention: calls of PyTorch's, products that a model makes itself, mixers.

A function mode sees the calls of `scaled_dot_product_attention`, wherever the function was imported from,
and the products of values with weights that a model made itself (`diag.models.hooks.eager`).
`multi_head_attention_forward` is overridable itself, so the mode is off inside it; for the time of that one
call the functions that it uses switch it on again.
Forward hooks on modules, kept as a stack, tell which of them makes a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diag.models.hooks.combined import Combination, in_place
from diag.models.hooks.eager import Followed, Product
from diag.models.hooks.in_python import Reader, in_python, refuse_no_rows
from diag.models.hooks.layers import Layer
from diag.models.hooks.linear import Mixing, mixers_told

SDPA = F.scaled_dot_product_attention
MULTI_HEAD = F.multi_head_attention_forward
PROJECTIONS = {F.linear: 0, torch.addmm: 1, Tensor.addmm: 1}  # function -> which argument is its input
CONVOLUTIONS = {F.conv1d, F.conv2d}
INSIDE_MULTI_HEAD = (
    *((F, name) for name in ("scaled_dot_product_attention", "softmax", "dropout", "linear")),
    (torch, "bmm"),
)
"""What `multi_head_attention_forward` calls, by where it looks for it."""
BUILT_IN: dict[Callable, Callable] = {F.softmax: torch.softmax, F.dropout: partial(torch.dropout, train=True)}
"""Instead of functions written in Python, which hand a mode what stands in their own place."""


@dataclass
class Frame:
    """One module whose forward is running.

    layer: what is listed of this run of it. calls: how many it has made. unread: the output of the last
    call, until the projection that should read it is seen. maps: calls that may be added up. turns: how many
    layers have made theirs, where each call is one. tokens: how many the calls of its layer have had.
    """

    path: str
    run: int
    layer: Layer | None = None
    calls: int = 0
    unread: Tensor | None = None
    maps: Combination | None = None
    turns: int = 0
    tokens: int = 0


@contextmanager
def hooked(mode: AttentionMode, modules: Mapping[str, nn.Module], *, without_softmax: bool) -> Iterator[None]:
    """Attaches a mode to modules, by path, and switches it on; undoes both, whatever happens.

    without_softmax: whether it is told of their mixers without softmax, too.
    """
    with ExitStack() as undone:
        undone.callback(mode.stack.clear)
        mode.readers = undone.enter_context(in_python())
        for path, module in modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks
            entered, left = partial(mode.entered, path), partial(mode.left, path)
            undone.callback(module.register_forward_pre_hook(entered, prepend=True).remove)
            kept = module.register_forward_hook(left, always_call=True, with_kwargs=True)
            undone.callback(kept.remove)
        if without_softmax:
            undone.enter_context(mixers_told(modules.values(), mode.mixing))
        with mode:
            yield


class Arguments(NamedTuple):
    """What PyTorch's attention is called with."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def run(self) -> Tensor:
        """What it returns."""
        return SDPA(*self[:6], scale=self.scale, enable_gqa=self.enable_gqa)

    @property
    def scaling(self) -> float:
        """What scores are multiplied with."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale


class Ran(Arguments):
    """Those of another function, which has run. output: what it gave, in PyTorch's axes."""

    output: Tensor

    def run(self) -> Tensor:
        """What it gave."""
        return self.output


class AttentionMode(TorchFunctionMode):
    """Hands on every call of PyTorch's attention, every product of weights with values, and what may be a
    projection of one.

    A function mode is off inside `multi_head_attention_forward`, which is therefore run with it on for the
    length of the calls that matter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[Frame] = []
        self.followed = Followed()
        self.readers: Mapping[Any, Reader] = {}
        self.off = False

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """What runs under this is no attention, whatever it looks like: the inside of a recurrence."""
        before, self.off = self.off, True
        try:
            yield
        finally:
            self.off = before

    def entered(self, path: str, module: nn.Module, args: Any) -> None:
        """A hooked module begins to run."""
        raise NotImplementedError

    def left(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A hooked module has run; its output is None if it raised."""
        raise NotImplementedError

    def attention(self, given: Arguments) -> Tensor:
        """What a call of attention returns."""
        raise NotImplementedError

    def mixing(self, given: Mixing) -> Any:
        """What a mixer without softmax returns."""
        raise NotImplementedError

    def product(self, given: Product, result: Tensor) -> Tensor:
        """What a product of weights with values returns, which has made `result`."""
        raise NotImplementedError

    def softmax(self, start: int, scores: torch.Size) -> None:
        """Told of a softmax over what may be scores, and its number (`Weights.start`)."""

    def unread(self, why: str) -> None:
        """Told why a call of attention cannot be read."""
        raise NotImplementedError

    def projection(self, read: Tensor) -> None:
        """Told what a linear map reads, `[…, channel]`."""
        raise NotImplementedError

    def added_up(self, frame: Frame) -> None:
        """Told that the sum of a frame's maps is about to be read."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.off:
            return func(*args, **kwargs)
        if func is SDPA:
            given = Arguments(*args, **kwargs)
            if self.stack:
                refuse_no_rows(given.query, self.stack[-1].path)
            return self.attention(given)
        if func is MULTI_HEAD:
            return self.multi_head(args, kwargs)
        if not self.stack:  # between layers weights may be on their way to one
            result = func(*args, **kwargs)
            self.followed.seen(func, args, kwargs, result)
            return result
        if func in self.readers:
            return self.of_others(func, args, kwargs)
        frame = self.stack[-1]
        if frame.maps is not None and frame.maps.is_read_by(func, args, kwargs):
            self.added_up(frame)
        if func in PROJECTIONS and len(args) > PROJECTIONS[func]:
            self.projection(args[PROJECTIONS[func]])
        elif func in CONVOLUTIONS and args:
            self.projection(args[0].movedim(1, -1))
        weighed = self.followed.product_of(func, args, kwargs)
        result = func(*args, **kwargs)
        if weighed is not None:
            refuse_no_rows(weighed.value, frame.path)
            replaced = self.product(weighed, result)
            return result.copy_(replaced) if in_place(func) else replaced
        if frame.maps is not None:
            frame.maps.seen(func, args, kwargs, result)
        if (scores := self.followed.seen(func, args, kwargs, result)) is not None:
            self.softmax(self.followed.starts - 1, scores)
        return result

    def of_others(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an attention function that is not PyTorch's, and sees its call as one of that."""
        read = self.readers[func](*args, **kwargs)
        if isinstance(read, str):
            self.unread(read)
            return func(*args, **kwargs)
        refuse_no_rows(read.value if isinstance(read, Product) else read.arguments[2], self.stack[-1].path)
        result = func(*args, **kwargs)
        output, *more = result if isinstance(result, tuple) else (result,)
        if isinstance(read, Product):
            replaced = self.product(read, output)
        else:
            given = Ran(*read.arguments)
            given.output = read.in_torch_axes(output)
            returned = self.attention(given)
            replaced = output if returned is given.output else read.in_own_axes(returned, output)
        return (replaced, *more) if isinstance(result, tuple) else replaced

    def multi_head(self, args: Any, kwargs: Any) -> Any:
        """Runs the one function inside which every mode is off, and sees what it does all the same."""
        with ExitStack() as undone:
            for where, name in INSIDE_MULTI_HEAD:
                public = getattr(where, name)
                undone.callback(setattr, where, name, public)
                setattr(where, name, partial(self._seen, BUILT_IN.get(public, public)))
            return MULTI_HEAD(*args, **kwargs)

    def _seen(self, func: Callable, *args: Any, **kwargs: Any) -> Any:
        with self:
            return func(*args, **kwargs)
