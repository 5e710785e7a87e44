"""Output gates: switched off, a layer returns W_O of what its heads return, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from reference import dense_pattern
from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from diag.attention.call import AttentionCall
from diag.errors import UserError
from diag.measure.edited_model import check_layers, edited
from diag.measure.loop import measure
from diag.models.base import Batch, Sample, Tower
from diag.models.hooks.interventions import parse
from diag.models.hooks.layers import Layer, attention_modules
from diag.models.hooks.seam import Sightings, attention_calls

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def language_model(kind: str) -> tuple[nn.Module, Tensor]:
    full = {"layer_types": ["full_attention"] * 2}
    if kind == "qwen3_next":
        config = transformers.Qwen3NextConfig(
            **SIZES, **EXPERTS, **full, shared_expert_intermediate_size=16, attention_bias=True
        )
        model: nn.Module = transformers.Qwen3NextModel(config)
    elif kind == "qwen3_5":
        model = transformers.Qwen3_5TextModel(transformers.Qwen3_5TextConfig(**SIZES, **full))
    else:
        sizes = SIZES | EXPERTS | full
        model = transformers.AfmoeModel(transformers.AfmoeConfig(**sizes, num_dense_layers=1))
    return model, torch.arange(2 * 9).view(2, 9) % 50


class Wrapped(nn.Module):
    """An attention module of timm as a whole model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.attn = module

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


TIMM: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: Attention(32, num_heads=4, qkv_bias=True, gated=True),
    "timm_rope": lambda: AttentionRope(32, num_heads=4, num_prefix_tokens=0, gated=True),
    "eva": lambda: EvaAttention(32, num_heads=4, qk_norm=False, scale_norm=False, gated=True),
}
KINDS = ["qwen3_next", "qwen3_5", "afmoe", *TIMM]


def built(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if kind in TIMM:
        model, given = Wrapped(TIMM[kind]()), torch.randn(2, 9, 32)
    else:
        model, given = language_model(kind)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # small weights leave every gate at one half
    return model.eval().requires_grad_(False), given


def tower_of(model: nn.Module, given: Tensor) -> Tower:
    return Tower(
        name="text",
        layers=attention_modules(model),
        samples=lambda inputs, length: iter(()),
        encode=lambda samples: Batch(tuple(sample.id for sample in samples), given),
        forward=lambda batch: model(batch.data),
    )


def run(tower: Tower, given: Tensor, texts: Sequence[str]) -> tuple[list[AttentionCall], list[Tensor], Any]:
    """Calls of all layers, what their attention modules return, and what the model does."""
    calls: list[AttentionCall] = []
    returned: list[Tensor] = []
    hooks = [
        layer.module.register_forward_hook(
            lambda module, args, output: returned.append(output[0] if isinstance(output, tuple) else output)
        )
        for layer in tower.layers
    ]
    with (
        torch.inference_mode(),
        edited(tower, tower.layers, (), [parse(text) for text in texts]),
        tower.capture(tower.layers, calls.append),
    ):
        result = tower.forward(Batch(("a", "b"), given))
    for hook in hooks:
        hook.remove()
    return calls, returned, result


def projected(layer: Layer, heads: Tensor) -> Tensor:
    """W_O of `[batch, head, token, dim]`, in float64."""
    module: Any = layer.module
    projection = module.o_proj if hasattr(module, "o_proj") else module.proj
    found = heads.transpose(1, 2).flatten(2) @ projection.weight.double().T
    return found if projection.bias is None else found + projection.bias.double()


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_gate_a_layer_returns_the_projected_heads(kind: str) -> None:
    """W_O A V of the dense reference; with the gate (the negative control) it returns something else."""
    model, given = built(kind)
    tower = tower_of(model, given)
    for texts, same in ((["gated"], True), ([], False)):
        calls, returned, _ = run(tower, given, texts)
        assert len(calls) == len(tower.layers)
        for call, output in zip(calls, returned, strict=True):
            value = call.value.double().repeat_interleave(call.group, 1)
            expected = projected(tower.layers[call.layer], torch.from_numpy(dense_pattern(call)) @ value)
            error = ((output - expected).norm() / expected.norm()).item()
            assert error < 1e-5 if same else error > 0.05


def test_with_its_gate_qwen_multiplies_with_the_sigmoid() -> None:
    """The half of the projection that is taken for gate logits is the gate."""
    model, given = built("qwen3_next")
    tower = tower_of(model, given)
    states: list[Tensor] = []
    layer: Any = tower.layers[0]
    layer.module.register_forward_pre_hook(
        lambda module, args, kwargs: states.append(kwargs["hidden_states"]), with_kwargs=True
    )
    calls, returned, _ = run(tower, given, [])
    weight, bias = layer.module.q_proj.weight, layer.module.q_proj.bias
    logits = (states[0] @ weight.T + bias).unflatten(-1, (4, 16))[..., 8:].transpose(1, 2).double()
    value = calls[0].value.double().repeat_interleave(2, 1)
    gated = torch.from_numpy(dense_pattern(calls[0])) @ value * logits.sigmoid()
    torch.testing.assert_close(returned[0].double(), projected(layer, gated), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was_and_other_layers_alone(kind: str) -> None:
    model, given = built(kind)
    tower = tower_of(model, given)
    before, first, _ = run(tower, given, [])
    last = len(tower.layers) - 1
    edited_calls, changed, _ = run(tower, given, [f"gated:{last}"])
    for x, y in zip(first[:last], changed[:last], strict=True):
        assert torch.equal(x, y)
    assert torch.equal(before[last].output, edited_calls[last].output), "heads are before the gate"
    assert not torch.allclose(first[last], changed[last])
    _, after, _ = run(tower, given, [])
    assert all(torch.equal(x, y) for x, y in zip(first, after, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_seam_sees_that_the_gate_is_off(kind: str) -> None:
    model, given = built(kind)
    tower = tower_of(model, given)
    for texts, expected in ((["gated"], "as captured"), ([], "modified")):
        sightings: Sightings
        with (
            torch.inference_mode(),
            edited(tower, tower.layers, (), [parse(text) for text in texts]),
            attention_calls(tower.layers, lambda call: None) as sightings,
        ):
            tower.forward(Batch(("a", "b"), given))
        assert set(sightings.projection.values()) == {expected}


def test_a_probe_under_it() -> None:
    model, given = built("qwen3_next")
    tower = tower_of(model, given)
    samples = [Sample(name, lambda: None) for name in "ab"]
    numbers = [
        next(iter(measure(tower, samples, metrics=["cos_y_vself"], edits=[parse(text) for text in texts])))
        for texts in ([], ["gated:0"])
    ]
    first, second = ([layer.values for layer in batch] for batch in numbers)
    assert (first[0] == second[0]).all(), "heads of the layer itself are before its gate"
    assert (first[1] != second[1]).any()


def test_a_model_without_a_gate_is_refused_by_the_name_of_the_layer() -> None:
    torch.manual_seed(0)
    ungated = Wrapped(Attention(32, num_heads=4))
    layers = attention_modules(ungated)
    for attempt in (
        lambda: check_layers([parse("gated")], layers),
        lambda: edited(tower_of(ungated, torch.zeros(1)), layers, (), [parse("gated:0")]).__enter__(),
    ):
        with pytest.raises(UserError, match=r"layer 'attn' \(Attention\) has no output gate") as error:
            attempt()
        assert "Qwen3NextAttention" in (error.value.tip or "")
    with pytest.raises(UserError, match="'gated' changes a whole layer, not heads"):
        parse("gated:0/1")


def test_in_half_precision_the_gate_is_exactly_one() -> None:
    model, given = built("qwen3_next")
    model = model.bfloat16()
    tower = tower_of(model, given)
    calls, returned, _ = run(tower, given, ["gated"])
    layer: Any = tower.layers[0]
    expected = layer.module.o_proj(calls[0].output.transpose(1, 2).flatten(2))
    assert torch.equal(returned[0], expected)
