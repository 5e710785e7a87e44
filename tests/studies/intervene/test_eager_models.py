"""Every edit of attention in whole models that compute their softmax themselves, against a dense reference.

The reference is the library's own model in float64, whose attention function is wrapped: what it returns in
one layer is replaced by the edit's formula on its weights and values. Final states and gradients must agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from diag.errors import MeasurementError
from diag.measure.edited_model import beside_of, edited
from diag.models.families.from_module import from_module
from diag.models.hooks.beside import HeldOut, HeldOutLayer, mixed
from diag.models.hooks.interventions import INTERVENTIONS, parse

LAYER, TOKENS, WIDTH, HEADS = 1, 12, 32, 4
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": HEADS, "head_dim": 8}
SIZES |= {"vocab_size": 50, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.3}
OWN = {"attn_implementation": "eager"}


def gptj() -> nn.Module:
    config = transformers.GPTJConfig(
        vocab_size=50, n_embd=WIDTH, n_layer=3, n_head=HEADS, rotary_dim=4, n_inner=48, **OWN
    )
    return transformers.GPTJModel(config)


def gemma2() -> nn.Module:
    """Its soft cap is low enough to bend scores, its window shorter than the text."""
    config = transformers.Gemma2Config(**SIZES, attn_logit_softcapping=2.0, sliding_window=7, **OWN)
    return transformers.Gemma2Model(config)


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(
        **SIZES,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=7,
        experts_implementation="eager",
        **OWN,
    )
    return transformers.GptOssModel(config)


MODELS: dict[Any, Any] = {gptj: None, gemma2: modeling_gemma2, gpt_oss: modeling_gpt_oss}
"""How a model is built, and where its attention function stands; GPT-J's is a method."""

IDS = ("000000", "000001")
"""What the inputs of a ready batch are called."""

Change = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Weights, values of every query head, and output → output."""


def parts_of(y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """v̂, and r: one fixed random unit direction per head of the layer."""
    r = torch.randn(HEADS, 8, generator=torch.Generator().manual_seed(mixed(0, LAYER)), dtype=torch.float64)
    return v / v.norm(dim=-1, keepdim=True), (r / r.norm(dim=-1, keepdim=True))[:, None]


def less(y: Tensor, unit: Tensor, share: float = 1.0) -> Tensor:
    return y - share * (y * unit).sum(-1, keepdim=True) * unit


def turned(a: Tensor, v: Tensor, y: Tensor) -> Tensor:
    """y less its part along w: r, turned until it has v̂'s angle to y."""
    unit, r = parts_of(y, v)
    straight = y / y.norm(dim=-1, keepdim=True)
    cosine = (straight * unit).sum(-1, keepdim=True)
    beside = less(r.expand_as(y), straight)
    w = cosine * straight + (1 - cosine**2).clamp(min=0).sqrt() * beside / beside.norm(dim=-1, keepdim=True)
    return less(y, w)


def kept(rule: Callable[[Tensor], Tensor]) -> Change:
    """Rows with some of the keys that they see, at the sum that they had; those with none stay."""

    def change(a: Tensor, v: Tensor, y: Tensor) -> Tensor:
        left = torch.where(rule(a), a, 0.0)
        total = left.sum(-1, keepdim=True)
        scale = a.sum(-1, keepdim=True) / total.where(total > 0, 1.0)
        return torch.where(total > 0, (left * scale) @ v, y)

    return change


PLACE = torch.arange(TOKENS)
APART = (PLACE[:, None] - PLACE).abs()
FIRST = (PLACE - 1).clamp(0, TOKENS - 3)[:, None]


def is_sink(a: Tensor) -> Tensor:
    """Whether a key is the one that its head gives most to, `[batch, head, 1, key]`."""
    return nn.functional.one_hot(a.sum(2).argmax(-1), TOKENS).bool()[:, :, None]


def exchanged(given: Callable[[Tensor], Any]) -> Change:
    """The value of the sink replaced, A as it is."""

    def change(a: Tensor, v: Tensor, y: Tensor) -> Tensor:
        sink = is_sink(a).mT
        return a @ torch.where(sink, torch.as_tensor(given(v), dtype=v.dtype), v)

    return change


def others() -> HeldOut:
    """What heads of layer 1 returned for two other inputs, their sinks' values, and ordinary ones."""
    drawn = torch.randn(3, 2, HEADS, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return HeldOut(("x", "y"), {LAYER: HeldOutLayer(*drawn.unbind(0))})


def donated(part: str) -> Callable[[Tensor], Tensor]:
    held = others()
    donors = held.donors(IDS, 0)
    return lambda v: getattr(held.layers[LAYER], part)[donors][:, :, None]


EXACT: dict[str, Change] = {
    "xsa": lambda a, v, y: less(y, parts_of(y, v)[0]),
    "gated_xsa=0.5": lambda a, v, y: less(y, parts_of(y, v)[0], 0.5),
    "random_direction": lambda a, v, y: less(y, parts_of(y, v)[1]),
    "matched_direction": turned,
    "mask_self": kept(lambda a: (APART > 0) & (a > 0)),
    "uniform": lambda a, v, y: ((a > 0) / (a > 0).sum(-1, keepdim=True) * a.sum(-1, keepdim=True)) @ v,
    "identity=0.3": lambda a, v, y: 0.7 * y + 0.3 * v,
    "zero": lambda a, v, y: 0 * y,
    "mean": lambda a, v, y: 0 * y + others().layers[LAYER].output.mean(0)[:, None],
    "window=3": kept(lambda a: APART < 3),
    "neighbourhood=3": kept(lambda a: (PLACE >= FIRST) & (PLACE < FIRST + 3)),
    "top_keys=3": kept(lambda a: a >= a.topk(3, -1).values[..., -1:]),
    "sink_zero": exchanged(lambda v: 0.0),
    "sink_mean": exchanged(lambda v: others().layers[LAYER].sink.mean(0)[:, None]),
    "sink_donor": exchanged(donated("sink")),
    "sink_ordinary": exchanged(donated("ordinary")),
    "sink_masked": kept(lambda a: ~is_sink(a)),
}
DRAWN = ("random_window=3", "random_neighbourhood=3", "random_keys=3", "random_zero", "random_masked")
OF_IMAGES = ("redistribute", "random_redistribute")


def test_every_edit_of_heads_is_here() -> None:
    named = {text.partition("=")[0] for text in (*EXACT, *DRAWN, *OF_IMAGES)}
    assert named == {name for name, entry in INTERVENTIONS.items() if entry.where == "attention"}


def dense(build: Any, model: nn.Module, ids: Tensor, change: Change | None, patch: pytest.MonkeyPatch) -> Any:
    """The last states of a model in float64, of which one layer's heads return something else."""
    home = MODELS[build]
    if home is None:
        attention = model.h[LAYER].attn  # type: ignore[union-attr, index]
        original = type(attention)._attn

        def method(query: Tensor, key: Tensor, value: Tensor, *more: Any, **named: Any) -> Any:
            y, a = original(attention, query, key, value, *more, **named)
            return (y if change is None else change(a, value, y)), a

        patch.setattr(attention, "_attn", method, raising=False)
    else:
        written = home.eager_attention_forward

        def function(module: Any, query: Tensor, key: Tensor, value: Tensor, *more: Any, **named: Any) -> Any:
            y, a = written(module, query, key, value, *more, **named)
            if change is not None and module.layer_idx == LAYER:
                values = value.repeat_interleave(HEADS // value.shape[1], 1)
                y = change(a, values, y.transpose(1, 2)).transpose(1, 2)
            return y, a

        patch.setattr(home, "eager_attention_forward", function)
    try:
        return model(ids, use_cache=False).last_hidden_state
    finally:
        patch.undo()


@pytest.mark.parametrize("build", MODELS)
def test_edits_are_those_of_the_dense_model_and_gradients_flow(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    # in float64: a first row less its own value is zero, and Gemma-2's norm behind W_O enlarges its rounding
    model = build().eval().double()
    with torch.no_grad():  # at their small scale all weights of a row would be alike
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else nn.init.normal_(parameter, 1, 0.2)
    ids = torch.randint(0, 50, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    exact = copy.deepcopy(model)
    _, (tower,), samples = from_module(model, [{"input_ids": ids}])
    batch = tower.encode(list(samples)[:2])
    assert batch.ids == IDS
    told = beside_of(tower, batch, others())
    weights = [p for p in model.parameters() if p.ndim > 1]
    twins = [p for p in exact.parameters() if p.ndim > 1]
    untouched = dense(build, exact, ids, None, monkeypatch)

    def run(text: str) -> Tensor:
        with edited(tower, tower.layers, (), [parse(f"{text}:{LAYER}")], batch.real, told):
            return tower.forward(batch).last_hidden_state

    for text, change in EXACT.items():
        found, wanted = run(text), dense(build, exact, ids, change, monkeypatch)
        torch.testing.assert_close(
            found.double(), wanted, atol=2e-4, rtol=2e-4, msg=lambda m, t=text: f"{t}: {m}"
        )
        assert not torch.allclose(wanted, untouched, atol=1e-3), text
        for ours, theirs in zip(
            torch.autograd.grad(found.square().mean(), weights, allow_unused=True),
            torch.autograd.grad(wanted.square().mean(), twins, allow_unused=True),
            strict=True,
        ):
            assert (ours is None) == (theirs is None), text
            if ours is not None:
                scale = float(theirs.abs().max())
                torch.testing.assert_close(ours.double(), theirs, atol=1e-3 * scale + 1e-7, rtol=1e-2)
    for text in DRAWN:
        found = run(text)
        assert torch.equal(found, run(text)), text
        assert not torch.allclose(found.double(), untouched, atol=1e-3), text
        first = torch.autograd.grad(found.square().mean(), weights, allow_unused=True)[0]
        assert bool(first.isfinite().all()) and bool(first.any()), text  # noqa: PT018 one says the other
    for text in OF_IMAGES:
        with pytest.raises(MeasurementError, match="no keys of which it is known that they are an image's"):
            run(text)
