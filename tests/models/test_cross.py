"""Cross-attention as rows of its own: against the library's own weights, in models of several libraries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch import nn

from diag.errors import UserError
from diag.run.api import probe

TOKENS: dict[str, Any] = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3}
SIZES |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
SIZES |= {f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")}
METRICS = ("entropy", "effective_keys", "sink_share", "received_gini")


def made(kind: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """An encoder–decoder with large random weights, and two inputs for both parts, some of it padding."""
    torch.manual_seed(0)
    ids, answer = torch.randint(3, 40, (2, 9)), torch.randint(3, 40, (2, 6))
    batch = {"input_ids": ids, "decoder_input_ids": answer}
    masks = {"attention_mask": torch.ones(2, 9).long(), "decoder_attention_mask": torch.ones(2, 6).long()}
    masks["attention_mask"][1, 6:] = 0
    masks["decoder_attention_mask"][0, 4:] = 0
    if kind == "bart":
        config = transformers.BartConfig(**SIZES, **TOKENS, max_position_embeddings=16, init_std=0.3)
        model, batch = transformers.BartForConditionalGeneration(config), batch | masks
    elif kind == "t5":
        sizes = {
            "d_model": 32,
            "num_layers": 2,
            "num_decoder_layers": 3,
            "num_heads": 4,
            "d_kv": 8,
            "d_ff": 64,
        }
        config = transformers.T5Config(**sizes, vocab_size=40, decoder_start_token_id=1)
        model, batch = transformers.T5ForConditionalGeneration(config), batch | masks
    else:
        sizes = SIZES | {"max_source_positions": 10, "max_target_positions": 16, "num_mel_bins": 8}
        starts = {"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}
        config = transformers.WhisperConfig(**sizes, **TOKENS, **starts, init_std=0.3)
        model = transformers.WhisperForConditionalGeneration(config)
        batch = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": answer}
    return model.eval(), batch


def from_the_library(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """`[layer, input, head]`, from the weights that the library hands out, in float64."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**batch, output_attentions=True).cross_attentions
    model.set_attn_implementation("sdpa")
    found: dict[str, list[Any]] = {name: [] for name in METRICS}
    for layer in maps:
        numbers: dict[str, list[list[float]]] = {name: [] for name in METRICS}
        for one in range(2):
            rows = batch.get("decoder_attention_mask", torch.ones(2, layer.shape[2]))[one].bool().numpy()
            keys = batch.get("attention_mask", torch.ones(2, layer.shape[3]))[one].bool().numpy()
            if len(keys) != layer.shape[3]:
                keys = np.ones(layer.shape[3], bool)
            heads = [a[rows][:, keys] for a in layer[one].double().numpy()]
            got = [np.sort(a.mean(0)) for a in heads]
            n = int(keys.sum())
            numbers["entropy"].append([-(a * np.log(a)).sum(1).mean() for a in heads])
            numbers["effective_keys"].append([(1 / (a**2).sum(1)).mean() for a in heads])
            numbers["sink_share"].append([c[-1] for c in got])
            spread = [np.abs(c[:, None] - c).sum() / (2 * n * c.sum()) for c in got]
            numbers["received_gini"].append(spread)
        for name in METRICS:
            found[name].append(numbers[name])
    return {name: np.array(x) for name, x in found.items()}


@pytest.mark.parametrize("kind", ["bart", "t5", "whisper"])
def test_cross_rows_are_the_librarys_weights(kind: str) -> None:
    model, batch = made(kind)
    plain, found = probe(model, [batch]), probe(model, [batch], cross=True)
    rows = found.samples[found.samples["tower"] == "cross"]
    assert list(rows["layer"].unique()) == [0, 1, 2]
    assert set(rows["value_from"]) == {"others"}
    expected = from_the_library(model, batch)
    for name in METRICS:
        seen = rows[rows["metric"] == name].pivot_table(
            index=["layer", "input"], columns="head", values="value"
        )
        np.testing.assert_allclose(seen.to_numpy().reshape(3, 2, 4), expected[name], atol=2e-5)
    # no metric that needs a v_i is among them, nothing else has changed, and nothing stands as left out
    assert not {"cos_y_vself", "self_weight", "value_similarity"} & set(rows["metric"])
    others = found.samples[found.samples["tower"] != "cross"].reset_index(drop=True)
    pd.testing.assert_frame_equal(others, plain.samples, check_categorical=False, check_dtype=False)
    assert len(plain.skipped) == 3
    assert found.skipped == {}


def test_cross_attention_of_one_length_and_of_torch() -> None:
    """As many keys as queries, tokens before inputs, and blocks of another library."""
    torch.manual_seed(0)

    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True)

        def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return self.whole(source, target)

    batch = {"source": torch.randn(2, 7, 32), "target": torch.randn(2, 7, 32)}
    found = probe(Translator().eval(), [batch], cross=True, metrics=["entropy"])
    assert list(found.samples["tower"].unique()) == ["encoder", "decoder", "cross"]
    cross = found.samples[found.samples["tower"] == "cross"]
    assert set(cross["module"]) == {f"whole.decoder.layers.{i}.multihead_attn" for i in range(2)}


class Pooled(nn.Module):
    """Blocks and a head that pools their tokens by one query: that is no cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.pool, self.query = (
            nn.MultiheadAttention(32, 4, batch_first=True),
            nn.Parameter(torch.randn(1, 32)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.pool(self.query.expand(len(x), 1, -1), x, x)[0]


def test_what_has_no_cross_attention_is_told() -> None:
    torch.manual_seed(0)
    with pytest.raises(UserError, match="Pooled has no cross-attention that is seen") as told:
        probe(Pooled().eval(), [torch.randn(2, 5, 32)], cross=True)
    assert (
        told.value.tip
        == "give an encoder–decoder model and batches for both of its parts, or leave cross=True out"
    )
    with pytest.raises(UserError, match="cross=True takes what encoder and decoder read"):
        probe("demo:lm", "demo", cross=True)
    with pytest.raises(UserError, match="does not go with null=, values= or intervene="):
        probe(*made("t5")[:1], [], cross=True, values="bias_free")
