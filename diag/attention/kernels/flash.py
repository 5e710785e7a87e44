"""Attention that also returns the log-normaliser, where PyTorch's own kernel already has it.

On the CPU, `scaled_dot_product_attention` *is* the flash operator called here, with masks and grouped heads
too, so the output is the same to the bit and `lse_i` is free. Everywhere else the public function runs,
and whoever needs `lse_i` computes it from the scores.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.overrides import has_torch_function

_public = torch.nn.functional.scaled_dot_product_attention


def attention_with_normaliser(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor | None]:
    """The public function's output, bit-identical, and `lse` `[batch, head, token]` or None.

    Arguments are those of `scaled_dot_product_attention`.
    """
    given = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    masked_alike = attn_mask is None or attn_mask.dtype in (torch.bool, query.dtype)
    plain = query.device.type == "cpu" and query.ndim == 4 and masked_alike and not trained and not dropout_p
    # only the public function is cast by autocast and seen by other function modes
    plain = plain and not torch.is_autocast_enabled("cpu") and not has_torch_function(given)
    if plain and SDPBackend.FLASH_ATTENTION.value == torch._fused_sdp_choice(  # what it would choose itself
        query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
    ):
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # as the public function does
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )
    output = _public(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return output, None
