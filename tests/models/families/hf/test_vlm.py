"""Vision-language models: which tokens are the image's, and that their numbers are those of the library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import TEXT_SIZES, VISION_SIZES, save_tokenizer
from commands import Ended
from PIL import Image

from diag.errors import MeasurementError, UserError
from diag.inputs.items import Inputs
from diag.measure.batch_readings import Incidents
from diag.measure.loop import measure
from diag.measure.meaning import understood
from diag.models import load
from diag.models.base import Model, Sample, Tower
from diag.models.names.resolve import parse
from diag.run.api import probe

Folders = Callable[[str], Path]
KINDS = ["llava", "qwen2_5_vl_whole"]
CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "qwen2_5_vl_whole": "Qwen2_5_VLForConditionalGeneration",
}


def loaded(folder: Path, **arguments: Any) -> Model:
    given = "".join(f",{key}={value}" for key, value in arguments.items())
    return load(parse(f"hf:{folder}{given}"), device="cpu", dtype=torch.float32)


def numbers(tower: Tower, inputs: Inputs, metrics: list[str], batch_size: int = 8, limit: int = 3) -> Any:
    """`[input, token set, layer, metric, head]` over the default sets."""
    found = measure(tower, list(tower.samples(inputs, None))[:limit], metrics=metrics, batch_size=batch_size)
    return torch.cat(
        [torch.stack([torch.tensor(layer.values) for layer in batch], 1).movedim(3, 0) for batch in found]
    )


def test_a_processor_that_is_a_tokenizer_alone_leaves_the_language_tower_out(
    folder_of: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder_of("llava"))
    monkeypatch.setattr("diag.models.families.hf.load.load_processor", lambda spec: tokenizer)
    model = loaded(folder_of("llava"))
    assert list(model.towers) == ["vision", "text"]
    assert "puts no image tokens into a prompt" in model.notes[0]


class Particular:
    """LLaVA's processor, which takes images as others do: `images_of` says what it reads of them."""

    def __init__(self, folder: Path, images_of: Callable[[list[Any], int], list[Any]]) -> None:
        self.whole, self.images_of = transformers.AutoProcessor.from_pretrained(folder), images_of

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def __call__(self, *, images: list[Any], text: list[str], **options: Any) -> Any:
        found = dict(self.whole(images=self.images_of(images, len(text)), text=text, **options))
        return found | {"num_tiles": [[1]] * len(text)}  # some say in lists what no model reads


def in_lists_of_their_own(images: list[Any], texts: int) -> list[Any]:
    """Gemma 3, Llama 3.2 and LFM2-VL: several images in a flat list are those of the first text."""
    if texts > 1 and not isinstance(images[0], list):
        raise ValueError(f"found [1, 1] tokens and [{texts}] images per sample")
    return [image for one in images for image in (one if isinstance(one, list) else [one])]


def one_alone(images: list[Any], texts: int) -> list[Any]:
    if texts > 1:
        raise IndexError("list index out of range")
    return images


def broken(images: list[Any], texts: int) -> list[Any]:
    raise IndexError("list index out of range")


@pytest.mark.parametrize(("images_of", "most"), [(in_lists_of_their_own, None), (one_alone, 1)])
def test_processors_take_several_images_each_in_its_way(
    folder_of: Folders,
    photographs: Inputs,
    monkeypatch: pytest.MonkeyPatch,
    images_of: Callable[[list[Any], int], list[Any]],
    most: int | None,
) -> None:
    folder = folder_of("llava")
    expected = numbers(loaded(folder).towers["language"], photographs, ["cos_y_vself", "entropy"])
    processor = Particular(folder, images_of)
    monkeypatch.setattr("diag.models.families.hf.load.load_processor", lambda spec: processor)
    tower = loaded(folder).towers["language"]
    assert tower.max_batch == most
    torch.testing.assert_close(numbers(tower, photographs, ["cos_y_vself", "entropy"]), expected)


def test_a_processor_that_breaks_leaves_the_other_towers(
    folder_of: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = Particular(folder_of("llava"), broken)
    monkeypatch.setattr("diag.models.families.hf.load.load_processor", lambda spec: processor)
    model = loaded(folder_of("llava"))
    assert list(model.towers) == ["vision", "text"]
    (note,) = model.notes
    assert note.startswith("no language tower: the processor of ")
    assert note.endswith("cannot be used: list index out of range")


def test_what_stands_between_pieces_of_an_image_is_no_padding(tmp_path: Path, photographs: Inputs) -> None:
    """LLaVA-NeXT ends each row of patches with a token that is the same in every image."""
    torch.manual_seed(0)
    save_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tiles = [[32, 64], [64, 32], [64, 64]]
    text = TEXT_SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION_SIZES),
        text_config=transformers.LlamaConfig(**text, initializer_range=0.3),
        image_token_id=len(tokenizer) - 1,
        image_grid_pinpoints=tiles,
    )
    transformers.LlavaNextModel(config).save_pretrained(tmp_path)
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = transformers.LlavaNextImageProcessor(**sides, image_grid_pinpoints=tiles)
    transformers.LlavaNextProcessor(
        processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(tmp_path)
    model = loaded(tmp_path)
    samples = list(model.towers["language"].samples(photographs, None))[:3]
    tower = understood(model, model.towers["language"], samples)
    assert all(padding is None for layer in tower.layers for padding in layer.form.padding)
    found = list(measure(tower, samples, metrics=["cos_y_vself"]))
    assert len({batch[0].facts.n_tokens for batch in found}) > 1  # images of several sizes
    assert all(np.isfinite(layer.values).all() for batch in found for layer in batch)


@pytest.mark.parametrize("kind", KINDS)
def test_three_towers(folder_of: Folders, photographs: Inputs, kind: str) -> None:
    model = loaded(folder_of(kind))
    assert list(model.towers) == ["vision", "text", "language"]
    assert [tower.name for tower in model.takers("vision")] == ["vision", "language"]
    assert [tower.name for tower in model.takers("text")] == ["text"]
    language = model.towers["language"]
    assert [layer.path for layer in language.layers] == [
        "language_model.layers.0.self_attn",
        "language_model.layers.1.self_attn",
    ]
    assert language.token_sets == ("image", "text", "last", "all")
    assert language.default_sets == ("image", "text")
    assert model.notes == ()


@pytest.mark.parametrize("kind", KINDS)
def test_the_sets_are_the_processors_image_tokens_and_all_others(
    folder_of: Folders, photographs: Inputs, kind: str
) -> None:
    folder = folder_of(kind)
    tower = loaded(folder, prompt="the cat sat").towers["language"]
    batch = tower.encode(list(tower.samples(photographs, None))[:1])
    processor = transformers.AutoProcessor.from_pretrained(folder)
    ids = batch.data["input_ids"]
    assert torch.equal(batch.sets["image"], ids == processor.image_token_id)
    assert torch.equal(batch.sets["text"], ~batch.sets["image"])
    assert batch.sets["last"].nonzero().tolist() == [[0, ids.shape[1] - 1]]
    written = processor.tokenizer.decode(ids[0][batch.sets["text"][0]])
    expected = "\nthe cat sat" if kind == "llava" else "<|vision_start|><|vision_end|>the cat sat answer :"
    assert written == expected
    assert tower.facts["prompt_format"] == ("bare" if kind == "llava" else "chat template")


@pytest.mark.parametrize("kind", KINDS)
def test_both_sets_agree_with_the_librarys_own_attention(
    folder_of: Folders, photographs: Inputs, kind: str
) -> None:
    """cos(y, v), A_ii and cos(v, v) of every layer from `output_attentions` of the eager implementation."""
    folder = folder_of(kind)
    tower = loaded(folder).towers["language"]
    found = numbers(tower, photographs, ["cos_y_vself", "self_weight", "value_similarity"], limit=1)[0]
    batch = tower.encode(list(tower.samples(photographs, None))[:1])
    whole = getattr(transformers, CLASSES[kind]).from_pretrained(folder, attn_implementation="eager").eval()
    projected: list[torch.Tensor] = []
    for layer in whole.model.language_model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda module, args, output: projected.append(output))
    with torch.inference_mode():
        patterns = whole(**batch.data, output_attentions=True).attentions
    for index, (pattern, flat) in enumerate(zip(patterns, projected, strict=True)):
        value = flat[0].double().unflatten(-1, (2, 8)).transpose(0, 1).repeat_interleave(2, 0)
        output = pattern[0].double() @ value
        cosine = torch.cosine_similarity(output, value, dim=-1)
        unit = torch.nn.functional.normalize(value, dim=-1)
        own = pattern[0].double().diagonal(dim1=-2, dim2=-1)
        for place, name in enumerate(("image", "text")):
            tokens = batch.sets[name][0]
            rows = tokens.clone()
            rows[0] = False  # it sees only itself
            pairs = (unit[:, tokens] @ unit[:, tokens].transpose(1, 2)).sum((1, 2)) - tokens.sum()
            expected = [cosine[:, rows].mean(1), own[:, rows].mean(1)]
            expected.append(pairs / (tokens.sum() * (tokens.sum() - 1)))
            torch.testing.assert_close(found[place, index], torch.stack(expected), atol=1e-5, rtol=0)
    assert (found[0] - found[1]).abs().min() > 1e-4, "the sets would be told apart by no number"


def test_images_of_one_size_may_share_a_batch(folder_of: Folders, photographs: Inputs) -> None:
    tower = loaded(folder_of("llava")).towers["language"]
    together = numbers(tower, photographs, ["cos_y_vself", "excess"], batch_size=3)
    torch.testing.assert_close(
        together, numbers(tower, photographs, ["cos_y_vself", "excess"], batch_size=1), atol=1e-5, rtol=0
    )
    assert (tower.max_batch, tower.facts["image_size"]) == (None, (32, 32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["vision", "language"])
def test_an_image_that_the_processor_refuses_is_its_own(
    folder_of: Folders, photographs: Inputs, kind: str, name: str
) -> None:
    tower = loaded(folder_of(kind)).towers[name]
    samples = list(tower.samples(photographs, None))[:3]
    odd, incidents = Sample("odd", lambda: Image.new("RGB", (0, 5))), Incidents()
    options: Any = {"metrics": ["cos_y_vself"], "batch_size": 2}
    found = list(measure(tower, [samples[0], odd, *samples[1:]], incidents=incidents, **options))
    assert list(incidents.failed) == ["odd"]
    assert incidents.failed["odd"].startswith("cannot preprocess the image: ")
    for ours, alone in zip(found, measure(tower, samples, **options), strict=True):
        for mine, other in zip(ours, alone, strict=True):
            np.testing.assert_array_equal(mine.values, other.values)


def test_images_of_their_own_size_run_one_by_one(folder_of: Folders, photographs: Inputs) -> None:
    tower = loaded(folder_of("qwen2_5_vl_whole")).towers["language"]
    assert (tower.max_batch, tower.facts["image_size"], tower.facts["patch_size"]) == (1, "native", 28)
    assert numbers(tower, photographs, ["cos_y_vself"]).isfinite().all()


def test_one_command_measures_both_towers(folder_of: Folders, attnbias: Callable[..., Ended]) -> None:
    given = ("-m", f"hf:{folder_of('qwen2_5_vl_whole')}", "--images", "demo", "--limit", 2)
    ended = attnbias("probe", *given, "--json")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    rows = {(row["tower"], row["tokens"], row["layer"], row["attn_scope"]) for row in document["layers"]}
    assert rows == {
        *{("vision", "patch", *layer) for layer in ((0, "window"), (1, "full"))},
        *{("language", name, layer, "full") for name in ("image", "text") for layer in (0, 1)},
    }
    assert list(document["manifest"]["inputs"]) == ["vision"]
    assert [entry["tower"] for entry in document["manifest"]["models"]] == ["vision", "language"]


@pytest.mark.parametrize(
    ("tokens", "towers"),
    [
        ("text", {"language"}),
        ("patch", {"vision"}),
        ("all", {"vision", "language"}),
        ("patch,text", {"vision", "language"}),
    ],
)
def test_token_sets_choose_the_tower(
    folder_of: Folders, noise: Path, attnbias: Callable[..., Ended], tokens: str, towers: set[str]
) -> None:
    given = ("-m", f"hf:{folder_of('llava')}", "--images", noise, "--limit", 1, "--metrics", "self_weight")
    ended = attnbias("probe", *given, "--tokens", tokens, "--json")
    assert ended.code == 0, ended.err
    assert {row["tower"] for row in json.loads(ended.out)["layers"]} == towers


def test_an_unknown_token_set_is_refused(folder_of: Folders, photographs: Inputs) -> None:
    with pytest.raises(UserError, match="this model has no token set 'pixels'") as error:
        loaded(folder_of("llava")).takers("vision", ["pixels"])
    assert error.value.tip == "--tokens takes 'patch', 'all', 'cls', 'image', 'text' or 'last' here"


def test_python_users_name_the_sets(folder_of: Folders, photographs: Inputs) -> None:
    found = probe(f"hf:{folder_of('llava')}", photographs, tokens=["image", "text"], limit=1)
    assert set(found.layers["tower"]) == {"language"}
    assert set(found.layers["tokens"]) == {"image", "text"}


def test_without_a_processor_the_vision_tower_is_left(folder_of: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(folder_of("llava"), tmp_path / "llava")
    (folder / "processor_config.json").unlink()
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    model = loaded(folder)
    assert "vision" in model.towers
    assert "language" not in model.towers
    assert any(note.startswith("no language tower: ") for note in model.notes)


def test_a_prompt_is_for_vision_language_models_only(folder_of: Folders) -> None:
    with pytest.raises(UserError, match="does not take the argument 'prompt'"):
        loaded(folder_of("vit"), prompt="what")


def test_a_size_is_for_the_vision_tower_only(folder_of: Folders) -> None:
    model = loaded(folder_of("llava"), img_size=64)
    assert "vision" in model.towers
    assert "language" not in model.towers
    assert any("does not take img_size with a prompt" in note for note in model.notes)


def test_a_layer_that_sees_other_tokens_is_refused(folder_of: Folders, photographs: Inputs) -> None:
    """Marks of positions are for sequences as they were encoded, not for windows of them."""
    tower = loaded(folder_of("llava")).towers["language"]
    batch = tower.encode(list(tower.samples(photographs, None))[:1])
    batch.sets["image"] = batch.sets["image"][:, 1:]
    with pytest.raises(MeasurementError, match="which of them are 'image' is unclear"):
        list(
            measure(replace(tower, encode=lambda samples: batch), list(tower.samples(photographs, None))[:1])
        )


# --- head divergence


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_is_that_of_two_runs_of_the_library(
    folder_of: Folders, photographs: Inputs, kind: str
) -> None:
    """What reaches the output projection, with the image and with its mean colour, per head and token set."""
    folder = folder_of(kind)
    tower = loaded(folder).towers["language"]
    sample = next(iter(tower.samples(photographs, None)))
    found = next(
        iter(
            measure(
                tower,
                [sample],
                metrics=["head_divergence", "head_divergence_relative"],
                token_sets=["text", "last", "image"],
            )
        )
    )
    whole = getattr(transformers, CLASSES[kind]).from_pretrained(folder, attn_implementation="eager").eval()
    outputs: list[torch.Tensor] = []
    for layer in whole.model.language_model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    image = sample.read().convert("RGB")
    colour = tuple(round(float(x)) for x in np.asarray(image, float).mean((0, 1)))
    for shown in (image, Image.new("RGB", image.size, colour)):
        batch = tower.encode([Sample("a", lambda shown=shown: shown)])
        with torch.inference_mode():
            whole(**batch.data)
    for index, layer in enumerate(found):
        one, other = (
            x[0].double().unflatten(-1, (4, 8)).transpose(0, 1) for x in (outputs[index], outputs[index + 2])
        )
        distance = (one - other).norm(dim=-1)
        relative = 2 * distance / (one.norm(dim=-1) + other.norm(dim=-1))
        for place, name in enumerate(("text", "last", "image")):
            rows = batch.sets[name][0].clone()
            rows[0] = False
            expected = torch.stack([x[:, rows].mean(1) for x in (distance, relative)])
            torch.testing.assert_close(
                torch.tensor(layer.values[place, :, 0]), expected, atol=1e-5, rtol=1e-4
            )
    assert (found[1].values > 1e-4).all(), "the image would make no difference"


def test_divergence_by_name_of_the_group(folder_of: Folders, attnbias: Callable[..., Ended]) -> None:
    given = ("-m", f"hf:{folder_of('llava')}", "--images", "demo", "--limit", 2, "--metrics", "divergence")
    ended = attnbias("probe", *given, "--tokens", "text,last", "--intervene", "xsa:0", "--json")
    assert ended.code == 0, ended.err
    rows = json.loads(ended.out)["layers"]
    assert {(row["tokens"], row["metric"]) for row in rows} == {
        (tokens, metric)
        for tokens in ("text", "last")
        for metric in ("head_divergence", "head_divergence_relative")
    }
    assert all(row["mean"] > 0 for row in rows)
