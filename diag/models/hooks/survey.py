"""One forward pass in which every attention call of a model is watched, and asked whose tokens it is of.

The axis test: when a module that called attention has run, it is run again with one element of what it read
changed. In a call over its own tokens exactly one row of V changes, and that row of Q; one column is a call
over channels, one head a call over heads; where V does not follow, keys are of something else, or the module
was handed queries, keys and values, and what runs it is asked instead. Where there are other numbers of keys
than of queries, and both follow what the module reads, keys were pooled, or queries.

What a pass leaves is small: of V a fingerprint per token, by which two passes are compared.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from diag.attention.call import AttentionCall, KeysOf
from diag.attention.visibility import HIDDEN, hiding, plain
from diag.errors import MeasurementError
from diag.models.hooks.combined import Combination
from diag.models.hooks.eager import Product
from diag.models.hooks.layout import (
    PLAIN,
    TOKENS_FIRST,
    Layout,
    layout_of,
    merged_layout,
    plain_layout,
    sized_layout,
)
from diag.models.hooks.linear import Inside, Mixing, Recurrence, is_linear, is_without_softmax
from diag.models.hooks.mode import Arguments, AttentionMode, Frame, hooked
from diag.models.hooks.seam import not_its_own
from diag.models.hooks.squares import in_several_rows, in_squares, sides_of

SEED = 20_241_119
NEIGHBOURS = 8
"""Of how many tokens up to its own a value in front of a recurrence may be made; convolutions are 4 wide."""

ABOVE = 3
"""How many modules, from the one that called attention upwards, are asked: a block runs its attention, which
may run another one that is handed queries, keys and values."""

OWN, MIXED, SHARED, ELSEWHERE = "own tokens", "mixed values", "an earlier layer's values", "other tokens"
POOLED = "the same tokens in other numbers"
CHANNELS, HEADS, EVERYTHING, ORDER = "channels", "heads", "everything", "another order"
NOT_LINEAR, LEARNED, NO_QUERIES = "not linear", "learned weights", "no queries"
OVERLAP, EXPERTS = "overlapping windows", "experts"
REASONS = {
    CHANNELS: "it attends over channels, not over tokens",
    HEADS: "it attends over heads, not over tokens",
    EVERYTHING: "each of its values is made of many tokens",
    OVERLAP: "its windows overlap: a token is a key of several of them",
    EXPERTS: "it weighs what is made of one token (a mixture of experts)",
    ORDER: "its keys are not in the order of its queries",
    ELSEWHERE: "its keys are not the tokens of its queries (cross-attention)",
    NOT_LINEAR: "what it makes of its values is not linear in them",
    LEARNED: "its weights follow nothing that it reads: a learned matrix mixes its tokens",
    NO_QUERIES: "none of its queries follows a token: they are learned, or its softmax is not over keys",
}
"""What the axis test found -> why such a call is not measured."""


@dataclass(eq=False)
class Seen:
    """One attention call, as far as it is understood.

    path, run, number: of the module, which run of it, and which call in that run.
    print: of V, a number per token, `[…, token]`, in which two passes differ where V does.
    kind: what the axis test found; None where it could not be asked. why: it is not measured, if so.
    asked: whether it was. touched: whether the one changed element reached it.
    sizes: numbers of queries and keys, where they differ. keys_of: as in `AttentionCall`.
    adds_up: whether it is one of several maps of a sum.
    recurrence: of a mixer without softmax, which stands in for its call; its output stands for its queries.
    keys: which keys a mask shows to anyone, `[row, token]`. first_alone: the first token sees only itself.
    extra: how many keys in front of its tokens and behind them are none. unequal: there may be such, or
        tokens that were pooled to keys or queries.
    changed: along the first axis, where V did. rows_read: how many rows its module was given.
    open: how many more modules may be asked. query: or `scores`, where the model multiplies weights itself.
    """

    path: str
    run: int
    number: int
    print: Tensor
    kind: str | None = None
    why: str | None = None
    asked: bool = False
    touched: bool = False
    unequal: bool = False
    sizes: tuple[int, int] | None = None
    keys_of: KeysOf = "own"
    extra: tuple[int, int] = (0, 0)
    layout: Layout | None = None
    adds_up: bool = False
    recurrence: Recurrence | None = None
    keys: Tensor | None = None
    first_alone: bool = False
    open: int = ABOVE
    query: Tensor | None = None
    scores: Tensor | None = None
    value: Tensor | None = None
    output: Tensor | None = None
    changed: Tensor | None = None
    rows_read: int | None = None
    widths: list[int] = field(default_factory=list)

    def is_open(self, frame: _Running) -> bool:
        """Whether a module may tell more: one that runs a recurrence only may have mixed values before it."""
        alone = self.recurrence is not None and len(frame.made) == 1
        return self.kind is None or (self.kind == OWN and alone)

    def waits(self, frame: _Running) -> bool:
        """Whether what runs a module may tell more, also of queries and keys that this one was handed."""
        handed = self.unequal and self.path == frame.path and (self.sizes or (1,))[0] > 1
        return handed or self.is_open(frame) or self.layout is None

    def forget(self) -> None:
        """Takes back what the axis test found."""
        if self.why is None:
            self.kind, self.asked, self.touched = None, False, False

    def close(self) -> None:
        """Lets go of what the tests needed."""
        if self.layout is None and self.output is not None:
            sized = (sized_layout(self.output, width) for width in self.widths)
            self.layout = plain_layout(self.output) or next((one for one in sized if one), None)
            one_row = self.changed is None or len(self.changed) == 1
            # one head has a row for each input, though a projection may read several heads side by side
            if one_row and self.output.ndim == 3 and len(self.output) == self.rows_read:
                self.layout = Layout(1, 1)
            if self.layout is None and self.changed is not None:
                self.layout = merged_layout(self.output, self.changed)
        self.open, self.query, self.scores, self.value, self.output = 0, None, None, None, None

    def tokens_of(self, x: Tensor) -> Tensor:
        """What is known of each key, `[…, key]`, of those that are tokens."""
        before, after = self.extra
        return x[..., before : x.shape[-1] - after]

    def rows(self, x: Tensor) -> Tensor:
        """What was told of each token, `[…, token]`, by rows of the call: `[row, token]`, of any head."""
        return self.split(x).any(1)

    def split(self, x: Tensor) -> Tensor:
        """What was told of each token, `[…, token]`, as `[row, head, token]`."""
        return (self.layout or PLAIN).split(x[..., None])[..., 0]


class _Enough(BaseException):  # no error: none that the code of a model, or who tells of its errors, catches
    """What is to be seen has been: what is left of a model or a module need not run."""


def watched(root: nn.Module, run: Callable[[], object], *, asked: bool = True, most: int = 0) -> Survey:
    """What was seen while `run` ran the model, in order.

    asked: whether modules are run again for the axis test; else only fingerprints are taken.
    most: how many calls are looked for, behind which the run ends; 0 for all.
    """
    modules = {path: module for path, module in root.named_modules() if not _is_leaf(module)}
    survey = Survey(asked, most)
    with hooked(survey, modules, without_softmax=True), suppress(_Enough):
        run()
    for seen in survey.seen:
        seen.close()
    return survey


def _is_leaf(module: nn.Module) -> bool:
    """Layers of PyTorch that never call attention; there are many, and each hook costs."""
    return type(module).__module__.startswith("torch.nn.modules") and not any(module.children())


@dataclass
class _Running(Frame):
    """made: the calls of this run and of all that ran in it, in order. waiting: those not understood yet."""

    made: list[Seen] = field(default_factory=list)
    waiting: list[Seen] = field(default_factory=list)


class Survey(AttentionMode):
    """The calls of one pass.

    seen: in order. softmaxes: those that modules made themselves of scores, and of which it was not seen what
    is weighed with them: path and shape, by their number. not_read: modules that called attention
    that cannot be read, and why. runs: how often each module ran; of a module that makes the calls of several
    layers in turn, which are `in_turn`, how many these were.
    """

    stack: list[_Running]  # type: ignore[assignment]

    def __init__(self, asked: bool, most: int = 0) -> None:
        super().__init__()
        self.asked, self.most = asked, most
        self.seen: list[Seen] = []
        self.softmaxes: dict[int, tuple[str, torch.Size]] = {}
        self.not_read: dict[str, str] = {}
        self.runs: Counter[str] = Counter()
        self.in_turn: set[str] = set()
        self.disturbed: int | None = (
            None  # of the calls of a module that is run again, whose output is changed
        )
        self.again: list[tuple[Tensor | None, Tensor]] | None = None  # of calls of a module that is run again
        self.most_again = 0
        self.directions: dict[tuple[int, torch.device], Tensor] = {}

    def entered(self, path: str, module: nn.Module, args: Any) -> None:
        if self.again is None and not self.off:
            self.stack.append(_Running(path, self.runs[path]))
            self.runs[path] += 1

    def left(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.again is not None or self.off:
            return
        frame = self.stack.pop()
        if output is not None and self.asked and any(x.is_open(frame) or x.unequal for x in frame.waiting):
            self._ask(frame, module, args, kwargs)
        if output is not None and frame.maps is not None and frame.maps.adds_up:
            self._note_maps(frame, frame.maps)
        elif output is not None and sum(seen.touched for seen in frame.made if seen.path == frame.path) > 1:
            self._ask_in_turn(frame, module, args, kwargs)
        for seen in frame.waiting:
            seen.open -= 1
        left = [seen for seen in frame.waiting if seen.open and seen.waits(frame)]
        for seen in frame.waiting:
            if seen not in left:
                seen.close()
        if self.stack:
            self.stack[-1].made += frame.made
            self.stack[-1].waiting += left

    @property
    def eager(self) -> dict[str, torch.Size]:
        """Modules that made a softmax of scores, and what it weighs is not seen; the shape of the largest."""
        found = dict[str, torch.Size]()
        for path, scores in self.softmaxes.values():
            found[path] = max(scores, found.get(path, scores), key=torch.Size.numel)
        return found

    def softmax(self, start: int, scores: torch.Size) -> None:
        if self.again is None:
            self.softmaxes[start] = (self.stack[-1].path, scores)

    def unread(self, why: str) -> None:
        self.not_read[self.stack[-1].path] = why

    def projection(self, read: Tensor) -> None:
        if self.again is not None:
            return
        for frame in self.stack[-ABOVE:]:
            for seen in frame.waiting:
                if seen.layout is None and seen.output is not None and seen.output.dtype == read.dtype:
                    seen.layout = layout_of(seen.output, read)
                    seen.widths.append(read.shape[-1])

    def attention(self, given: Arguments) -> Tensor:
        query, key, value, attn_mask, *_ = given
        if self.again is not None:
            self._note_again(query.clone(), value.clone())
        output = given.run()
        if self.again is not None or not self.stack:
            return self._disturb(output)
        seen = self._noted(value)
        if query.shape[-2] != key.shape[-2]:
            seen.kind, seen.why = ELSEWHERE, not_its_own(query, key, attn_mask)
            seen.sizes = query.shape[-2], key.shape[-2]
            # not where it is aligned to first or last keys
            seen.unequal = not given.is_causal and type(attn_mask).__name__ != "CausalBias"
        if self.asked and (seen.kind is None or seen.unequal):
            seen.query, seen.value, seen.output = query, value, output
            mask, causal = plain(attn_mask, given.is_causal)
            seen.first_alone = causal
            if mask is not None:
                self._read(mask, seen)
            frame = self.stack[-1]
            frame.waiting.append(seen)
            if output.ndim == 4 and not seen.unequal:
                frame.maps = frame.maps or Combination(frame.path)
                call = AttentionCall(0, frame.path, query, key, value, output, mask, causal, given.scaling)
                frame.maps.note_call(call, output)
        return output

    def mixing(self, given: Mixing) -> Any:
        with self.unseen(), Inside() as inside:
            result, output = given.run()
        if output is None or not is_without_softmax(given, inside):
            return given.run()[0]  # seen this time
        if self.again is not None:
            self._note_again(output.clone(), given.value.clone())
        elif self.stack:
            seen = self._noted(given.value, mixer=True)
            seen.layout, seen.recurrence = given.usual, Recurrence(given.called)
            if self.asked and not self._is_linear(given, output):
                seen.kind, seen.why = NOT_LINEAR, REASONS[NOT_LINEAR]
            elif self.asked:
                seen.query, seen.value, seen.output = output, given.value, output
                self.stack[-1].waiting.append(seen)
        return result

    def _is_linear(self, given: Mixing, output: Tensor) -> bool:
        with self.unseen():
            return is_linear(given, output)

    def product(self, given: Product, result: Tensor) -> Tensor:
        if self.again is not None:
            self._note_again(given.scores, given.value.clone())
            return given.result(self._disturb(given.output(result)))
        self.softmaxes.pop(given.weights.start, None)
        seen, pattern = self._noted(given.value), given.pattern
        if pattern.shape[-2] != pattern.shape[-1]:
            seen.kind, seen.why = ELSEWHERE, not_its_own(pattern, given.value)
            seen.sizes, seen.unequal = (pattern.shape[-2], pattern.shape[-1]), True
        if self.asked and (seen.kind is None or seen.unequal):
            seen.scores, seen.value, seen.output = given.scores, given.value, given.output(result)
            shown = pattern != 0
            seen.first_alone = bool(shown.shape[-1] > 1 and not shown[..., 0, 1:].any())
            if shown.ndim == 4:
                seen.keys = shown.any(-2).any(1)
            self.stack[-1].waiting.append(seen)
        return result

    def _disturb(self, output: Tensor) -> Tensor:
        """The output of a call, or, where that is asked for, changed at one token."""
        if self.again is None or self.disturbed != len(self.again) - 1:
            return output
        changed = output.clone()
        changed[..., output.shape[-2] // 2, :] += 1 + output.abs().max()
        return changed

    def _noted(self, value: Tensor, *, mixer: bool = False) -> Seen:
        frame = self.stack[-1]
        # mixers are numbered apart: where attention beside them is the layer's, the seam is not told of them
        mixers = sum(one.recurrence is not None for one in frame.made)
        seen = Seen(frame.path, frame.run, -1 - mixers if mixer else frame.calls, self._print(value))
        frame.calls += not mixer
        self.seen.append(seen)
        frame.made.append(seen)
        if len(self.seen) == self.most:
            raise _Enough
        return seen

    def _note_again(self, query: Tensor | None, value: Tensor) -> None:
        """A call of a module that is run again, which ends behind as many as it has made."""
        assert self.again is not None
        self.again.append((query, value))
        if len(self.again) == self.most_again:
            raise _Enough

    def _note_maps(self, frame: _Running, maps: Combination) -> None:
        """The calls of a frame are maps that it adds up, or it does with them what is not understood."""
        own = [seen for seen in frame.made if seen.path == frame.path]
        try:
            maps.combined()
        except MeasurementError as error:
            for seen in own:
                seen.kind, seen.why = EVERYTHING, error.args[0].partition("' ")[2].partition("\n")[0]
            return
        for seen in own:
            seen.adds_up = True

    def _read(self, mask: Tensor, seen: Seen) -> None:
        """Notes what a mask tells; `Visibility` reads it in full where it is measured."""
        mask, hidden = (mask, 0.0) if mask.dtype == torch.bool else hiding(mask)
        shown = mask if mask.dtype == torch.bool else mask > hidden
        seen.first_alone |= bool(shown.shape[-2] > 1 and not shown[..., 0, 1:].any())
        if shown.ndim == 4:
            seen.keys = shown.any(-2).any(1)

    def _print(self, value: Tensor) -> Tensor:
        place = (value.shape[-1], value.device)
        if place not in self.directions:
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randn(value.shape[-1], dtype=torch.float64, generator=generator)
            self.directions[place] = drawn.to(value.device)
        return value.double() @ self.directions[place]

    def _ask(self, frame: _Running, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The axis test of a module that has just run, on all that waits in it."""
        again, (given, read) = self._again(frame, module, _with_changed(args, kwargs)), _read_by(args, kwargs)
        if again is None:
            return
        for seen, (query, value) in zip(frame.made, again, strict=True):
            if seen.is_open(frame) and seen.value is not None and seen.value.shape == value.shape:
                seen.asked = True
                if seen.recurrence is not None:
                    _ask_recurrence(seen, query, value)
                else:
                    direct = seen.path == frame.path
                    seen.kind = _kind(seen, query, value, direct=direct)
                    if seen.kind is None and direct and len(given) == 1:
                        seen.kind = _without_queries(seen, query, value)
                        seen.why = REASONS.get(seen.kind or "")
                    seen.rows_read = None if read is None else len(read)
                seen.touched = seen.kind is not None
        own = {(seen.path, seen.run) for seen in frame.made if seen.kind in (OWN, MIXED)}
        mine = [seen for seen in frame.made if seen.path == frame.path]
        unmoved = [seen for seen in mine if seen.asked and seen.kind is None]
        if unmoved and len(mine) > 1 and not own:  # the element was of another of its calls, as of a stream
            further = self._again(frame, module, _with_changed(args, kwargs, part=6)) or []
            for seen, (query, value) in zip(frame.made, further, strict=False):
                if seen in unmoved and seen.value is not None and seen.value.shape == value.shape:
                    seen.kind = _kind(seen, query, value, direct=True)
        others = [seen for seen in frame.made if seen.kind is None and (seen.path, seen.run) in own]
        unequal = [
            seen
            for seen, (_, value) in zip(frame.made, again, strict=True)
            if seen.unequal and _may_be_pooled(seen, value, direct=seen.path == frame.path)
        ]
        if not others and not unequal:
            return
        # windows in turn, or keys from elsewhere: when all that was read changes, V of windows does
        all_changed = self._again(frame, module, _with_changed(args, kwargs, everywhere=True)) or []
        for seen, (_, everywhere) in zip(frame.made, all_changed, strict=False):
            if seen in others and seen.value is not None and len(_followed(seen.value, everywhere)[-2]):
                seen.kind = OWN
        if not unequal:
            return
        # keys without a token follow nothing that is given, such as what another stack returned
        given = self._again(frame, module, _with_changed(args, kwargs, everywhere=True, beside=True)) or []
        for seen, (query, value), (_, everywhere) in zip(frame.made, again, given, strict=False):
            if seen in unequal:
                _ask_for_extra_keys(seen, query, value, everywhere, direct=seen.path == frame.path)
        if unequal := [seen for seen in unequal if seen.unequal and all_changed]:
            queries, keys = unequal[0].sizes or (0, 1)
            place = math.isqrt(queries // keys)  # the next key's, where keys are pooled
            one_more = self._again(frame, module, _with_changed(args, kwargs, at=place)) or []
            sides = sides_of([*args, *kwargs.values()])
            for seen, *runs in zip(frame.made, all_changed, again, one_more, strict=False):
                if seen in unequal and len({seen.print.shape, *(value.shape[:-1] for _, value in runs)}) == 1:
                    self._ask_for_pooling(seen, runs, sides, direct=seen.path == frame.path)

    def _ask_for_pooling(
        self, seen: Seen, runs: Sequence[tuple[Tensor | None, Tensor]], sides: set[int], *, direct: bool
    ) -> None:
        """Notes a call of the same tokens in other numbers: queries and keys both follow what was read.

        runs: its queries, or its scores, and its values, when all that its module read was changed, and when
        one element was, for two of them. sides: as `in_squares` has them. direct: as in `_kind`: else it has
        to be seen that they were made of the same places.
        """
        assert seen.value is not None
        assert seen.sizes is not None
        (every, everywhere), *ones = runs
        queries, keys = seen.sizes
        followed = len(_followed(seen.value, everywhere)[-2])
        if direct and followed > queries:  # the module reads them: no module around it tells more
            seen.unequal = False
        if queries == 1 or followed < keys:
            return
        found = list[tuple[Tensor, Tensor]]()
        for again, value in ones:
            of_value = _followed(seen.value, value)[-2]
            of_query = _known_queries(seen, again, of_value)
            found.append((of_value[:0] if of_query is None else of_query, of_value))
        if seen.query is not None and every is not None:
            follow = len(_followed(seen.query, every)[-2]) == queries
        else:
            follow = any(len(of_query) for of_query, _ in found)
        squares = in_squares([pair for pair in found if all(map(len, pair))], queries, keys, sides)
        if follow and keys > queries and in_several_rows(everywhere, self._print(everywhere)):
            seen.kind, seen.why, seen.unequal = OVERLAP, REASONS[OVERLAP], False
        elif follow and (direct or squares):
            seen.kind, seen.why, seen.asked, seen.unequal = POOLED, None, True, False
            seen.keys_of = "pooled" if squares and keys < queries else "others"
        elif direct and not follow and seen.query is None:
            seen.why = f"{seen.why}, or a softmax that is not over keys"

    def _ask_in_turn(self, frame: _Running, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Whether the calls of one run are layers that follow each other, as in a model that is one function.

        They are where each one's values follow the output of the one before it, token by token.
        """
        calls = frame.made
        if (
            calls[0].kind != OWN
            or not calls[0].touched
            or any(seen.path != frame.path or seen.value is None or seen.unequal for seen in calls)
        ):
            return
        for number, seen in enumerate(calls[1:]):
            self.disturbed = number
            again = self._again(frame, module, _with_changed(args, kwargs, nothing=True))
            self.disturbed = None
            assert seen.value is not None
            if again is None or again[number + 1][1].shape != seen.value.shape:
                return
            if _kind(seen, *again[number + 1], direct=True) != OWN:
                return
        for number, seen in enumerate(calls):
            seen.kind, seen.run, seen.number = OWN, frame.run + number, 0
            seen.changed, seen.rows_read = calls[0].changed, calls[0].rows_read
        self.runs[frame.path] = frame.run + len(calls)
        self.in_turn.add(frame.path)

    def _again(self, frame: _Running, module: nn.Module, given: tuple[list, dict] | None) -> list | None:
        """Queries and values of all calls when a module is run again; None where that does not go."""
        if given is None:
            return None
        self.again, self.most_again = [], len(frame.made)
        self.stack.append(_Running(frame.path, frame.run))
        try:
            with suppress(_Enough):
                module.forward(*given[0], **given[1])
        except Exception:  # a module's own code, on what it was not made for: it cannot be asked
            return None
        finally:
            self.stack.pop()
            again, self.again = self.again, None
        return again if len(again) == len(frame.made) else None


def _kind(seen: Seen, again: Tensor | None, value_again: Tensor, *, direct: bool) -> str | None:
    """What a call is over, from what changed in V and Q; None where V does not tell.

    again: its query, or its scores, when the module ran again. direct: whether the module that made the call
    was asked, and not one that runs it, in which tokens may have been mixed before.
    """
    assert seen.value is not None
    places = _followed(seen.value, value_again)
    tokens, dims = places[-2:]
    if not len(tokens):
        return None
    if direct and seen.changed is None:
        seen.changed = places[0]
    of_query = _queries(seen, again, tokens)
    if len(tokens) == 1:
        if direct and len(of_query):
            return OWN if tokens[0] in of_query else ORDER
        return None if direct else OWN if of_query.tolist() == tokens.tolist() else ELSEWHERE
    if not direct:
        return None
    if len(dims) == 1 and seen.value.shape[-1] > 1:
        return CHANNELS
    if _once_in_each_row(seen.value, value_again):
        return OVERLAP
    several = seen.value.ndim == 4 and seen.value.shape[1] > 1
    if several and len(places[1]) == 1 and len(tokens) == seen.value.shape[-2]:
        return HEADS
    return MIXED if len(tokens) <= seen.value.shape[-2] / 2 else EVERYTHING


def _ask_recurrence(seen: Seen, output_again: Tensor, value_again: Tensor) -> None:
    """What a mixer without softmax is over, where its tokens are, and whether it is causal.

    Which axis holds tokens is the one that is not followed as a whole. Its values may be made of a few tokens
    each, by a convolution over neighbours.
    """
    assert seen.value is not None
    assert seen.query is not None
    assert seen.recurrence is not None
    known = seen.kind
    layouts = sorted((PLAIN, TOKENS_FIRST), key=lambda layout: layout != seen.layout)
    if (seen.layout or PLAIN).split(seen.value).shape[-2] == 1:  # a single head looks like a single token
        layouts.reverse()
    for layout in layouts:
        value, again, output = (layout.split(x) for x in (seen.value, value_again, seen.query))
        tokens, dims = _followed(value, again)[-2:]
        of_output = _followed(output, layout.split(output_again))[-2]
        size = value.shape[-2]
        if not len(tokens) or not len(of_output):
            continue
        alone = len(tokens) == 1
        causal = bool(of_output[0] == tokens[0]) and (bool(tokens[0] > 0) or size == 1)
        whole = len(tokens) == size or (causal and size - int(tokens[0]) == len(tokens) > NEIGHBOURS)
        if alone and tokens[0] not in of_output:
            seen.kind = known or ORDER
            continue
        if whole and not alone:
            seen.kind = known or (CHANNELS if len(dims) == 1 and value.shape[-1] > 1 else EVERYTHING)
            continue
        seen.kind, seen.layout = OWN if alone else MIXED, layout
        seen.recurrence = replace(seen.recurrence, causal=causal)
        seen.first_alone = causal
        return


def _without_queries(seen: Seen, again: Tensor | None, value_again: Tensor) -> str | None:
    """Why weights of a call do not follow the one token that its values do; None where they are not known.

    again, value_again: as in `_kind`, of a module that reads nothing else.
    """
    assert seen.value is not None
    known = seen.scores is not None and again is not None and seen.scores.shape == again.shape
    if not known or len(_followed(seen.value, value_again)[-2]) != 1:
        return None
    return LEARNED if torch.equal(seen.scores, again) else NO_QUERIES  # type: ignore[arg-type]


def _may_be_pooled(seen: Seen, value: Tensor, *, direct: bool) -> bool:
    """Whether it is worth asking about a call with other numbers of queries and keys.

    value: its values with one element changed. direct: as in `_kind`.
    """
    if seen.value is None or seen.value.shape != value.shape:
        return False
    return direct or len(_followed(seen.value, value)[-2]) > 0


def _once_in_each_row(value: Tensor, again: Tensor) -> bool:
    """Whether several tokens changed, but never two of one row."""
    changed = _apart(value, again).any(-1)  # […, token]
    return bool(changed.sum(-1).max() == 1)


def _ask_for_extra_keys(
    seen: Seen, again: Tensor | None, value: Tensor, everywhere: Tensor, *, direct: bool
) -> None:
    """Notes keys that are no tokens, of a call with more keys than queries: they follow nothing that is read.

    again, value: its query, or its scores, and its values, with one element changed; everywhere: its values
    when all that was read changed. direct: as in `_kind`.
    """
    assert seen.value is not None
    assert seen.output is not None
    if not seen.value.shape == value.shape == everywhere.shape:
        return
    followed, one = _followed(seen.value, everywhere)[-2], _followed(seen.value, value)[-2]
    queries, keys = seen.output.shape[-2], seen.value.shape[-2]
    if not len(one):
        return
    if direct and queries == 1 and len(one) == keys:
        seen.kind, seen.why, seen.unequal = EXPERTS, REASONS[EXPERTS], False
        return
    if len(followed) != queries or len(one) != 1:
        if direct and len(one) > 1 and len(followed) > queries:
            seen.why = f"{queries} queries over {keys} keys, of which some are made of several tokens"
        return
    before = int(followed[0])
    extra = (before, keys - queries - before)
    token = one - before
    in_a_row = int(followed[-1]) - before == queries - 1
    of_query = _queries(seen, again, one)
    if in_a_row and (token in of_query if direct else of_query.tolist() == token.tolist()):
        seen.kind, seen.why, seen.asked, seen.touched, seen.extra = OWN, None, True, True, extra
        seen.print, seen.unequal = seen.tokens_of(seen.print), False
        if seen.keys is not None:
            seen.keys = seen.tokens_of(seen.keys)


def _queries(seen: Seen, again: Tensor | None, keys: Tensor) -> Tensor:
    """As `_known_queries`; those of the keys where it is not known."""
    return keys if (known := _known_queries(seen, again, keys)) is None else known


def _known_queries(seen: Seen, again: Tensor | None, keys: Tensor) -> Tensor | None:
    """Which queries changed, where some keys did: what a row of scores is elsewhere tells it.

    None where scores are not known, or every key changed.
    """
    if seen.query is not None and again is not None:
        return _followed(seen.query, again)[-2]
    if seen.scores is None or again is None or seen.scores.shape != again.shape:
        return None
    others = torch.ones(again.shape[-1], dtype=torch.bool, device=again.device)
    others[keys] = False
    if not others.any():
        return None
    # where a key is hidden in one of them, as outside of the largest scores, that is no change of its query
    hidden = ~((seen.scores > HIDDEN) & (again > HIDDEN))
    return _followed(*(x.masked_fill(hidden, 0.0)[..., others] for x in (seen.scores, again)))[-2]


def _apart(x: Tensor, again: Tensor) -> Tensor:
    """Where anything changed."""
    apart = (x.double() - again.double()).abs()
    return apart > 1e-5 * apart.max()


def _followed(x: Tensor, again: Tensor) -> list[Tensor]:
    """On each axis, where anything changed."""
    changed, axes = _apart(x, again), range(x.ndim)
    return [changed.any(tuple(a for a in axes if a != axis)).nonzero()[:, 0] for axis in axes]


def _read_by(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], Tensor | None]:
    """The tensors that a module is given, and the one that it reads: the first that holds numbers or ids."""
    given = (*args, *kwargs.values())
    tensors = [x for x in given if isinstance(x, Tensor) and x.ndim >= 2 and x.numel()]
    return tensors, next((x for x in tensors if x.is_floating_point() or are_ids(x)), None)


def _with_changed(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    at: int | None = None,
    everywhere: bool = False,
    beside: bool = False,
    nothing: bool = False,
    part: int = 2,
) -> tuple[list, dict] | None:
    """Arguments with what a module reads changed in one element: its first tensor, wherever that is given.

    at: at another place of the first input, so far along the last two axes. everywhere: in all elements;
    beside: of all other tensors of numbers or ids, too. nothing: in none. part: how far into it the element
    lies. Caches are left out, or keys would be there twice. None where there is no tensor to change.
    """
    tensors, read = _read_by(args, kwargs)
    if read is None:
        return None
    # of an odd number: in the windows of outlook attention, two apart, one of an even number stands once
    changed, place = read.clone(), tuple(min(size - 1, size // part | 1) for size in read.shape)
    if at is not None:
        place = (*(0 for _ in read.shape[:-2]), *(min(at, size - 1) for size in read.shape[-2:]))
    if nothing:
        changed = read
    elif everywhere:
        changed = other_than(read)
    elif read.is_floating_point():
        changed[place] += 1 + read.abs().max()
    else:
        changed[place] = read.min() if read[place] != read.min() else read.max()
    same = [x for x in tensors if x.data_ptr() == read.data_ptr() and x.shape == read.shape]

    def instead(x: Any) -> Any:
        if any(x is one for one in same):
            return changed
        if beside and any(x is one for one in tensors) and (x.is_floating_point() or are_ids(x)):
            return other_than(x)
        if isinstance(x, MutableMapping | list):  # what layers hand on in it stays as this pass has left it
            return copy(x)
        return None if hasattr(x, "get_seq_length") else x

    return [instead(x) for x in args], {name: instead(x) for name, x in kwargs.items()}


def are_ids(x: Tensor) -> bool:
    """Whether a tensor holds ids, and neither numbers nor flags."""
    return not x.is_floating_point() and not x.is_complex() and bool((x > 1).any())


def other_than(x: Tensor, number: int = 1) -> Tensor:
    """Another tensor of its kind that differs everywhere: noise of its spread, or ids in another order.

    number: which other one.
    """
    if not x.is_floating_point():
        return x.roll(number, -1)
    # a seed that nobody has drawn his own input with
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(SEED + number))
    spread = x.float().std().nan_to_num().cpu() if x.numel() > 1 else 0.0
    return (drawn * (1 + spread)).to(x.device, x.dtype)
