"""Follows what comes of a softmax that a model computes itself to the product with its values.

Every entry of the weights carries a label: which entry of the softmax it comes from. Views and copies are
done to the labels as they are done to the weights, so that no axis is ever guessed: at a product, the labels
say whether it is the axis of keys that is contracted, and which axes are queries, heads and rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
SOFTMAX = {aten._softmax.default, aten._safe_softmax.default, aten._log_softmax.default}
PRODUCTS = {aten.bmm.default: 0, aten.mm.default: 0, aten.baddbmm.default: 1, aten.addmm.default: 1}
"""Operators, and where in their arguments the first factor stands."""
COPIES = {
    aten.clone.default,
    aten.constant_pad_nd.default,
    aten.roll.default,
    aten.flip.default,
    aten.index_select.default,
    aten.cat.default,
    aten.repeat.default,
}
RESHAPES = {aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default}
"""Labels do not lie in memory as the weights do, and may have to be copied."""
ALIKE = {aten._to_copy.default, aten.native_dropout.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor}
NORMS = {
    aten.native_layer_norm.default,
    aten.native_group_norm.default,
    aten.native_batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
}
"""What makes other weights of weights, each in its place."""
SUMS = {aten.sum.dim_IntList: 1, aten.logsumexp.default: 1}
NOTHING, FAINT, LEAST = -1e30, -60.0, 1e-26
"""A score that sees nothing; next to a row's largest, one that hides a key; a weight that is none."""
GAP = 30.0
"""Scores that a mask hides lie so far below the others; those of one softmax lie closer together."""


@dataclass(frozen=True)
class Weights:
    """A tensor that holds weights of a softmax.

    labels: of each entry, its place in a tensor of `shape`. key: the axis of `shape` that holds keys; None
    until a sum says so (weights that are made by exp). scores: what the softmax was taken of, where places
    are still those of that tensor.
    """

    tensor: Tensor
    labels: Tensor
    shape: tuple[int, ...]
    key: int | None
    scores: Tensor | None
    before: Tensor
    origin: list[Any]

    def at(self, labels: Tensor) -> list[Tensor]:
        """The coordinates of labels, one tensor for each axis."""
        return list(torch.unravel_index(labels.clamp(min=0), self.shape))


@dataclass
class Product:
    """Weights times values: `[…, query, key]`, `[…, key, dim]`, `[…, query, dim]`.

    scores: of these weights, where it is known. before: all that the softmax was taken of, keys last.
    """

    pattern: Tensor
    value: Tensor
    output: Tensor
    scores: Tensor | None
    before: Tensor

    @property
    def visible(self) -> Tensor:
        """Whether each query sees each key."""
        seen = self.pattern.abs() > (LEAST if self.scores is None else 0)
        if self.scores is not None:
            top = self.scores.amax(-1, keepdim=True)
            seen = seen & (self.scores > top + _faint(self.scores - top)) & (self.scores > NOTHING)
        return seen


class Follower:
    """Knows the weights that are alive; `step` is told of every operator that ran."""

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        self.known: dict[int, Weights] = {}
        self.totals: dict[
            int, tuple[Tensor, int]
        ] = {}  # log-sums and scores less these, and the axis of keys
        self.parameters = {x.untyped_storage().data_ptr() for x in parameters if not x.is_meta}

    def start(self, func: Any, args: Any, out: Tensor, origin: list[Any]) -> None:
        """A softmax, or an exp that may become one, ran."""
        key = args[1] % out.ndim if func in SOFTMAX else self.totals.get(id(args[0]), (None, None))[1]
        labels = torch.arange(out.numel()).view(out.shape)
        scores = args[0].detach().double()
        self._know(Weights(out, labels, tuple(out.shape), key, scores, scores, origin))

    def of(self, tensor: Any) -> Weights | None:
        """What is known of a tensor."""
        return self.known.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def _know(self, weights: Weights) -> None:
        self.known[id(weights.tensor)] = weights

    def step(self, func: Any, args: Any, kwargs: Any, out: Any) -> Iterator[tuple[list[Any], Product | None]]:
        """What an operator did to weights; yields where they are multiplied with values, once per product."""
        flat = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg])]
        found = [weights for x in flat if (weights := self.of(x)) is not None]
        result = out[0] if isinstance(out, tuple) else out
        if func is aten.logsumexp.default:
            self.totals[id(out)] = out, args[1][0] % args[0].ndim
        elif func is aten.sub.Tensor and id(args[1]) in self.totals:
            self.totals[id(out)] = out, self.totals[id(args[1])][1]
        if not found:
            return
        if func in PRODUCTS:
            yield from self._product(args[PRODUCTS[func]], args[PRODUCTS[func] + 1], result)
        elif func in SUMS:
            self._summed(found[0], args[SUMS[func]])
        elif func is aten.convolution.default and tuple(args[1].shape[2:]) == (1,) * (args[1].ndim - 2):
            self._mixed(
                found[0].labels.movedim(1, -1), found[0], result, lambda labels: labels.movedim(-1, 1)
            )
        elif isinstance(out, list | tuple) and func.is_view:
            for tensor, labels in zip(out, func(found[0].labels, *args[1:], **(kwargs or {})), strict=True):
                self._know(replace(found[0], tensor=tensor, labels=labels))
        elif isinstance(result, Tensor):
            self._carried(func, args, kwargs or {}, found, result)

    def _carried(self, func: Any, args: Any, kwargs: Any, found: list[Weights], result: Tensor) -> None:
        first = found[0]
        if func in RESHAPES:
            self._know(replace(first, tensor=result, labels=first.labels.reshape(result.shape)))
        elif func is aten.as_strided.default:
            return  # a view of memory, not of axes
        elif func.is_view or func in COPIES:
            if isinstance(args[0], list | tuple):
                labels = [known.labels if (known := self.of(x)) else torch.full(x.shape, -1) for x in args[0]]
                moved = func(labels, *args[1:], **kwargs)
            elif func is aten.constant_pad_nd.default:
                moved = func(first.labels, args[1], -1)
            elif self.of(args[0]) is None:
                return
            else:
                moved = func(first.labels, *args[1:], **kwargs)
            if isinstance(moved, Tensor):
                self._know(replace(first, tensor=result, labels=moved))
        elif func in NORMS:
            if result.shape == first.labels.shape:
                self._know(replace(first, tensor=result, scores=None))
        elif torch.Tag.pointwise in func.tags or func in ALIKE:
            like = next((one for one in found if one.labels.shape == result.shape), first)
            try:
                labels = like.labels.expand(result.shape)
            except RuntimeError:
                return
            self._know(replace(like, tensor=result, labels=labels))

    def _summed(self, weights: Weights, axes: Any) -> None:
        """A sum over the axis of keys says which it is."""
        axes = [axes] if isinstance(axes, int) else list(axes or [])
        if weights.key is not None or len(axes) != 1:
            return
        along = weights.labels.movedim(axes[0], -1).reshape(-1, weights.labels.shape[axes[0]])[0]
        vary = [axis for axis, place in enumerate(weights.at(along)) if len(place.unique()) > 1]
        if len(vary) == 1:
            for known in list(self.known.values()):
                if known.origin is weights.origin:
                    self._know(replace(known, key=vary[0]))

    def _mixed(
        self, labels: Tensor, weights: Weights, result: Tensor, placed: Callable[[Tensor], Tensor]
    ) -> None:
        """Weights that were mixed along the last axis of `labels`, such as those of talking heads.

        placed: labels `[…, mixed]` -> in the axes of `result`.
        """
        places = weights.at(labels)
        vary = [n for n, place in enumerate(places) if bool((place != place[..., :1]).any())]
        if len(vary) != 1 or vary[0] == weights.key:
            return
        count = result.numel() // (labels.numel() // labels.shape[-1])
        shape = tuple(count if n == vary[0] else size for n, size in enumerate(weights.shape))
        new = [place[..., :1].expand(*place.shape[:-1], count) for place in places]
        new[vary[0]] = torch.arange(count).expand_as(new[0])
        moved = torch.zeros((), dtype=torch.long)
        for place, size in zip(new, shape, strict=True):
            moved = moved * size + place
        self._know(
            Weights(result, placed(moved), shape, weights.key, None, weights.before, weights.origin),
        )

    def _product(
        self, left: Tensor, right: Tensor, out: Tensor
    ) -> Iterator[tuple[list[Any], Product | None]]:
        for one, other, result in ((left, right, out), (right.mT, left.mT, out.mT)):
            weights = self.of(one if one is left else right)
            if weights is None:
                continue
            of_model = other.untyped_storage().data_ptr() in self.parameters
            labels = weights.labels if one is left else weights.labels.mT
            flat = (-1, *one.shape[-2:])
            places = weights.at(labels.reshape(flat))
            vary = [n for n, place in enumerate(places) if bool((place != place[..., :1]).any())]
            single = not vary and weights.key is not None and weights.shape[weights.key] == 1
            if weights.key is not None and (vary == [weights.key] or single):
                if of_model:  # a linear map of probabilities
                    continue
                found = _arranged(
                    weights,
                    labels.reshape(flat),
                    one.reshape(flat).detach().double(),
                    other.reshape(-1, *other.shape[-2:]).detach().double(),
                    result.reshape(-1, *result.shape[-2:]).detach().double(),
                )
                yield weights.origin, found
            elif weights.key is not None and len(vary) == 1 and _same(other):
                self._mixed(labels, weights, out, lambda x, one=one: x if one is left else x.mT)  # type: ignore[misc]


def _same(factor: Tensor) -> bool:
    """Whether a factor is one matrix for all rows, as the parameters that mix heads are."""
    return factor.ndim == 2 or bool((factor == factor[:1]).all())


def _arranged(weights: Weights, labels: Tensor, a: Tensor, v: Tensor, y: Tensor) -> Product | None:
    """A product `[n, q, k]`, `[n, k, d]`, `[n, q, d]` in the axes of the softmax, queries and keys last."""
    assert weights.key is not None
    n, rows, _keys = a.shape
    places = weights.at(labels)
    order = places[weights.key][0, 0].argsort()
    of_row = [place[..., 0] for place in places]  # [n, row]
    others = [axis for axis in range(len(weights.shape)) if axis != weights.key]
    along = [axis for axis in others if bool((of_row[axis] != of_row[axis][:, :1]).any())]
    if not along:
        along = others[-1:] if rows == 1 else []
    if not along:
        return None
    query = min(along, key=lambda axis: abs(weights.shape[axis] - weights.shape[weights.key]))
    lead = [axis for axis in others if axis != query]
    place = torch.zeros(n, rows, dtype=torch.long)
    for axis in lead:
        place = place * weights.shape[axis] + of_row[axis]
    ranked = (place * weights.shape[query] + of_row[query]).flatten()
    by = ranked.argsort(stable=True)
    counts = torch.unique(ranked, return_counts=True)[1]
    queries = len(of_row[query].unique())
    repeats = int(counts[0])
    if bool((counts != repeats).any()) or len(counts) % queries:
        return None
    groups = len(counts) // queries
    grid = by.view(groups, queries, repeats).transpose(1, 2)  # [group, repeat, query]
    source = grid // rows  # which n each row comes from
    if bool((source != source[..., :1]).any()):
        return None  # every query has values of its own
    sizes = [len(of_row[axis].unique()) for axis in lead]
    if prod(sizes) != groups or not sizes:
        sizes = [groups]
    shape = (*sizes, repeats) if repeats > 1 else tuple(sizes)

    def formed(x: Tensor) -> Tensor:
        """`[group, repeat, …]` with the axes of the softmax in front."""
        x = x.view(*shape, *x.shape[2:])
        return x.movedim(len(sizes), 0) if repeats > 1 else x

    flat = a.flatten(0, 1)[grid][..., order]
    scores = None
    if weights.scores is not None:
        scores = formed(weights.scores.flatten()[labels.clamp(min=0).flatten(0, 1)[grid]][..., order])
    value, output = formed(v[source[..., 0]][..., order, :]), formed(y.flatten(0, 1)[grid])
    before = weights.before.movedim((query, weights.key), (-2, -1))
    return Product(formed(flat), value, output, scores, before)


def _faint(below: Tensor) -> float:
    """How far below the largest of its row a score is hidden: under the first wide gap among the faint."""
    levels = below[below.isfinite() & (below > 2 * NOTHING)].flatten().sort(descending=True).values
    gaps = (levels[:-1] - levels[1:] > GAP) & (levels[1:] < FAINT)
    return (levels[:-1][gaps][0].item() - GAP / 2) if bool(gaps.any()) else -math.inf
