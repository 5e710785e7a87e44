"""open_clip: both towers, the shipped B/14 config, QuickGELU, tags and errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from checkpoints import OPEN_CLIP_SIZES, save_open_clip
from safetensors.torch import save_file
from torch import nn

from diag.errors import UserError
from diag.inputs.items import Inputs
from diag.models import load
from diag.models.base import Model
from diag.models.checkpoint import read_checkpoint
from diag.models.names.resolve import parse
from diag.models.names.spec import ModelSpec
from diag.models.weights import digest

CPU = {"device": "cpu", "dtype": torch.float32}


TEXT = OPEN_CLIP_SIZES["text_cfg"]
TRUNK = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 224}
CONFIGS = {
    "tiny": OPEN_CLIP_SIZES,
    "trunk": {"embed_dim": 16, "custom_text": True, "vision_cfg": TRUNK, "text_cfg": TEXT},
    "unmasked": {**OPEN_CLIP_SIZES, "custom_text": True, "text_cfg": {**TEXT, "no_causal_mask": True}},
    "foreign-tokenizer": {
        **OPEN_CLIP_SIZES,
        "custom_text": True,
        "text_cfg": {**TEXT, "hf_tokenizer_name": "org/none"},
    },
    "convolutional": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
        "text_cfg": TEXT,
    },
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in CONFIGS.items():
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)


def test_a_training_checkpoint_is_what_runs(tmp_path: Path, tiny: None) -> None:
    model = load(ModelSpec("tiny", "open_clip", "tiny", checkpoint=save_open_clip(tmp_path)), **CPU)
    torch.manual_seed(0)
    assert model.facts["weights_sha256"] == digest(open_clip.CLIP(**OPEN_CLIP_SIZES))
    assert model.notes == ()


def test_texts_are_framed_and_fill_the_context(tiny: None, texts: Inputs) -> None:
    tower = load(ModelSpec("tiny", "open_clip", "tiny", random_init=True), **CPU).tower("text")
    ids = tower.encode(list(tower.samples(texts, None))[:2]).data
    assert ids.shape == (2, 16)
    assert ids[:, 0].tolist() == [49406] * 2
    assert ids[:, -1].tolist() == [49407] * 2
    assert not (ids == 0).any()
    with pytest.raises(UserError, match="takes exactly 16 tokens"):
        list(tower.samples(texts, 8))


def test_a_timm_trunk_has_the_prefix_of_timm(tiny: None) -> None:
    model = load(ModelSpec("x", "open_clip", "trunk", random_init=True), **CPU)
    tower = model.tower("vision")
    assert tower.prefix == ("cls",)
    assert [tower.layers[0].path, len(tower.layers)] == ["visual.trunk.blocks.0.attn", 12]
    assert (tower.facts["patch_size"], tower.facts["image_size"]) == (16, 224)


def test_only_a_text_tower_without_a_mask_takes_shorter_windows(tiny: None, texts: Inputs) -> None:
    masked = load(ModelSpec("x", "open_clip", "trunk", random_init=True), **CPU).tower("text")
    with pytest.raises(UserError, match="takes exactly 16 tokens"):
        next(masked.samples(texts, 9))
    tower = load(ModelSpec("x", "open_clip", "unmasked", random_init=True), **CPU).tower("text")
    assert [layer.path for layer in tower.layers] == [
        f"text.transformer.resblocks.{i}.attn" for i in range(2)
    ]
    calls = []
    with torch.inference_mode(), tower.capture(tower.layers, calls.append):
        tower.forward(tower.encode([next(tower.samples(texts, 9))]))
    assert [call.tokens for call in calls] == [9, 9]


def test_a_tower_without_its_tokenizer_is_left_out(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = load(ModelSpec("x", "open_clip", "foreign-tokenizer", random_init=True), **CPU)
    assert list(model.towers) == ["vision"]
    assert model.notes[0] == (
        "no text tower: 'tokenizer.json' of 'org/none' is not on this machine and the hub cannot be reached"
    )


def test_a_text_tower_of_transformers_that_is_not_at_hand_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        load(parse("open_clip:roberta-ViT-B-32", random_init=True), **CPU)
    assert str(error.value) == (
        "'config.json' of 'roberta-base' is not on this machine and the hub cannot be reached"
    )
    assert error.value.tip == "where there is a network: hf download roberta-base config.json"


def test_the_shipped_config_is_a_b_14() -> None:
    model = load(parse("open_clip:ViT-B-14", random_init=True), **CPU)
    tower = model.tower("vision")
    assert (tower.facts["patch_size"], tower.facts["image_size"], len(tower.layers)) == (14, 224, 12)
    assert model.module.visual.positional_embedding.shape == (257, 768)
    assert len(model.tower("text").layers) == 12


def test_the_vision_tower_is_left_out_where_it_has_no_attention(tiny: None) -> None:
    model = load(ModelSpec("x", "open_clip", "convolutional", random_init=True), **CPU)
    assert list(model.towers) == ["text"]
    assert "no vision tower" in model.notes[0]
    with pytest.raises(UserError, match="has no vision tower"):
        model.tower("vision")


@pytest.mark.parametrize(
    ("name", "message", "tip"),
    [
        ("open_clip:ViT-B-32", "names an architecture, not its weights", "open_clip:ViT-B-32/"),
        ("open_clip:ViT-B-14", "names an architecture, not its weights", "use --checkpoint FILE"),
        ("open_clip:ViT-B-32/laion2b_s34b", "has no weights 'laion2b_s34b'", "'laion2b_s34b_b79k'"),
        (
            "open_clip:ViT-B-32/laion2b_s34b_b79k",
            "'open_clip_model.safetensors' of 'laion/CLIP-ViT-B-32-laion2B-s34B-b79K' is not on this machine",
            "hf download laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        ),
    ],
)
def test_errors(name: str, message: str, tip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        load(parse(name), **CPU)
    assert message in str(error.value)
    assert tip in (error.value.tip or "")


def test_weights_trained_with_quickgelu_run_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    def create(*args: object, **kwargs: object) -> None:
        given.update(kwargs)
        raise RuntimeError("enough")

    monkeypatch.setattr(open_clip, "create_model", create)
    with pytest.raises(UserError, match="enough"):
        load(parse("open_clip:ViT-B-16/dfn2b"), **CPU)
    assert given["force_quick_gelu"] is True
    given.clear()
    with pytest.raises(UserError, match="enough"):
        load(parse("vit-b-16"), **CPU)
    assert "force_quick_gelu" not in given


def test_an_unknown_argument(tiny: None) -> None:
    spec = ModelSpec("tiny", "open_clip", "tiny", random_init=True, model_args={"force_image_sise": 64})
    with pytest.raises(UserError, match="does not take the argument 'force_image_sise'") as error:
        load(spec, **CPU)
    assert error.value.tip == "did you mean 'force_image_size'?"


# --- other image sizes than that of the weights


def tokens_seen(model: Model, photographs: Inputs) -> int:
    tower = model.tower("vision")
    calls: list = []
    with torch.inference_mode(), tower.capture(tower.layers, calls.append):
        tower.forward(tower.encode([next(tower.samples(photographs, None))]))
    return calls[0].tokens


def test_another_image_size_interpolates_the_positions(
    tmp_path: Path, tiny: None, photographs: Inputs
) -> None:
    file = save_open_clip(tmp_path)
    stored = torch.load(file)["state_dict"]["module.visual.positional_embedding"]
    spec = ModelSpec("tiny", "open_clip", "tiny", checkpoint=file, model_args={"img_size": 64})
    model = load(spec, **CPU)
    larger = {**OPEN_CLIP_SIZES["vision_cfg"], "image_size": 64}
    expected = open_clip.CLIP(**{**OPEN_CLIP_SIZES, "vision_cfg": larger})
    state = {"visual.positional_embedding": stored}
    open_clip.model.resize_pos_embed(state, expected)
    positions = model.module.visual.positional_embedding
    assert torch.equal(positions, state["visual.positional_embedding"])
    assert torch.equal(positions[0], stored[0])
    facts = model.tower("vision").facts
    assert (facts["positions"], facts["patch_embedding"], facts["image_size"]) == (
        "interpolated",
        "native",
        64,
    )
    assert model.notes == ("position embeddings interpolated from 4×4 to 8×8: off the training distribution",)
    assert tokens_seen(model, photographs) == 65
    same = load(
        ModelSpec("tiny", "open_clip", "tiny", checkpoint=file, model_args={"force_image_size": 32}), **CPU
    )
    assert same.tower("vision").facts["positions"] == "native"
    assert same.notes == ()


def test_published_weights_of_a_folder_at_another_size(
    tmp_path: Path, tiny: None, photographs: Inputs
) -> None:
    torch.manual_seed(0)
    module = open_clip.CLIP(**OPEN_CLIP_SIZES)
    save_file(module.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP_SIZES}))
    native = load(parse(f"open_clip:local-dir:{tmp_path}"), **CPU)
    assert native.tower("vision").facts["positions"] == "native"
    model = load(parse(f"{tmp_path},img_size=48"), **CPU)
    assert model.tower("vision").facts["positions"] == "interpolated"
    assert "from 4×4 to 6×6" in model.notes[0]
    assert tokens_seen(model, photographs) == 37


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("config", ["tiny", "trunk"])
def test_another_grid_of_as_many_patches_is_interpolated(
    tmp_path: Path, tiny: None, config: str, published: bool
) -> None:
    torch.manual_seed(0)
    base = open_clip.create_model(config, pretrained_text=False)
    key = "visual.trunk.pos_embed" if config == "trunk" else "visual.positional_embedding"
    side, patch = (14, 16) if config == "trunk" else (4, 8)
    base.state_dict()[key].normal_()
    stored = base.state_dict()[key].reshape(1, side**2 + 1, -1)
    size = (side * patch // 2, side * patch * 2)
    save_file(base.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIGS[config]}))
    spec = parse(f"open_clip:local-dir:{tmp_path}")
    if not published:
        spec = ModelSpec("x", "open_clip", config, checkpoint=tmp_path / "open_clip_model.safetensors")
    model = load(replace(spec, model_args={"img_size": size}), **CPU)
    expected = timm.layers.resample_abs_pos_embed(stored, [side // 2, side * 2], [side, side])
    assert not torch.equal(expected, stored)
    assert torch.allclose(model.module.state_dict()[key].reshape(expected.shape), expected, atol=1e-6)
    assert model.tower("vision").facts["positions"] == "interpolated"
    assert f"interpolated from {side}×{side} to {side // 2}×{side * 2}" in model.notes[0]


def test_a_timm_trunk_at_another_size(tmp_path: Path, tiny: None, photographs: Inputs) -> None:
    torch.manual_seed(0)
    base = open_clip.create_model("trunk", pretrained_text=False)
    save_file(base.state_dict(), tmp_path / "w.safetensors")
    spec = ModelSpec(
        "x", "open_clip", "trunk", checkpoint=tmp_path / "w.safetensors", model_args={"img_size": 96}
    )
    model = load(spec, **CPU)
    assert model.module.visual.trunk.pos_embed.shape == (1, 37, 192)
    assert model.tower("vision").facts["positions"] == "interpolated"
    assert "from 14×14 to 6×6" in model.notes[0]
    assert tokens_seen(model, photographs) == 37


@pytest.mark.parametrize(
    ("name", "arguments", "message", "tip"),
    [
        ("convolutional", {"img_size": 64}, "vision tower (ModifiedResNet) of one image size", "img_size"),
        (
            "tiny",
            {"img_size": 36},
            "36 px is not a multiple of the patch size 8",
            "img_size=32 or img_size=40",
        ),
        ("tiny", {"patch_size": 4}, "keeps its patch size", "timm: models take patch_size="),
        ("tiny", {"img_size": 64, "force_image_size": 64}, "are the same", "give img_size alone"),
    ],
)
def test_sizes_that_cannot_be(
    tiny: None, name: str, arguments: dict[str, int], message: str, tip: str
) -> None:
    with pytest.raises(UserError) as error:
        load(ModelSpec("x", "open_clip", name, random_init=True, model_args=arguments), **CPU)
    assert message in str(error.value)
    assert tip in (error.value.tip or "")


def test_two_own_checkpoints_of_the_shipped_b_14(tmp_path: Path) -> None:
    """What `-m open_clip:ViT-B-14,checkpoint=A -m open_clip:ViT-B-14,checkpoint=B` loads."""
    hashes = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        small = open_clip.CLIP(**OPEN_CLIP_SIZES)
        torch.save(small.state_dict(), tmp_path / f"{seed}.pt")
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-14", OPEN_CLIP_SIZES)
            model = load(parse(f"open_clip:ViT-B-14,checkpoint={tmp_path}/{seed}.pt"), **CPU)
        assert model.name == f"open_clip:ViT-B-14,checkpoint={tmp_path}/{seed}.pt"
        assert model.facts["weights_sha256"] == digest(small)
        hashes.add(model.facts["weights_sha256"])
    assert len(hashes) == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_the_weights_of_a_torchscript_archive_of_openai(tmp_path: Path, tiny: None) -> None:
    module = open_clip.CLIP(**OPEN_CLIP_SIZES, quick_gelu=True)
    sizes = {name: torch.tensor(16) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "archive.pt"))
    with pytest.raises(UserError, match="is a TorchScript archive") as refused:
        load(ModelSpec("tiny", "open_clip", "tiny", checkpoint=tmp_path / "archive.pt"), **CPU)
    assert "torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)" in (refused.value.tip or "")
    file = tmp_path / "weights.pt"
    torch.save(torch.jit.load(tmp_path / "archive.pt").state_dict(), file)
    assert list(read_checkpoint(file).tensors) == ["weight", "bias"]
    # what that command writes of OpenAI's archives: sizes among the weights, in half precision
    torch.save({**{name: value.half() for name, value in module.state_dict().items()}, **sizes}, file)
    spec = ModelSpec("tiny", "open_clip", "tiny", checkpoint=file)
    with pytest.raises(UserError, match="OpenAI's weights were trained with QuickGELU") as error:
        load(spec, **CPU)
    assert error.value.tip == f"add force_quick_gelu=true: -m {spec.resolved},force_quick_gelu=true"
    model = load(replace(spec, model_args={"force_quick_gelu": True}), **CPU)
    assert model.facts["weights_sha256"] == digest(module.half().float())


def test_which_weights_of_a_checkpoint_are_taken_is_that_of_the_library(tmp_path: Path, tiny: None) -> None:
    state = open_clip.CLIP(**OPEN_CLIP_SIZES).state_dict()
    averaged = {name: value * 0.5 for name, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": averaged}, tmp_path / "w.pt")
    spec = ModelSpec("tiny", "open_clip", "tiny", checkpoint=tmp_path / "w.pt")
    plain, other = load(spec, **CPU), load(replace(spec, checkpoint_key="state_dict_ema"), **CPU)
    assert plain.notes == (
        "the weights were taken, 'state_dict'; 'checkpoint_key=state_dict_ema' takes the others",
    )
    assert torch.equal(plain.module.visual.proj, state["visual.proj"])
    assert torch.equal(other.module.visual.proj, averaged["visual.proj"])
