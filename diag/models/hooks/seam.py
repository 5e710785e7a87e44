"""The seam: a context manager under which a model's attention calls become `AttentionCall`s.

Every supported family ends in `scaled_dot_product_attention`. A function mode sees those calls,
wherever the function was imported from; `multi_head_attention_forward` is overridable itself, so
the mode is off inside it, and for the time of that one call the attribute switches it on again.
Forward hooks on the listed modules, kept as a stack, tell which layer a call belongs to. Captures nest.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diag.attention.call import HIDDEN, AttentionCall
from diag.attention.kernels.flash import attention_with_normaliser
from diag.attention.visibility import Visibility
from diag.errors import MeasurementError, UserError
from diag.models.hooks.combined import Combination

SDPA = F.scaled_dot_product_attention
MULTI_HEAD = F.multi_head_attention_forward
SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax}
PROJECTIONS = {F.linear: 0, torch.addmm: 1, Tensor.addmm: 1}  # function -> which argument is its input

NAMES = re.compile(r"attention|attn", re.IGNORECASE)
SHIFTED_WINDOWS = re.compile(r"WindowAttention|Swin")
SHIFTED_WINDOWS_HIDDEN = -50.0
"""Swin hides the neighbouring window with -100 on top of a learned bias of a few units; elsewhere such an
entry may be a distance bias of a key that is seen."""

CLOSED = re.compile(r"pool|cross|encdec|encoder_attn", re.IGNORECASE)
BESIDE = re.compile(r"drop|norm|embed|output|residual", re.IGNORECASE)
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")


@dataclass(frozen=True, eq=False)
class Layer:
    """One self-attention module: its place in depth order, its path and the module.

    adds_up: whether it adds up several maps (`diag.models.hooks.combined`); their sum is its call then.
    """

    index: int
    path: str
    module: nn.Module
    adds_up: bool = False


OnCall = Callable[[AttentionCall], Tensor | None]
"""Sees one call; None goes on with the model's output, a tensor of its shape replaces it."""


@dataclass
class Sightings:
    """What was seen while capturing, by layer path.

    runs: how often the layer's module ran; more than once where depths share its weights.
    calls: how often it called attention on its own tokens.
    skipped: why a call was not self-attention.
    projection: "as captured" where the output projection read exactly Y, "modified" where a gate or
        norm came between, "unknown" where no projection was seen.
    """

    runs: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, str] = field(default_factory=dict)
    projection: dict[str, str] = field(default_factory=dict)


def attention_modules(root: nn.Module, *, prefix: str = "") -> tuple[Layer, ...]:
    """The self-attention modules below `root` in depth order: the innermost modules named as attention.

    Pooling heads, cross-attention and what lies inside them are left out.
    prefix: put before every path.
    """
    named: dict[str, nn.Module] = {}
    closed: list[str] = []  # where nothing is self-attention
    for path, module in root.named_modules():
        words = f"{type(module).__name__} {path.rpartition('.')[2]}"
        if path.startswith(tuple(closed)):
            continue
        if path and CLOSED.search(words):
            closed.append(f"{path}.")
        elif NAMES.search(type(module).__name__) and not BESIDE.search(words):
            named[path] = module
    inner = [p for p in named if not any(other.startswith(f"{p}.") for other in named)]
    return tuple(Layer(i, prefix + path, named[path]) for i, path in enumerate(inner))


@contextmanager
def attention_calls(layers: Sequence[Layer], on_call: OnCall) -> Iterator[Sightings]:
    """Under this, each self-attention call of `layers` is handed to `on_call` as the model runs.

    Calls outside the listed layers pass through. Cross-attention and pooling (queries that are not
    the keys' tokens) pass through and are noted in `Sightings.skipped`.

    Raises MeasurementError, naming the layer, if a listed layer finishes without a call or drops
    attention weights at random.
    """
    refuse_compiled(layers)
    seam = _Seam(on_call)
    with _hooked(seam, layers):
        yield seam.sightings


def discover(module: nn.Module, run: Callable[[], object]) -> tuple[Layer, ...]:
    """The modules of any model that call PyTorch attention on their own tokens, in order of first call.

    run: runs the model once on a real batch.
    Warns of modules that compute softmax attention themselves; raises UserError if there are no others.
    """
    modules = [Layer(i, path, child) for i, (path, child) in enumerate(module.named_modules())]
    refuse_compiled(modules)
    found: dict[int, Layer] = {}

    def on_call(call: AttentionCall) -> None:
        found.setdefault(call.layer, modules[call.layer])

    seam = _Seam(on_call, strict=False)
    with _hooked(seam, modules):
        run()
    if not found:
        if seam.eager:
            where = next(iter(seam.eager)) or type(module).__name__
            raise UserError(
                f"the model computes attention itself, in '{where}': it cannot be seen",
                "call F.scaled_dot_product_attention there, or nn.MultiheadAttention with need_weights=False",
            )
        raise UserError(
            f"{type(module).__name__} made no self-attention call",
            "attnbias measures models that use torch.nn.functional.scaled_dot_product_attention",
        )
    for path in seam.eager:
        warnings.warn(f"'{path}' computes attention itself: it is not in the table", stacklevel=2)
    return tuple(
        Layer(i, layer.path, layer.module, layer.path in seam.adding_up)
        for i, layer in enumerate(found.values())
    )


def refuse_compiled(layers: Sequence[Layer]) -> None:
    """Raises UserError for traced, scripted, compiled or exported modules: no call of theirs is visible."""
    for layer in layers:
        kind = type(layer.module).__name__
        opaque = isinstance(layer.module, torch.jit.ScriptModule | torch.fx.GraphModule)
        if opaque or kind == "OptimizedModule" or layer.module._compiled_call_impl is not None:
            name = f"layer '{layer.path}'" if layer.path else "the model"
            raise UserError(
                f"{name} is a compiled {kind}: its attention calls are not visible from Python",
                "pass the original nn.Module, before torch.compile, torch.jit or torch.export",
            )


@contextmanager
def _hooked(seam: _Seam, layers: Sequence[Layer]) -> Iterator[None]:
    """Attaches the seam to every layer and switches it on; undoes both, whatever happens."""
    with ExitStack() as undone:
        undone.callback(seam.stack.clear)
        for layer in layers:
            entered, left = partial(seam.entered, layer), partial(seam.left, layer)
            undone.callback(layer.module.register_forward_pre_hook(entered, prepend=True).remove)
            undone.callback(layer.module.register_forward_hook(left, always_call=True).remove)
        with seam:
            yield


@dataclass
class _Frame:
    """One listed module whose forward is running."""

    layer: Layer
    calls: int = 0
    unread: Tensor | None = None  # the output that the next projection should read
    maps: Combination | None = None  # of a layer that adds up several, or may


class _Seam(TorchFunctionMode):
    def __init__(self, on_call: OnCall, *, strict: bool = True) -> None:
        super().__init__()
        self.on_call = on_call
        self.strict = strict
        self.stack: list[_Frame] = []
        self.sightings = Sightings()
        self.eager: dict[str, None] = {}  # paths, in order
        self.adding_up: set[str] = set()
        self.visibilities: dict[tuple, Visibility] = {}

    def entered(self, layer: Layer, module: nn.Module, args: Any) -> None:
        self.stack.append(_Frame(layer))
        self.sightings.runs[layer.path] += 1

    def left(self, layer: Layer, module: nn.Module, args: Any, output: Any) -> None:
        frame = self.stack.pop()
        # None: the forward raised, and its own error is the one to show
        if output is None:
            return
        if not self.strict:
            if frame.maps is not None and frame.maps.adds_up:
                self.adding_up.add(layer.path)
            return
        if frame.maps is not None:
            self.hand_on(frame, frame.maps)
        if frame.calls == 0:
            eager = layer.path in self.eager
            raise MeasurementError(
                f"layer '{layer.path}' finished without a call of scaled_dot_product_attention: "
                f"{'it computes softmax attention itself (eager)' if eager else 'nothing was seen'}",
                "load the model with its 'sdpa' implementation, or leave the layer out with --layers",
            )
        self.sightings.projection.setdefault(layer.path, "unknown")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            return self.attention(*args, **kwargs)
        if func is MULTI_HEAD:
            return self.multi_head(args, kwargs)
        if self.stack:
            frame = self.stack[-1]
            if self.strict and frame.maps is not None and frame.maps.is_read_by(func, args, kwargs):
                self.hand_on(frame, frame.maps)
            if func in SOFTMAX:
                if args and args[0].ndim >= 3 and args[0].shape[-1] == args[0].shape[-2]:
                    self.eager[self.stack[-1].layer.path] = None
            elif func in PROJECTIONS and self.stack[-1].unread is not None:
                self.note_projection(args, PROJECTIONS[func])
            result = func(*args, **kwargs)
            if frame.maps is not None:
                frame.maps.seen(func, args, kwargs, result)
            return result
        return func(*args, **kwargs)

    def multi_head(self, args: Any, kwargs: Any) -> Any:
        """Runs the one function inside which every mode is off, and sees its attention call all the same."""
        public = F.scaled_dot_product_attention

        def seen(*args: Any, **kwargs: Any) -> Tensor:
            with self:
                return public(*args, **kwargs)

        frame = self.stack[-1] if self.stack else None
        before = frame.calls if frame else 0
        F.scaled_dot_product_attention = seen  # type: ignore[assignment]
        try:
            result = MULTI_HEAD(*args, **kwargs)
        finally:
            F.scaled_dot_product_attention = public
        if frame is not None:
            frame.unread = None  # the output projection was applied out of sight
            if frame.calls == before:  # need_weights=True
                self.eager[frame.layer.path] = None
        return result

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not self.stack:
            return SDPA(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        frame = self.stack[-1]
        path = frame.layer.path
        frame.calls += 1
        if dropout_p and self.strict:
            raise MeasurementError(
                f"layer '{path}' drops attention weights at random (p = {dropout_p})",
                "put the model in evaluation mode: model.eval()",
            )
        output, normaliser = attention_with_normaliser(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
        if query.shape[-2] != key.shape[-2]:
            self.sightings.skipped[path] = (
                f"{query.shape[-2]} queries over {key.shape[-2]} keys: cross-attention or pooling"
            )
            return output
        heads = _merged_heads(query, frame.layer.module)
        swin = SHIFTED_WINDOWS.search(type(frame.layer.module).__name__)
        seen = self.visibility_of(
            None if attn_mask is None else _split_mask(attn_mask, query, heads),
            is_causal,
            SHIFTED_WINDOWS_HIDDEN if swin else HIDDEN,
            _split(output, heads),
        )
        call = AttentionCall(
            layer=frame.layer.index,
            module=path,
            query=_split(query, heads),
            key=_split(key, heads),
            value=_split(value, heads),
            output=_split(output, heads),
            mask=seen.mask,
            causal=seen.causal,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            hidden=seen.hidden,
            log_normaliser=normaliser,
            visibility=seen,
        )
        if frame.layer.adds_up or not self.strict:
            frame.maps = frame.maps or Combination(path)
            frame.maps.note_call(call, output)
            if frame.layer.adds_up:
                return output
        self.sightings.calls[path] += 1
        replaced = self.on_call(call)
        if replaced is not None:
            output = _joined(replaced.to(output.dtype), output)
        if path not in self.sightings.projection:
            frame.unread = output
        return output

    def hand_on(self, frame: _Frame, maps: Combination) -> None:
        """Hands on the sum of a layer's maps, before the module goes on with it."""
        call, frame.maps = maps.combined(), None
        self.sightings.calls[frame.layer.path] += 1
        replaced = self.on_call(call)
        if replaced is not None:
            maps.replace(call, replaced)
        if frame.layer.path not in self.sightings.projection:
            frame.unread = call.output

    def visibility_of(self, mask: Tensor | None, causal: bool, hidden: float, output: Tensor) -> Visibility:
        """What queries see. Layers that get the same mask tensor read it once; the last two are kept."""
        if mask is None:
            return Visibility.of(mask, causal, hidden, output)
        place = (mask.data_ptr(), mask.shape, mask.stride(), causal, hidden, output.shape)
        if place not in self.visibilities:
            while len(self.visibilities) >= 2:
                self.visibilities.pop(next(iter(self.visibilities)))
            # it holds the mask, so that its address is not given to another one
            self.visibilities[place] = Visibility.of(mask, causal, hidden, output)
        return self.visibilities[place]

    def note_projection(self, args: tuple, which: int) -> None:
        """Compares what the output projection reads with the output that was captured."""
        frame = self.stack[-1]
        output, frame.unread = frame.unread, None
        if output is None or len(args) <= which or output.ndim != 4:
            return
        read = args[which]
        same = read.numel() == output.numel() and torch.equal(
            read.reshape(-1), output.transpose(1, 2).reshape(-1)
        )
        self.sightings.projection[frame.layer.path] = "as captured" if same else "modified"


def _merged_heads(query: Tensor, module: nn.Module) -> int:
    """How many heads a module has put into the batch. Raises MeasurementError for an unknown layout."""
    if query.ndim not in (3, 4, 5):
        raise MeasurementError(f"attention over {query.ndim} dimensions is not understood")
    if query.ndim != 3:
        return 1
    counts = [getattr(module, name, None) for name in HEAD_COUNTS]
    heads = next((count for count in counts if isinstance(count, int)), 1)
    return heads if query.shape[0] % heads == 0 else 1


def _split(x: Tensor, heads: int) -> Tensor:
    """To `[batch, head, token, dim]` from it, SAM's `[batch · head, token, dim]`, or Hiera's
    `[batch, head, window, token, dim]`."""
    if x.ndim == 3:
        return x.unflatten(0, (-1, heads))
    return x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x


def _split_mask(mask: Tensor, query: Tensor, heads: int) -> Tensor:
    if query.ndim == 3 and mask.ndim == 3:
        return mask.unflatten(0, (-1, heads)) if mask.shape[0] > 1 else mask[None]
    if query.ndim == 4 or mask.ndim == 2:
        return mask
    raise MeasurementError("a mask over windows or merged heads is not understood")


def _joined(x: Tensor, like: Tensor) -> Tensor:
    """Back from `[batch, head, token, dim]` to the layout of `like`."""
    if like.ndim == 5:
        return x.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)
    return x.reshape(like.shape)
