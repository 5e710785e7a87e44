"""One forward pass in which every attention call of a model is watched, and asked whose tokens it is of.

When a module that called attention has run, it is run again with something of what it read changed; what is
asked of it is in `diag.models.hooks.axis`. What a pass leaves is small: of V a fingerprint per token, by
which two passes are compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diag.attention.call import AttentionCall
from diag.attention.visibility import hiding, plain
from diag.errors import MeasurementError
from diag.models.hooks.axis import are_in_turn, ask
from diag.models.hooks.combined import Combination
from diag.models.hooks.eager import Product
from diag.models.hooks.layout import layout_of
from diag.models.hooks.linear import Inside, Mixing, Recurrence, is_linear, is_without_softmax
from diag.models.hooks.mode import Arguments, AttentionMode, hooked
from diag.models.hooks.seam import not_its_own
from diag.models.hooks.seen import ABOVE, ELSEWHERE, EVERYTHING, NOT_LINEAR, REASONS, Running, Seen


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


class Survey(AttentionMode):
    """The calls of one pass.

    seen: in order. softmaxes: those that modules made themselves of scores, and of which it was not seen what
    is weighed with them: path and shape, by their number. not_read: modules that called attention
    that cannot be read, and why. runs: how often each module ran; of a module that makes the calls of several
    layers in turn, which are `in_turn`, how many these were.
    """

    stack: list[Running]  # type: ignore[assignment]

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
            self.stack.append(Running(path, self.runs[path]))
            self.runs[path] += 1

    def left(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.again is not None or self.off:
            return
        frame = self.stack.pop()
        with self.unseen():  # what is computed to compare two runs
            self._left(frame, module, args, kwargs, output)
        if self.stack:
            self.stack[-1].made += frame.made
            self.stack[-1].waiting += frame.waiting

    def _left(self, frame: Running, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Asks what a module has called, and lets go of what no other one is to be asked of."""
        if output is not None and self.asked and any(x.is_open(frame) or x.unequal for x in frame.waiting):
            ask(frame, args, kwargs, partial(self._again, frame, module), self._print)
        if output is not None and frame.maps is not None and frame.maps.adds_up:
            self._note_maps(frame, frame.maps)
        elif output is not None and are_in_turn(frame, args, kwargs, partial(self._again, frame, module)):
            self.runs[frame.path] = frame.run + len(frame.made)
            self.in_turn.add(frame.path)
        for seen in frame.waiting:
            seen.open -= 1
        left = [seen for seen in frame.waiting if seen.open and seen.waits(frame)]
        for seen in frame.waiting:
            if seen not in left:
                seen.close()
        frame.waiting = left

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

    def _note_maps(self, frame: Running, maps: Combination) -> None:
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

    def _again(
        self,
        frame: Running,
        module: nn.Module,
        given: tuple[list, dict] | None,
        disturbed: int | None = None,
    ) -> list[tuple[Tensor | None, Tensor]] | None:
        """Queries and values of all calls when a module is run again; None where that does not go.

        disturbed: of which of its calls the output is changed at one token.
        """
        if given is None:
            return None
        self.disturbed = disturbed
        self.again, self.most_again = [], len(frame.made)
        before, self.off = self.off, False
        self.stack.append(Running(frame.path, frame.run))
        try:
            with suppress(_Enough):
                module.forward(*given[0], **given[1])
        except Exception:  # a module's own code, on what it was not made for: it cannot be asked
            return None
        finally:
            self.stack.pop()
            self.off = before
            again, self.again, self.disturbed = self.again, None, None
        return again if len(again) == len(frame.made) else None
