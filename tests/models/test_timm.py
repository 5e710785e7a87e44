"""timm: preprocessing of the weights, checkpoints, and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from checkpoints import save_timm
from PIL import Image
from safetensors.torch import save_file

from diag.errors import UserError
from diag.inputs import Inputs
from diag.models import load
from diag.models.base import Model, Sample
from diag.models.names import parse
from diag.models.timm import fuse, prefix_of
from diag.models.weights import digest

CPU = {"device": "cpu", "dtype": torch.float32}
SMALL = ["img_size=32", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=4"]
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


def small(**options: object) -> Model:
    return load(parse("timm:vit_tiny_patch16_224", model_args=SMALL, **options), **CPU)


def test_a_checkpoint_is_what_runs(tmp_path: Path) -> None:
    file = save_timm(tmp_path, "vit_tiny_patch16_224", **SIZES)
    torch.manual_seed(1)
    model = small(checkpoint=file)
    torch.manual_seed(0)
    assert model.facts["weights_sha256"] == digest(timm.create_model("vit_tiny_patch16_224", **SIZES))
    assert model.facts["checkpoint"] == str(file)
    torch.manual_seed(2)
    assert small(random_init=True).facts["weights_sha256"] != model.facts["weights_sha256"]


def test_preprocessing_is_that_of_the_weights(photographs: Inputs) -> None:
    tower = small(random_init=True).tower("vision")
    facts = tower.facts
    assert (facts["patch_size"], facts["image_size"]) == (8, 32)
    assert facts["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert facts["preprocessing"]["crop"] == "center 0.9"
    batch = tower.encode(list(tower.samples(photographs, None)))
    assert batch.data.shape == (3, 3, 32, 32)
    white = tower.encode([Sample("w", lambda: Image.new("L", (50, 40), 255))])
    assert torch.equal(white.data, torch.ones(1, 3, 32, 32))


def test_tokens_before_the_patches() -> None:
    names = {
        "vit_base_patch16_siglip_224": (),
        "vit_small_patch16_dinov3": ("cls", *["registers"] * 4),
        "beit_base_patch16_224": ("cls",),
        "vit_base_patch16_rope_reg1_gap_256": ("registers",),
    }
    with torch.device("meta"):
        found = {name: prefix_of(timm.create_model(name, depth=1)) for name in names}
    assert found == names


def test_fused_attention_is_switched_on_where_the_environment_switched_it_off() -> None:
    from timm.layers import config

    before = config._USE_FUSED_ATTN
    timm.layers.set_fused_attn(False)
    try:
        module = timm.create_model("vit_tiny_patch16_224", **SIZES)
    finally:
        config._USE_FUSED_ATTN = before
    assert not module.blocks[0].attn.fused_attn
    fuse(module)
    assert all(block.attn.fused_attn for block in module.blocks)


def test_a_checkpoint_of_another_size_names_the_tensors(tmp_path: Path) -> None:
    file = save_timm(tmp_path, "vit_tiny_patch16_224", **{**SIZES, "embed_dim": 64})
    with pytest.raises(UserError) as error:
        small(checkpoint=file)
    assert "'cls_token' is [1, 1, 64], the model's is [1, 1, 32]" in str(error.value)
    assert "more" in str(error.value)
    assert "--model-arg" in (error.value.tip or "")


def test_nan_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    module = timm.create_model("vit_tiny_patch16_224", **SIZES)
    module.blocks[1].attn.qkv.weight.data[0, 0] = float("nan")
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"'blocks\.1\.attn\.qkv\.weight' hold NaN"):
        small(checkpoint=tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("name", "options", "message", "tip"),
    [
        (
            "vit_tiny_patch16_224",
            {"random_init": True, "model_args": ["img_sise=3"]},
            "'img_sise'",
            "'img_size'",
        ),
        ("resnet18", {"random_init": True}, "no self-attention layer", "measures transformers"),
        (
            "vit_tiny_patch16_224.augreg_in21k",
            {},
            "'model.safetensors' of 'timm/vit_tiny_patch16_224.augreg_in21k' is not on this machine",
            "hf download timm/vit_tiny_patch16_224.augreg_in21k model.safetensors",
        ),
    ],
)
def test_errors(
    name: str, options: dict, message: str, tip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        load(parse(f"timm:{name}", **options), **CPU)
    assert message in str(error.value)
    assert tip in (error.value.tip or "")
    assert "\n" not in str(error.value)


def test_a_local_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", **SIZES)
    timm.models.save_for_hf(module, tmp_path, model_args=SIZES)
    model = load(parse(str(tmp_path)), **CPU)
    assert model.resolved == f"timm:local-dir:{tmp_path}"
    assert model.facts["weights_sha256"] == digest(module)
