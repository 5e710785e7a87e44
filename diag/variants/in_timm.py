"""timm's attention with a change between attention and output projection."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor

from diag.variants.formulas import Change, Sizes, mean_of_visible


class ChangedTimmAttention(Attention):
    """timm's attention with a change before its output norm."""

    change: Change
    gate: Any

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`[batch, token, channel]` → the same shape, as timm does."""
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # [batch, head, token, dim]
        output = F.scaled_dot_product_attention(
            self.q_norm(query),
            self.k_norm(key),
            value,
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            is_causal=is_causal,
        )
        changed = self.change(output, value, x, lambda: mean_of_visible(value, attn_mask, is_causal))
        output = self.norm(changed.transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(output if gate is None else output * gate))


def can_be_changed(module: Any) -> bool:
    """Whether it is timm's plain attention; its relatives are not understood."""
    return type(module) is Attention


def swap(module: Any, path: str) -> Sizes:
    """Makes a module that can be changed a changed one; its sizes."""
    module.__class__ = ChangedTimmAttention
    return Sizes(module.qkv.in_features, module.num_heads, module.head_dim)
