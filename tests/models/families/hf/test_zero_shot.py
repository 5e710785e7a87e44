"""Zero-shot logits of a Hugging Face CLIP: those of the library's own forward pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from diag.inputs.items import Inputs
from diag.models import load
from diag.models.families.hf.files import load_tokenizer
from diag.models.families.hf.zero_shot import TEMPLATES, zero_shot
from diag.models.hooks.interventions import parse as parse_edit
from diag.models.names.resolve import parse
from diag.studies.intervene.sweep import cases, sweep

Folders = Callable[[str], Path]
CPU = {"device": "cpu", "dtype": torch.float32}
NAMES = ["cat", "hill_dog", "mat"]


def library_logits(folder: Path, pixels: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """`[image, text]` as transformers computes them, from image and text together."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return model(
            pixel_values=pixels, **tokenizer(texts, padding=True, return_tensors="pt")
        ).logits_per_image


def test_with_one_template_they_are_the_librarys_own(folder_of: Folders, photographs: Inputs) -> None:
    folder = folder_of("clip")
    spec = parse(f"hf:{folder}")
    model = load(spec, **CPU)
    tower = model.tower("vision")
    batch = tower.encode(list(tower.samples(photographs, None)))
    classify = zero_shot(model.module, load_tokenizer(spec), NAMES, ["the {} ."])
    with torch.inference_mode():
        found = classify(tower.forward(batch).pooler_output)
    expected = library_logits(folder, batch.data, ["the cat .", "the hill dog .", "the mat ."])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert expected.std(0).min() > 1e-4, "images are not told apart"
    assert expected.std(1).min() > 1e-4, "classes are not told apart"


def test_templates_are_averaged_before_the_cosine(folder_of: Folders, photographs: Inputs) -> None:
    """Mean of unit vectors, as a unit: the library's logits on average, times one number for each class."""
    model = load(parse(f"hf:{folder_of('clip')}"), **CPU)
    assert model.zero_shot is not None
    tower = model.tower("vision")
    batch = tower.encode(list(tower.samples(photographs, None)))
    with torch.inference_mode():
        found = model.zero_shot(NAMES)(tower.forward(batch).pooler_output)
    written = [template.format(name.replace("_", " ")) for name in NAMES for template in TEMPLATES]
    mean = library_logits(folder_of("clip"), batch.data, written).unflatten(1, (len(NAMES), -1)).mean(2)
    ratio = found / mean
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), atol=0, rtol=1e-3)
    assert (ratio >= 1 - 1e-6).all()


def test_accuracy_in_a_sweep(folder_of: Folders, photographs: Inputs) -> None:
    model = load(parse(f"hf:{folder_of('clip')}"), **CPU)
    tower = model.tower("vision")
    samples = list(tower.samples(photographs, None))
    truth = {sample.id: place for place, sample in enumerate(samples)}
    assert model.zero_shot is not None
    todo = cases([parse_edit("skip")], tower.layers, ["first"])
    rows = sweep(model, tower, samples, todo, labels=truth, classify=model.zero_shot(NAMES))
    assert {"top1_change", "top5_change", "class_divergence", "embedding_change"} <= set(rows["effect"])
    assert (rows.loc[rows["effect"] == "class_divergence", "value"] > 0).all()


@pytest.mark.parametrize("kind", ["siglip", "vit", "gpt2"])
def test_others_take_no_names_of_classes(folder_of: Folders, kind: str) -> None:
    assert load(parse(f"hf:{folder_of(kind)}"), **CPU).zero_shot is None
