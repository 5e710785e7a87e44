"""The embedded models: what their cards say is true, and the script that trained them does what it says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diag.inputs.texts import demo_text
from diag.models import load
from diag.models.families.demo import EMBEDDED, build_vit
from diag.models.names.resolve import parse
from diag.studies.train.crops import HELD_OUT_REGION, TRAIN_REGION, Crops, CropsTask
from diag.studies.train.plan import Recipe, TrainPlan
from tools.embedded_models import VALIDATION_CROPS, train_lm, train_vit

PAIRS = [f"grid-p{patch}-{variant}" for patch in (16, 8, 4) for variant in ("sa", "xsa")]
VITS = ["vit-p16", "vit-p8", "vit-p4", *PAIRS]
WEIGHTS = {
    **{name: (EMBEDDED / f"{name}.safetensors", EMBEDDED / f"{name}.json") for name in VITS},
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
    crops = Crops(HELD_OUT_REGION, 64, augment=False)
    generator = np.random.default_rng(card["recipe"]["seed"] + 1)
    correct = 0
    with torch.inference_mode():
        for _ in range(VALIDATION_CROPS // 100):
            images, labels = crops.batch(100, generator).values()
            correct += int((model(images).argmax(-1) == labels).sum())
    # a few crops may tip over with another version of the resampling
    assert correct / VALIDATION_CROPS == pytest.approx(card["validation_accuracy"], abs=0.01)
    assert correct / VALIDATION_CROPS > 0.7


@pytest.mark.parametrize("name", ["grid-p16-xsa", "grid-p8-sa"])
def test_the_accuracy_of_a_pair_is_measured_again(name: str) -> None:
    card = json.loads(WEIGHTS[name][1].read_text())
    recipe = {key: value for key, value in card["recipe"].items() if key != "seed"}
    plan = TrainPlan(
        title="t",
        task="crops",
        patch_sizes=(card["config"]["patch_size"],),
        variants=("sa",),
        seeds=(0,),
        model={"img_size": 64},
        recipe=recipe,
    )
    model = load(parse(f"demo:{name}"), device="cpu", dtype=torch.float32).module
    with torch.inference_mode():
        found = CropsTask(plan).evaluate(model, torch.device("cpu"))
    assert found["accuracy"] == pytest.approx(card["validation_accuracy"], abs=0.01)
    assert found["held_out"] == card["validation_crops"]


def test_pairs_start_from_the_same_weights() -> None:
    cards = {name: json.loads(WEIGHTS[name][1].read_text()) for name in PAIRS}
    for patch in (16, 8, 4):
        first, second = (cards[f"grid-p{patch}-{variant}"] for variant in ("sa", "xsa"))
        assert first["initial_sha256"] == second["initial_sha256"]
        assert first["recipe"] == second["recipe"]
        assert first["sha256"] != second["sha256"]


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
    assert TRAIN_REGION[1] < HELD_OUT_REGION[0]
    sides = [Crops(region, 64, augment=False).images for region in (TRAIN_REGION, HELD_OUT_REGION)]
    wholes = Crops((0.0, 1.0), 64, augment=False).images
    for left, right, whole in zip(*sides, wholes, strict=True):
        assert left.shape[2] + right.shape[2] < whole.shape[2]
        assert torch.equal(left, whole[:, :, : left.shape[2]])
        assert torch.equal(right, whole[:, :, -right.shape[2] :])


def test_crops_are_seeded() -> None:
    crops = Crops(TRAIN_REGION, 64, augment=True)
    first, again, other = (crops.batch(4, np.random.default_rng(seed)) for seed in (0, 0, 1))
    images = first["images"]
    assert torch.equal(images, again["images"])
    assert torch.equal(first["labels"], again["labels"])
    assert not torch.equal(images, other["images"])
    assert images.shape == (4, 3, 64, 64)
    assert images.min() >= -1
    assert images.max() <= 1


def test_a_run_is_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.embedded_models.VALIDATION_CROPS", 100)
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
