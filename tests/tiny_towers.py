"""Towers of a few small attention layers, and inputs for them: what tests of the loop run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import attention_modules
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diag.measure.loop import measure
from diag.metrics.default import METRICS
from diag.models.base import Batch, Sample, Tower
from diag.models.hooks.layers import Layer
from diag.results.layer_values import LayerValues

NAMES = list(METRICS)
VISION_TOKENS, INPUTS = 12, 5


class Attention(attention_modules.Attention):
    """With four heads."""

    def __init__(self, kv_heads: int = 4, **options: Any) -> None:
        super().__init__(4, kv_heads, **options)


class InTurn(Attention):
    """Qwen2.5-VL: one call for each window of five or seven tokens."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.out(torch.cat([self.attended(window) for window in x.split((5, 7), 1)], 1))


class InBatch(Attention, attention_modules.WindowsInBatch):
    """Swin: three windows of four tokens of each input, as rows."""


class Pooled(Attention):
    """Four queries over all tokens."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        pooled = F.scaled_dot_product_attention(q[:, :, :4], k, v).transpose(1, 2).flatten(2)
        return x + self.out(pooled).mean(1, keepdim=True)


class Skipping(Attention):
    """Runs, but not when its inputs are as `skip` says."""


class Stack(attention_modules.Stack):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            if not (isinstance(layer, Skipping) and x.shape[0] == 1):
                x = layer(x, mask)
        return x


def own_samples(inputs: Any, seq_len: int | None) -> Iterator[Sample]:
    raise NotImplementedError


def tower_of(module: nn.Module, *, text: bool = False, **fields: Any) -> Tower:
    """A tower over tensors `[token, 16]`; texts differ in length and are padded on the right."""
    module.requires_grad_(False).eval()

    def encode(samples: Sequence[Sample]) -> Batch:
        read = [sample.read() for sample in samples]
        ids = tuple(sample.id for sample in samples)
        padded = nn.utils.rnn.pad_sequence(read, batch_first=True)
        if not text:
            return Batch(ids, (padded, None))
        lengths = torch.tensor([len(x) for x in read])
        real = torch.arange(padded.shape[1]) < lengths[:, None]
        causal = torch.ones(padded.shape[1], padded.shape[1], dtype=torch.bool).tril()
        return Batch(ids, (padded, real[:, None, None] & causal), real)

    layers = tuple(Layer(i, f"layers.{i}", layer) for i, layer in enumerate(module.layers))
    given = {"prefix": () if text else ("cls", "registers", "registers")} | fields
    name = "text" if text else "vision"
    return Tower(name, layers, own_samples, encode, lambda batch: module(*batch.data), **given)


def vision_tower(*layers: nn.Module, **fields: Any) -> Tower:
    torch.manual_seed(0)
    return tower_of(Stack(*(layers or (Attention(), Attention(), Attention()))), **fields)


def text_tower() -> Tower:
    torch.manual_seed(1)
    grouped = {"kv_heads": 2, "enable_gqa": True}
    return tower_of(Stack(Attention(**grouped), Attention(), Attention(**grouped)), text=True)


def samples_of(*lengths: int) -> list[Sample]:
    """Random inputs of some lengths, `[token, 16]`, with a common direction."""
    generator = torch.Generator().manual_seed(2)
    shared = torch.randn(1, 16, generator=generator)
    drawn = [torch.randn(length, 16, generator=generator) + 0.5 * shared for length in lengths]
    return [Sample(f"input-{i}", partial(torch.clone, x)) for i, x in enumerate(drawn)]


IMAGES = samples_of(*[VISION_TOKENS] * INPUTS)
TEXTS = samples_of(9, 14, 6, 11, 14)


def run(tower: Tower, samples: Sequence[Sample], **options: Any) -> np.ndarray:
    return table(list(measure(tower, samples, **options)))


def table(batches: Sequence[Sequence[LayerValues]]) -> np.ndarray:
    """`[layer, token set, metric, input, head]`"""
    return np.concatenate([np.stack([block.values for block in batch]) for batch in batches], 3)
