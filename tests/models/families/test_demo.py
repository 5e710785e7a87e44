"""The embedded models: their loaders, with stand-in weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed

from diag.errors import UserError
from diag.inputs.items import Inputs
from diag.models import load
from diag.models.base import Sample
from diag.models.names.resolve import parse

CPU = {"device": "cpu", "dtype": torch.float32}


@pytest.fixture(autouse=True)
def stand_ins(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diag.models.families.demo.EMBEDDED", embedded)


def test_images_are_prepared_as_in_training() -> None:
    tower = load(parse("demo:vit-p8"), **CPU).tower("vision")
    picture = np.zeros((128, 192), dtype=np.uint8)
    picture[:, 32:160] = 255  # the centre square; the rest must be cropped away
    pixels = tower.encode([Sample("a", lambda: Image.fromarray(picture))]).data
    assert pixels.shape == (1, 3, 64, 64)
    assert torch.equal(pixels[..., 2:-2], torch.ones(1, 3, 64, 60))
    black = tower.encode([Sample("b", lambda: Image.new("RGB", (64, 64)))]).data
    assert torch.equal(black, -torch.ones(1, 3, 64, 64))


@pytest.mark.parametrize(("name", "patches"), [("vit-p16", 16), ("vit-p8", 64), ("vit-p4", 256)])
def test_patch_sizes(name: str, patches: int) -> None:
    model = load(parse(f"demo:{name}"), **CPU)
    facts = model.tower("vision").facts
    assert (facts["image_size"] // facts["patch_size"]) ** 2 == patches
    assert (model.family, model.resolved, model.facts["card"]["name"]) == ("demo", f"demo:{name}", name)


def test_the_language_model(texts: Inputs) -> None:
    model = load(parse("demo:lm"), **CPU)
    tower = model.tower("text")
    assert (model.resolved, tower.facts["context"], len(tower.layers)) == ("demo:lm", 256, 6)
    assert next(tower.samples(texts, 32)).id == "long:00000"


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="comes with its own weights"):
        load(parse("demo:lm", model_args=["n_layer=3"]), **CPU)
    monkeypatch.setattr("diag.models.families.demo.EMBEDDED", tmp_path)
    with pytest.raises(UserError, match="holds no weights of 'demo:lm'"):
        load(parse("demo:lm"), **CPU)
    with pytest.raises(UserError, match=r"vit-p8\.safetensors' does not exist"):
        load(parse("demo:vit-p8"), **CPU)


def test_another_image_size_interpolates_the_positions(embedded: Path, photographs: Inputs) -> None:
    native = load(parse("demo:vit-p8"), **CPU)
    model = load(parse("demo:vit-p8,img_size=128"), **CPU)
    stored = load_file(embedded / "vit-p8.safetensors")["pos_embed"].float()
    assert torch.equal(model.module.pos_embed, resample_abs_pos_embed(stored, [16, 16]))
    assert (model.name, model.resolved) == ("demo:vit-p8,img_size=128", "demo:vit-p8,img_size=128")
    assert native.notes == ()
    assert native.tower("vision").facts["positions"] == "native"
    tower = model.tower("vision")
    assert (tower.facts["positions"], tower.facts["image_size"]) == ("interpolated", 128)
    assert tower.facts["preprocessing"]["size"] == [128, 128]
    assert "from 8×8 to 16×16" in model.notes[0]
    calls: list = []
    with torch.inference_mode(), tower.capture(tower.layers, calls.append):
        tower.forward(tower.encode(list(tower.samples(photographs, None))))
    assert {call.tokens for call in calls} == {257}


@pytest.mark.parametrize(
    ("name", "message", "tip"),
    [
        (
            "demo:vit-p8,img_size=60",
            "60 px is not a multiple of the patch size 8",
            "img_size=56 or img_size=64",
        ),
        ("demo:vit-p8,img_size=(64, 128)", "'demo:vit-p8' takes square images", "img_size=64"),
        (
            "demo:vit-p8,patch_size=4",
            "'demo:vit-p8' comes with its own weights",
            "-m demo:vit-p8,img_size=128",
        ),
        ("demo:lm,img_size=64", "'demo:lm' comes with its own weights", "use it alone: -m demo:lm"),
        ("demo:vit-p8,checkpoint=w.pt", "'demo:vit-p8' comes with its own weights", "use it alone"),
    ],
)
def test_sizes_that_cannot_be(name: str, message: str, tip: str) -> None:
    with pytest.raises(UserError) as error:
        load(parse(name), **CPU)
    assert message in str(error.value)
    assert tip in (error.value.tip or "")
