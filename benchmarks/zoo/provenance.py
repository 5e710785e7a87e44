"""Of which tokens a call's queries and values are: read off gradients, which are exactly zero elsewhere.

One forward pass keeps the graph. Row t of V and row t of Q are differentiated by what the modules around the
call were given: where both depend on one and the same place, and on no other, a token meets its own value.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor, nn

from zoo.observer import Call, watching

OWN, POOLED, CROSS, CHANNELS, MIXED, ORDER, UNKNOWN = (
    "own tokens",
    "the same tokens in other numbers",
    "other tokens",
    "channels",
    "mixed values",
    "another order",
    "unknown",
)
MOST_PLACES = 400_000
"""Elements of an argument beyond which it is not looked at."""


def kinds_of(root: nn.Module, run: Callable[[], object]) -> list[tuple[Call, str]]:
    """The fused calls of one forward pass, each with whose values its tokens meet.

    Raises RuntimeError where the model cannot be differentiated.
    """
    frozen = [p for p in root.parameters() if p.is_floating_point() and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with watching(root, graph=True) as watch, torch.enable_grad():
            run()
        return [(call, kind_of(call)) for call in watch.calls if not call.eager]
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def kind_of(call: Call) -> str:
    """Whose values the call's tokens meet; where there are more keys than queries, `Call.own` is set."""
    queries, keys = call.lengths
    for first in dict.fromkeys((0, keys - queries)) if keys > queries else ():
        if _kind_of(call, first) == OWN:
            call.own = first
            return OWN
    if queries == keys:
        return _kind_of(call, 0)
    return POOLED if queries > 1 and _reads_one(call) else CROSS


def _reads_one(call: Call) -> bool:
    """Whether queries and values follow one and the same tensor that a module around the call was given."""
    assert call.query is not None
    assert call.value is not None
    if not (call.query.requires_grad and call.value.requires_grad):
        return False
    for frame in reversed(call.stack):
        given = [x for x in frame.given if x.is_floating_point() and x.requires_grad and x.ndim >= 2]
        if not given:
            continue
        follow = [
            [g is not None and bool((g != 0).any()) for g in _gradients(x.double().square().sum(), given)]
            for x in (call.query, call.value)
        ]
        if all(map(any, follow)):
            return any(map(all, zip(*follow, strict=True)))
    return False


def _kind_of(call: Call, first: int) -> str:
    """The same, for keys of the queries' own tokens that begin at one of all keys."""
    queries = call.lengths[0]
    query, value = call.query, call.value
    assert query is not None
    assert value is not None
    around: list[Tensor] = []
    for frame in reversed(call.stack):
        around += [x for x in frame.given if x.is_floating_point() and x.requires_grad and x.ndim >= 2]
    around = [x for x in around if x.numel() <= MOST_PLACES][:14]
    if not around or not value.requires_grad or not query.requires_grad:
        return UNKNOWN
    token = queries // 2
    of_value, of_query = (
        _gradients(_row(value, first + token), around),
        _gradients(_row(query, token), around),
    )
    of_column = _gradients(_column(value), around)
    found = UNKNOWN
    reads_value = reads_query = False
    for v, q, column in zip(of_value, of_query, of_column, strict=True):
        at_v, at_q, at_column = _places(v), _places(q), _places(column)
        if len(at_v) == 1 and at_v == at_q:
            return OWN
        if len(at_v) > 1 and len(at_column) == 1:
            return CHANNELS
        if v is not None and at_v == at_q and 1 < len(at_v) < v.numel() // max(v.shape):
            return OWN  # query and value of one token, which is itself made of several places
        if len(at_v) == 1 and len(at_q) == 1:
            found = ORDER
        elif len(at_v) > 1 and len(at_q) >= 1 and found is UNKNOWN and not reads_value:
            found = MIXED
        reads_value |= len(at_v) == 1 and len(at_q) != 1
        reads_query |= len(at_q) == 1 and len(at_v) != 1
    if reads_value and reads_query and found in (UNKNOWN, MIXED):
        return CROSS
    return found


def _row(x: Tensor, token: int) -> Tensor:
    row = x[(0,) * (x.ndim - 2)][token]
    return (row * torch.linspace(1, 2, row.numel(), dtype=row.dtype)).sum()


def _column(x: Tensor) -> Tensor:
    column = x[(0,) * (x.ndim - 2)][:, -1]
    return (column * torch.linspace(1, 2, column.numel(), dtype=column.dtype)).sum()


def _gradients(of: Tensor, by: list[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(of, by, retain_graph=True, allow_unused=True))


def _places(gradient: Tensor | None) -> frozenset[tuple[int, ...]]:
    """Where a gradient is not zero, without channels: the axis without which fewest places remain."""
    if gradient is None:
        return frozenset()
    there = gradient.abs() > 1e-9 * gradient.abs().max()
    if not there.any():
        return frozenset()
    places = [there.any(axis) for axis in range(there.ndim)]
    fewest = min(
        range(there.ndim), key=lambda axis: (int(places[axis].sum()), -prod(there.shape[axis : axis + 1]))
    )
    return frozenset((fewest, *map(int, place)) for place in places[fewest].nonzero())
