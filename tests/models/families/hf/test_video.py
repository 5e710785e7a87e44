"""Models of videos: clips of frames as one input, and what is said where there are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from checkpoints import TEXT_SIZES, VISION_SIZES, save_tokenizer
from commands import Ended
from PIL import Image

from diag.errors import UserError
from diag.inputs.images import images
from diag.measure.meaning import understood
from diag.models import load
from diag.models.base import Model
from diag.models.names.resolve import parse
from diag.run.api import probe

CPU = {"device": "cpu", "dtype": torch.float32}
SQUARE = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of twelve frames of noise, and one of a single frame."""
    folder, generator = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for name, frames in (("jump", 12), ("short", 1), ("walk", 12)):
        (folder / name).mkdir()
        for number in range(frames):
            noise = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / name / f"{number}.png")
    return folder


def model_of(kind: str) -> tuple[transformers.PreTrainedModel, object]:
    """A small model of videos of four frames, and what prepares them."""
    if kind == "videomae":
        config = transformers.VideoMAEConfig(**VISION_SIZES, num_frames=4)
        return transformers.VideoMAEModel(config), transformers.VideoMAEImageProcessor(**SQUARE)
    if kind == "vivit":
        sizes = TEXT_SIZES | {"image_size": 32, "num_frames": 4, "tubelet_size": [2, 8, 8]}
        return transformers.VivitModel(transformers.VivitConfig(**sizes)), transformers.VivitImageProcessor(
            **SQUARE
        )
    if kind == "timesformer":
        config = transformers.TimesformerConfig(**VISION_SIZES, num_frames=4)
        return transformers.TimesformerModel(config), transformers.VideoMAEImageProcessor(**SQUARE)
    if kind == "xclip":
        temporal = {f"mit_{name}": size for name, size in TEXT_SIZES.items()}
        vision = VISION_SIZES | temporal | {"num_frames": 4}
        text = TEXT_SIZES | {"vocab_size": 300}
        config = transformers.XCLIPConfig(vision_config=vision, text_config=text, projection_dim=32)
        return transformers.XCLIPModel(config), transformers.VideoMAEImageProcessor(**SQUARE)
    sizes = TEXT_SIZES | {"hidden_size": 48, "crop_size": 32, "patch_size": 8, "frames_per_clip": 4}
    sizes |= {"pred_hidden_size": 48, "pred_num_attention_heads": 4, "pred_num_hidden_layers": 1}
    config = transformers.VJEPA2Config(**sizes, pred_num_mask_tokens=2)
    return transformers.VJEPA2Model(config), transformers.VJEPA2VideoProcessor(**SQUARE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(0)
            made[kind] = tmp_path_factory.mktemp(kind)
            for part in model_of(kind):
                part.save_pretrained(made[kind])  # type: ignore[attr-defined]
            save_tokenizer(made[kind], special=("<s>", "</s>"))
        return made[kind]

    return folder_of


def loaded(folder: Path, **arguments: object) -> Model:
    return load(parse(f"hf:{folder}", model_args=[f"{k}={v}" for k, v in arguments.items()]), **CPU)


@pytest.mark.parametrize(
    ("kind", "prefix", "tokens"), [("videomae", (), 32), ("vivit", ("cls",), 33), ("vjepa2", (), 32)]
)
def test_a_clip_is_one_input(
    saved: Callable[[str], Path], clips: Path, kind: str, prefix: tuple[str, ...], tokens: int
) -> None:
    folder = saved(kind)
    model = loaded(folder)
    tower = model.tower("vision")
    assert (tower.prefix, tower.suffix, tower.frames) == (prefix, (), 4)
    assert (tower.facts["patch_size"], tower.facts["image_size"]) == (8, "4×32×32")
    samples = list(tower.samples(images(clips), None))
    assert [sample.id for sample in samples] == ["jump", "short", "walk"]
    batch = tower.encode([samples[0], samples[2]])
    chosen = [[Image.open(clips / name / f"{i}.png") for i in (0, 4, 7, 11)] for name in ("jump", "walk")]
    _, processor = model_of(kind)
    (expected,) = processor(chosen, return_tensors="pt").values()  # type: ignore[operator]
    assert torch.equal(batch.data, expected)
    tested = understood(model, tower, samples)
    assert [layer.index for layer in tested.layers] == [0, 1]
    assert not any("predictor" in layer.path for layer in tested.layers)
    calls: list = []
    with torch.inference_mode(), tested.capture(tested.layers, calls.append):
        tower.forward(batch)
    assert [(call.batch, call.tokens) for call in calls] == [(2, tokens)] * 2
    found = probe(f"hf:{folder}", str(clips), metrics=["cos_y_vself", "attention_distance"])
    assert found.failed == {"short": "its frames are too few: 1 of 4"}
    numbers = found.layers.set_index("metric")["mean"]
    assert np.isfinite(numbers["cos_y_vself"]).all()
    assert numbers["attention_distance"].isna().all()  # tokens lie in time as well


@pytest.mark.parametrize(
    ("kind", "in_time", "in_space", "tokens"),
    [("xclip", "message", "self_attn", 4 * 4 + 2), ("timesformer", "temporal", "r.0.attention.", 4 * 4 + 1)],
)
def test_frames_in_layers_of_their_own_have_no_patches_told_apart(
    saved: Callable[[str], Path], clips: Path, kind: str, in_time: str, in_space: str, tokens: int
) -> None:
    """X-CLIP attends within each frame and among their messages, TimeSformer within each place first."""
    model = loaded(saved(kind))
    tower = model.tower("vision")
    assert ("text" in model.towers) == (kind == "xclip")
    assert (tower.token_sets, tower.prefix) == (("all",), ())
    found = probe(f"hf:{saved(kind)}", str(clips), metrics=["entropy", "attention_distance"], limit=1)
    several = found.samples.groupby("module", observed=True)["n_tokens"].first()
    assert {int(several[path]) for path in several.index if in_time in path} == {4}
    assert {int(several[path]) for path in several.index if in_space in path} == {tokens}
    assert found.layers.set_index("metric")["mean"]["attention_distance"].isna().all()


def test_one_command_measures_clips(
    saved: Callable[[str], Path], clips: Path, attnbias: Callable[..., Ended]
) -> None:
    given = ("-m", f"hf:{saved('videomae')}", "--images", clips, "--metrics", "self_weight", "--json")
    for _ in range(2):  # the second time it is found again
        ended = attnbias("probe", *given)
        assert ended.code == 3, ended.err  # one input failed
        document = json.loads(ended.out)
        (entry,) = document["manifest"]["models"]
        assert (entry["inputs"], entry["frames"]) == (3, 4)
        assert "short" in document["manifest"]["failed_inputs"]
    assert "goes on" not in ended.err


@pytest.mark.parametrize("given", ["demo", "short", [Image.new("RGB", (40, 40))]])
def test_what_gives_no_clip_is_said_in_one_sentence(
    saved: Callable[[str], Path], clips: Path, given: object
) -> None:
    source = str(clips / "short") if given == "short" else given
    with pytest.raises(UserError) as error:
        probe(f"hf:{saved('videomae')}", source)
    one, many = (
        "takes 4 frames, and no clip of '.*' has more than 1",
        "takes clips, and '.*' gives single images",
    )
    error.match(one if given == "short" else many)
    assert "frames" in (error.value.tip or "")


def test_another_number_of_frames_is_an_argument_of_the_model(saved: Callable[[str], Path]) -> None:
    assert loaded(saved("vjepa2"), frames_per_clip=8).tower("vision").frames == 8
    with pytest.raises(UserError, match="does not take img_size: it takes clips"):
        loaded(saved("videomae"), img_size=64)
