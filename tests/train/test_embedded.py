"""The embedded models: what their cards say is true, and the script that trained them does what it says."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diag.inputs import demo_text
from diag.models.demo import EMBEDDED, build_vit
from diag.train.embedded import (
    TRAIN_REGION,
    VALIDATION_CROPS,
    VALIDATION_REGION,
    Crops,
    Recipe,
    photographs,
    train_lm,
    train_vit,
)

WEIGHTS = {
    "vit-p16": (EMBEDDED / "vit-p16.safetensors", EMBEDDED / "vit-p16.json"),
    "vit-p8": (EMBEDDED / "vit-p8.safetensors", EMBEDDED / "vit-p8.json"),
    "vit-p4": (EMBEDDED / "vit-p4.safetensors", EMBEDDED / "vit-p4.json"),
    "lm": (EMBEDDED / "lm" / "model.safetensors", EMBEDDED / "lm" / "card.json"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_card_describes_its_weights(name: str) -> None:
    weights, card_file = WEIGHTS[name]
    card = json.loads(card_file.read_text())
    assert card["name"] == name
    assert weights.stat().st_size < 2_000_000
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == card["sha256"]
    assert sum(tensor.numel() for tensor in load_file(weights).values()) == card["parameters"]
    assert {"data", "recipe", "command", "licence", "dtype"} <= set(card)


@pytest.mark.parametrize("name", ["vit-p16", "vit-p8"])
def test_the_stated_accuracy_is_measured_again(name: str) -> None:
    weights, card_file = WEIGHTS[name]
    card = json.loads(card_file.read_text())
    model = build_vit(card["config"]["patch_size"]).eval()
    model.load_state_dict({key: value.float() for key, value in load_file(weights).items()})
    crops = Crops(VALIDATION_REGION, card["recipe"]["seed"] + 1, augment=False)
    correct = 0
    with torch.inference_mode():
        for _ in range(VALIDATION_CROPS // 100):
            images, labels = crops.batch(100)
            correct += int((model(images).argmax(-1) == labels).sum())
    # a few crops may tip over with another version of the resampling
    assert correct / VALIDATION_CROPS == pytest.approx(card["validation_accuracy"], abs=0.01)
    assert correct / VALIDATION_CROPS > 0.7


def test_the_language_model_has_learned_its_text() -> None:
    """Its loss on the held-out tenth is well below that of the distribution of single tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = demo_text()
    held_out = text[int(len(text) * 0.9) :][:20000]
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "lm")
    ids = torch.tensor(tokenizer(held_out, verbose=False)["input_ids"])
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / "lm", dtype=torch.float32).eval()
    windows = ids[: len(ids) // 256 * 256].view(-1, 256)
    with torch.inference_mode():
        logits = model(windows).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    frequency = torch.bincount(ids).float() / len(ids)
    unigram = -(frequency[frequency > 0] * frequency[frequency > 0].log()).sum().item()
    assert loss < unigram - 0.5


def test_training_and_validation_share_no_pixel() -> None:
    assert TRAIN_REGION[1] < VALIDATION_REGION[0]
    sides = [Crops(region, 0, augment=False).images for region in (TRAIN_REGION, VALIDATION_REGION)]
    for left, right, whole in zip(*sides, photographs(), strict=True):
        assert left.shape[2] + right.shape[2] < whole.shape[2]
        assert torch.equal(left, whole[:, :, : left.shape[2]])
        assert torch.equal(right, whole[:, :, -right.shape[2] :])


def test_crops_are_seeded() -> None:
    first, again, other = (Crops(TRAIN_REGION, seed, augment=True).batch(4) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (4, 3, 64, 64)
    assert first[0].min() >= -1
    assert first[0].max() <= 1


def test_the_rate_warms_up_and_decays() -> None:
    recipe = Recipe(steps=200, batch_size=1, learning_rate=1.0, warmup=10)
    rates = [recipe.rate_at(step) for step in range(200)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert rates[-1] < 1e-3


def test_a_run_is_reproducible(tmp_path: Path) -> None:
    recipe = Recipe(steps=2, batch_size=4, learning_rate=1e-3)
    cards = [train_vit(16, recipe, tmp_path / name) for name in ("a", "b")]
    assert cards[0]["sha256"] == cards[1]["sha256"]
    assert (tmp_path / "a" / "vit-p16.safetensors").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_language_recipe_writes_a_hugging_face_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    card = train_lm(Recipe(steps=1, batch_size=2, learning_rate=1e-3), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lm")
    text = "try: x = 1\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    assert sum(p.numel() for p in model.parameters()) == card["parameters"]
