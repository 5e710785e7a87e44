"""What a module or a model is given in the place of its input, to see what follows."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

SEED = 20_241_119
ORDERS = 8
"""Of so many orders of ids the one is taken in which most of them are others than they were."""


def read_by(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], Tensor | None]:
    """The tensors that a module is given, and the one that it reads: the first that holds numbers or ids."""
    given = (*args, *kwargs.values())
    tensors = [x for x in given if isinstance(x, Tensor) and x.ndim >= 2 and x.numel()]
    return tensors, next((x for x in tensors if x.is_floating_point() or are_ids(x)), None)


def with_changed(
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
    tensors, read = read_by(args, kwargs)
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
    """Another tensor of its kind that differs everywhere: noise of its spread, or ids in another order, or
    those before them.

    number: which other one.
    """
    if not x.is_floating_point():
        size = x.shape[-1]
        orders = [x.roll(number + i, -1) for i in range(min(ORDERS, size)) if (number + i) % size]
        if all(
            torch.equal(order, x) for order in orders
        ):  # as of the first ids of all sequences, side by side
            return x + torch.where(x > 0, -1, 1)
        return max(orders, key=lambda order: int((order != x).sum()))
    # a seed that nobody has drawn his own input with
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(SEED + number))
    spread = x.float().std().nan_to_num().cpu() if x.numel() > 1 else 0.0
    return (drawn * (1 + spread)).to(x.device, x.dtype)
