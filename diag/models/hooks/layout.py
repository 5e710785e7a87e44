"""How the tensors of an attention call hold their heads, read off what the output projection contracts.

A module may keep heads in an axis of their own, `[batch, head, token, dim]` or, with windows,
`[batch, window, head, token, dim]`, or merge them into the first axis. Neither class nor attribute names
tell: what the projection reads does, because each of its rows is one token with all heads side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 8
"""Rows of a candidate that are looked for in what the projection reads."""


@dataclass(frozen=True)
class Layout:
    """Where the heads of a call are.

    axis: of heads, among the axes before those of tokens and dims; 2 of four is `[batch, token, head, dim]`.
    merged: how many heads are merged into axis 0; `axis` then says on which side of it they stand once it
        is split in two: 1 behind the rest, 0 in front of it. 0 where they have an axis of their own.
    """

    axis: int
    merged: int = 0

    def split(self, x: Tensor) -> Tensor:
        """To `[row, head, token, dim]`: what is not heads is rows. A view where that is possible."""
        if x.ndim == 4 and self == PLAIN:
            return x
        if self.merged:
            x = x.unflatten(0, (-1, self.merged) if self.axis else (self.merged, -1))
        x = x.movedim(self.axis, -3)
        return x[None] if x.ndim == 3 else x.flatten(0, -4)

    def joined(self, x: Tensor, like: Tensor) -> Tensor:
        """Back from `[row, head, token, dim]` to the shape of `like`, which was split."""
        if like.ndim == 4 and self == PLAIN:
            return x
        if like.ndim == 4 and self.axis == 2:  # tokens stand before heads
            return x.transpose(1, 2)
        lead = list(like.shape[:-2])
        if self.merged:
            rest = lead[0] // self.merged
            lead = [*((rest, self.merged) if self.axis else (self.merged, rest)), *lead[1:]]
        others = [size for axis, size in enumerate(lead) if axis != self.axis]
        return x.view(*others, *x.shape[1:]).movedim(-3, self.axis).reshape(like.shape)

    def split_mask(self, mask: Tensor, shape: torch.Size) -> Tensor:
        """A mask that broadcasts to the scores `[…, token, token]`, as one of `[row, head, token, token]`.

        shape: of the query.
        """
        if len(shape) == 4 and self == PLAIN:
            return mask
        lead = len(shape) - 2
        mask = mask[(None,) * (lead + 2 - mask.ndim)] if mask.ndim < lead + 2 else mask
        if all(size == 1 for size in mask.shape[:-2]):
            return mask.reshape(1, 1, *mask.shape[-2:])
        return self.split(mask.expand(*shape[:-2], *mask.shape[-2:]))


PLAIN = Layout(1)
"""`[batch, head, token, dim]`."""
TOKENS_FIRST = Layout(2)
"""`[batch, token, head, dim]`, as the libraries of recurrences have it."""


def plain_layout(output: Tensor) -> Layout | None:
    """The layout that needs no test: heads right before tokens, in the usual four axes; None of others."""
    return PLAIN if output.ndim == 4 else None


def layout_of(output: Tensor, read: Tensor) -> Layout | None:
    """The layout of a call's output of which a projection reads the heads of each token side by side.

    output: `[…, token, dim]`. read: what the projection was given, `[…, channel]`.
    None where it reads something else.
    """
    width, rows = read.shape[-1], read.reshape(-1, read.shape[-1])
    most, best = 0, None
    for layout in _candidates(output, width):
        found, looked_for = _found(layout.split(output), rows)
        if found > most:
            most, best = found, layout
        if found == looked_for:
            break
    return best


def sized_layout(output: Tensor, width: int) -> Layout | None:
    """The only layout in which a token has `width` channels; None where that does not tell it.

    Where merged heads may stand on either side of the rows, they are taken to stand behind them: were it the
    other way, rows would be those of other inputs, which the owner test tells.
    """
    possible = list(_candidates(output, width))
    heads = {layout.merged for layout in possible}
    return possible[0] if len(possible) == 1 or (len(heads) == 1 and 0 not in heads) else None


def merged_layout(output: Tensor, changed: Tensor) -> Layout | None:
    """Where heads are in `[row, token, dim]`, by the rows that changed with one element of what was read.

    changed: their numbers; each head of that input is among them. None where they are not evenly apart.
    """
    rows, heads = output.shape[0], len(changed)
    if output.ndim != 3 or not heads or rows % heads:
        return None
    if (
        torch.equal(changed, torch.arange(heads, device=changed.device) + changed[0])
        and not changed[0] % heads
    ):
        return Layout(1, heads)
    apart = torch.equal(changed.diff(), torch.full_like(changed[1:], rows // heads))
    return Layout(0, heads) if apart else None


def _candidates(output: Tensor, width: int) -> Iterator[Layout]:
    """Layouts in which each token has so many channels, the usual ones first."""
    *lead, _, dim = output.shape
    for axis in reversed(range(len(lead))):
        if lead[axis] * dim == width and not (len(lead) == 1 and axis == 0):
            yield Layout(axis)
    heads, rest = divmod(width, dim)
    if lead and not rest and lead[0] % heads == 0:
        yield Layout(1, heads)
        if heads not in (1, lead[0]):
            yield Layout(0, heads)


def _found(split: Tensor, rows: Tensor) -> tuple[int, int]:
    """How many of a few tokens, their heads side by side, are among the rows, and how many were sought."""
    inputs, heads, tokens, dim = split.shape
    places = torch.linspace(0, inputs * tokens - 1, min(ROWS, inputs * tokens)).long()
    few = split[places // tokens, :, places % tokens].reshape(len(places), heads * dim)
    first = rows[:, 0]
    alike = (rows[first == token[0]] == token for token in few)  # most rows differ in the first channel
    return sum(bool(each.all(-1).any()) for each in alike), len(few)
