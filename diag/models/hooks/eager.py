"""Attention that a model writes out itself: its weights, followed from a softmax to the product with values.

A softmax over scores gives weights; they are cast, dropped, masked, mixed between heads, viewed and moved;
then a product contracts the axis of keys with values. What multiplies the values there is the pattern of the
layer, whatever was done to it before. Of each tensor on the way are known the axis of keys and, as long as
they are moved alike, the scores that it came of. Nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from diag.models.hooks.combined import (
    ADDED,
    DIVIDED,
    JOINED,
    MOVED,
    SAME,
    SCALED,
    in_place,
    name_of,
    tensors_in,
)

SOFTMAX, LOGARITHM, EXPONENTIAL = {"softmax", "softmin"}, "log_softmax", "exp"
PRODUCTS = {"matmul", "bmm", "mm", "rmatmul"}
REORDERED = {"flip", "fliplr", "flipud", "roll", "gather", "take_along_dim"}
ATTRIBUTES = {"T", "mT", "H", "mH"}
MASKING = {"masked_fill", "mul", "imul", "where", "setitem", "tril", "triu", "masked_scatter"}
"""Names of functions, without underscores: what begins weights, multiplies, moves or masks them."""
ALIGNED = SAME | SCALED | DIVIDED | {"dropout", "softmax", "linear", "conv2d", "clamp", "relu", "nan_to_num"}
"""What leaves zero where scores hide a key; of other functions only weights tell."""
NO_WEIGHTS = JOINED | {"sum", "mean", "amax", "max", "sigmoid", "bernoulli", "cumsum"}
"""What of weights gives something else, though it may be of their shape."""

WEIGHTS, LOGARITHMS, UNDIVIDED = "weights", "logarithms", "undivided"


@dataclass(frozen=True, eq=False)
class Weights:
    """A tensor on the way from a softmax to a product.

    start: of the softmax, counted in a pass. axis: of keys. scores: what the softmax was of, of the shape of
        the tensor as far as it can be; None where they have been lost. state: whether it holds weights, their
        logarithms, or exponentials that nothing has divided yet. masked: whether something that may hide
        keys was done after the softmax. altered: whether it may be other than zero where scores hide a key.
        dropout: how many are dropped at random.
    """

    start: int
    axis: int
    scores: Tensor | None
    state: str = WEIGHTS
    masked: bool = False
    altered: bool = False
    dropout: float = 0.0


@dataclass(frozen=True, eq=False)
class Product:
    """A product of weights with values, its axes in the order of PyTorch's attention.

    pattern: `[…, query, key]`. value: `[…, key, dim]`. scores: of the pattern, if they are known; other axes
        may be others than its own where heads are mixed. weights: what is known of them.
    axes: of the product's result, those of `[…, query, dim]`.
    """

    pattern: Tensor
    value: Tensor
    scores: Tensor | None
    weights: Weights
    axes: tuple[int, ...]

    def output(self, result: Tensor) -> Tensor:
        """The result as `[…, query, dim]`."""
        return result.permute(self.axes)

    def result(self, output: Tensor) -> Tensor:
        """Back from `[…, query, dim]`."""
        return output.permute(tuple(self.axes.index(axis) for axis in range(len(self.axes))))


class Followed:
    """All weights that are on their way in one forward pass; a tensor that is gone is forgotten."""

    def __init__(self) -> None:
        self.known = WeakTensorKeyDictionary()
        self.starts = 0

    def product_of(self, func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Product | None:
        """The product of weights with values that a function is about to make, if it is one."""
        if not self.known:
            return None
        name = _name(func)
        if name == "einsum":
            read = _einsum(args)
        elif name == "baddbmm" and len(args) == 3 and (kwargs.get("beta"), kwargs.get("alpha", 1)) == (0, 1):
            read = _matmul(*args[1:])
        elif name in PRODUCTS and len(args) + len(kwargs) == 2:
            one, other = (*args, *kwargs.values())
            read = _matmul(*((other, one) if name == "rmatmul" else (one, other)))
        else:
            return None
        if read is None:
            return None
        operands, labels, of_result = read
        for weights, own, value, others in (
            (operands[0], labels[0], operands[1], labels[1]),
            (operands[1], labels[1], operands[0], labels[0]),
        ):
            known = self._of(weights)
            if known is not None and self._of(value) is None and not isinstance(value, nn.Parameter):
                return _product(known, weights, own, value, others, of_result)
        return None

    def seen(self, func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> bool:
        """A function has run; follows what it returned, if that holds weights. Whether a softmax began."""
        name = _name(func)
        if in_place(func) or kwargs.get("out") is not None:
            self._written(args[0] if in_place(func) else kwargs["out"])
        if name in SOFTMAX or name == LOGARITHM:
            return self._begin(name, args, kwargs, result)
        if name == EXPONENTIAL:
            return self._exponential(args, result)
        if not self.known:
            return False
        of = [x for x in tensors_in(args, kwargs) if self._of(x) is not None]
        if not of:
            return False
        known = self._of(of[0])
        assert known is not None
        if in_place(func):
            if of[0] is args[0]:
                self._keep(name, known, of[0], args, kwargs, of[0])
        elif name in MOVED | ATTRIBUTES | REORDERED:
            if args and args[0] is of[0]:
                self._move(func, known, of[0], args[1:], kwargs, result)
        elif isinstance(result, Tensor) and result.is_floating_point() and name not in NO_WEIGHTS:
            self._keep(name, known, of[0], args, kwargs, result)
        return False

    # --- one function

    def _of(self, x: Any) -> Weights | None:
        return self.known.get(x) if isinstance(x, Tensor) else None

    def _begin(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> bool:
        scores = args[0] if args else kwargs.get("input")
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if not isinstance(scores, Tensor) or not isinstance(dim, int) or not _may_be_scores(scores):
            return False
        state = WEIGHTS if name in SOFTMAX else LOGARITHMS
        known: Tensor | None = -scores if name == "softmin" else scores
        known = None if _shares_memory(scores, result) else known  # written over
        self.known[result] = Weights(self.starts, dim % scores.ndim, known, state)
        self.starts += 1
        return name in SOFTMAX and (scores.ndim > 3 or scores.shape[-1] == scores.shape[-2])

    def _written(self, x: Any) -> None:
        """Lets go of scores that something is written over."""
        if isinstance(x, Tensor):
            for of, known in [*self.known.items()]:
                if known.scores is not None and _shares_memory(known.scores, x):
                    self.known[of] = replace(known, scores=None)

    def _exponential(self, args: Sequence[Any], result: Any) -> bool:
        before = self._of(args[0]) if args else None
        if before is not None and before.state == LOGARITHMS:
            self.known[result] = replace(before, state=WEIGHTS)
            return True
        if args and isinstance(args[0], Tensor) and _may_be_scores(args[0]):
            # the axis is known when something divides it
            kept = None if _shares_memory(args[0], result) else args[0]
            self.known[result] = Weights(self.starts, result.ndim - 1, kept, UNDIVIDED)
            self.starts += 1
        return False

    def _move(
        self,
        func: Callable,
        known: Weights,
        of: Tensor,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,
    ) -> None:
        """Follows a function that only rearranges elements, by what it does to numbers of keys."""

        def moved(x: Tensor) -> list[Tensor]:
            # what is expanded cannot always be viewed
            instead: dict[str, Callable] = {"view": Tensor.reshape, "view_as": Tensor.reshape_as}
            found = instead.get(name_of(func), func)(x, *args, **kwargs)
            return [found] if isinstance(found, Tensor) else [*found]

        results = [result] if isinstance(result, Tensor) else [*result]
        scores = known.scores
        aligned = moved(scores) if scores is not None and scores.shape == of.shape else [None] * len(results)
        for one, numbers, score in zip(results, moved(_numbers(of, known.axis)), aligned, strict=True):
            axes = [axis for axis in range(one.ndim) if _varies(numbers, axis)]
            if len(axes) == 1:
                self.known[one] = replace(known, axis=axes[0], scores=score)

    def _keep(
        self,
        name: str,
        known: Weights,
        of: Tensor,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Tensor,
    ) -> None:
        """Follows a function that leaves keys along their axis: of each element, or a mix of heads."""
        axis = known.axis + result.ndim - of.ndim
        if name == "einsum":
            read = _einsum(args)
            if read is None:
                return
            operands, labels, of_result = read
            own = labels[0] if operands[0] is of else labels[1]
            if own[known.axis] not in of_result:
                return
            axis = of_result.index(own[known.axis])
        elif name in PRODUCTS:  # heads are mixed by a matrix: keys are not contracted
            if result.shape != of.shape:
                return
        elif name == "linear" and known.axis == of.ndim - 1:
            return
        if axis >= result.ndim or axis < 0 or result.shape[axis] != of.shape[known.axis]:
            return
        if known.state == UNDIVIDED and name in DIVIDED:
            along = _summed_axis(args, result)
            if along is None:
                return
            self.known[result] = replace(known, axis=along, state=WEIGHTS)
            return
        same = known.scores is not None and known.scores.ndim == result.ndim and name != "einsum"
        self.known[result] = replace(
            known,
            axis=axis,
            scores=known.scores if same else None,
            masked=known.masked or name in MASKING,
            altered=known.altered or not (name in ALIGNED | MASKING or (name in ADDED and not _added(args))),
            dropout=max(known.dropout, _dropped(name, args, kwargs)),
        )


def _name(func: Callable) -> str:
    """As `name_of`, without the part of PyTorch where it is; that of the attribute where one is read."""
    name = name_of(func).removeprefix("special_").removeprefix("linalg_")
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "get" else name


def _added(args: Sequence[Any]) -> bool:
    """Whether something else than a number is added."""
    return all(isinstance(x, Tensor) for x in args[:2])


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _may_be_scores(x: Tensor) -> bool:
    """Whether a softmax may be one over keys: of queries and keys at the least, and of numbers."""
    square = x.ndim == 2 and x.shape[0] == x.shape[1] > 1
    return x.is_floating_point() and (x.ndim >= 3 or square)


def _dropped(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """How many weights `dropout` drops at random."""
    if name != "dropout":
        return 0.0
    given = dict(zip(("input", "p", "training"), args, strict=False)) | dict(kwargs)
    return float(given.get("p", 0.5)) if given.get("training", True) else 0.0


def _summed_axis(args: Sequence[Any], result: Tensor) -> int | None:
    """Along which axis the divisor is a sum that has been kept; None where that is not one."""
    if len(args) < 2 or not isinstance(args[1], Tensor) or args[1].ndim != result.ndim:
        return None
    axes = [a for a in range(result.ndim) if args[1].shape[a] == 1 and result.shape[a] > 1]
    return axes[0] if len(axes) == 1 else None


def _numbers(like: Tensor, axis: int) -> Tensor:
    """The number of each element's key, expanded to the shape of a tensor."""
    shape = [1] * like.ndim
    shape[axis] = like.shape[axis]
    return torch.arange(like.shape[axis], device=like.device).view(shape).expand(like.shape)


def _varies(x: Tensor, axis: int) -> bool:
    if x.stride(axis) == 0 or x.shape[axis] == 1:
        return False
    return bool((x.narrow(axis, 0, 1) != x.narrow(axis, 1, 1)).any())


# --- products

Read = tuple[tuple[Tensor, Tensor], tuple[list[str], list[str]], list[str]]
"""Two operands, the labels of their axes, and those of the result."""


def _matmul(one: Any, other: Any) -> Read | None:
    """The axes of a product of matrices, which may be many side by side."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)) or min(one.ndim, other.ndim) < 2:
        return None
    lead = [f"lead{n}" for n in range(max(one.ndim, other.ndim) - 2, 0, -1)]
    labels = (
        [*lead[len(lead) - one.ndim + 2 :], "row", "sum"],
        [*lead[len(lead) - other.ndim + 2 :], "sum", "col"],
    )
    return (one, other), labels, [*lead, "row", "col"]


def _einsum(args: Sequence[Any]) -> Read | None:
    """The axes of an einsum of two operands that is written as an equation."""
    if len(args) < 2 or not isinstance(args[0], str):
        return None
    operands = args[1] if isinstance(args[1], tuple | list) else args[1:]
    if len(operands) != 2 or not all(isinstance(x, Tensor) for x in operands):
        return None
    given, arrow, result = args[0].replace(" ", "").partition("->")
    parts = given.split(",")
    if not arrow or len(parts) != 2:
        return None
    dots = [x.ndim - len(part.replace("...", "")) for x, part in zip(operands, parts, strict=True)]
    most = max(dots)

    def labels(part: str, number: int) -> list[str]:
        before, between, after = part.partition("...")
        rest = [f"dot{n}" for n in range(number, 0, -1)] if between else []
        return [*before, *rest, *after]

    one, other = (labels(part, number) for part, number in zip(parts, dots, strict=True))
    return (operands[0], operands[1]), (one, other), labels(result, most)


def _are_weights(known: Weights, x: Tensor) -> bool:
    """Whether a tensor holds weights; exponentials do as well where they sum to 1: of s − log Σ exp s.

    Decays of a recurrence that forgets at once are ones and zeros.
    """
    if known.state != UNDIVIDED or not x.numel():
        return known.state == WEIGHTS
    spread = bool((x.amax(known.axis) < 1 - 1e-3).any())
    return spread and bool((x.sum(known.axis) - 1).abs().max() < 1e-3)


def _product(
    known: Weights, weights: Tensor, own: list[str], value: Tensor, others: list[str], of_result: list[str]
) -> Product | None:
    """The product in the order of attention; None where it does not weigh values along the axis of keys."""
    key = own[known.axis]
    if key not in others or key in of_result or not _are_weights(known, weights):
        return None
    if any(x in others and x not in of_result for x in own if x != key):  # it is summed over more than keys
        return None
    dims = [x for x in of_result if x not in own]
    queries = [x for x in own if x in of_result and x not in others]
    if not dims or not queries or len(of_result) != len({*own, *others}) - 1:
        return None
    sizes = dict(zip(own, weights.shape, strict=True))
    # of several axes that values do not have, such as heads that share theirs, queries are as many as keys
    query = min(queries, key=lambda x: (sizes[x] != sizes[key], abs(own.index(x) - own.index(key))))
    dim = dims[-1]
    lead = [x for x in of_result if x not in (query, dim)]
    full = sizes | {x: n for x, n in zip(others, value.shape, strict=True) if sizes.get(x, 1) == 1}
    full[key] = sizes[key]

    def laid_out(x: Tensor, labels: list[str], last: tuple[str, str]) -> Tensor:
        wanted = [*lead, *last]
        x = x.permute([labels.index(y) for y in wanted if y in labels])
        for place, y in enumerate(wanted):
            if y not in labels:
                x = x.unsqueeze(place)
        return x.expand([full[y] for y in wanted])

    scores = known.scores
    if scores is not None and scores.ndim == weights.ndim:
        scores = scores.permute([own.index(y) for y in [*(y for y in lead if y in own), query, key]])
    else:
        scores = None
    if scores is not None and scores.shape[-2:] != (sizes[query], sizes[key]):
        scores = None
    return Product(
        pattern=laid_out(weights, own, (query, key)),
        value=laid_out(value, others, (key, dim)),
        scores=scores,
        weights=known,
        axes=tuple(of_result.index(y) for y in [*lead, query, dim]),
    )
