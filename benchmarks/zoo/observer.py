"""Watches a model's attention without any code of attnbias: the judge's own eyes.

Two nets, below and above each other. `scaled_dot_product_attention` is replaced wherever a library keeps it;
and a dispatch mode sees every softmax that reaches an operator, and the product that contracts its axis of
keys with values: attention that a model writes out itself (eager), its weights, values and output.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.eager import SOFTMAX, Follower, Product, aten

SDPA = F.scaled_dot_product_attention
ELEMENTARY = (nn.Softmax, nn.Dropout, nn.Identity)


@dataclass
class Frame:
    """A module that is running: its path, which run of it, the tensors that it was given.

    module, args, kwargs: what runs it again. before: how many eager calls there were when it began.
    """

    path: str
    run: int
    given: list[Tensor]
    elementary: bool = False
    module: nn.Module | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    before: int = 0


@dataclass
class Call:
    """One attention call.

    path, run: the innermost module that was running, and which run of it. eager: whether the model computed
    softmax itself; then `pattern` is what multiplied the values, `seen` says which keys a query sees and
    `raw` is what the softmax was taken of; or only `scores`, the shape of its softmax, is known. own: where
    among the keys those of the queries' own tokens begin, for keys that are more than the queries. stack:
    the running modules.
    """

    path: str
    run: int
    eager: bool
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    output: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    dropout: float = 0.0
    scores: tuple[int, ...] = ()
    pattern: Tensor | None = None
    seen: Tensor | None = None
    raw: Tensor | None = None
    own: int = 0
    stack: list[Frame] = field(default_factory=list)

    @property
    def lengths(self) -> tuple[int, int]:
        """Numbers of queries and keys."""
        if self.pattern is not None:
            return self.pattern.shape[-2], self.pattern.shape[-1]
        if self.query is None or self.key is None:
            return self.scores[-2], self.scores[-1]
        return self.query.shape[-2], self.key.shape[-2]


class Calls(list[Call]):
    """Calls in order. softmaxes: paths of modules in which a softmax over three axes or more ran."""

    def __init__(self) -> None:
        super().__init__()
        self.softmaxes: list[str] = []


class Watch(TorchDispatchMode):
    """The calls of all forward passes while it is on, in order, and how often each module ran.

    graph: whether calls keep the autograd graph, and modules their arguments, for `provenance`. parameters:
    of the model; what weighs those is no attention.
    """

    def __init__(self, graph: bool, parameters: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.graph = graph
        self.calls = Calls()
        self.runs: Counter[str] = Counter()
        self.stack: list[Frame] = []
        self.inside = 0  # attention of PyTorch is running, whose own softmax is no other call
        self.follower = Follower(parameters)
        self.eager = 0  # calls so far

    def enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [x for x in [*args, *kwargs.values()] if isinstance(x, Tensor)] if self.graph else []
        again = (module, args, kwargs, self.eager) if self.graph else (None, (), {}, 0)
        self.stack.append(Frame(path, self.runs[path], given, isinstance(module, ELEMENTARY), *again))
        self.runs[path] += 1

    def leave(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        self.inside += 1
        try:
            output = SDPA(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        finally:
            self.inside -= 1
        keep = (lambda x: x) if self.graph else (lambda x: x.detach().to(torch.float64))
        mask = attn_mask
        if mask is not None and hasattr(mask, "_materialize"):  # torch.nn.attention.bias.CausalBias
            mask = mask._materialize(query.device)
        with ExitStack() as off:
            off.enter_context(torch.utils._python_dispatch._disable_current_modes())
            self.calls.append(
                Call(
                    *self.where(),
                    False,
                    keep(query),
                    keep(key),
                    keep(value),
                    keep(output),
                    None if mask is None else mask.detach().clone(),
                    is_causal,
                    query.shape[-1] ** -0.5 if scale is None else scale,
                    dropout_p,
                    stack=list(self.stack) if self.graph else [],
                )
            )
        return output

    def where(self) -> tuple[str, int]:
        """Path and run of the innermost module, one that is only a softmax or the like left out."""
        frames = [frame for frame in self.stack if not frame.elementary]
        return (frames[-1].path, frames[-1].run) if frames else ("", 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.inside:
            return out
        if func in SOFTMAX or (func is aten.exp.default and self.follower.of(args[0]) is None):
            if args[0].ndim >= 2:
                place = self.where()
                if func in SOFTMAX and args[0].ndim >= 3:
                    self.calls.softmaxes.append(place[0])
                self.follower.start(func, args, out, [*place, tuple(args[0].shape), list(self.stack)])
            return out
        for origin, product in self.follower.step(func, args, kwargs, out):
            self.multiplied(origin, product)
        return out

    def multiplied(self, origin: list[Any], product: Product | None) -> None:
        """Weights met values: an eager call."""
        path, run, scores, stack = origin
        call = Call(path, run, True, scores=scores, stack=stack if self.graph else [])
        if product is not None:
            call.pattern, call.value, call.output = product.pattern, product.value, product.output
            call.seen, call.raw = product.visible, product.before
        self.calls.append(call)
        self.eager += 1


@contextmanager
def watching(root: nn.Module, graph: bool = False) -> Iterator[Watch]:
    """Watches all that runs below `root`; everything is undone at the end."""
    watch = Watch(graph, root.parameters())
    with ExitStack() as undone:
        for path, module in root.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            enter, leave = partial(watch.enter, path), partial(watch.leave, path)
            undone.callback(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True).remove)
            undone.callback(module.register_forward_hook(leave, always_call=True).remove)
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").split(".")[0] in ("diag", "zoo"):
                continue
            for name, value in list(vars(module).items()) if hasattr(module, "__dict__") else ():
                if value is SDPA:
                    setattr(module, name, watch.attention)
                    undone.callback(setattr, module, name, SDPA)
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        undone.callback(torch.backends.mha.set_fastpath_enabled, fast)
        with watch:
            yield watch


def observed(root: nn.Module, run: Callable[[], object]) -> Calls:
    """The attention calls of one forward pass, in float64."""
    with watching(root) as watch, torch.no_grad():
        run()
    return watch.calls
