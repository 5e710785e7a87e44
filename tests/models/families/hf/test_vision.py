"""Vision towers of Hugging Face models: what image processors make of an image, and what is no patch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from checkpoints import TEXT_SIZES, VISION_SIZES, VOCABULARY, save_tokenizer
from PIL import Image

from diag.attention.call import AttentionCall
from diag.errors import UserError
from diag.inputs.items import Inputs
from diag.measure.loop import measure
from diag.measure.meaning import understood
from diag.models import load
from diag.models.base import Batch, Model, Tower
from diag.models.families.hf.vision import _processed
from diag.models.families.hf.vlm import _side
from diag.models.names.resolve import parse
from diag.studies.attend.measure import Grid, _patches

CPU = {"device": "cpu", "dtype": torch.float32}
SQUARE = {"size": {"height": 32, "width": 32}}


def saved(folder: Path, model: transformers.PreTrainedModel, processor: object = None) -> Model:
    """The model as it is loaded from a folder, with an image processor or a tokenizer beside it."""
    model.save_pretrained(folder)
    if processor is None:
        save_tokenizer(folder)
    else:
        processor.save_pretrained(folder)  # type: ignore[attr-defined]
    return load(parse(f"hf:{folder}"), **CPU)


def calls_of(tower: Tower, batch: Batch) -> list[AttentionCall]:
    calls: list[AttentionCall] = []
    with torch.inference_mode(), tower.capture(tower.layers, calls.append):
        tower.forward(batch)
    return calls


def first_of(tower: Tower, photographs: Inputs) -> Batch:
    return tower.encode([next(tower.samples(photographs, None))])


def test_tokens_behind_the_patches_and_images_of_their_own_size(tmp_path: Path, photographs: Inputs) -> None:
    sizes = VISION_SIZES | {"image_size": [32, 48], "num_detection_tokens": 5}
    torch.manual_seed(0)
    model = transformers.YolosModel(transformers.YolosConfig(**sizes))
    processor = transformers.YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    loaded = saved(tmp_path, model, processor)
    assert loaded.notes == ("position embeddings interpolated from 4×6 to the grid of each image",)
    tower = loaded.tower("vision")
    assert (tower.prefix, tower.suffix) == (("cls",), ("detection",) * 5)
    assert tower.token_sets == ("patch", "all", "cls", "detection")
    assert (tower.facts["patch_size"], tower.facts["image_size"]) == (8, "native")
    assert tower.facts["positions"] == "interpolated"  # from 4 × 6 patches, in every forward pass
    assert tower.max_batch == 1
    kinds = _patches(tower, Grid("yolos", 8, 16, 1, 2))
    assert kinds["kind"].tolist() == ["cls", "patch", "patch", *["detection"] * 5]
    assert kinds["col"].dropna().tolist() == [0, 1]
    asked = {"metrics": ["cos_y_vself", "attention_distance"], "token_sets": ["patch", "detection"]}
    batches = list(measure(tower, tower.samples(photographs, None), **asked))
    assert len({batch[0].facts.n_tokens for batch in batches}) > 1
    found = np.concatenate([batch[0].values for batch in batches], 2)  # [token set, metric, input, head]
    assert np.isfinite(found[:, 0]).all()
    assert np.isnan(found[:, 1]).all()  # tokens behind the patches have no place among them


def test_a_distilled_model_has_two_class_tokens(tmp_path: Path) -> None:
    model = transformers.DeiTModel(transformers.DeiTConfig(**VISION_SIZES))
    tower = saved(tmp_path, model, transformers.ViTImageProcessor(**SQUARE)).tower("vision")
    assert (tower.prefix, tower.facts["patch_size"]) == (("cls", "cls"), 8)


def test_a_hierarchy_steps_as_its_first_layer_does(tmp_path: Path) -> None:
    """SegFormer's patches overlap: kernels of 7 pixels, steps of 4. Its config names no patch size."""
    sizes = {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 16], "sr_ratios": [1, 1]}
    sizes |= {"num_attention_heads": [1, 2], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
    model = transformers.SegformerModel(transformers.SegformerConfig(**sizes))
    tower = saved(tmp_path, model, transformers.SegformerImageProcessor(**SQUARE)).tower("vision")
    assert (tower.facts["patch_size"], tower.prefix) == (4, ())


def siglip(folder: Path) -> Path:
    torch.manual_seed(0)
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION_SIZES))
    model.save_pretrained(folder)
    transformers.SiglipImageProcessor(size={"height": 16, "width": 64}).save_pretrained(folder)
    return folder


def test_another_grid_of_as_many_patches_is_interpolated(tmp_path: Path, photographs: Inputs) -> None:
    """The embeddings of 4 × 4 patches would fit 2 × 8 as they are, and mean nothing there."""
    model = load(parse(f"hf:{siglip(tmp_path)}"), **CPU)
    tower = model.tower("vision")
    assert tower.facts["positions"] == "interpolated"
    assert model.notes == ("position embeddings interpolated from 4×4 to 2×8: off the training distribution",)
    batch = first_of(tower, photographs)
    assert batch.data.shape == (1, 3, 16, 64)
    with torch.inference_mode():
        ours = tower.forward(batch).last_hidden_state
        expected = model.module(batch.data, interpolate_pos_encoding=True).last_hidden_state
        unchanged = model.module(batch.data).last_hidden_state
    assert torch.equal(ours, expected)
    assert not torch.allclose(ours, unchanged, atol=1e-3)


def test_a_model_that_cannot_interpolate_refuses_another_grid_of_as_many_patches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diag.models.families.hf.vision.FLAG", "another_flag")
    with pytest.raises(UserError, match=r"are of 4×4 patches, its image processor gives 2×8") as error:
        load(parse(f"hf:{siglip(tmp_path)}"), **CPU)
    assert "image_processor.save_pretrained" in (error.value.tip or "")


def test_tiles_of_one_image_are_the_windows_of_one_input(tmp_path: Path, photographs: Inputs) -> None:
    model = transformers.Idefics3VisionTransformer(transformers.Idefics3VisionConfig(**VISION_SIZES))
    sides = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    loaded = saved(tmp_path, model, transformers.Idefics3ImageProcessor(**sides))
    tower = loaded.tower("vision")
    tested = understood(loaded, tower, list(tower.samples(photographs, None)))
    assert [layer.path for layer in tested.layers] == [layer.path for layer in tower.layers]
    assert tested.skipped == {}
    batch = first_of(tower, photographs)
    assert (tower.max_batch, len(batch.ids)) == (1, 1)
    tiles = batch.data["pixel_values"].shape[0]
    assert [(call.batch, call.tokens) for call in calls_of(tower, batch)] == [(tiles, 16)] * 2
    assert tiles > 1
    facts = tower.facts
    assert (facts["patch_size"], facts["image_size"], facts["positions"]) == (8, "native", "native")


class InLists:
    """An image processor of which every tensor lies in lists."""

    def __init__(self, inner: transformers.ViTImageProcessor) -> None:
        self.inner = inner

    def __call__(self, **given: object) -> dict[str, object]:
        pixels = self.inner(**given)["pixel_values"]
        return {
            "pixel_values": [[pixels[0]]],
            "num_tiles": [[1]],
            "words": ["a"],
            "unlike": [pixels, pixels[0]],
        }

    def to_dict(self) -> dict[str, object]:
        return self.inner.to_dict()


def test_lists_of_tensors_are_tensors(
    folder_of: Callable[[str], Path], photographs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = first_of(load(parse(f"hf:{folder_of('vit')}"), **CPU).tower("vision"), photographs)
    inner = transformers.AutoImageProcessor.from_pretrained(folder_of("vit"))
    made = _processed(InLists(inner), Image.new("RGB", (40, 40)))
    assert {name: value.shape for name, value in made.items()} == {
        "pixel_values": (1, 1, 3, 32, 32),
        "num_tiles": (1, 1),
    }
    monkeypatch.setattr("diag.models.families.hf.load.load_image_processor", lambda spec: InLists(inner))
    tower = load(parse(f"hf:{folder_of('vit')}"), **CPU).tower("vision")
    (pixels,) = first_of(tower, photographs).data.values()
    assert torch.equal(pixels, expected.data)


def test_padded_patches_are_not_real(tmp_path: Path, photographs: Inputs) -> None:
    config = transformers.Siglip2VisionConfig(**TEXT_SIZES, patch_size=8, num_patches=16)
    torch.manual_seed(0)
    processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=14)
    tower = saved(tmp_path, transformers.Siglip2VisionModel(config), processor).tower("vision")
    batch = first_of(tower, photographs)
    assert batch.real is not None
    rows, columns = batch.data["spatial_shapes"][0].tolist()
    assert int(batch.real.sum()) == rows * columns < 14
    assert {call.tokens for call in calls_of(tower, batch)} == {14}
    assert (tower.facts["patch_size"], tower.facts["positions"]) == (8, "interpolated")


def test_the_vision_tower_of_a_larger_model_saved_alone(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = transformers.AutoModel.from_pretrained(folder_of("qwen2_5_vl"))
    processor = transformers.AutoImageProcessor.from_pretrained(folder_of("qwen2_5_vl"))
    model = saved(tmp_path, whole.visual, processor)
    assert list(model.towers) == ["vision"]
    alone, within = model.tower("vision"), load(parse(f"hf:{folder_of('qwen2_5_vl')}"), **CPU).tower("vision")
    assert dict(alone.facts) == dict(within.facts)
    assert alone.facts["patch_size"] == 14


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            transformers.ConvNextConfig(depths=[1], hidden_sizes=[8], num_stages=1),
            "no self-attention layer found in its vision tower",
        ),
        (
            transformers.Blip2QFormerConfig(**TEXT_SIZES, vocab_size=VOCABULARY),
            "takes 'query_embeds', neither images nor text",
        ),
        (
            transformers.Siglip2VisionConfig(**TEXT_SIZES, patch_size=8, num_patches=16),
            "needs 'pixel_attention_mask', 'spatial_shapes', which its image processor does not give",
        ),
    ],
    ids=lambda value: value.model_type if isinstance(value, transformers.PretrainedConfig) else "",
)
def test_what_cannot_be_measured_is_refused_for_its_own_reason(
    tmp_path: Path, config: transformers.PretrainedConfig, message: str
) -> None:
    config.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(**SQUARE).save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        load(parse(f"hf:{tmp_path}", random_init=True), **CPU)
    assert message in str(error.value)


def detr(kind: str) -> transformers.PreTrainedModel:
    """Two encoder layers and one decoder layer behind a convolutional network, which knows no SDPA."""
    backbone = transformers.ResNetConfig(
        depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8, layer_type="basic", out_features=["stage2"]
    )
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4}
    sizes |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=backbone, use_timm_backbone=False, backbone=None, num_queries=4, **sizes
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}Model")(config)


DETR_IMAGES = {"size": {"shortest_edge": 96, "longest_edge": 144}}


def test_the_objects_that_a_decoder_looks_for_are_no_patches(tmp_path: Path, photographs: Inputs) -> None:
    model = saved(tmp_path, detr("Detr"), transformers.DetrImageProcessor(**DETR_IMAGES))
    tower = understood(model, model.tower("vision"), list(model.tower("vision").samples(photographs, None)))
    assert [layer.path for layer in tower.layers] == [f"encoder.layers.{i}.self_attn" for i in range(2)]
    assert tower.facts["patch_size"] == 8


def test_another_stack_does_not_stand_in_for_one_that_is_not_seen(
    tmp_path: Path, photographs: Inputs
) -> None:
    """Deformable DETR samples the image with an attention of its own; its decoder is no vision tower."""
    processor = transformers.DeformableDetrImageProcessor(**DETR_IMAGES)
    model = saved(tmp_path, detr("DeformableDetr"), processor)
    tower = model.tower("vision")
    with pytest.raises(
        UserError, match=r"no layer of its vision tower attends to its own tokens \('encoder\.layers\.0"
    ):
        understood(model, tower, list(tower.samples(photographs, None)))


def test_a_layer_is_known_by_what_stands_behind_the_models_name(tmp_path: Path) -> None:
    """`RobertaPreLayerNormSelfAttention` is no norm."""
    sizes = TEXT_SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 34, "pad_token_id": 1}
    config = transformers.RobertaPreLayerNormConfig(**sizes, bos_token_id=0, eos_token_id=1)
    tower = saved(tmp_path, transformers.RobertaPreLayerNormModel(config)).tower("text")
    assert [layer.path for layer in tower.layers] == [f"encoder.layer.{i}.attention.self" for i in range(2)]


@pytest.mark.parametrize(
    ("pixels", "tokens", "expected"),
    [
        ((1, 3, 32, 32), 16, 8),
        ((1, 5, 3, 64, 64), 5 * 4, 32),  # SmolVLM: what the projector merges stands in no setting of patches
        ((24, 3 * 2 * 8 * 8), 6, 16),  # Qwen-VL: patches in a row
        ((1, 3, 32, 32), 20, 8),  # with a token behind each row: what the config says
    ],
)
def test_the_pixels_behind_an_image_token(pixels: tuple[int, ...], tokens: int, expected: int) -> None:
    packed = {"pixel_values": torch.zeros(pixels), "input_ids": torch.tensor([[7] * tokens + [3] * 5])}
    config = transformers.CLIPVisionConfig(patch_size=8)
    assert _side(packed, "pixel_values", 7, config) == expected
    assert _side(packed, "pixel_values", 7, transformers.PretrainedConfig()) in (expected, None)
