"""Products of two tensors, read by their axes: which are side by side, and which are contracted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

PRODUCTS = {"matmul", "bmm", "mm", "rmatmul", "einsum", "baddbmm"}
"""Names of functions, without underscores."""

Read = tuple[tuple[Tensor, Tensor], tuple[list[str], list[str]], list[str]]
"""Two operands, the labels of their axes, and those of the result."""


def read_axes(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Read | None:
    """The axes of a product of two tensors; None of what is none."""
    if name == "einsum":
        return _einsum(args)
    if name == "baddbmm" and len(args) == 3 and kwargs.get("alpha", 1) == 1:
        alone = kwargs.get("beta", 1) == 0 or not args[0].any()
        return _matmul(*args[1:]) if alone else None
    if name not in PRODUCTS or len(args) + len(kwargs) != 2:
        return None
    one, other = (*args, *kwargs.values())
    return _matmul(other, one) if name == "rmatmul" else _matmul(one, other)


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
