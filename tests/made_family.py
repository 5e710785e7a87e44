"""A family that exists in tests only: all that a new one takes is such a file, and its line in the table.

`made:tiny~1` and `made:tiny~2` are one architecture with two sets of weights; they read bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diag.errors import UserError, did_you_mean
from diag.models.base import Model, Tower
from diag.models.encoding import text_encoder, text_facts, text_samples
from diag.models.family import Family, Listed
from diag.models.loading import layers_of, ready
from diag.models.names.spec import ModelSpec

NAMES = ("tiny~1", "tiny~2")
CONTEXT = 32


class Tiny(nn.Module):
    """A causal stack of two layers over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.layers(self.embed(ids), mask=mask, is_causal=True)  # [batch, token, dim]


def load(spec: ModelSpec, *, device: str | torch.device, dtype: torch.dtype) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(spec.name[-1]))
        module = ready(Tiny(), spec.resolved, device=device, dtype=dtype)
    tower = Tower(
        name="text",
        layers=layers_of(module, spec.resolved, "text"),
        samples=text_samples(lambda text: list(text.encode()), context=CONTEXT),
        encode=text_encoder(device),
        forward=lambda batch: module(batch.data),
        decode=lambda ids: bytes(ids).decode(errors="replace"),
        token_text=chr,
        facts=text_facts(CONTEXT, (), ()),
    )
    return Model(spec.given, spec.family, spec.resolved, module, {"text": tower})


def named(spec: ModelSpec) -> ModelSpec:
    if spec.name not in NAMES:
        raise UserError(f"model '{spec.given}' is not made", did_you_mean(spec.name, NAMES))
    return spec


FAMILY = Family(
    "made",
    load=load,
    named=named,
    claims=lambda spec: spec.name in NAMES,
    names=lambda: NAMES,
    row=lambda name: Listed(name, f"made:{name}", f"text, {CONTEXT}"),
    architecture=lambda name: name.partition("~")[0],
    packages=("pytest",),
)
