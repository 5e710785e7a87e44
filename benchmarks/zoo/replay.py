"""Of which tokens an eager call's queries and values are: read off what changes when one number does.

What reaches an operator has no gradients. So a module around the call is run again with one element of what
it was given changed. Where one row of scores and one row of V change, of one token, it meets its own value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.eager import FAINT, NOTHING
from zoo.observer import Call, Calls, Frame, Watch, watching
from zoo.provenance import CHANNELS, CROSS, MIXED, MOST_PLACES, ORDER, OWN, POOLED, UNKNOWN

FRAMES = 4
"""How many modules around a call are run again, at most."""


def kinds_of_eager(root: nn.Module, run: Callable[[], object]) -> list[tuple[Call, str]]:
    """The eager calls of one forward pass, each with whose values its tokens meet; `Call.own` is set."""
    with watching(root, graph=True) as watch, torch.no_grad():
        run()
        calls = [call for call in watch.calls if call.eager]
        return [(call, kind_of(watch, call, number)) for number, call in enumerate(calls)]


def kind_of(watch: Watch, call: Call, number: int) -> str:
    """Whose values the tokens of the eager call meet that is the `number`-th of the pass."""
    if call.value is None:
        return UNKNOWN
    queries, keys = call.lengths
    frames = [frame for frame in reversed(call.stack) if not frame.elementary][:FRAMES]
    if queries > keys:
        return _pooled(watch, call, number, frames)
    found = UNKNOWN
    alone: set[str] = set()
    for frame in frames:
        again = _again(watch, frame, frame.args, frame.kwargs, number - frame.before)
        if again is None or again.value is None or again.value.shape != call.value.shape:
            continue  # it draws at random, or remembers what it saw
        for changed in _changed(frame):
            other = _again(watch, frame, *changed, number - frame.before)
            if other is None or other.value is None or other.value.shape != again.value.shape:
                continue
            kind, reads = _compared(call, again, other)
            if kind == OWN:
                return OWN
            if kind == CHANNELS:
                return CHANNELS
            if reads:
                alone.add(reads)
            elif kind == MIXED and number > frame.before:
                continue  # tokens were mixed by attention before it
            elif found == UNKNOWN or kind == ORDER:
                found = kind
        if found != UNKNOWN:
            break
    if queries != keys:
        return _pooled(watch, call, number, frames)
    return CROSS if found == UNKNOWN and len(alone) > 1 else found


def _pooled(watch: Watch, call: Call, number: int, frames: list[Frame]) -> str:
    """Whether queries and values follow one argument of the innermost module that they both follow."""
    if call.lengths[0] == 1:
        return CROSS
    for frame in frames:
        again = _again(watch, frame, frame.args, frame.kwargs, number - frame.before)
        if again is None or again.value is None or again.raw is None:
            continue
        follow: list[tuple[bool, bool]] = []
        for places in zip(_changed(frame), _changed(frame, first=True), strict=True):
            others = [_again(watch, frame, *changed, number - frame.before) for changed in places]
            reached = [_reached(again, other) for other in others if other is not None]
            follow.append(tuple(any(map(bool, of)) for of in zip(*reached, strict=True)) or (False, False))
        if any(rows for rows, _ in follow) and any(queries for _, queries in follow):
            return POOLED if (True, True) in follow else CROSS
    return CROSS


def _again(watch: Watch, frame: Frame, args: Any, kwargs: Any, number: int) -> Call | None:
    """A call of a module that is run again."""
    watch.calls, kept = Calls(), watch.calls
    assert frame.module is not None
    try:
        frame.module(*map(_uncached, args), **{name: _uncached(x) for name, x in kwargs.items()})
        eager = [call for call in watch.calls if call.eager]
        return eager[number] if 0 <= number < len(eager) else None
    except Exception:  # a module that does not run twice, such as one that fills a cache
        return None
    finally:
        watch.calls = kept


def _uncached(x: Any) -> Any:
    """An argument, without the cache that a module has filled when it ran first."""
    return None if hasattr(x, "get_seq_length") else x


def _changed(frame: Frame, *, first: bool = False) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of a module, with one element of one tensor changed, for each of its tensors.

    first: the first one of each, which is among strided tokens, too.
    """
    found = []
    for name in [*range(len(frame.args)), *frame.kwargs]:
        x = frame.args[name] if isinstance(name, int) else frame.kwargs[name]
        if (
            not isinstance(x, Tensor)
            or not x.is_floating_point()
            or x.ndim < 2
            or not 1 < x.numel() <= MOST_PLACES
        ):
            continue
        new = x.detach().clone()
        new[tuple(0 if first else size * 2 // 3 for size in x.shape)] += 3 * float(new.double().std()) + 1
        if isinstance(name, int):
            args = tuple(new if n == name else arg for n, arg in enumerate(frame.args))
            found.append((args, frame.kwargs))
        else:
            found.append((frame.args, frame.kwargs | {name: new}))
    return found


def _compared(call: Call, base: Call, other: Call) -> tuple[str, str]:
    """What a change says of a call, and whether only values or only queries changed."""
    assert base.value is not None
    assert other.value is not None
    one, two = base.raw, other.raw
    if one is None or two is None or one.shape != two.shape:
        return UNKNOWN, ""
    columns = len(_somewhere(_differ(base.value, other.value).any(-2)))
    rows, queries = _reached(base, other)
    if not rows and not queries:
        return UNKNOWN, ""
    if not rows or not queries:
        return UNKNOWN, "queries" if queries else "values"
    if len(rows) == len(queries) == 1:
        (value,), (query,) = rows, queries
        extra = call.lengths[1] - call.lengths[0]
        if (value == query and extra == 0) or (extra > 0 and 0 <= value - query <= extra):
            call.own = value - query
            return OWN, ""
        return ORDER, ""
    if rows == queries and len(rows) * 2 <= call.lengths[1]:
        return OWN, ""  # one place is read by several tokens, which meet their own values
    if len(rows) > 1 and columns == 1 and base.value.shape[-1] > 1:
        return CHANNELS, ""
    return MIXED, ""


def _reached(base: Call, other: Call) -> tuple[set[int], set[int]]:
    """Which keys and which queries are others."""
    one, two = base.raw, other.raw
    if one is None or two is None or one.shape != two.shape or base.value is None or other.value is None:
        return set(), set()
    rows = _somewhere(_differ(base.value, other.value).any(-1))
    seen = (one > one.amax(-1, keepdim=True) + FAINT) & (one > NOTHING)
    apart = (two - one).where(seen & two.isfinite(), torch.nan)
    apart = (
        apart - apart.nanmedian(-1, keepdim=True).values
    ).abs()  # a row may be shifted as a whole, by its maximum
    most = (apart > 1e-6 * one.where(seen, 0).abs().max()).sum(-1) * 2 > seen.sum(-1).clamp(min=2)
    return rows, _somewhere(most)


def _somewhere(found: Tensor) -> set[int]:
    """Places along the last axis where something was found at any place of the others."""
    return set(found.reshape(-1, found.shape[-1]).any(0).nonzero().flatten().tolist())


def _differ(one: Tensor, two: Tensor) -> Tensor:
    one, two = one.nan_to_num(posinf=0, neginf=0), two.nan_to_num(posinf=0, neginf=0)
    scale = one.where(one.abs() < 1e9, 0).abs().max() if one.numel() else 0
    return (one - two).abs() > 1e-6 * scale
