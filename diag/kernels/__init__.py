"""Kernels that compute the same numbers faster; each is tested against a dense float64 reference."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from diag.attention import AttentionCall, SoftmaxStatistics
    from diag.values import ValueStatistics


def fused_statistics(call: AttentionCall) -> SoftmaxStatistics | None:
    """The statistics of a call on CUDA in one pass; None where plain PyTorch has to compute them."""
    if not _has_triton(call):
        return None
    from diag.kernels import triton_scores, triton_statistics

    return triton_statistics.softmax_statistics(call) if triton_scores.supports(call) else None


def fused_values(call: AttentionCall, among: Tensor, rows: Tensor, least: float) -> ValueStatistics | None:
    """Norms, products and sums of values and outputs on CUDA; None where plain PyTorch has to compute them.

    The arguments are those of `diag.values.value_statistics`.
    """
    if not _has_triton(call):
        return None
    from diag.kernels import triton_values

    known = triton_values.supports_values(call)
    return triton_values.value_statistics(call, among, rows, least) if known else None


def _has_triton(call: AttentionCall) -> bool:
    """Triton comes with PyTorch's builds for CUDA on Linux only, and its import takes a second."""
    return call.output.is_cuda and importlib.util.find_spec("triton") is not None
