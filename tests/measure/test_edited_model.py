"""A tower under edits: padding stays out of what a branch averages over, and mistakes are told."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from diag.errors import UserError
from diag.measure.edited_model import by_own_numbers, check_layers, edited
from diag.models.base import Batch, Tower
from diag.models.hooks.block_parts import find_blocks
from diag.models.hooks.depth import Place
from diag.models.hooks.interventions import parse
from diag.models.hooks.layers import attention_modules
from diag.run.api import probe


class Encoder(nn.Module):
    """Two blocks that take a mask of real tokens by name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        block = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layers(x, src_key_padding_mask=~attention_mask.bool())


@pytest.fixture(scope="module")
def model() -> Encoder:
    return Encoder().eval().requires_grad_(False)


X = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
REAL = torch.tensor([[True] * 9, [True] * 6 + [False] * 3])


def run(model: Encoder, x: Tensor, real: Tensor, told: Tensor | None, texts: Sequence[str]) -> Tensor:
    tower = Tower(
        name="text",
        layers=attention_modules(model),
        samples=lambda inputs, length: iter(()),
        encode=lambda samples: Batch((), x),
        forward=lambda batch: model(x, real),
    )
    blocks = find_blocks(model, tower.layers)
    edits = [parse(text) for text in texts]
    with torch.inference_mode(), edited(tower, tower.layers, blocks, edits, told):
        return model(x, real)


@pytest.mark.parametrize("text", ["cb", "cb_s=0.7"])
def test_padding_is_no_part_of_the_mean(model: Encoder, text: str) -> None:
    """A padded input gives what it gives alone; without the mask (a negative control) it does not."""
    alone = run(model, X[1:, :6], REAL[1:, :6], None, [text])
    told = run(model, X, REAL, REAL, [text])
    torch.testing.assert_close(told[1:, :6], alone, atol=1e-5, rtol=1e-5)
    untold = run(model, X, REAL, None, [text])
    assert (untold[1:, :6] - alone).abs().max() > 1e-2


def test_a_probe_tells_the_mask(model: Encoder) -> None:
    """Downstream of `cb`, an input measures the same alone and padded."""
    arguments = {"metrics": ["cos_y_vself", "value_similarity"], "intervene": ["cb:0"], "layers": [1]}
    padded = probe(model, [{"x": X, "attention_mask": REAL}], **arguments).samples
    alone = probe(model, [{"x": X[1:, :6], "attention_mask": REAL[1:, :6]}], **arguments).samples
    found = padded[padded["input_index"] == 1].set_index(["metric", "head"])["value"].sort_index()
    expected = alone.set_index(["metric", "head"])["value"].sort_index()
    assert found.to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-5)
    untouched = probe(model, [{"x": X, "attention_mask": REAL}], **(arguments | {"intervene": []})).samples
    before = untouched[untouched["input_index"] == 1].set_index(["metric", "head"])["value"].sort_index()
    assert (before - found).abs().max() > 1e-3


def test_layers_of_edits_may_count_from_the_last(model: Encoder) -> None:
    layers = attention_modules(model)
    given = [parse(text) for text in ("xsa:-2", "cb:last", "xsa:0-1", "xsa", "xsa:-2-last/3")]
    found = by_own_numbers(given, layers)
    assert [edit.layers for edit in found] == [{0}, {1}, {0, 1}, None, {0, 1}]
    assert [edit.text for edit in found] == [edit.text for edit in given]
    places = [Place(0, "layers.0"), Place(1, "layers.1", 0, "no softmax attention (Mamba)")]
    with pytest.raises(UserError) as error:
        by_own_numbers([parse("xsa:last")], layers[:1], places)
    said = (
        "--intervene xsa:last: layer -1 is layer 1 ('layers.1'), which is not measured: no softmax attention"
    )
    assert str(error.value).startswith(said)
    with pytest.raises(UserError, match="--intervene xsa:-3: there is no layer -3"):
        by_own_numbers([parse("xsa:-3")], layers)


def test_a_layer_that_is_not_there(model: Encoder) -> None:
    with pytest.raises(UserError, match="--intervene cb:2: there is no layer 2") as error:
        check_layers([parse("cb:2")], attention_modules(model))
    assert error.value.tip == "layers are 0 to 1"
