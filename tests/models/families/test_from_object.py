"""A model object with its tokenizer, processor or transform: the numbers of the same model by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pytest
import timm
import timm.data
import torch
import transformers
from checkpoints import TEXT
from PIL import Image
from torch import Tensor, nn

import diag
from diag.errors import UserError

FAST = ["cos_y_vself", "entropy", "nmi"]
CALLED = ["model", "weights", "positions", "patch_embedding"]
"""Columns that tell how a model was loaded: of an object that is not known."""


def pictures(count: int = 3) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (count, 40, 48, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in noise]


def same(by_object: diag.Probe, by_name: diag.Probe) -> None:
    """Every table but for the model's name, and token sets and depth."""
    for ours, theirs in ((by_object.layers, by_name.layers), (by_object.samples, by_name.samples)):
        pd.testing.assert_frame_equal(ours.drop(columns=CALLED), theirs.drop(columns=CALLED), atol=1e-6)
    assert by_object.depths == by_name.depths


@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        ("gpt2", transformers.GPT2LMHeadModel),
        ("llama", transformers.AutoModel),
        ("bert", transformers.BertForMaskedLM),
        ("t5", transformers.T5ForConditionalGeneration),
    ],
)
def test_texts_through_a_tokenizer_of_transformers(
    folder_of: Callable[[str], Path], kind: str, cls: Any
) -> None:
    folder = folder_of(kind)
    model = cls.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    options: dict[str, Any] = {"metrics": FAST, "seq_len": 16, "limit": 3}
    same(
        diag.probe(model, [TEXT], tokenizer=tokenizer, **options),
        diag.probe(f"hf:{folder}", [TEXT], **options),
    )


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip", "qwen2_5_vl", "llava"])
def test_images_through_a_processor_of_transformers(folder_of: Callable[[str], Path], kind: str) -> None:
    folder = folder_of(kind)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    options: dict[str, Any] = {"metrics": FAST, "limit": 3}
    by_object = diag.probe(model, pictures(), processor=processor, **options)
    same(by_object, diag.probe(f"hf:{folder}", pictures(), **options))
    if kind == "dinov2":
        sets = ["patch", "cls", "registers"]
        found = diag.probe(model, pictures(), processor=processor, tokens=sets, metrics=FAST).layers
        assert set(found["tokens"]) == set(sets)


def test_both_towers_through_one_processor(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("clip")
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images = transformers.AutoImageProcessor.from_pretrained(folder)
    both = transformers.CLIPProcessor(image_processor=images, tokenizer=tokenizer)
    for inputs in (pictures(), [TEXT], TEXT):
        same(
            diag.probe(model, inputs, processor=both, metrics=FAST),
            diag.probe(f"hf:{folder}", inputs, metrics=FAST),
        )


@pytest.fixture
def vit() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}
    return timm.create_model("vit_small_patch16_224", **sizes).eval()


def transform_of(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    config = timm.data.resolve_model_data_config(model) | {"input_size": (3, 32, 32)}
    return timm.data.create_transform(**config, is_training=False)


def test_images_through_a_transform_of_timm(vit: nn.Module, tmp_path: Path) -> None:
    torch.save(vit.state_dict(), tmp_path / "w.pt")
    name = "timm:vit_small_patch16_224,img_size=32,patch_size=8,depth=2,embed_dim=48,num_heads=3"
    options: dict[str, Any] = {"metrics": FAST, "tokens": ["patch", "cls", "all"]}
    by_name = diag.probe(name, pictures(), checkpoint=tmp_path / "w.pt", **options)
    by_object = diag.probe(vit, pictures(), preprocess=transform_of(vit), name="mine", **options)
    same(by_object, by_name)
    assert set(by_object.layers["model"]) == {"mine"}
    assert set(by_object.layers["patch_size"]) == {8}
    processor = transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    assert set(diag.probe(vit, pictures(), processor=processor, metrics=FAST).layers["tokens"]) == {"patch"}


def test_a_changed_object_is_measured_as_it_is(vit: nn.Module) -> None:
    """Values of one block are doubled on their way: nothing known of the class holds for it."""
    before = diag.probe(vit, pictures(), preprocess=transform_of(vit), metrics=["entropy"])
    block: Any = vit
    block.blocks[1].attn.qkv.register_forward_hook(lambda module, args, qkv: qkv * 2)
    after = diag.probe(vit, pictures(), preprocess=transform_of(vit), metrics=["entropy"])
    assert not before.meaning["vision"]["tested"]
    assert after.meaning["vision"]["tested"]
    means = [run.layers.set_index(["layer", "metric"])["mean"] for run in (before, after)]
    assert means[0][0, "entropy"] == pytest.approx(means[1][0, "entropy"], abs=1e-6)
    assert means[1][1, "entropy"] < means[0][1, "entropy"]
    assert not vit.training
    vit.train()
    with pytest.raises(UserError, match="VisionTransformer is in training mode"):
        diag.probe(vit, pictures(), preprocess=transform_of(vit))


def test_both_towers_of_open_clip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"layers": 2, "width": 32}
    config = {
        "embed_dim": 16,
        "vision_cfg": {**sizes, "image_size": 32, "patch_size": 8, "head_width": 8},
        "text_cfg": {**sizes, "context_length": 12, "vocab_size": 49408, "heads": 4},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small", config)
    monkeypatch.setattr("diag.models.families.open_clip.open_clip_configs", lambda: ["small"])
    model, _, preprocess = open_clip.create_model_and_transforms("small", load_weights=False)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    fed: dict[str, Any] = {"tokenizer": open_clip.get_tokenizer("small"), "preprocess": preprocess}
    for inputs in (pictures(), [TEXT]):
        by_name = diag.probe("open_clip:small", inputs, checkpoint=tmp_path / "w.pt", metrics=FAST, limit=4)
        same(diag.probe(model.eval(), inputs, **fed, metrics=FAST, limit=4), by_name)
    (call, _) = diag.capture(model, TEXT, **fed, limit=2)
    assert (call.batch, call.tokens, call.module) == (2, 12, "transformer.resblocks.0.attn")


class Own(nn.Module):
    """Somebody's own: pixels or ids to states, through two blocks."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.embed: nn.Module = nn.Embedding(tokens, 16) if tokens else nn.Conv2d(3, 16, 8, 8)
        block = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.blocks(x if x.ndim == 3 else x.flatten(2).transpose(1, 2))


def test_a_module_of_no_library(vit: nn.Module, folder_of: Callable[[str], Path]) -> None:
    transform = transform_of(vit)
    module = Own(0).eval()
    ours = diag.probe(module, pictures(), preprocess=transform, metrics=FAST)
    batch = torch.stack([transform(one) for one in pictures()])
    theirs = diag.probe(module, [batch], metrics=FAST)
    entropy = [run.layers.query("metric == 'entropy'")["mean"].to_numpy() for run in (ours, theirs)]
    np.testing.assert_allclose(*entropy, atol=1e-6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder_of("gpt2"))
    reader = Own(300).eval()
    assert diag.probe(reader, [TEXT], tokenizer=tokenizer, seq_len=9).layers["n_tokens"].eq(9).all()


@pytest.mark.parametrize(
    ("inputs", "fed", "told"),
    [
        ([TEXT], {}, "the model is an object (VisionTransformer) alone, and its inputs are texts"),
        (TEXT, {}, "the model is an object (VisionTransformer) alone, and its inputs are named"),
        (pictures(1), {}, "the model is an object (VisionTransformer) alone, and its inputs are images"),
        (pictures(1), {"tokenizer": 3}, "inputs are images, and neither processor nor preprocess is given"),
        (pictures(1), {"preprocess": lambda image: 3}, "what preprocess makes of an image is a int"),
        (
            pictures(1),
            {"preprocess": lambda image: image.nothing},
            "preprocess, or processor, fails on an image: 'Image' object has no attribute 'nothing'",
        ),
        (
            torch.zeros(1, 3, 32, 32),
            {"preprocess": int},
            "inputs are tensors, and 'VisionTransformer' makes its own of texts or images",
        ),
        (
            pictures(1),
            {"preprocess": int, "checkpoint": "w.pt"},
            "the model is an object (VisionTransformer), and checkpoint or random_init is given",
        ),
    ],
)
def test_what_does_not_feed_a_model_is_told(vit: nn.Module, inputs: Any, fed: Any, told: str) -> None:
    with pytest.raises(UserError) as error:
        diag.probe(vit, inputs, **fed)
    assert str(error.value) == told
    assert error.value.tip


def test_what_feeds_an_object_does_not_go_with_a_name() -> None:
    with pytest.raises(UserError) as error:
        diag.probe("demo:lm", [TEXT], tokenizer=object())
    assert str(error.value) == "'demo:lm' is a name, and a tokenizer, processor or preprocess is given"
