"""The ledger as the loop measures it: tokens of every class, windows, padding, a model that reads both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import save_vision_language_model
from tiny_towers import IMAGES, TEXTS, Attention, InBatch, InTurn, run, text_tower, vision_tower

import diag
from diag.metrics.catalogue import LEDGER_CLASSES
from diag.models.base import Tower

OUTPUT = [f"output_from_{name}" for name in LEDGER_CLASSES]
BIAS = [f"bias_from_{name}" for name in LEDGER_CLASSES]
NAMES = [*OUTPUT, *BIAS, "cos_y_vself", "self_part"]


def checked(found: np.ndarray, there: set[str]) -> None:
    """`[…, metric, input, head]`: which classes are defined, and what their sums are."""
    output, bias = found[:, :, : len(OUTPUT)], found[:, :, len(OUTPUT) : -2]
    for part in (output, bias):
        defined = {name for place, name in enumerate(LEDGER_CLASSES) if not np.isnan(part[:, :, place]).any()}
        empty = {name for place, name in enumerate(LEDGER_CLASSES) if np.isnan(part[:, :, place]).all()}
        assert (defined, empty) == (there, {*LEDGER_CLASSES} - there)
    np.testing.assert_allclose(np.nansum(output, 2), 1, atol=1e-6)
    np.testing.assert_allclose(np.nansum(bias, 2), found[:, :, -2], atol=1e-6)
    np.testing.assert_allclose(bias[:, :, 0], found[:, :, -1], atol=1e-6)


def measured(tower: Tower, samples: object, **options: object) -> np.ndarray:
    return run(tower, samples, metrics=NAMES, **options)  # type: ignore[arg-type]


def test_tokens_beside_patches_are_of_their_classes() -> None:
    """Nine patches of a square image behind a class token and two registers."""
    tower = replace(vision_tower(), facts={"image_size": 48})
    found = measured(tower, IMAGES, token_sets=["patch", "all"])
    checked(found, {"self", "sink", "cls", "registers", "near", "rest"})
    one_by_one = measured(tower, IMAGES, token_sets=["patch", "all"], batch_size=1)
    np.testing.assert_allclose(one_by_one, found, atol=2e-6)


def test_kinds_of_another_name_are_the_prefix_and_an_unknown_size_has_no_near_patches() -> None:
    tower = vision_tower(prefix=("cls", "prompt", "prompt"))
    checked(measured(tower, IMAGES), {"self", "sink", "cls", "prefix", "rest"})


@pytest.mark.parametrize("windowed", [InBatch, InTurn])
def test_windows_have_ledgers_of_their_own(windowed: type[Attention]) -> None:
    torch.manual_seed(0)
    tower = vision_tower(windowed(), prefix=(), facts={"image_size": (48, 64)})
    found = measured(tower, IMAGES)
    near = {"near"} if not np.isnan(found[:, :, OUTPUT.index("output_from_near")]).all() else set()
    checked(found, {"self", "sink", "rest"} | near)
    assert bool(near) == (windowed is InBatch)  # 3 windows of 2 x 2 patches; 5 and 7 patches are no squares


def test_texts_that_are_padded_have_the_ledgers_that_they_have_alone() -> None:
    tower = text_tower()
    together, alone = measured(tower, TEXTS), measured(tower, TEXTS, batch_size=1)
    checked(together, {"self", "sink", "near", "rest"})
    np.testing.assert_allclose(together, alone, atol=2e-6)


def test_a_model_that_reads_images_and_text_has_both_classes(tmp_path: Path) -> None:
    folder = save_vision_language_model(tmp_path / "model", "llava")
    probe = diag.probe(f"hf:{folder}", "demo", limit=2, metrics=["ledger", "cos_y_vself"])
    layers = probe.layers[probe.layers["tower"] == "language"]
    for _, part in layers.groupby(["tokens", "layer"]):
        means = part.set_index("metric")["mean"]
        assert means[["output_from_image", "output_from_text"]].notna().all()
        assert means[OUTPUT].sum() == pytest.approx(1, abs=1e-6)
        assert means[BIAS].sum() == pytest.approx(means["cos_y_vself"], abs=1e-6)
        assert means["output_from_rest"] == pytest.approx(0, abs=1e-5)
