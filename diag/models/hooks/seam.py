"""The seam: a context manager under which a model's attention calls become `AttentionCall`s.

What is watched is in `diag.models.hooks.mode`. Captures nest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diag.attention.call import AttentionCall
from diag.attention.extra_keys import without_extra_keys, without_extra_weights
from diag.attention.kernels.flash import attention_with_normaliser
from diag.attention.visibility import Visibility, plain
from diag.errors import MeasurementError, UserError
from diag.models.hooks.combined import Combination
from diag.models.hooks.eager import Product
from diag.models.hooks.in_python import WHAT_TO_TYPE, attends_out_of_sight
from diag.models.hooks.layers import Layer
from diag.models.hooks.layout import PLAIN, Layout, plain_layout
from diag.models.hooks.linear import Mixing
from diag.models.hooks.mode import Arguments, AttentionMode, Frame, Ran, hooked

ONE_SIZE = "give inputs of one size, and those of another size in a run of their own"

OnCall = Callable[[AttentionCall], Tensor | None]
"""Sees one call; None goes on with the model's output, a tensor of its shape replaces it."""


@dataclass
class Sightings:
    """What was seen while capturing, by layer name.

    runs: how often a module ran, by path; more than once where depths share its weights.
    calls: how often a layer called attention on its own tokens.
    skipped: why a call was not self-attention.
    projection: "as captured" where the output projection read exactly Y, "modified" where a gate or
        norm came between, "unknown" where no projection was seen.
    """

    runs: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, str] = field(default_factory=dict)
    projection: dict[str, str] = field(default_factory=dict)


class OtherSize(MeasurementError):  # noqa: N818  it is no mistake of anybody's
    """Inputs are of another size than those that were looked at, and a layer attends otherwise for it."""


@contextmanager
def attention_calls(layers: Sequence[Layer], on_call: OnCall) -> Iterator[Sightings]:
    """Under this, each self-attention call of `layers` is handed to `on_call` as the model runs.

    Calls outside the listed layers pass through. Cross-attention and pooling (queries that are not
    the keys' tokens) pass through and are noted in `Sightings.skipped`.

    Raises MeasurementError, naming the layer, if a listed layer finishes without a call or drops
    attention weights at random.
    """
    refuse_compiled(layers)
    seam = _Seam(layers, on_call)
    recurrent = any(layer.form.recurrence is not None for layer in layers)
    with hooked(seam, {layer.path: layer.module for layer in layers}, without_softmax=recurrent):
        yield seam.sightings


def refuse_compiled(layers: Sequence[Layer]) -> None:
    """Raises UserError for scripted and traced modules that attend: no call of theirs is visible."""
    for layer in layers:
        if attends_out_of_sight(layer.module):
            name = f"layer '{layer.path}'" if layer.path else "the model"
            raise UserError(
                f"{name} is a compiled {type(layer.module).__name__}: its attention calls are not visible "
                "from Python",
                "pass the original nn.Module, before torch.jit",
            )


class _Seam(AttentionMode):
    """Makes an `AttentionCall` of each call of the listed layers."""

    def __init__(self, layers: Sequence[Layer], on_call: OnCall) -> None:
        super().__init__()
        self.on_call = on_call
        self.listed = {(layer.path, layer.run): layer for layer in layers}
        self.in_turn = {layer.path for layer in layers if layer.form.in_turn}
        self.unshared = {layer.path: layer for layer in layers if layer.form.runs == 1}
        self.sightings = Sightings()
        self.visibilities: dict[tuple, tuple[Tensor, Visibility]] = {}

    def entered(self, path: str, module: nn.Module, args: Any) -> None:
        run = self.sightings.runs[path]
        self.sightings.runs[path] += 1
        # where a module runs again unasked, that is an error when the pass has ended
        layer = self.listed.get((path, run)) or self.unshared.get(path)
        self.stack.append(Frame(path, run, layer))

    def left(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        frame = self.stack.pop()
        # None: the forward raised, and its own error is the one to show
        if output is not None:
            self._close(frame)

    def _close(self, frame: Frame) -> None:
        """Ends a layer. Raises MeasurementError if it made no call."""
        if frame.layer is None:
            return
        name = frame.layer.name
        if frame.maps is not None:
            self.added_up(frame)
        if frame.calls == 0:
            raise MeasurementError(
                f"layer '{name}' finished without a call of attention that is seen",
                "leave the layer out with --layers",
            )
        if frame.layer.form.total not in (None, frame.tokens):
            raise OtherSize(
                f"layer '{name}' has {frame.tokens} tokens, which do not follow from the size of the inputs: "
                "what is padding is known for the size of the first input alone",
                ONE_SIZE,
            )
        self.sightings.projection.setdefault(name, "unknown")

    def unread(self, why: str) -> None:
        if (layer := self.stack[-1].layer) is not None:
            raise MeasurementError(f"layer '{layer.name}' cannot be read: {why}", WHAT_TO_TYPE)

    def attention(self, given: Arguments) -> Tensor:
        frame = self._frame() if self.stack else None
        if frame is None or frame.layer is None:
            return given.run()
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa = given
        layer, number = frame.layer, frame.calls
        frame.calls += 1
        _refuse_dropout(layer, dropout_p)
        # a mask beside is_causal is an error, which is for the function itself to raise
        mask, causal = (attn_mask, True) if is_causal else plain(attn_mask, False)
        if isinstance(given, Ran):
            output, normaliser = given.output, None
        else:
            output, normaliser = attention_with_normaliser(
                query, key, value, mask, dropout_p, causal, scale, enable_gqa
            )
        if not self._is_its_own(layer, number, query, key, mask):
            return output
        layout, outside = _layout_of(layer, output), None
        queries, keys, values, outputs = (layout.split(x) for x in (query, key, value, output))
        mask = None if mask is None else layout.split_mask(mask, query.shape)
        if any(layer.form.extra):
            keys, values, mask, outside, normaliser = without_extra_keys(
                queries, keys, values, mask, given.scaling, layer.form.extra
            )
        seen = self.visibility_of(mask, causal, outputs, values.shape[2])
        call = AttentionCall(
            layer=layer.index,
            module=layer.name,
            query=queries,
            key=_of_heads(keys, values),
            value=_of_heads(values, keys),
            output=outputs,
            mask=seen.mask,
            causal=seen.causal,
            scale=given.scaling,
            log_normaliser=normaliser,
            outside=outside,
            keys_of=layer.form.keys_of,
            padding=padding_of(layer, number, outputs),
            visibility=seen,
        )
        if layer.form.adds_up:
            frame.maps = frame.maps or Combination(layer.name)
            frame.maps.note_call(call, output)
            return output
        return self._handed_on(frame, layer, call, layout, output)

    def product(self, given: Product, result: Tensor) -> Tensor:
        frame = self._frame()
        if frame.layer is None:
            return result
        layer, number = frame.layer, frame.calls
        frame.calls += 1
        _refuse_dropout(layer, given.weights.dropout)
        # the pattern's rows are queries as those of a query are, and the values' rows are keys
        if not self._is_its_own(layer, number, given.pattern, given.value):
            return result
        output = given.output(result)
        layout = _layout_of(layer, output)
        pattern, values, outputs = (layout.split(x) for x in (given.pattern, given.value, output))
        if given.scores is None or given.scores.shape != given.pattern.shape:
            scores, masked = torch.zeros_like(pattern[:1, :1]), True
        else:
            scores, masked = layout.split(given.scores), given.weights.masked
        outside = None
        if any(layer.form.extra):
            scores = scores.narrow(-1, layer.form.extra[0], outputs.shape[2])
            pattern, values, outside = without_extra_weights(pattern, values, layer.form.extra)
        added = pattern if given.weights.altered else None
        seen = Visibility.of_scores(scores, outputs, pattern if masked else None, added)
        call = AttentionCall(
            layer=layer.index,
            module=layer.name,
            query=None,
            key=None,
            value=values,
            output=outputs,
            mask=seen.mask,
            causal=seen.causal,
            scale=1.0,
            pattern=pattern,
            outside=outside,
            keys_of=layer.form.keys_of,
            padding=padding_of(layer, number, outputs),
            visibility=seen,
        )
        return given.result(self._handed_on(frame, layer, call, layout, output))

    def _frame(self) -> Frame:
        """The module that makes a call, and the layer that it is of."""
        frame = self.stack[-1]
        if frame.path in self.in_turn:
            if frame.turns:
                self._close(frame)
                self.sightings.runs[frame.path] += 1
            frame.layer, frame.calls = self.listed.get((frame.path, frame.run + frame.turns)), 0
            frame.tokens = 0
            frame.turns += 1
        return frame

    def _is_its_own(
        self, layer: Layer, number: int, query: Tensor, key: Tensor, mask: Tensor | None = None
    ) -> bool:
        """Whether a call is one of those that are the layer's; notes why it is not."""
        if layer.form.calls is not None and number not in layer.form.calls:
            return False
        own = layer.form.keys_of == "own"
        if own and key.shape[-2] - sum(layer.form.extra) != query.shape[-2]:
            self.sightings.skipped[layer.name] = not_its_own(query, key, mask)
            return False
        return True

    def _handed_on(
        self, frame: Frame, layer: Layer, call: AttentionCall, layout: Layout, output: Tensor
    ) -> Tensor:
        """What the model goes on with."""
        self.sightings.calls[layer.name] += 1
        frame.tokens += call.batch * call.tokens
        replaced = self.on_call(call)
        if replaced is not None:
            output = layout.joined(replaced.to(output.dtype), output)
        if layer.name not in self.sightings.projection:
            frame.unread = layout.split(output)
        return output

    def mixing(self, given: Mixing) -> Any:
        frame = self.stack[-1] if self.stack else None
        layer = None if frame is None else frame.layer
        form = None if layer is None else layer.form.recurrence
        if frame is None or layer is None or form is None or form.called != given.called:
            return given.run()[0]
        with self.unseen():
            result, output = given.run()
        if output is None:
            return result
        number = frame.calls
        frame.calls += 1
        layout = layer.form.layout or PLAIN
        outputs = layout.split(output)
        call = AttentionCall(
            layer=layer.index,
            module=layer.name,
            query=None,
            key=None,
            value=layout.split(given.value),
            output=outputs,
            mask=None,
            causal=form.causal,
            scale=1.0,
            padding=padding_of(layer, number, outputs),
        )
        handed = self._handed_on(frame, layer, call, layout, output)
        return result if handed is output else given.with_output(result, handed)

    def added_up(self, frame: Frame) -> None:
        """Hands on the sum of a layer's maps, before the module goes on with it."""
        assert frame.maps is not None
        assert frame.layer is not None
        maps, frame.maps = frame.maps, None
        call, name = maps.combined(), frame.layer.name
        self.sightings.calls[name] += 1
        frame.tokens += call.batch * call.tokens
        replaced = self.on_call(call)
        if replaced is not None:
            maps.replace(call, replaced)
        if name not in self.sightings.projection:
            frame.unread = call.output

    def visibility_of(self, mask: Tensor | None, causal: bool, output: Tensor, keys: int) -> Visibility:
        """What queries see. Layers that get the same mask tensor read it once; the last two are kept."""
        if mask is None:
            return Visibility.of(mask, causal, output, keys)
        place = (mask.data_ptr(), mask.shape, mask.stride(), causal, output.shape, keys)
        if place not in self.visibilities:
            while len(self.visibilities) >= 2:
                self.visibilities.pop(next(iter(self.visibilities)))
            # the mask is held, so that its address is not given to another one
            self.visibilities[place] = mask, Visibility.of(mask, causal, output, keys)
        return self.visibilities[place][1]

    def projection(self, read: Tensor) -> None:
        """Compares what the output projection reads with the output that was captured."""
        frame = self.stack[-1]
        output, frame.unread = frame.unread, None
        if output is None or frame.layer is None:
            return
        same, form = _is_read_as_it_is(read, output), frame.layer.form
        # rows of others may be read in another order
        if same or form.layout in (None, PLAIN) or form.recurrence:
            self.sightings.projection[frame.layer.name] = "as captured" if same else "modified"


def _is_read_as_it_is(read: Tensor, output: Tensor) -> bool:
    """Whether what a projection reads is Y, inputs first or tokens first, or some of its tokens in a row.

    read: `[…, channel]`. output: `[batch, head, token, dim]`.
    """
    batch, heads, tokens, dim = output.shape
    count, rest = divmod(read.numel(), max(1, batch * heads * dim))
    if rest or not 0 < count <= tokens:
        return False
    parts = [output] if count == tokens else [output[:, :, :count], output[:, :, tokens - count :]]
    orders = (0, 2, 1, 3), (2, 0, 1, 3)
    return any(
        torch.equal(read.reshape(-1), part.permute(order).reshape(-1)) for part in parts for order in orders
    )


def _refuse_dropout(layer: Layer, dropped: float) -> None:
    if dropped:
        raise MeasurementError(
            f"layer '{layer.name}' drops attention weights at random (p = {dropped})",
            "put the model in evaluation mode: model.eval(); where it is, set what its call asks for to 0",
        )


def _layout_of(layer: Layer, output: Tensor) -> Layout:
    """Where the heads of a layer's calls are. Raises MeasurementError, naming the layer, if nothing tells."""
    layout = layer.form.layout or plain_layout(output)
    if layout is None:
        raise MeasurementError(
            f"layer '{layer.name}' attends over {output.ndim} axes, and where its heads are is not known",
            "measure the model by name, or as a module: the layout is found there",
        )
    return layout


def _of_heads(x: Tensor, other: Tensor) -> Tensor:
    """Keys with as many heads as values, or the other way round: PyTorch lets them differ."""
    times = other.shape[1] // x.shape[1]
    return x.repeat_interleave(times, 1) if times > 1 else x


def not_its_own(query: Tensor, key: Tensor, mask: Tensor | None = None) -> str:
    """Why a call with other numbers of queries and keys is not of its own tokens."""
    aligned = type(mask).__name__ == "CausalBias"
    what = "causal up to the last key, as with a cache" if aligned else "cross-attention or pooling"
    return f"{query.shape[-2]} queries over {key.shape[-2]} keys: {what}"


def padding_of(layer: Layer, number: int, output: Tensor) -> Tensor | None:
    """Which tokens of a call are padding, `[row, token]`, from what was found of one input.

    Raises MeasurementError where its windows are others than those that were looked at.
    """
    known = layer.form.padding[number] if number < len(layer.form.padding) else None
    if known is None:
        return None
    rows, tokens = known.shape
    if output.shape[2] != tokens or output.shape[0] % rows:
        raise other_windows(layer.name, known, output.shape[0], output.shape[2])
    return known.to(output.device).repeat(output.shape[0] // rows, 1)


def other_windows(name: str, known: Tensor, rows: int, tokens: int) -> OtherSize:
    """That windows are others than those of which it is known what fills them up: inputs of another size.

    known: as in `Form.padding`. What fills up other windows cannot be told from these, even where it is alike
    in all of them: the single window of a small image says nothing of the nine of a larger one.
    """
    windows = "window" if len(known) == 1 else "windows"
    return OtherSize(
        f"layer '{name}' fills its windows up, {len(known)} {windows} of {known.shape[1]} tokens for the "
        f"first input and not {rows} of {tokens} as here: what is padding is known for that size alone",
        ONE_SIZE,
    )
