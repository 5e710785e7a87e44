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
from diag.models.hooks.products import PRODUCTS, read_axes

SOFTMAX, LOGARITHM, EXPONENTIAL = {"softmax", "softmin"}, "log_softmax", "exp"
REORDERED = {"flip", "fliplr", "flipud", "roll", "gather", "take_along_dim"}
RESHAPED = {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"}
ATTRIBUTES = {"T", "mT", "H", "mH"}
MASKING = {"masked_fill", "mul", "imul", "where", "setitem", "tril", "triu", "masked_scatter"}
"""Names of functions, without underscores: what begins weights, moves or masks them."""
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
        # products of exponentials that nothing has divided yet; None of what has been made of one
        self.undivided = WeakTensorKeyDictionary()
        self.starts = 0

    def product_of(self, func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Product | None:
        """The product of weights with values that a function is about to make, if it is one.

        Exponentials may be multiplied with values first, and divided by their sum afterwards: it is the
        division that makes it then.
        """
        if not (self.known or self.undivided):
            return None
        if name_of(func) in DIVIDED | SCALED:
            return self._divided(name_of(func), args)
        found = self._product(func, args, kwargs)
        return found if found is not None and _are_weights(found) else None

    def seen(
        self, func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> torch.Size | None:
        """A function has run; follows what it returned, if that holds weights.

        Gives the shape of the scores where this was a softmax of what may be some, or the end of one; empty
        where that is not known.
        """
        name = name_in_torch(func)
        # functions that begin parameters are called by keywords
        written = next(tensors_in(args, kwargs), None) if in_place(func) else kwargs.get("out")
        if written is not None:
            self._written(written)
        if name in SOFTMAX or name == LOGARITHM:
            return self._begin(name, args, kwargs, result)
        if name == EXPONENTIAL:
            return self._exponential(args, result)
        if not (self.known or self.undivided):
            return None
        late = next((x for x in args[:2] if isinstance(x, Tensor) and x in self.undivided), None)
        if late is not None and name in DIVIDED and late is args[0] and isinstance(args[1], Tensor):
            self.starts += 1  # by what is not known to be the sum of weights, or several products are
            return torch.Size()
        if late is not None and name in MOVED | SAME | SCALED | ADDED.keys():
            for part in [result] if isinstance(result, Tensor) else result:
                self.undivided[part] = None
        of = [x for x in tensors_in(args, kwargs) if self._of(x) is not None]
        if not of:
            return None
        known = self._of(of[0])
        assert known is not None
        if known.state == UNDIVIDED and (product := self._product(func, args, kwargs)) is not None:
            if (product.pattern >= 0).all():
                self.undivided[result] = product
        elif in_place(func):
            if of[0] is args[0]:
                self._keep(name, known, of[0], args, kwargs, of[0])
        elif name in MOVED | ATTRIBUTES | REORDERED:
            if args and args[0] is of[0]:
                self._move(func, known, of[0], args[1:], kwargs, result)
        elif isinstance(result, Tensor) and result.is_floating_point() and name not in NO_WEIGHTS:
            self._keep(name, known, of[0], args, kwargs, result)
        return None

    # --- products

    def _product(self, func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Product | None:
        """A product of what is on its way, whether it holds weights by now or not."""
        read = read_axes(name_in_torch(func), args, kwargs)
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

    def _divided(self, name: str, args: Sequence[Any]) -> Product | None:
        """The product of weights that their sum divides only after they met the values, or one over it."""
        for given, other in (args[:2], args[1::-1]) if len(args) > 1 else ():
            found = self.undivided.get(given) if isinstance(given, Tensor) else None
            if found is None or not isinstance(other, Tensor) or not _broadcasts(other, given):
                continue
            factor = found.output(other.expand(given.shape))
            rows = factor[..., :1]
            pattern = found.pattern / rows if name in DIVIDED else found.pattern * rows
            if (factor == rows).all() and _sum_to_one(pattern):
                return replace(found, pattern=pattern)
        return None

    # --- one function

    def _of(self, x: Any) -> Weights | None:
        return self.known.get(x) if isinstance(x, Tensor) else None

    def _begin(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor
    ) -> torch.Size | None:
        scores = args[0] if args else kwargs.get("input")
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if not isinstance(scores, Tensor) or not isinstance(dim, int) or not _may_be_scores(scores):
            return None
        state = WEIGHTS if name in SOFTMAX else LOGARITHMS
        known: Tensor | None = -scores if name == "softmin" else scores
        known = None if _shares_memory(scores, result) else known  # written over
        self.known[result] = Weights(self.starts, dim % scores.ndim, known, state)
        self.starts += 1
        tells = name in SOFTMAX and (scores.ndim > 3 or scores.shape[-1] == scores.shape[-2])
        return scores.shape if tells else None

    def _written(self, x: Any) -> None:
        """Lets go of scores that something is written over."""
        if isinstance(x, Tensor):
            for of, known in [*self.known.items()]:
                if known.scores is not None and _shares_memory(known.scores, x):
                    self.known[of] = replace(known, scores=None)

    def _exponential(self, args: Sequence[Any], result: Any) -> torch.Size | None:
        before = self._of(args[0]) if args else None
        if before is not None and before.state == LOGARITHMS:
            self.known[result] = replace(before, state=WEIGHTS)
            return result.shape
        if args and isinstance(args[0], Tensor) and _may_be_scores(args[0]):
            # the axis is known when something divides it
            kept = None if _shares_memory(args[0], result) else args[0]
            self.known[result] = Weights(self.starts, result.ndim - 1, kept, UNDIVIDED)
            self.starts += 1
        return None

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
        name = name_of(func)
        numbers = torch.arange(of.shape[known.axis], device=of.device).view(
            [-1 if axis == known.axis else 1 for axis in range(of.ndim)]
        )
        numbers = numbers.expand(of.shape)  # of each element's key
        for place, one in enumerate([result] if isinstance(result, Tensor) else [*result]):
            if name not in RESHAPED and not _shares_memory(one, of):  # picked out: so would scores be, a copy
                if one.ndim == of.ndim:
                    self.known[one] = replace(known, scores=None)
                continue

            def moved(x: Tensor | None, place: int = place, like: Tensor = one) -> Tensor | None:
                if x is None or x.shape != of.shape:
                    return None
                if name in RESHAPED:
                    return _viewed(x, like.shape)
                found = func(x, *args, **kwargs)
                return found if isinstance(found, Tensor) else found[place]

            at = moved(numbers)
            axes = [] if at is None else [a for a, size in enumerate(at.shape) if size > 1 and at.stride(a)]
            if len(axes) == 1:
                self.known[one] = replace(known, axis=axes[0], scores=moved(known.scores))

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
            read = read_axes(name, args, kwargs)
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


def name_in_torch(func: Callable) -> str:
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


def _viewed(x: Tensor, shape: torch.Size) -> Tensor | None:
    """The tensor in another shape; None where its elements would have to be copied for it."""
    try:
        return x.view(shape)
    except RuntimeError:
        return None


# --- products


def _broadcasts(x: Tensor, to: Tensor) -> bool:
    """Whether a tensor expands to the shape of another one."""
    sizes = zip(reversed(x.shape), reversed(to.shape), strict=False)
    return x.ndim <= to.ndim and all(size in (1, other) for size, other in sizes)


def _are_weights(found: Product) -> bool:
    """Whether weights are what values meet; exponentials are as well where they sum to 1: of s − log Σ exp s.

    Decays of a recurrence that forgets at once are ones and zeros.
    """
    state, x = found.weights.state, found.pattern
    if state != UNDIVIDED or not x.numel():
        return state == WEIGHTS
    spread = bool((x.amax(-1) < 1 - 1e-3).any())
    return spread and _sum_to_one(x)


def _sum_to_one(x: Tensor) -> bool:
    """Whether all rows do, but for rounding."""
    full = torch.promote_types(x.dtype, torch.float32)
    return bool((x.sum(-1, dtype=full) - 1).abs().max() < max(1e-3, 4 * torch.finfo(x.dtype).eps))


def _product(
    known: Weights, weights: Tensor, own: list[str], value: Tensor, others: list[str], of_result: list[str]
) -> Product | None:
    """The product in the order of attention; None where it does not weigh values along the axis of keys."""
    key = own[known.axis]
    if key not in others or key in of_result:
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
