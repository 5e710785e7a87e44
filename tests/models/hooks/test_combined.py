"""Layers that add up several maps: their call is the module's own sum, or they are refused by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from reference import reference
from surveys import layers_on
from torch import Tensor, nn

from diag.attention.call import AttentionCall
from diag.attention.pattern import pattern_rows
from diag.attention.row_sums import row_sums
from diag.errors import MeasurementError
from diag.measure.loop import capture
from diag.metrics.default import METRICS, per_input
from diag.models.families.from_module import from_module
from diag.models.hooks.meaning import SEVERAL
from diag.models.hooks.seam import attention_calls
from diag.run.api import probe

HEADS, DIM, TOKENS = 3, 4, 7
Parts = tuple[Tensor, Tensor, Tensor]
SDPA = F.scaled_dot_product_attention


class Differential(nn.Module):
    """Differential attention over `[batch, token, 24]` in one of the ways in which it is written.

    y: what a forward pass made. scale: λ of each head or, with a λ of its own, of each head and token.
    """

    def __init__(
        self, way: Callable[[Differential, Parts], Tensor], *, maps: int = 2, own: bool = False
    ) -> None:
        super().__init__()
        self.way, self.maps = way, maps
        self.qk = nn.Linear(24, 2 * maps * HEADS * DIM)
        self.v, self.out = nn.Linear(24, HEADS * 2 * DIM), nn.Linear(HEADS * 2 * DIM, 24)
        self.gate = nn.Linear(24, HEADS)
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        qk = self.qk(x).unflatten(-1, (2, HEADS, self.maps, DIM)).permute(2, 0, 3, 4, 1, 5)
        q, k = qk[0], qk[1]  # [batch, head, map, token, dim]
        v = self.v(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        self.scale = torch.tensor([0.3, 0.5, -0.2])[:, None, None]
        if self.own:
            self.scale = self.gate(x).sigmoid().transpose(1, 2)[..., None]
        self.queries_and_keys = q, k
        y = self.way(self, (q, k, v))
        self.y = y.clone()
        return self.out(F.rms_norm(y, (2 * DIM,)).transpose(1, 2).flatten(2))

    @property
    def weights(self) -> Tensor:
        """Those of the last forward pass by their formula, in float64: `[batch, head, token, token]`."""
        q, k = (x.double() for x in self.queries_and_keys)
        each = (q @ k.transpose(-1, -2) / DIM**0.5).softmax(-1)
        return each[:, :, 0] - sum(self.scale.double() * each[:, :, n] for n in range(1, self.maps))


def two_calls(on: Differential, parts: Parts) -> Tensor:
    q, k, v = parts
    return SDPA(q[:, :, 0], k[:, :, 0], v) - on.scale * SDPA(q[:, :, 1], k[:, :, 1], v)


def written_over(on: Differential, parts: Parts) -> Tensor:
    q, k, v = parts
    y = SDPA(q[:, :, 0], k[:, :, 0], v)
    other = SDPA(q[:, :, 1], k[:, :, 1], v)
    other *= on.scale
    y -= other
    return y


def doubled_heads(on: Differential, parts: Parts) -> Tensor:
    """One call of 2H heads, first maps and then second ones, that are chunked."""
    q, k, v = parts
    y = SDPA(q.transpose(1, 2).flatten(1, 2), k.transpose(1, 2).flatten(1, 2), v.repeat(1, 2, 1, 1))
    first, other = y.transpose(1, 2).contiguous().chunk(2, 2)
    return first.transpose(1, 2) - on.scale * other.transpose(1, 2)


def side_by_side(on: Differential, parts: Parts) -> Tensor:
    """One call of 2H heads whose pairs share a KV head, a first map and a second one in turn."""
    q, k, v = parts
    y = SDPA(q.flatten(1, 2), k.flatten(1, 2), v.repeat_interleave(2, 1))
    return y[:, 0::2] - on.scale * y[:, 1::2]


def halves_of_values(on: Differential, parts: Parts) -> Tensor:
    """Four calls: kernels that take values no wider than queries."""
    q, k, v = parts
    maps = [
        torch.cat([SDPA(q[:, :, n], k[:, :, n], half) for half in v.chunk(2, -1)], -1).to(torch.float32)
        for n in range(2)
    ]
    return maps[0] - on.scale * maps[1]


def stacked(on: Differential, parts: Parts) -> Tensor:
    q, k, v = parts
    every = [SDPA(q[:, :, n], k[:, :, n], v) for n in range(on.maps)]
    return torch.stack([every[0], *(-on.scale * y for y in every[1:])], 1).sum(1)


WAYS = {
    "two calls": (two_calls, 2),
    "written over": (written_over, 2),
    "doubled heads": (doubled_heads, 2),
    "side by side": (side_by_side, 2),
    "halves of values": (halves_of_values, 2),
    "three maps, stacked": (stacked, 3),
}


def calls_of(module: nn.Module, x: Tensor | dict[str, Tensor]) -> list[AttentionCall]:
    _, (tower,), samples = from_module(module, [x])
    return capture(tower, tower.encode(samples))


@pytest.mark.parametrize("own", [False, True], ids=["of heads", "of tokens"])
@pytest.mark.parametrize("way", WAYS)
def test_the_call_of_a_layer_is_the_sum_that_the_module_makes(way: str, own: bool) -> None:
    torch.manual_seed(0)
    function, maps = WAYS[way]
    module = Differential(function, maps=maps, own=own).eval()
    (call,) = calls_of(module, torch.randn(2, TOKENS, 24))
    assert len(call.maps) == maps
    assert torch.equal(call.output, module.y)
    np.testing.assert_allclose(pattern_rows(call), module.weights.detach().numpy(), atol=1e-6)
    total = row_sums(call).expand(2, HEADS, TOKENS)
    np.testing.assert_allclose(total, module.weights.sum(-1).detach(), atol=1e-6)
    everything = [list(range(TOKENS))] * 2
    measured, expected = per_input(call), reference(call, anchors=everything)
    for name, numbers in measured.items():
        if not METRICS[name].of_shares:
            np.testing.assert_allclose(numbers, expected[name], rtol=1e-4, atol=2e-5, err_msg=name)


def normed(on: Differential, parts: Parts) -> Tensor:
    q, k, v = parts
    first, other = (F.rms_norm(SDPA(q[:, :, n], k[:, :, n], v), (2 * DIM,)) for n in range(2))
    return first - on.scale * other


def gated_channels(on: Differential, parts: Parts) -> Tensor:
    q, k, v = parts
    return SDPA(q[:, :, 0], k[:, :, 0], v) - SDPA(q[:, :, 1], k[:, :, 1], v) * torch.arange(2.0 * DIM)


def one_masked(on: Differential, parts: Parts) -> Tensor:
    q, k, v = parts
    other = SDPA(q[:, :, 1], k[:, :, 1], v, is_causal=True)
    return SDPA(q[:, :, 0], k[:, :, 0], v) - on.scale * other


def rolled(on: Differential, parts: Parts) -> Tensor:
    q, k, v = parts
    first, other = (SDPA(q[:, :, n], k[:, :, n], v) for n in range(2))
    return first - on.scale * torch.cat([other[:, :, 1:], other[:, :, :1]], 2)


@pytest.mark.parametrize("way", [normed, gated_channels, one_masked, rolled])
def test_another_combination_is_refused_by_name(way: Callable[..., Tensor]) -> None:
    model = nn.Sequential(Differential(way).eval())
    with pytest.raises(MeasurementError, match=r"\('0': combines several maps"):
        calls_of(model.eval(), torch.randn(2, TOKENS, 24))


def branches(on: Differential, parts: Parts) -> Tensor:
    q, k, v = parts
    return SDPA(q[:, :, 0], k[:, :, 0], v) + SDPA(q[:, :, 1], k[:, :, 1], v.flip(-1))


def test_calls_over_values_of_their_own_are_no_maps_of_one_layer() -> None:
    with pytest.raises(MeasurementError, match=SEVERAL):
        layers_on(Differential(branches).eval(), torch.randn(2, TOKENS, 24))


def test_an_intervention_changes_what_the_module_goes_on_with() -> None:
    module, x = Differential(two_calls).eval(), torch.randn(2, TOKENS, 24)
    layers = layers_on(module, x)
    with torch.inference_mode():
        plain = module(x)
        with attention_calls(layers, lambda call: None) as sightings:
            watched = module(x)
        with attention_calls(layers, lambda call: torch.zeros_like(call.output)):
            changed = module(x)
    assert torch.equal(watched, plain)
    assert sightings.projection == {"": "modified"}  # a norm stands between
    assert torch.equal(changed, module.out.bias.expand_as(changed))


def test_timm_and_transformers_give_the_cosine_of_the_layers_own_output() -> None:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, attn_layer="diff", num_classes=0)
    config = transformers.DiffLlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50
    )
    llama = transformers.DiffLlamaModel(config)
    real = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    texts = {"input_ids": torch.randint(1, 50, (2, 7)), "attention_mask": real}
    for model, given in ((vit.eval(), torch.randn(2, 3, 64, 64)), (llama.eval(), texts)):
        norms = [m for name, m in model.named_modules() if name.endswith(("sub_norm", "groupnorm"))]
        read: list[Tensor] = []  # the norm reads the layer's y
        hooks = [
            norm.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0].clone()))
            for norm in norms
        ]
        with torch.inference_mode():
            model(**given) if isinstance(given, dict) else model(given)
        for hook in hooks:
            hook.remove()
        run = probe(model, [given], metrics=["cos_y_vself", "entropy", "row_sum"])
        calls = calls_of(model, given)
        for layer, (call, y) in enumerate(zip(calls, read, strict=True)):
            y = y if y.shape == call.output.shape else y.transpose(1, 2)
            assert torch.equal(call.output, y)
            rows = run.layers[run.layers["layer"] == layer].set_index("metric")
            expected = reference(call)["cos_y_vself"].mean()
            assert rows["mean"]["cos_y_vself"] == pytest.approx(expected.item(), abs=1e-6)
            assert np.isnan(rows["mean"]["entropy"])
            total, sums = rows["mean"]["row_sum"], row_sums(call)
            assert total == pytest.approx(float(sums[sums != 0].mean()), abs=1e-5)
            assert 0 < total < 0.9
            assert rows["row_sum"]["row_sum"] == round(total, 3)
            alone = reference(call.of_map(call.maps[0]))["self_weight"].mean()
            assert abs(alone - reference(call)["self_weight"].mean()) > 0.01
