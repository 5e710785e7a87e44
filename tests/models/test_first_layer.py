"""What a vision tower's first attention layer reads: steps from token to token, and what is no patch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diag.models import load
from diag.models.base import Tower
from diag.models.encoding import image_encoder, image_preparation, image_samples
from diag.models.first_layer import kinds_of, placed
from diag.models.hooks.layers import Layer
from diag.models.names.resolve import parse

CPU = {"device": "cpu", "dtype": torch.float32}
CLS, REGISTERS = ("cls",), ("registers",)


@pytest.mark.parametrize(
    ("name", "patch_size", "prefix"),
    [
        ("vit_tiny_patch16_224,depth=1", 16, CLS),
        ("deit_tiny_distilled_patch16_224,depth=1", 16, CLS * 2),
        ("vit_small_r26_s32_224,depth=1", 32, CLS),  # a stem of stride 32; the patch embedding says 1
        ("pit_ti_224", 8, CLS),  # patches of 16 that overlap
        ("pit_ti_distilled_224", 8, CLS * 2),
        ("crossvit_tiny_240", 12, CLS),  # the first of two branches
        ("cait_xxs24_224", 16, ()),  # a class token that comes later
        ("coat_tiny", 4, CLS),
        ("swin_tiny_patch4_window7_224", 4, ()),
        ("flexivit_small,patch_size=24,depth=1", 24, CLS),
        ("vit_tiny_patch16_224,patch_size=[32,8],depth=1", (32, 8), CLS),
        ("vit_base_patch16_siglip_224,depth=1", 16, ()),
        ("beit_base_patch16_224,depth=1", 16, CLS),
        ("vit_small_patch16_dinov3,depth=1", 16, CLS + REGISTERS * 4),
        ("vit_base_patch16_rope_reg1_gap_256,depth=1", 16, REGISTERS),
        ("vit_small_patch14_reg4_dinov2,depth=1", 14, CLS + REGISTERS * 4),
    ],
)
def test_timm_models_by_name(name: str, patch_size: int | tuple[int, int], prefix: tuple[str, ...]) -> None:
    tower = load(parse(f"timm:{name}", random_init=True), **CPU).tower("vision")
    assert (tower.facts["patch_size"], tower.prefix, tower.suffix) == (patch_size, prefix, ())


class Reader(nn.Module):
    """The first attention layer: what it reads is what counts."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Patches(nn.Module):
    """Steps over an image, tokens before and behind its patches, and one layer."""

    def __init__(self, *steps: nn.Module, front: int = 0, back: int = 0, **tokens: int) -> None:
        super().__init__()
        self.steps, self.layer = nn.Sequential(*steps), Reader()
        self.counts = (front, back)
        for name, count in tokens.items():
            setattr(self, name, nn.Parameter(torch.randn(1, count, 1)))
        self.constant = torch.randn(front + back)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.steps(pixels)
        x = x if x.ndim == 3 else x.flatten(2).transpose(1, 2)
        parts = self.constant[None, :, None].expand(len(x), -1, x.shape[-1]).split(self.counts, 1)
        return self.layer(torch.cat([parts[0], x, parts[1]], 1))


class Cut(nn.Module):
    """Patches without a convolution: `[batch, patch, pixels]` of squares of pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return (
            x.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)
        )


def tower_over(module: Patches, size: tuple[int, int] = (48, 96), declared: object = None) -> Tower:
    def transform(image: Image.Image) -> Tensor:
        resized = np.asarray(image.resize(size[::-1]), dtype=np.float32)
        return torch.from_numpy(resized).permute(2, 0, 1)

    prepare = image_preparation(transform, torch.float32)
    layers = (Layer(0, "layer", module.layer),)
    encode = image_encoder(prepare, "cpu")
    tower = Tower("vision", layers, image_samples, encode, lambda batch: module(batch.data))
    return placed(tower, module, declared)


def conv(stride: int | tuple[int, int], kernel: int | tuple[int, int] | None = None) -> nn.Module:
    return nn.LazyConv2d(4, kernel or stride, stride)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([conv(8)], 8),
        ([conv((8, 4))], (8, 4)),
        ([conv(4, 7)], 4),  # overlapping, without padding: 48 / 11 is no whole number
        ([conv(2), nn.MaxPool2d(2), conv(2), conv(1)], 8),
        ([nn.AvgPool2d(3, 2, padding=1), nn.Unfold(4, stride=4)], 8),
        ([nn.PixelUnshuffle(4), conv(2)], 8),
        ([nn.AdaptiveAvgPool2d((12, 24))], 4),
        ([nn.Upsample(scale_factor=2), conv(8)], 4),
        ([nn.Upsample((40, 80)), conv(8)], None),  # 9.6 px
        ([Cut()], 8),  # nothing steps over the image: its area over the tokens
    ],
)
def test_the_step_is_the_product_of_what_is_on_the_way(
    steps: list[nn.Module], expected: int | tuple[int, int] | None
) -> None:
    tower = tower_over(Patches(*steps, front=1, cls_token=1), declared=7)
    assert tower.facts["patch_size"] == expected
    assert tower.prefix == CLS


def test_the_declared_size_stands_where_nothing_else_is_known() -> None:
    """Tokens that no square of pixels accounts for, such as rows of an image."""
    rows = nn.Flatten(2)
    assert tower_over(Patches(rows), declared=(4, 8)).facts["patch_size"] == (4, 8)
    assert tower_over(Patches(nn.Flatten(2))).facts["patch_size"] is None


@pytest.mark.parametrize(
    ("front", "back", "tokens", "prefix", "suffix"),
    [
        (1, 100, {"cls_token": 1, "detection_tokens": 100}, CLS, ("detection",) * 100),
        (2, 0, {"cls_token": 1}, CLS + REGISTERS, ()),
        (3, 2, {"prompt_tokens": 2, "cls_token": 1}, ("cls", "prompt", "prompt"), REGISTERS * 2),
        (0, 1, {"class_token": 1}, (), CLS),
        (1, 0, {"cls_token_0": 1, "cls_token_1": 1}, CLS, ()),
        (0, 0, {"cls_token": 1}, (), ()),
        (0, 2, {}, (), REGISTERS * 2),
        (5, 0, {"cls_token": 1, "reg_token": 4}, CLS + REGISTERS * 4, ()),
    ],
)
def test_tokens_are_found_by_content_and_named_by_parameters(
    front: int, back: int, tokens: dict[str, int], prefix: tuple[str, ...], suffix: tuple[str, ...]
) -> None:
    module = Patches(conv(16), front=front, back=back, **tokens)
    tower = tower_over(module)
    assert (tower.prefix, tower.suffix) == (prefix, suffix)
    assert kinds_of(front, back, module) == (prefix, suffix)
    patches, everything = 18, 18 + front + back
    assert (
        tower.tokens_in("patch", everything).tolist() == [False] * front + [True] * patches + [False] * back
    )
    assert tower.token_sets == ("patch", "all", *dict.fromkeys(prefix + suffix))
    for kind in {*prefix, *suffix}:
        assert int(tower.tokens_in(kind, everything).sum()) == (prefix + suffix).count(kind)
    later = replace(tower, joined={patches + 1: (1, 0)})
    assert later.tokens_in("patch", patches + 1).tolist() == [False] + [True] * patches
    fewer = len(prefix + suffix) - 1  # where patches have become groups, nothing stands beside them
    assert fewer < 1 or tower.tokens_in("patch", fewer).all()


def test_patches_that_are_left_out_are_no_reason_to_call_others_registers() -> None:
    """A masked autoencoder reads fewer patches than there are: parameters say what stands before them."""

    class Masked(Patches):
        def forward(self, pixels: Tensor) -> Tensor:
            x = self.steps(pixels).flatten(2).transpose(1, 2)[:, :5]
            return self.layer(torch.cat([self.cls_token.expand(len(x), 1, 4), x], 1))

    tower = tower_over(Masked(conv(8), cls_token=1))
    assert (tower.prefix, tower.suffix, tower.facts["patch_size"]) == (CLS, (), 8)


def test_images_of_one_sequence_come_one_by_one() -> None:
    """Pixtral joins the images of a batch; whose tokens are whose could not be told."""

    class Joined(Patches):
        def forward(self, pixels: Tensor) -> Tensor:
            x = self.steps(pixels).flatten(2).transpose(1, 2)
            return self.layer(x.flatten(0, 1)[None])

    assert tower_over(Joined(conv(8))).max_batch == 1
    assert tower_over(Patches(conv(8))).max_batch is None


def test_nothing_is_left_on_the_model_and_no_number_is_drawn() -> None:
    class Drawing(Patches):
        def forward(self, pixels: Tensor) -> Tensor:
            return super().forward(pixels + torch.rand(()))

    module = Drawing(nn.Conv2d(3, 4, 8, 8), front=1, cls_token=1)
    before = torch.get_rng_state()
    tower_over(module)
    assert torch.equal(torch.get_rng_state(), before)
    assert not module.layer._forward_pre_hooks
    assert module(torch.randn(2, 3, 48, 96)).shape == (2, 73, 4)
