"""timm: preprocessing of the weights, checkpoints, and errors."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from checkpoints import save_timm
from PIL import Image
from safetensors.torch import save_file

from diag.errors import UserError
from diag.inputs.items import Inputs
from diag.models import load
from diag.models.base import Model, Sample
from diag.models.families.timm.load import fitted_by_timm, fuse
from diag.models.names.resolve import parse
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
    torch.manual_seed(0)  # as it was saved, and as random weights are drawn
    assert model.facts["weights_sha256"] == digest(timm.create_model("vit_tiny_patch16_224", **SIZES))
    assert model.facts["checkpoint"] == str(file)
    torch.manual_seed(2)
    assert small(random_init=True).facts["weights_sha256"] == model.facts["weights_sha256"]
    other = timm.create_model("vit_tiny_patch16_224", **SIZES)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    found = small(checkpoint=tmp_path / "other.pt").facts["weights_sha256"]
    assert found == digest(other) != model.facts["weights_sha256"]


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


def test_layers_whose_names_say_nothing_are_found_by_their_calls() -> None:
    tower = load(parse("timm:iformer_t", random_init=True), **CPU).tower("vision")
    assert [type(layer.module).__name__ for layer in tower.layers] == ["SHMA"] * 5
    assert (tower.facts["patch_size"], tower.prefix) == (16, ())


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


# --- other sizes than those of the weights


def noisy(folder: Path, **sizes: object) -> dict[str, torch.Tensor]:
    """A checkpoint whose embeddings are no constants, and its tensors."""
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", **{**SIZES, **sizes})
    module.pos_embed.data.normal_()
    save_file(module.state_dict(), folder / "w.safetensors")
    return module.state_dict()


def own(folder: Path, *changes: str) -> Model:
    rest = [pair for pair in SMALL if pair.partition("=")[0] not in {c.partition("=")[0] for c in changes}]
    name = f"timm:vit_tiny_patch16_224,checkpoint={folder / 'w.safetensors'}"
    return load(parse(",".join([name, *changes]), model_args=rest), **CPU)


def patches_seen(model: Model, photographs: Inputs) -> int:
    tower = model.tower("vision")
    calls: list = []
    with torch.inference_mode(), tower.capture(tower.layers, calls.append):
        tower.forward(tower.encode([next(tower.samples(photographs, None))]))
    return calls[0].tokens - len(tower.prefix)


def test_another_image_size_interpolates_the_positions(tmp_path: Path, photographs: Inputs) -> None:
    stored = noisy(tmp_path)
    model = own(tmp_path, "img_size=64")
    weights = model.module.state_dict()
    expected = timm.layers.resample_abs_pos_embed(stored["pos_embed"], [8, 8])
    assert torch.equal(weights["pos_embed"], expected)
    assert torch.equal(weights["pos_embed"][:, 0], stored["pos_embed"][:, 0])
    assert all(torch.equal(weights[name], stored[name]) for name in stored if name != "pos_embed")
    facts = model.tower("vision").facts
    assert (facts["positions"], facts["patch_embedding"], facts["image_size"]) == (
        "interpolated",
        "native",
        64,
    )
    assert model.notes == ("position embeddings interpolated from 4×4 to 8×8: off the training distribution",)
    assert patches_seen(model, photographs) == 64


def test_another_patch_size_resamples_the_kernel_exactly_upward(tmp_path: Path, photographs: Inputs) -> None:
    """The enlarged kernel gives an enlarged patch the embedding that the kernel gave the patch."""
    stored = noisy(tmp_path)
    model = own(tmp_path, "patch_size=16")
    kernel, larger = stored["patch_embed.proj.weight"], model.module.patch_embed.proj.weight
    assert larger.shape == (32, 3, 16, 16)
    patch = torch.randn(1, 3, 8, 8)
    enlarged = torch.nn.functional.interpolate(patch, (16, 16), mode="bicubic", antialias=True)
    before, after = (torch.einsum("oihw,nihw->no", *pair) for pair in ((kernel, patch), (larger, enlarged)))
    assert torch.allclose(before, after, atol=1e-4)
    facts = model.tower("vision").facts
    assert (facts["positions"], facts["patch_embedding"], facts["patch_size"]) == (
        "interpolated",
        "resampled",
        16,
    )
    assert "from 8×8 to 16×16 px (exact upward)" in model.notes[1]
    assert patches_seen(model, photographs) == 4
    smaller = own(tmp_path, "patch_size=4")
    assert torch.equal(
        smaller.module.patch_embed.proj.weight, timm.layers.resample_patch_embed(kernel, [4, 4])
    )
    assert "lossy below the stored kernel" in smaller.notes[1]


def test_published_weights_are_resampled_by_timm_and_marked_alike(
    tmp_path: Path, photographs: Inputs
) -> None:
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", **SIZES)
    module.pos_embed.data.normal_()
    timm.models.save_for_hf(module, tmp_path, model_args=SIZES)
    native = load(parse(f"timm:local-dir:{tmp_path}"), **CPU)
    assert native.tower("vision").facts["positions"] == "native"
    model = load(parse(f"{tmp_path},patch_size=16,img_size=96"), **CPU)
    assert torch.equal(
        model.module.patch_embed.proj.weight,
        timm.layers.resample_patch_embed(module.patch_embed.proj.weight, [16, 16]),
    )
    assert torch.allclose(
        model.module.pos_embed, timm.layers.resample_abs_pos_embed(module.pos_embed, [6, 6]), atol=1e-6
    )
    assert [note.partition(":")[0] for note in model.notes] == [
        "position embeddings interpolated from 4×4 to 6×6",
        "patch embedding resampled from 8×8 to 16×16 px (exact upward)",
    ]
    assert patches_seen(model, photographs) == 36


def test_a_checkpoint_that_was_trained_at_the_size_is_native(tmp_path: Path) -> None:
    stored = noisy(tmp_path, img_size=64)
    model = own(tmp_path, "img_size=64")
    assert model.tower("vision").facts["positions"] == "native"
    assert model.notes == ()
    assert torch.equal(model.module.pos_embed, stored["pos_embed"])


def on_two_rows(stored: torch.Tensor) -> torch.Tensor:
    """Position embeddings of a class token and a grid of 4 × 4, as PyTorch interpolates them to 2 × 8."""
    grid = stored[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, (2, 8), mode="bicubic", antialias=True)
    return torch.cat([stored[:, :1], resized.flatten(2).transpose(1, 2)], 1)


@pytest.mark.parametrize("published", [True, False])
def test_another_grid_of_as_many_patches_is_interpolated(tmp_path: Path, published: bool) -> None:
    """The embeddings of 4 × 4 patches would fit 2 × 8 as they are, and mean nothing there."""
    stored = noisy(tmp_path)["pos_embed"]
    spec = parse("timm:vit_tiny_patch16_224", model_args=SMALL, checkpoint=tmp_path / "w.safetensors")
    if published:
        module = timm.create_model("vit_tiny_patch16_224", **SIZES)
        module.pos_embed.data = stored
        timm.models.save_for_hf(module, tmp_path, model_args=SIZES)
        spec = parse(f"timm:local-dir:{tmp_path}")
    model = load(replace(spec, model_args={**spec.model_args, "img_size": (16, 64)}), **CPU)
    assert torch.allclose(model.module.pos_embed, on_two_rows(stored), atol=1e-6)
    assert model.tower("vision").facts["positions"] == "interpolated"
    assert model.notes == ("position embeddings interpolated from 4×4 to 2×8: off the training distribution",)
    same = load(replace(spec, model_args={**spec.model_args, "img_size": (32, 32)}), **CPU)
    assert torch.equal(same.module.pos_embed, stored)
    assert same.tower("vision").facts["positions"] == "native"


def test_without_a_size_nothing_is_interpolated(tmp_path: Path) -> None:
    file = save_timm(tmp_path, "vit_tiny_patch16_224", img_size=64, depth=1)
    with pytest.raises(UserError, match=r"'pos_embed' is \[1, 17, 192\], the model's is \[1, 197, 192\]"):
        load(parse(f"timm:vit_tiny_patch16_224,checkpoint={file},depth=1"), **CPU)


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("vit_base_patch16_rope_reg1_gap_256", "native"),
        ("swin_tiny_patch4_window7_224", "native"),
        ("beit_base_patch16_224", "interpolated"),
        ("vit_base_patch14_dinov2", "interpolated"),
    ],
)
def test_which_models_take_another_size_as_it_is(name: str, positions: str) -> None:
    with torch.device("meta"):
        native, other = (
            timm.create_model(name, depth=1, **size)
            if "swin" not in name
            else timm.create_model(name, depths=(1, 1), **size)
            for size in ({}, {"img_size": 448})
        )
    assert fitted_by_timm(other, native, name).positions == positions


def test_random_weights_are_made_for_their_size() -> None:
    model = load(parse("timm:vit_tiny_patch16_224,img_size=96,depth=1", random_init=True), **CPU)
    assert model.tower("vision").facts["positions"] == "native"
    assert model.module.pos_embed.shape == (1, 37, 192)


@pytest.mark.parametrize(
    ("name", "message", "tip"),
    [
        (
            "vit_tiny_patch16_224,img_size=250",
            "250 px is not a multiple of the patch size 16",
            "img_size=240 or",
        ),
        ("flexivit_small,patch_size=14", "240 px is not a multiple of the patch size 14", "img_size=238 or"),
        ("vit_tiny_patch16_224,img_size=big", "img_size is 'big', not a number of pixels", "img_size=224"),
        ("vit_tiny_patch16_224,patch_size=0", "patch_size is 0, not a number", "patch_size=16"),
        ("resnet18,img_size=256", "'timm:resnet18' has no grid of patches", "leave img_size"),
        ("hiera_tiny_224,img_size=256", "'timm:hiera_tiny_224' has no grid of patches", "leave img_size"),
    ],
)
def test_sizes_that_cannot_be(name: str, message: str, tip: str) -> None:
    with pytest.raises(UserError) as error:
        load(parse(f"timm:{name}", random_init=True), **CPU)
    assert message in str(error.value)
    assert tip in (error.value.tip or "")


def test_averaged_weights_are_taken_as_timm_takes_them(tmp_path: Path) -> None:
    state = timm.create_model("vit_tiny_patch16_224", **SIZES).state_dict()
    averaged = {f"module.{name}": value * 0.5 for name, value in state.items()}
    file = tmp_path / "last.pth.tar"
    document = {"args": argparse.Namespace(lr=0.1), "state_dict": state, "state_dict_ema": averaged}
    torch.save(document, file)
    theirs = timm.create_model("vit_tiny_patch16_224", checkpoint_path=file, **SIZES)
    spec = parse("timm:vit_tiny_patch16_224", checkpoint=file, model_args=SMALL)
    ours = load(spec, **CPU)
    assert digest(ours.module) == digest(theirs)
    assert ours.notes[0] == (
        "the weights averaged over training were taken, 'state_dict_ema';"
        " 'checkpoint_key=state_dict' takes the others"
    )
    plain = load(replace(spec, checkpoint_key="state_dict"), **CPU)
    assert torch.equal(plain.module.cls_token, state["cls_token"])
