"""torch's own transformers, with both orders of axes, and the towers of torchvision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from zoo.case import Case, lively


class Reads(nn.Module):
    """A module that takes inputs of other names than `src` and `tgt`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Both(Reads):
    """Encoder and decoder read inputs of equal length."""

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """As `nn.Transformer` does."""
        return self.inner(source, target)


class SelfAttention(Reads):
    """`nn.MultiheadAttention` of a sequence over itself."""

    def forward(self, x: Tensor) -> Tensor:
        """Without the weights, as is usual."""
        return self.inner(x, x, x, need_weights=False)[0]


class Weights(Reads):
    """The same with its weights, which PyTorch computes out of sight."""

    def forward(self, x: Tensor) -> Tensor:
        """The output alone."""
        return self.inner(x, x, x, need_weights=True)[0]


def _layer(**options: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(32, 4, 64, **options)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "Transformer (batch_first)": lambda: Both(nn.Transformer(32, 4, 2, 2, 64, batch_first=True)),
    "Transformer (sequence first)": lambda: Both(nn.Transformer(32, 4, 2, 2, 64)),
    "TransformerEncoder (batch_first)": lambda: nn.TransformerEncoder(
        _layer(batch_first=True), 2, enable_nested_tensor=False
    ),
    "TransformerEncoder (norm_first)": lambda: nn.TransformerEncoder(
        _layer(batch_first=True, norm_first=True), 2, enable_nested_tensor=False
    ),
    "TransformerEncoder (sequence first)": lambda: nn.TransformerEncoder(
        _layer(), 2, enable_nested_tensor=False
    ),
    "TransformerDecoder (batch_first)": lambda: Both(
        _Decoder(nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 2))
    ),
    "MultiheadAttention (batch_first)": lambda: SelfAttention(nn.MultiheadAttention(32, 4, batch_first=True)),
    "MultiheadAttention (sequence first)": lambda: SelfAttention(nn.MultiheadAttention(32, 4)),
    "MultiheadAttention (need_weights)": lambda: Weights(nn.MultiheadAttention(32, 4, batch_first=True)),
    "MultiheadAttention (add_zero_attn)": lambda: SelfAttention(
        nn.MultiheadAttention(32, 4, batch_first=True, add_zero_attn=True)
    ),
}
VISION: dict[str, Callable[[], nn.Module]] = {
    "VisionTransformer": lambda: VisionTransformer(64, 16, 2, 4, 32, 64),
    "SwinTransformer": lambda: SwinTransformer([4, 4], 24, [2, 2], [3, 6], [4, 4]),
    "MaxVit": lambda: MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.0),
}


class _Decoder(Reads):
    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.inner(target, source)


def names() -> list[str]:
    """All of them."""
    return [*MODULES, *(f"torchvision {name}" for name in VISION)]


def build(name: str, folder: Path | None) -> Case:
    """One of them, on four inputs of twelve tokens, or two images. There is no name for these."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    if name.startswith("torchvision "):
        module = VISION[name.removeprefix("torchvision ")]()
        return Case("torch", name, lively(module), torch.randn(2, 3, 64, 64, generator=generator))
    module = lively(MODULES[name]())
    x = torch.randn(4, 12, 32, generator=generator)
    batch = {"source": x, "target": torch.randn(4, 12, 32, generator=generator)}
    first = 1 if "sequence first" in name else 0  # then there are twelve inputs of four tokens
    return Case("torch", name, module, batch if isinstance(module, Both) else x, axis=first)
