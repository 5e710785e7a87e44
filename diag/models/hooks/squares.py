"""Whether keys lie where the queries' tokens do, though there are other numbers of them: pooled in squares.

A grid of tokens is pooled, or strided, to a coarser one. Which place a key has is told by what follows when
one token is changed: a few neighbouring queries and a few neighbouring keys, around one place of the image.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

NEIGHBOURS = 9
"""How many queries, or keys, may follow one token: convolutions are 3 x 3."""
MOST_PREFIX = 8
"""How many tokens may stand before those of the grid."""

Followed = tuple[Tensor, Tensor]
"""Which queries and which keys changed with one token."""


def in_squares(found: Sequence[Followed], queries: int, keys: int, sides: Collection[int]) -> bool:
    """Whether each key is of the tokens in a square around its place, and each query of those around its own.

    found: of some tokens, those that reach a query and a key. sides: how high and wide grids may be, beside
    as high as wide.
    """
    fine, coarse = max(queries, keys), min(queries, keys)
    ordered = [pair if queries >= keys else pair[::-1] for pair in found]
    if not ordered:
        return False
    return any(
        all(_alike(*pair, prefix, width, stride) for pair in ordered)
        for prefix, width, stride in _grids(fine, coarse, sides)
        if all(len(many) < fine - prefix[0] and len(few) < coarse - prefix[1] for many, few in ordered)
    )


def _grids(fine: int, coarse: int, sides: Collection[int]) -> Iterator[tuple[tuple[int, int], int, int]]:
    """Ways to see them as grids: tokens before each, the width of the finer one, and the stride."""
    for before in range(MOST_PREFIX + 1):
        for after in {before, 0}:
            places, fewer = fine - before, coarse - after
            if fewer < 1 or places % fewer:
                continue
            stride = math.isqrt(places // fewer)
            if stride < 2 or stride**2 * fewer != places:
                continue
            known = [side for side in sides if side and places % side == 0 and places // side in sides]
            for width in {*known, math.isqrt(places)}:
                height, rest = divmod(places, width)
                if not rest and width % stride == 0 and height % stride == 0:
                    yield (before, after), width, stride


def _alike(many: Tensor, few: Tensor, prefix: tuple[int, int], width: int, stride: int) -> bool:
    """Whether what changed on the finer grid and on the coarser one lies around one place."""
    many, few = many - prefix[0], few - prefix[1]
    many, few = many[many >= 0], few[few >= 0]
    if not 0 < len(many) <= NEIGHBOURS or not 0 < len(few) <= NEIGHBOURS:
        return False
    here, there = _middle(many, width), _middle(few, width // stride)
    # in steps of the coarser grid; where squares overlap, the middle of several is up to half a step away
    apart = ((here + 0.5) / stride - 0.5 - there).abs()
    spread = 0.5 if len(few) == 1 else 1.0
    return bool((apart <= spread).all())


def _middle(places: Tensor, width: int) -> Tensor:
    return torch.stack([places // width, places % width]).double().mean(1)


def sides_of(given: Sequence[Any]) -> set[int]:
    """The numbers among some arguments that may be sides of a grid: also axes of tensors, and pairs."""
    found = set[int]()
    for x in given:
        parts = x.shape if isinstance(x, Tensor) else x if isinstance(x, tuple | list) else [x]
        found |= {size for size in parts if isinstance(size, int)}
    return found


def in_several_rows(value: Tensor, prints: Tensor) -> bool:
    """Whether a token is a key of several rows, under other numbers, as in windows that overlap.

    value: `[…, key, dim]`, of tokens that all differ. prints: a number for each, `[…, key]`.
    """
    order = prints.flatten().argsort()
    rows = value.flatten(0, -2)[order]
    row, number = order // prints.shape[-1], order % prints.shape[-1]
    alike = ((rows[1:] - rows[:-1]).abs() <= 1e-5 * rows.abs().max()).all(-1)
    return bool((alike & (number.diff() != 0) & (row.diff() != 0)).any())
