"""A self-attention layer: where it is, its number, how it calls attention; which modules are called so."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from diag.attention.call import KeysOf
from diag.models.hooks.layout import Layout
from diag.models.hooks.linear import Recurrence

NAMES = re.compile(r"attention|attn|(?-i:(MLA|MHSA|GPSA)$)", re.IGNORECASE)
CLOSED = re.compile(r"pool|cross|encdec|encoder_attn", re.IGNORECASE)
BESIDE = re.compile(r"drop|norm|embed|output|residual", re.IGNORECASE)


UNCLEAR = -1


@dataclass(frozen=True, eq=False)
class Form:
    """How a layer calls attention, as the tests of meaning found it (`diag.models.hooks.meaning`).

    The default is the usual one: one run, one call, `[batch, head, token, dim]`, no padding.

    runs: of its module in one forward pass; each run is a layer of its own.
    calls: which calls of a run are the layer's, by number; None for all of them.
    layout: where heads are; None for the usual axes.
    padding: which tokens of each call are padding, `[row of one input, token]`; None where none are.
    adds_up: whether its calls are maps that are added up (`diag.models.hooks.combined`); the sum is its call.
    value_from: "own" where each token has its own value; else what the values are of.
    keys_of: "own" where keys are the queries' own tokens; else as in `AttentionCall`: no token has a value.
    extra: how many keys in front of its tokens, and behind them, are no tokens: memory, zero and bias keys.
    in_turn: whether each call of its module is a layer of its own, one after the other, and counts as a run.
    recurrence: how a layer without softmax mixes its tokens; None of attention.
    total: how many tokens all calls of one run must have together, where that is to be checked: of inputs of
        another size than those that were looked at. `UNCLEAR` where none is right.
    """

    runs: int = 1
    calls: frozenset[int] | None = None
    layout: Layout | None = None
    padding: tuple[Tensor | None, ...] = ()
    adds_up: bool = False
    value_from: str = "own"
    keys_of: KeysOf = "own"
    extra: tuple[int, int] = (0, 0)
    in_turn: bool = False
    recurrence: Recurrence | None = None
    total: int | None = None

    @property
    def mixer(self) -> str:
        """What makes a layer's outputs: "softmax" or "linear"."""
        return "softmax" if self.recurrence is None else "linear"


USUAL = Form()


@dataclass(frozen=True, eq=False)
class Layer:
    """One self-attention layer.

    index: the model's own number, on the depth axis of its tower. path, module: where it is.
    run: which run of its module in a forward pass, from 0; depths that share weights differ in it.
    """

    index: int
    path: str
    module: nn.Module
    run: int = 0
    form: Form = USUAL

    @property
    def name(self) -> str:
        """The path, and which run where there are several."""
        if self.form.runs == 1:
            return self.path
        return f"{self.path} ({'call' if self.form.in_turn else 'run'} {self.run})".lstrip()


def attention_modules(root: nn.Module, *, prefix: str = "") -> tuple[Layer, ...]:
    """The self-attention modules below `root` in depth order: the innermost modules named as attention.

    Pooling heads, cross-attention and what lies inside them are left out.
    prefix: put before every path.
    """
    named: dict[str, nn.Module] = {}
    closed: list[str] = []  # where nothing is self-attention
    for path, module in root.named_modules():
        kind, own = type(module).__name__, path.rpartition(".")[2]
        if path.startswith(tuple(closed)):
            continue
        if path and CLOSED.search(f"{kind} {own}"):
            closed.append(f"{path}.")
        # what stands before belongs to the model's name: RobertaPreLayerNormSelfAttention
        elif (found := NAMES.search(kind)) and not BESIDE.search(f"{kind[found.end() :]} {own}"):
            named[path] = module
    inner = [p for p in named if not any(other.startswith(f"{p}.") for other in named)]
    return tuple(Layer(i, prefix + path, named[path]) for i, path in enumerate(inner))


def has_closed(root: nn.Module) -> bool:
    """Whether anything below `root` is called pooling or cross-attention."""
    return any(
        CLOSED.search(f"{type(module).__name__} {path.rpartition('.')[2]}")
        and NAMES.search(type(module).__name__)
        for path, module in root.named_modules()
    )
