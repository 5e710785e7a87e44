"""What fills windows up is found for each size of the inputs, and only where it may be otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from attention_modules import Attention, Stack
from torch import Tensor, nn

import diag
from diag.models.families.from_module import from_module
from diag.studies.monitor.monitor import Monitor

METRICS = ["cos_y_vself"]


class Windows(Attention):
    """Windows of four tokens in the order of the sequence, as rows; the last one is filled up with zeros."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        windows = self.windows(x)
        y = super().forward(windows.flatten(0, 1)).unflatten(0, windows.shape[:2]).flatten(1, 2)
        return y[:, : x.shape[1]]

    def windows(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, -x.shape[1] % 4)).unflatten(1, (-1, 4))  # [input, window, token, channel]


class InTurn(Windows):
    """One call for each window."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        each = [Attention.forward(self, window) for window in self.windows(x).unbind(1)]
        return torch.cat(each, 1)[:, : x.shape[1]]


class Filled(Windows):
    """One call over all tokens and what fills up the last four."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return Attention.forward(self, self.windows(x).flatten(1, 2))[:, : x.shape[1]]


def expected(module: Stack, x: Tensor) -> Tensor:
    """The mean cosine of outputs and values over the tokens that are real, `[input, layer, head]`."""
    found = list[Tensor]()
    with torch.inference_mode():
        for layer in module.layers:
            found.append(_expected(layer, x))
            x = layer(x)
    return torch.stack(found, 1)


def _expected(layer: Windows, x: Tensor) -> Tensor:
    """Of one layer, in float64."""
    filled = layer.windows(x)
    windows = filled.flatten(1, 2)[:, None] if isinstance(layer, Filled) else filled
    q, k, v = layer.heads(windows)  # [input, window, head, token, dim]
    y = (q.double() @ k.double().mT / 8**0.5).softmax(-1) @ v.double()
    cosine = F.cosine_similarity(y, v.double(), dim=-1).transpose(-1, -2).flatten(1, 2)
    return cosine[:, : x.shape[1]].mean(1)


def numbers(module: nn.Module, inputs: list[Tensor]) -> Tensor:
    """`[input, layer, head]`, of as many heads as a layer has at most."""
    table = diag.probe(module, inputs, metrics=METRICS).samples
    table = table[table["head"] >= 0]
    found = torch.full([table[name].max() + 1 for name in ("input_index", "layer", "head")], torch.nan)
    found = found.double()
    places = (torch.tensor(table[name].to_numpy()) for name in ("input_index", "layer", "head"))
    found[tuple(places)] = torch.tensor(table["value"].to_numpy(dtype=float))
    return found


@pytest.mark.parametrize("kind", [Windows, InTurn, Filled])
@pytest.mark.parametrize("lengths", [[8, 6, 8, 3, 6, 16], [4, 3], [6, 8, 7]])
def test_windows_that_a_later_input_does_not_fill(kind: type[Windows], lengths: list[int]) -> None:
    torch.manual_seed(0)
    module = Stack(kind(), kind()).eval()
    inputs = [torch.randn(2, tokens, 16) for tokens in lengths]
    of_inputs = torch.cat([expected(module, x) for x in inputs])
    torch.testing.assert_close(numbers(module, inputs), of_inputs, atol=1e-6, rtol=0)


def test_a_size_is_looked_at_once_and_only_where_its_tokens_do_not_follow() -> None:
    layer, ran = Stack(Windows(), Windows()).eval(), Counter[int]()
    layer.register_forward_hook(lambda module, args, output: ran.update([args[0].shape[1]]))
    diag.probe(layer, [torch.randn(1, tokens, 16) for tokens in (8, 16, 12, 16)], metrics=METRICS)
    assert (ran[16], ran[12]) == (2, 1)  # what is measured, and nothing else
    once = Counter(ran)
    diag.probe(layer, [torch.randn(1, tokens, 16) for tokens in (8, 6)], metrics=METRICS)
    looked_at = ran[6]
    assert looked_at > 1
    diag.probe(layer, [torch.randn(1, tokens, 16) for tokens in (8, 6, 6, 6)], metrics=METRICS)
    assert ran[6] == 2 * looked_at + 2
    assert ran[16] == once[16]


def sam() -> nn.Module:
    """SAM's image tower, without positions and so for images of any size; a window is 28 pixels wide."""

    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "output_channels": 8,
            }
            config = transformers.SamVisionConfig(
                **sizes, image_size=28, patch_size=4, window_size=7, global_attn_indexes=[], use_abs_pos=False
            )
            self.tower = transformers.SamVisionModel(config).vision_encoder
            patches = self.tower.patch_embed
            patches.forward = lambda x: patches.projection(x).permute(0, 2, 3, 1)

        def forward(self, x: Tensor) -> object:
            return self.tower(x)

    return Images()


def davit() -> nn.Module:
    """Windows of 7 × 7 patches of four pixels, then of eight."""
    sizes = {"depths": (1, 1), "embed_dims": (8, 16), "num_heads": (1, 2), "num_classes": 0}
    return timm.create_model("davit_tiny", **sizes)


@pytest.mark.parametrize(
    ("build", "sizes"), [(sam, (28, 20, 64)), (sam, (64, 20, 28)), (davit, (56, 40, 112))]
)
def test_images_of_several_sizes_are_measured_as_each_size_alone(
    build: Callable[[], nn.Module], sizes: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    module, inputs = build().eval(), [torch.randn(2, 3, size, size) for size in sizes]
    alone = torch.cat([numbers(module, [x]) for x in inputs])
    torch.testing.assert_close(numbers(module, inputs), alone, atol=1e-6, rtol=0, equal_nan=True)
    _, (tower,), samples = from_module(module, inputs)
    for sample in samples:
        assert tower.look_again is not None
        tower.look_again([sample])
        first = tower.encode([sample]).layers(tower.layers)[0]
        assert any(x is not None for x in first.form.padding) == (sample.read().data.shape[-1] % 28 > 0)


def test_a_layer_that_attends_otherwise_in_another_size_is_named() -> None:
    class Growing(nn.Module):
        """A second layer for more than eight tokens, of which it makes groups of two."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Attention(), Attention()])

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](x if x.shape[1] > 8 else F.pad(x, (0, 0, 0, 1)))
            return self.layers[1](x) if x.shape[1] < 9 else x

    with pytest.raises(
        diag.UserError, match=r"layer 'layers\.1' (was never run|attends otherwise in inputs of)"
    ):
        diag.probe(Growing().eval(), [torch.randn(1, 6, 16), torch.randn(1, 12, 16)], metrics=METRICS)


def test_training_batches_of_several_sizes() -> None:
    torch.manual_seed(0)
    module = Stack(Windows(), Windows()).eval()
    monitor = Monitor(module, every=1, metrics=METRICS)
    for step, tokens in enumerate((8, 6, 8, 3)):
        x = torch.randn(2, tokens, 16)
        module(x)  # with gradients, as in training
        of_step = monitor.step(step)
        for layer, right in enumerate(expected(module, x).mean((0, 2)).tolist()):
            assert of_step[f"attnbias/cos_y_vself/layer_0{layer}"] == pytest.approx(right, abs=1e-6)
