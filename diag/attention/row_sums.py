"""What the rows of A sum to, and what is left of a call when a constant leaves its values."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.attention.kernels import fused_statistics
from diag.attention.pattern import given_blocks, log2_pattern_blocks
from diag.errors import MeasurementError


def row_sums(call: AttentionCall) -> Float[Tensor, "#batch #head token"]:
    """`Σ_j A_ij` of every query row over the tokens j, float32, whatever sample of the rows the call has.

    1 of a softmax over tokens, by the way it is made; less where keys that are no tokens take a part; Σ_k c_k
    times those of each map; anything of a given pattern. 0 of a row that sees no key.
    """
    seen = call.visibility.count > 0
    if call.is_softmax:
        return seen.float()
    if call.maps:
        each = [one.coefficient * row_sums(call.of_map(one)) for one in call.maps]
        return torch.stack(torch.broadcast_tensors(*each)).sum(0)
    if (fused := fused_statistics(replace(call, sample=None))) is not None:
        assert fused.row_sum is not None
        return torch.where(seen, fused.row_sum, 0.0)
    sums = torch.empty(call.output.shape[:3], dtype=torch.float32, device=call.output.device)
    if call.pattern is not None:
        for where, block in given_blocks(call):
            sums[where] = block.sum(-1)
    else:
        assert call.log_normaliser is not None
        for where, logs in log2_pattern_blocks(replace(call, sample=None), call.log_normaliser.float(), True):
            sums[where] = logs.exp2_().sum(-1)
    return torch.where(seen, sums, 0.0)


def without_constant(call: AttentionCall, constant: Float[Tensor, " channel"]) -> AttentionCall:
    """The call with a constant c taken out of every value, and so out of every output.

    A (V - 1 cᵀ) = A V - s cᵀ exactly, s the sums of the rows of A: c leaves the output of a softmax whole,
    and less of it that of rows which sum to less. A row that sees no key keeps its output. Queries, keys,
    mask, pattern and what comes of no token stay: keys that are no tokens are not made by the projection.

    constant: c of each of the model's KV heads, one after the other. The model may have repeated
        them in the call.

    Raises MeasurementError if the call's heads cannot be those of the constant.
    """
    heads, rest = divmod(constant.numel(), call.value.shape[-1])
    if rest or heads == 0 or call.kv_heads % heads:
        raise MeasurementError(
            f"layer '{call.module}': a constant of {constant.numel()} numbers does not fit "
            f"{call.kv_heads} value heads of {call.value.shape[-1]}",
            "its values are not those of its projection, head for head: leave out --values bias-free",
        )
    each = constant.to(call.value.device).float().view(heads, 1, -1)
    each = each.repeat_interleave(call.kv_heads // heads, 0)  # [kv_head, 1, dim]
    output = call.output - row_sums(call)[..., None] * each.repeat_interleave(call.group, 0)
    return replace(call, value=(call.value - each).to(call.value.dtype), output=output.to(call.output.dtype))
