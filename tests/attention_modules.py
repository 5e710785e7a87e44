"""Small modules that call attention in the ways that libraries do, over `[batch, token, 16]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import has_torch_function

PUBLIC = F.scaled_dot_product_attention


def by_attribute(*args: Any, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(*args, **options)


class Attention(nn.Module):
    """Self-attention over `[batch, token, 16]`; `options` go to PyTorch's function, which `call` reaches."""

    def __init__(
        self,
        heads: int = 2,
        kv_heads: int | None = None,
        call: Callable[..., Tensor] = by_attribute,
        **options: Any,
    ) -> None:
        super().__init__()
        self.num_heads, self.kv_heads = heads, kv_heads or heads
        self.call, self.options = call, options
        self.q = nn.Linear(16, heads * 8)
        self.k, self.v = nn.Linear(16, self.kv_heads * 8), nn.Linear(16, self.kv_heads * 8)
        self.out = nn.Linear(heads * 8, 16)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part(x).unflatten(-1, (-1, 8)).transpose(-2, -3) for part in (self.q, self.k, self.v))
        return q, k, v

    def attended(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.call(*self.heads(x), mask, **self.options).transpose(-2, -3).flatten(-2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.out(self.attended(x, mask))


class MergedHeads(Attention):
    """SAM: heads are merged into the batch."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (part.flatten(0, 1) for part in self.heads(x))
        y = F.scaled_dot_product_attention(q, k, v, mask).unflatten(0, (-1, self.num_heads))
        return x + self.out(y.transpose(1, 2).flatten(2))


class FiveDimensions(Attention):
    """Hiera: `[batch, head, window, token, dim]`, three windows."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        windows = x.unflatten(1, (3, -1))  # [batch, window, token, dim]
        q, k, v = (part.transpose(1, 2) for part in self.heads(windows))
        y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
        return x + self.out(y.transpose(-2, -3).flatten(-2)).flatten(1, 2)


class WindowsInBatch(Attention):
    """Swin: three windows of each input, one row each."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        windows = x.unflatten(1, (3, -1)).flatten(0, 1)  # [batch · window, token, dim]
        return super().forward(windows, mask).unflatten(0, (-1, 3)).flatten(1, 2)


class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.mha(x, x, x, attn_mask=mask, need_weights=False)[0]


class Stack(nn.Module):
    """Layers one after the other; `layers` of modules that take `(x, mask)`."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Broken(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        raise RuntimeError("inside forward")


class Cross(Attention):
    """Five queries over the nine tokens."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q[:, :, :5], k, v)
        return self.out(y.transpose(1, 2).flatten(2))


def assert_untouched(*modules: nn.Module) -> None:
    """No patch, no function mode, no hook."""
    assert F.scaled_dot_product_attention is PUBLIC
    assert not has_torch_function((torch.ones(1),))
    for module in modules:
        for child in module.modules():
            assert not child._forward_hooks
            assert not child._forward_pre_hooks
            assert not child._forward_hooks_always_called
