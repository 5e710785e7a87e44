"""Sizes other than those of the weights: what is refused, and what is said."""

from __future__ import annotations

import pytest

from diag.errors import UserError
from diag.models.sizes import NATIVE, fitted, grid, refuse_remainder, refuse_unreasonable, requested, sides


def test_sizes_are_one_or_two_positive_numbers() -> None:
    assert requested({}, "img_size", "x") is None
    assert requested({"img_size": 224}, "img_size", "x") == (224, 224)
    assert requested({"img_size": [64, 32]}, "img_size", "x") == (64, 32)
    for wrong in ("big", 0, -8, True, 22.4, (1, 2, 3), None, "12"):
        with pytest.raises(UserError, match=r"x: img_size is .*, not a number of pixels") as error:
            requested({"img_size": wrong}, "img_size", "x")
        assert error.value.tip == "for example img_size=224"
    assert sides(None) is None


def test_what_a_model_may_be_without_can_be_0() -> None:
    refuse_unreasonable({"text_config": {"head_dim": 0, "num_experts": 0}}, "x")
    for name, least in (("hidden_size", 1), ("num_experts", 0)):
        with pytest.raises(UserError, match=f"x: text_config.{name} is -1") as error:
            refuse_unreasonable({"text_config": {name: -1}}, "x")
        assert error.value.tip == f"it can be from {least} to 10,000,000"


def test_an_image_that_patches_do_not_fill_is_refused_with_the_nearest_sizes() -> None:
    refuse_remainder((96, 64), (16, 16), "x")
    with pytest.raises(UserError, match="x: 250 px is not a multiple of the patch size 16") as error:
        refuse_remainder((256, 250), (16, 16), "x")
    assert error.value.tip == "use img_size=240 or img_size=256"
    with pytest.raises(UserError) as error:
        refuse_remainder((8, 8), (16, 16), "x")
    assert error.value.tip == "use img_size=16"
    assert grid((250, 96), (16, 32)) == (15, 3)


def test_what_was_done_is_said_in_words() -> None:
    assert fitted("vit", (224, 224)) == NATIVE
    assert NATIVE.facts == {"positions": "native", "patch_embedding": "native"}
    done = fitted("vit_base_patch16_224", (384, 384), positions=((14, 14), (24, 24)))
    assert done.facts == {"positions": "interpolated", "patch_embedding": "native"}
    assert done.notes == (
        "position embeddings interpolated from 14×14 to 24×24: off the training distribution",
    )
    upward = fitted("vit", (240, 240), patch_embedding=((16, 16), (24, 24)))
    assert upward.facts == {"positions": "native", "patch_embedding": "resampled"}
    assert "resampled from 16×16 to 24×24 px (exact upward)" in upward.notes[0]
    down = fitted("vit", (240, 240), patch_embedding=((16, 16), (8, 8)))
    assert "(lossy below the stored kernel): off the training distribution" in down.notes[0]


def test_a_model_that_was_trained_so_is_not_called_off_its_training() -> None:
    inside = fitted("flexivit_base.300ep_in21k", (240, 240), positions=((15, 15), (10, 10)))
    assert "FlexiViT was trained so" in inside.notes[0]
    outside = fitted("flexivit_base.300ep_in21k", (480, 480), positions=((15, 15), (20, 20)))
    assert "off the training distribution" in outside.notes[0]
    assert "518 px" in fitted("dinov2", (224, 224), positions=((37, 37), (16, 16))).notes[0]
