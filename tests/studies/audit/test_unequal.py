"""Images of unequal sizes in one batch: which tokens are an image's own, and who reads what fills it up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from diag.models.base import Tower
from diag.studies.audit import AuditPlan, audit, audit_module
from diag.studies.audit.unequal import Own
from diag.studies.audit.words import (
    ALONE,
    DIFFERS,
    FINAL,
    LEAK,
    NONE,
    OTHER_INPUT,
    PADDING,
    ROUNDING,
    UNEQUAL,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
DETR = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 32, "num_queries": 6}
DETR |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 32}
DETR |= {"use_timm_backbone": False, "use_pretrained_backbone": False}


def yolos() -> tuple[Any, Any]:
    config = transformers.YolosConfig(**SIZES, image_size=[32, 48], patch_size=8, num_detection_tokens=5)
    processor = transformers.YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    return transformers.YolosModel(config), processor


def detr() -> tuple[Any, Any]:
    backbone = transformers.ResNetConfig(**RESNET, out_features=["stage4"])
    processor = transformers.DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    return transformers.DetrModel(transformers.DetrConfig(backbone_config=backbone, **DETR)), processor


def siglip2() -> tuple[Any, Any]:
    config = transformers.Siglip2VisionConfig(**SIZES, num_patches=16, patch_size=8)
    processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    return transformers.Siglip2VisionModel(config), processor


def levels(leaks: pd.DataFrame, changed: str) -> dict[int, str]:
    rows = leaks[(leaks["case"] == UNEQUAL) & (leaks["changed"] == changed)]
    return dict(zip(rows["layer"], rows["level"], strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("made", "padding", "alone"),
    [(yolos, LEAK, DIFFERS), (detr, LEAK, DIFFERS), (siglip2, NONE, NONE)],
)
def test_models_that_read_what_fills_an_image_up(made: Any, padding: str, alone: str, tmp_path: Path) -> None:
    """YOLOS takes no mask; DETR has one in attention, and none in the convolutions before it."""
    torch.manual_seed(0)
    for part in made():
        part.save_pretrained(tmp_path)
    leaks = audit(AuditPlan(models=(f"hf:{tmp_path}",), images="demo")).leaks
    places = (0, 1, FINAL)
    assert levels(leaks, OTHER_INPUT) == dict.fromkeys(places, NONE)
    assert levels(leaks, PADDING) == dict.fromkeys(places, padding)
    found = levels(leaks, ALONE)
    assert set(found) == set(places)
    assert set(found.values()) <= ({alone, ROUNDING} if alone == NONE else {alone})


class Patches(nn.Module):
    """One layer over patches of 4 × 4 pixels. masked: whether it minds the mask."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.masked = masked
        self.cut, self.qkv, self.proj = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48), nn.Linear(16, 16)
        self.outputs: list[Tensor] = []

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> Tensor:
        x = self.cut(pixel_values).flatten(2).mT
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        seen = F.max_pool2d(pixel_mask[:, None].float(), 4).flatten(1).bool()[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, seen if self.masked else None)
        self.outputs.append(y.transpose(1, 2).flatten(2))
        return x + self.proj(self.outputs[-1])


@pytest.mark.parametrize("masked", [True, False])
def test_a_ready_batch_is_watched_where_its_own_pixels_are(masked: bool) -> None:
    """The first image is 6 × 8 of 8 × 12 pixels: of 2 × 3 tokens, 0 and 1 are its own, 3 and 4 are cut."""
    module = Patches(masked).eval()
    mask = torch.ones(2, 8, 12, dtype=torch.long)
    mask[0, 6:], mask[0, :, 8:] = 0, 0
    pixels = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1)) * mask[:, None]
    leaks = audit_module(module, [{"pixel_values": pixels, "pixel_mask": mask}]).leaks
    assert levels(leaks, OTHER_INPUT) == {0: NONE, FINAL: NONE}
    # a patch that is cut holds both, and is seen by the others
    assert levels(leaks, PADDING) == {0: LEAK, FINAL: LEAK}
    filled = torch.where(
        mask[:, None].bool() | (torch.arange(2) == 1)[:, None, None, None], pixels, pixels.mean() + 1
    )
    with torch.inference_mode():
        before, after = (module(x, mask) is not None and module.outputs[-1] for x in (pixels, filled))
    own = [0, 1]
    expected = ((after - before)[0, own].double().norm() / before[0, own].double().norm()).item()
    row = leaks[(leaks["case"] == UNEQUAL) & (leaks["changed"] == PADDING) & (leaks["layer"] == 0)]
    assert row["change"].item() == pytest.approx(expected, rel=1e-6)
    whole = mask.clone()
    whole[0, :, :8] = 1  # two columns of whole patches
    whole[0, :, 8:] = 0
    tight = audit_module(module, [{"pixel_values": pixels * whole[:, None], "pixel_mask": whole}]).leaks
    assert levels(tight, PADDING) == dict.fromkeys((0, FINAL), NONE if masked else LEAK)


def test_own_tokens_by_hand() -> None:
    def nothing(*given: Any) -> Any:
        return None

    kinds: Any = {"prefix": ("cls",), "suffix": ("detection",)}
    tower = Tower("vision", (), samples=nothing, encode=nothing, forward=nothing, **kinds)
    real = torch.zeros(8, 12, dtype=torch.bool)
    real[:4, :9] = True
    own = Own(tower, real)
    tokens = own.tokens(8)
    assert tokens is not None
    assert tokens.int().tolist() == [1, 1, 1, 0, 0, 0, 0, 1]  # class token, 2 × 3 patches, the one behind
    assert own.tokens(9) is None
    picked = own(torch.arange(8.0)[:, None])
    assert picked is not None
    assert picked[:, 0].tolist() == [0, 1, 2, 7]
    patches = Own(tower, torch.tensor([True, False]))
    assert patches(torch.zeros(3, 1)) is None
    assert patches(torch.ones(2, 1)) is not None
