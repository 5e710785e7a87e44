"""Kernels that compute the same numbers faster: the one door to Triton, and PyTorch's own flash operator.

What is here. `flash` runs the attention of a watched model and brings back the log-normaliser where the
operator has it anyway. The `triton_*` files compute statistics on CUDA: `triton_statistics` what a query row
holds, `triton_received` what a key receives, `triton_values` norms and products of values and outputs;
`triton_scores` is what the first two share. Whoever wants numbers asks the functions below. They say None, or
leave a quantity out, where plain PyTorch has to compute it, and import Triton only once a call lies on CUDA:
its import takes a second, and it comes with PyTorch's builds for CUDA on Linux alone.

What they see. Queries, keys, values, outputs and mask of one call, read in place whatever their strides, and
what the call's `Visibility` says. No pattern: a call that comes with one goes through plain PyTorch, as do
keys that are not the tokens' own, float64, heads wider than 256, anything a gradient is asked of (there is no
backward), AMD devices, compute capabilities below 8.0, and tensors whose offsets within a head need more than
31 bits.

What they trust. That the mask at hand is the one the model used, and that an entry at or below `call.hidden`
hides its key; whether A V so rebuilt is the model's output is for the reconstruction gate to say. Not that
padding is clean: it may hold NaN, so values of keys that nobody sees, and outputs of rows that see nothing,
count as 0.

What holds for all. Arithmetic is float32 whatever the model's format. Every sum has one owner and a fixed
order, there are no atomics, and the tile follows from format, head size and mask, never from a timing: the
same bits on every run. Every kernel is tested against a dense float64 reference, in Triton's interpreter
where there is no GPU, and compiled for capabilities 8.0 and 9.0.

What bit people:

- Tensor cores round float32 to 10 bits unless told not to; products are asked for as three of rounded parts.
- The device has 2^x, not e^x, so scores are in bits. The smallest float times log2(e) is no float any more:
  mask entries are compared with the threshold before they are turned into bits.
- -inf - (-inf) is NaN and 0 · inf too, so a hidden score is -1e30; so is the log-normaliser of a row that
  sees nothing, whose weights would overflow if somebody read them.
- The interpreter multiplies the bit patterns of bfloat16; there vectors are widened first.
- Float32 with a mask entry for each score spills registers: right, but slow.
- On the CPU the flash operator is the public function to the bit only if it is what PyTorch would have
  chosen; under autocast, other function modes, dropout or a gradient the public function runs itself.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.attention.containers import SoftmaxStatistics, ValueStatistics


def fused_statistics(call: AttentionCall) -> SoftmaxStatistics | None:
    """The statistics of a call on CUDA in one pass; None where plain PyTorch has to compute them."""
    if not _has_triton(call):
        return None
    from diag.attention.kernels import triton_scores, triton_statistics

    if not triton_scores.supports(call):
        return None
    found = triton_statistics.softmax_statistics(call)
    return found if call.outside is None else _beside_other_keys(call, found)


def _beside_other_keys(call: AttentionCall, found: SoftmaxStatistics) -> SoftmaxStatistics:
    """Statistics of a softmax over tokens as those of one over other keys as well: every weight times s.

    s = exp(lse over tokens - lse over all keys), what the weights on tokens sum to.
    """
    assert call.log_normaliser is not None
    assert found.log_normaliser is not None
    lse = call.log_normaliser.float()
    share = (found.log_normaliser - lse).exp()
    drawn = share if call.sample is None else call.sample.at(share)
    return SoftmaxStatistics(
        log_normaliser=lse,
        entropy=drawn * found.entropy - torch.xlogy(drawn, drawn),
        sum_of_squares=drawn.square() * found.sum_of_squares,
        self_weight=share * found.self_weight,
        first_weight=share * found.first_weight,
        row_sum=share,
    )


def fused_values(call: AttentionCall, among: Tensor, rows: Tensor, least: float) -> ValueStatistics | None:
    """Norms, products and sums of values and outputs on CUDA; None where plain PyTorch has to compute them.

    The arguments are those of `diag.attention.value_statistics.value_statistics`.
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
        if (share := softmax().row_sum if call.outside is not None else None) is not None:
            found["placed"] = found["placed"] * share
    return found


def _has_triton(call: AttentionCall) -> bool:
    """Triton comes with PyTorch's builds for CUDA on Linux only, and its import takes a second."""
    return call.output.is_cuda and importlib.util.find_spec("triton") is not None
