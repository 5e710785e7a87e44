"""Attention against saliency: dense float64 gradients, patterns made by hand, encoder–decoders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from commands import Ended
from scipy.stats import spearmanr
from torch import nn

from diag.errors import UserError
from diag.models import load
from diag.models.names.resolve import parse
from diag.results.agreement import ALL, GRADIENT, GRADIENT_X_INPUT, over_inputs, rank_correlation
from diag.show.figures.agreement import agreement_over_depth
from diag.studies.attend import AttendPlan, agreement, attend, folder_of, read, run_attend

TORCH_VIT = {"image": "demo:astronaut", "layer": -1, "patch": (1, 2), "saliency": True}


def rho_of(table: pd.DataFrame, **which: Any) -> float:
    for name, value in which.items():
        table = table[table[name].isna() if value is None else table[name] == value]
    assert len(table) == 1
    return float(table["rho"].iloc[0])


def dense(module: Any, pixels: torch.Tensor) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Of a timm ViT in float64, its blocks written out: what patches receive from patches, `[layer, head,
    patch]`, and both saliencies of the largest logit, `[patch]`.
    """
    module = module.double()
    x = module.norm_pre(module.patch_drop(module._pos_embed(module.patch_embed(pixels.double()))))
    x = start = x.detach().requires_grad_()
    received = []
    for block in module.blocks:
        attn, z = block.attn, block.norm1(x)
        q, k, v = attn.qkv(z).reshape(1, z.shape[1], 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        a = ((attn.q_norm(q) @ attn.k_norm(k).transpose(-1, -2)) * attn.scale).softmax(-1)
        received.append(a[0, :, 1:, 1:].mean(1).detach().numpy())
        y = (a @ v).transpose(1, 2).reshape(z.shape)
        x = x + block.ls1(attn.proj(y))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    logits = module.forward_head(module.norm(x))
    (g,) = torch.autograd.grad(logits.max(), start)
    salient = {GRADIENT_X_INPUT: (g * start).sum(-1).abs(), GRADIENT: g.norm(dim=-1)}
    return np.array(received), {name: s[0, 1:].detach().numpy() for name, s in salient.items()}


def test_a_classifier_is_dense_gradients_and_dense_attention() -> None:
    plan = AttendPlan(models=("demo:vit-p8",), **TORCH_VIT)
    found = attend(plan).agreement
    assert found is not None
    model = load(parse("demo:vit-p8"), device="cpu", dtype=torch.float32)
    tower = model.towers["vision"]
    (sample,) = list(tower.samples(plan.inputs(), None))
    received, salient = dense(model.module, tower.encode([sample]).data)
    for kind, values in salient.items():
        rows = found[found["saliency"] == kind]
        for layer, heads in enumerate(received):
            for head, share in enumerate(heads):
                expected = spearmanr(share, values).statistic
                assert rho_of(rows, layer=layer, head=str(head)) == pytest.approx(expected, abs=2e-3)
            expected = spearmanr(heads.mean(0), values).statistic
            assert rho_of(rows, layer=layer, head="mean") == pytest.approx(expected, abs=2e-3)
        whole = received.mean((0, 1))
        assert rho_of(rows, head=ALL) == pytest.approx(spearmanr(whole, values).statistic, abs=2e-3)
    assert set(found["n_keys"]) == {64}  # patches alone


class ByHand(nn.Module):
    """One head that gives the same row of weights to every query, and an answer that weighs tokens."""

    class Block(nn.Module):
        def __init__(self, row: torch.Tensor) -> None:
            super().__init__()
            self.row = row.log()
            self.attn = ByHand.Attention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 0 * self.attn(x, self.row)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x)[:, None].chunk(3, -1)
            bias = row.expand(x.shape[1], -1)
            return nn.functional.scaled_dot_product_attention(1e-6 * q, k, v, attn_mask=bias)[:, 0]

    def __init__(self, row: torch.Tensor, weight: torch.Tensor) -> None:
        super().__init__()
        self.blocks, self.weight = nn.ModuleList([ByHand.Block(row)]), weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](x).sum(-1) @ self.weight


@pytest.mark.parametrize(
    ("order", "rho"), [([0, 1, 2, 3, 4], 1.0), ([4, 3, 2, 1, 0], -1.0), ([1, 0, 2, 3, 4], 0.9)]
)
def test_patterns_made_by_hand(order: list[int], rho: float) -> None:
    """Attention to 5 tokens in the ratio 1 : 2 : 3 : 4 : 5, and an answer that hangs on them in an order."""
    torch.manual_seed(0)
    row = torch.tensor([1.0, 2, 3, 4, 5]) / 15
    weight = torch.tensor([1.0, 2, 3, 4, 5])[order]
    x = torch.ones(2, 5, 8) + 0.001 * torch.randn(2, 5, 8)
    found = agreement(ByHand(row, weight).eval(), [x], of=lambda result: result)
    assert len(found) == 2 * 2 * 3  # inputs, saliencies; a head, the layer, all of them
    np.testing.assert_allclose(found["rho"], rho, atol=1e-12)


class Adding(ByHand.Block):
    """Adds to what it is given in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(0 * self.attn(x.clone(), self.row))


class Untrainable(ByHand.Block):
    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
            return x.round()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Untrainable.Rounded.apply(super().forward(x))


def test_blocks_that_add_in_place_and_that_have_no_gradient() -> None:
    torch.manual_seed(0)
    row = torch.tensor([1.0, 2, 3, 4, 5]) / 15
    model, x = ByHand(row, 15 * row).eval(), torch.ones(1, 5, 8) + 0.001 * torch.randn(1, 5, 8)
    model.blocks[0] = Adding(row)
    np.testing.assert_allclose(agreement(model, [x.clone()], of=lambda result: result)["rho"], 1.0)
    model.blocks[0] = Untrainable(row)
    with pytest.raises(UserError, match="the module tower gives no gradients: ") as told:
        agreement(model, [x], of=lambda result: result)
    assert told.value.tip == "leave saliency out, or give a model whose parts can all be trained"


def small(kind: str) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    tokens = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    ids, answer = torch.randint(3, 40, (2, 9)), torch.randint(3, 40, (2, 6))
    if kind == "t5":
        sizes = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 64}
        config: Any = transformers.T5Config(**sizes, vocab_size=40, decoder_start_token_id=1)
        model: Any = transformers.T5ForConditionalGeneration(config)
        return model.eval(), {"input_ids": ids, "decoder_input_ids": answer}
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "init_std": 0.3}
    sizes |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    if kind == "bart":
        model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **tokens))
        masks = {"attention_mask": torch.ones(2, 9).long(), "decoder_attention_mask": torch.ones(2, 6).long()}
        masks["attention_mask"][1, 6:] = 0
        masks["decoder_attention_mask"][0, 5:] = 0
        return model.eval(), {"input_ids": ids, "decoder_input_ids": answer} | masks
    sizes |= {"max_source_positions": 10, "max_target_positions": 16, "num_mel_bins": 8}
    starts = {"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}
    model = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**sizes, **tokens, **starts)
    )
    return model.eval(), {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": answer}


@pytest.mark.parametrize("kind", ["t5", "bart", "whisper"])
def test_cross_attention_against_the_encoders_states(kind: str) -> None:
    """Weights as the library hands them out, gradients at the encoder's output as an input of the decoder."""
    model, batch = small(kind)
    found = agreement(model, [batch], cross=True)
    cross = found[found["kind"] == "cross"]
    model = model.double()
    given = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    source = given.get("input_features", given.get("input_ids"))
    mask = {"attention_mask": given["attention_mask"]} if "attention_mask" in given else {}
    memory = model.get_encoder()(source, **mask).last_hidden_state.detach().requires_grad_()
    model.set_attn_implementation("eager")
    rest = {name: x for name, x in given.items() if name.startswith("decoder")}
    result = model(encoder_outputs=(memory,), **mask, **rest, output_attentions=True)
    answer = given["decoder_input_ids"]
    real = given.get("decoder_attention_mask", torch.ones_like(answer))
    for one, name in enumerate(["000000", "000001"]):
        rows = real[one].bool()
        chances = result.logits[one].log_softmax(-1)
        each = [-chances[t, answer[one, t + 1]] for t in range(5) if rows[t + 1]]
        (g,) = torch.autograd.grad(sum(each) / len(each), memory, retain_graph=True)
        keys = given["attention_mask"][one].bool() if mask else torch.ones(memory.shape[1]).bool()
        salient = {GRADIENT_X_INPUT: (g * memory)[one].sum(-1).abs(), GRADIENT: g[one].norm(dim=-1)}
        for saliency, values in salient.items():
            of_one = cross[(cross["input"] == name) & (cross["saliency"] == saliency)]
            for layer, maps in enumerate(result.cross_attentions):
                share = maps[one][:, rows].mean(1)[:, keys].detach()
                for head in range(4):
                    expected = spearmanr(share[head], values[keys].detach()).statistic
                    assert rho_of(of_one, layer=layer, head=str(head)) == pytest.approx(expected, abs=1e-6)
            assert set(of_one["n_keys"]) == {int(keys.sum())}


def test_numbers_over_inputs_and_their_figure() -> None:
    model, batch = small("t5")
    found = agreement(model, [batch], cross=True)
    table = over_inputs(found)
    assert set(table["n"]) == {2}
    row = table[(table["tower"] == "cross") & (table["head"] == ALL) & (table["saliency"] == GRADIENT)].iloc[
        0
    ]
    of = found[(found["tower"] == "cross") & (found["head"] == ALL) & (found["saliency"] == GRADIENT)]
    assert row["mean"] == pytest.approx(of["rho"].mean())
    figure = agreement_over_depth(found)
    panels = figure.subfigs[0].axes
    assert [ax.get_title(loc="left").split(", ")[-1] for ax in panels] == ["encoder", "decoder", "cross"]
    drawn = {line.get_gid(): line for line in panels[2].lines}
    assert {"heads", "model", "all"} <= drawn.keys()


def test_of_too_few_places_there_is_no_correlation() -> None:
    assert np.isnan(rank_correlation(np.arange(3.0)[None], np.arange(3.0)[None])).all()
    assert np.isnan(rank_correlation(np.ones((1, 5)), np.arange(5.0)[None])).all()


@pytest.mark.usefixtures("sketched")
def test_a_look_with_saliency_is_kept_and_read(tmp_path: Path, attnbias: Callable[..., Ended]) -> None:
    given = ["--text", "the cat sat on the mat", "--layer", "-1", "--token", "-1", "--top", "2"]
    ended = attnbias("attend", "-m", "demo:lm", *given, "--saliency", "-o", str(tmp_path / "look"))
    assert "saliency |g·x| of the next-token loss: ρ with received attention\n" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80
    found = read(tmp_path / "look").agreement
    assert found is not None
    again = attend(
        AttendPlan(models=("demo:lm",), text="the cat sat on the mat", layer=-1, token=-1, saliency=True)
    )
    assert again.agreement is not None
    np.testing.assert_allclose(found["rho"], again.agreement["rho"], rtol=1e-6)
    ended = attnbias("attend", "-m", "demo:lm", *given, "--saliency", "-o", str(tmp_path / "look"), "--json")
    document = json.loads(ended.out)
    assert document["models"][0]["explained"] == "next-token loss"
    assert len(document["models"][0]["agreement"]) == len(found)


def test_looks_from_before_are_found_again() -> None:
    """A plan without what came later has the key that it always had."""
    plan = AttendPlan(models=("demo:lm",), text="the cat", layer=-1, token=-1)
    assert folder_of(plan).name.startswith("attend-demo-lm-")
    assert plan.key() != plan.model_copy(update={"saliency": True}).key()
    fields = {"models", "layer", "depth", "head", "patch", "pixel", "token", "seq_len", "top", "checkpoint"}
    fields |= {"model_args", "random_init", "trust_remote_code", "dtype"}
    assert fields == plan.identity().keys()


@pytest.mark.parametrize(
    ("of", "message", "tip"),
    [
        (None, "what the module returns is no logits", "say what is explained: of=lambda result: …"),
        (lambda result: result.sum((1, 2)).detach(), "does not depend on its tokens", "without detaching it"),
    ],
)
def test_what_is_not_explained_is_told(of: Any, message: str, tip: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with pytest.raises(UserError, match=message) as told:
        agreement(module, [torch.randn(2, 5, 32)], of=of)
    assert tip in (told.value.tip or "")


def test_a_model_without_an_answer_is_told(tmp_path: Path) -> None:
    from checkpoints import save_vision_model

    plan = AttendPlan(models=(f"hf:{save_vision_model(tmp_path, 'vit')}",), **TORCH_VIT)
    with pytest.raises(UserError, match="ends in states of tokens: no loss has gradients there") as told:
        run_attend(plan, tmp_path / "look")
    assert told.value.tip == (
        "give a classifier or a causal language model; or diag.attend.agreement(module, batches, of=…)"
    )
