"""Kernels that compute the same numbers faster; each is tested against a dense float64 reference."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diag.attention.call import AttentionCall
    from diag.attention.statistics import SoftmaxStatistics, ValueStatistics


def fused_statistics(call: AttentionCall) -> SoftmaxStatistics | None:
    """The statistics of a call on CUDA in one pass; None where plain PyTorch has to compute them."""
    if not _has_triton(call):
        return None
    from diag.attention.kernels import triton_scores, triton_statistics

    return triton_statistics.softmax_statistics(call) if triton_scores.supports(call) else None


def fused_values(call: AttentionCall, among: Tensor, rows: Tensor, least: float) -> ValueStatistics | None:
    """Norms, products and sums of values and outputs on CUDA; None where plain PyTorch has to compute them.

    The arguments are those of `diag.attention.values.value_statistics`.
    """
    if not _has_triton(call):
        return None
    from diag.attention.kernels import triton_values

    known = triton_values.supports_values(call)
    return triton_values.value_statistics(call, among, rows, least) if known else None


def fused_quantities(
    call: AttentionCall,
    softmax: Callable[[], SoftmaxStatistics],
    wanted: Collection[str],
    givers: Tensor,
    places: Tensor | None,
    prefix: int,
) -> dict[str, Tensor]:
    """Those of the wanted quantities of `diag.metrics.pattern_pass` that kernels compute; none off CUDA.

    Of all query rows, whatever sample of them the call has; only the entropy is that of the sampled ones.
    A row that sees no key may hold anything.

    softmax: gives the statistics of the call; asked for only where something is read off them.
    givers: the rows of each set that give to `received`, `[set, batch, head, token]`.
    places: coordinates of every token, `[token, 2]`, for Euclidean distance; None for |i - j|.
    prefix: tokens before the first that has a place.
    """
    if not _has_triton(call):
        return {}
    from diag.attention.kernels import triton_received, triton_scores, triton_statistics

    if not triton_scores.supports(call):
        return {}
    of_softmax = {"own": "self_weight", "first": "first_weight", "entropy": "entropy"}
    found = {name: getattr(softmax(), of_softmax[name]) for name in of_softmax.keys() & set(wanted)}
    if "received" in wanted:
        normaliser = softmax().log_normaliser
        assert normaliser is not None
        found["received"] = triton_received.received(call, normaliser, givers)
    if "distance" in wanted:
        none = torch.zeros(call.batch, 0, dtype=torch.long)
        rows = triton_statistics.row_statistics(call, none, distances=True, places=places, prefix=prefix)
        for name in ("distance", "distance_square", "placed"):
            found[name] = getattr(rows, name)
    return found


def _has_triton(call: AttentionCall) -> bool:
    """Triton comes with PyTorch's builds for CUDA on Linux only, and its import takes a second."""
    return call.output.is_cuda and importlib.util.find_spec("triton") is not None
