"""PyTorch's multi-head attention, open_clip's, with a change between attention and output projection."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diag.variants.formulas import Change, Sizes, mean_of_visible


class ChangedMultiheadAttention(nn.MultiheadAttention):
    """PyTorch's multi-head self-attention (open_clip's) with a change before its output projection."""

    change: Change

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Self-attention as PyTorch computes it without weights: `query` is what keys and values are made of.

        Raises RuntimeError if keys and values are made of something else, or if attention weights are asked
        for: no pattern gives a changed output.
        """
        if key is not query or value is not query:
            raise RuntimeError("a changed attention is self-attention: query, key and value are one tensor")
        if need_weights:
            raise RuntimeError(
                "a changed attention has no weights to return: call it with need_weights=False"
            )
        x = query if self.batch_first else query.transpose(0, 1)  # [batch, token, channel]
        batch, tokens = x.shape[:2]
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = _merged(attn_mask, key_padding_mask, (batch, self.num_heads, tokens), q.dtype)
        output = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal and mask is None,
        )
        changed = self.change(output, v, x, lambda: mean_of_visible(v, mask, is_causal and mask is None))
        output = self.out_proj(changed.transpose(1, 2).flatten(2))
        return (output if self.batch_first else output.transpose(0, 1)), None


def _merged(
    mask: Tensor | None, padding: Tensor | None, sizes: tuple[int, int, int], dtype: torch.dtype
) -> Tensor | None:
    """PyTorch's two masks as one additive mask, broadcastable to `[batch, head, token, token]`."""
    total = None
    if mask is not None:
        total = _additive(mask.view(*sizes, sizes[-1]) if mask.ndim == 3 else mask, dtype)
    if padding is not None:
        hidden = _additive(padding, dtype)[:, None, None]
        total = hidden if total is None else total + hidden
    return total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """True hides, as in `nn.MultiheadAttention`."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    return mask.to(dtype)


def can_be_changed(module: Any) -> bool:
    """Whether it is multi-head attention whose queries, keys and values have one projection."""
    return (
        type(module) is nn.MultiheadAttention
        and module.in_proj_weight is not None
        and module.bias_k is None
        and not module.add_zero_attn
    )


def swap(module: Any, path: str) -> Sizes:
    """Makes a module that can be changed a changed one; its sizes."""
    module.__class__ = ChangedMultiheadAttention
    return Sizes(module.embed_dim, module.num_heads, module.head_dim)
