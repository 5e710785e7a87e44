"""Model folders of others: what is wrong in their files is told in two lines, before anything is built."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from checkpoints import OPEN_CLIP_SIZES, TEXT_SIZES, VOCABULARY, save_tokenizer
from safetensors.torch import save_file

from diag.errors import UserError
from diag.inputs.items import Inputs
from diag.measure.loop import measure
from diag.models import load
from diag.models.families.hf.files import load_config, load_tokenizer
from diag.models.names.resolve import parse
from diag.models.sizes import refuse_too_large, refuse_unreasonable

Folders = Callable[[str], Path]
CPU = {"device": "cpu", "dtype": torch.float32}
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


@pytest.fixture(scope="session")
def timm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timm")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **SIZES)
    timm.models.save_for_hf(model, folder, model_args=SIZES)
    return folder


@pytest.fixture(scope="session")
def open_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open_clip")
    save_file(open_clip.CLIP(**OPEN_CLIP_SIZES).state_dict(), folder / "open_clip_model.safetensors")
    document = {"model_cfg": OPEN_CLIP_SIZES, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    return folder


def changed(source: Path, target: Path, file: str, **fields: Any) -> Path:
    """A copy of a folder in which one JSON file says something else; `a__b` is b within a."""
    shutil.copytree(source, target)
    document = json.loads((target / file).read_text())
    for path, value in fields.items():
        *within, key = path.split("__")
        part = document
        for name in within:
            part = part[name]
        part[key] = value
    (target / file).write_text(json.dumps(document))
    return target


def refusal(name: object, **options: Any) -> UserError:
    with pytest.raises(UserError) as error:
        load(parse(str(name), **options), **CPU)
    assert "\n" not in str(error.value)
    assert error.value.tip
    return error.value


@pytest.mark.parametrize(
    ("kind", "fields", "told"),
    [
        ("gpt2", {"n_embd": -1}, "n_embd is -1"),
        ("gpt2", {"n_layer": 10**9}, "n_layer is 1000000000"),
        ("gpt2", {"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ("gpt2", {"n_head": "four"}, "'n_head'"),
        ("gpt2", {"n_head": 5}, "cannot be read"),
        ("gpt2", {"model_type": "no-such-model"}, "cannot be read"),
        ("gpt2", {"model_type": 3}, "names no model_type"),
        ("gpt2", {"dtype": "float99"}, "cannot be read"),
        ("gpt2", {"attnbias_variant": "xsa"}, "'attnbias_variant' is 'xsa', no mapping"),
        ("gpt2", {"attnbias_variant": {"h.0.attn": 3}}, "'attnbias_variant' is"),
        ("gpt2", {"attnbias_variant": {"h.0.attn": "no"}}, "there is no attention variant 'no'"),
        (
            "gpt2",
            {"attnbias_variant": {"h.9.attn": "xsa"}},
            "changes 'h.9.attn', which the model",
        ),
        ("vit", {"patch_size": 0}, "patch_size is 0"),
        ("vit", {"image_size": -32}, "image_size is -32"),
        ("clip", {"vision_config__hidden_size": 10**9}, "vision_config.hidden_size is 1000000000"),
        ("clip", {"text_config": 3}, "config.json"),
    ],
)
def test_a_config_of_transformers(
    folder_of: Folders, tmp_path: Path, kind: str, fields: dict[str, Any], told: str
) -> None:
    folder = changed(folder_of(kind), tmp_path / "m", "config.json", **fields)
    error = refusal(folder)
    assert told in str(error)
    assert str(folder) in str(error) or "attention variant" in str(error) or "changes 'h.9" in str(error)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "it is empty"),
        (b"[]", "it holds no mapping of names to values"),
        (b"null", "it holds no mapping of names to values"),
        (b"\xff\xfe{", "it is not UTF-8"),
        (b'{"a":', "it is not JSON"),
        (None, "it is no plain file"),
    ],
)
def test_a_config_that_is_no_document(
    folder_of: Folders, open_clip_folder: Path, tmp_path: Path, content: bytes | None, told: str
) -> None:
    for source, file in ((folder_of("gpt2"), "config.json"), (open_clip_folder, "open_clip_config.json")):
        folder = tmp_path / file
        shutil.copytree(source, folder)
        (folder / file).unlink()
        if content is None:
            os.mkfifo(folder / file)
        else:
            (folder / file).write_bytes(content)
        prefixes = ("open_clip:local-dir:",) if "open_clip" in file else ("", "hf:", "tl:", "timm:local-dir:")
        for prefix in prefixes:
            assert f"cannot read config '{folder / file}': {told}" in str(refusal(f"{prefix}{folder}"))


def test_a_folder_of_timm(timm_folder: Path, tmp_path: Path) -> None:
    cases = {
        "names no architecture": {"architecture": 3},
        "model_args.depth is 1000000000": {"model_args__depth": 10**9},
        "model_args.embed_dim is 0": {"model_args__embed_dim": 0},
        "cannot be built": {"architecture": "no_such_architecture"},
        "the preprocessing of": {"pretrained_cfg__std": 3},
        "GB; this machine has": {"model_args__embed_dim": 9_999_999, "model_args__num_heads": 3},
    }
    for number, (told, fields) in enumerate(cases.items()):
        folder = changed(timm_folder, tmp_path / str(number), "config.json", **fields)
        for prefix in ("", "timm:local-dir:"):
            assert told in str(refusal(f"{prefix}{folder}"))
    assert load(parse(str(timm_folder)), **CPU).tower("vision").facts["patch_size"] == 8


def test_a_folder_of_open_clip(open_clip_folder: Path, tmp_path: Path) -> None:
    cases = {
        "holds no model_cfg": {"model_cfg": []},
        "model_cfg.vision_cfg.layers is -1": {"model_cfg__vision_cfg__layers": -1},
        "model_cfg.text_cfg.width is 1000000000": {"model_cfg__text_cfg__width": 10**9},
        "cannot be built": {"model_cfg__vision_cfg__no_such": 1},
    }
    for number, (told, fields) in enumerate(cases.items()):
        folder = changed(open_clip_folder, tmp_path / str(number), "open_clip_config.json", **fields)
        for prefix in ("", "open_clip:local-dir:"):
            assert told in str(refusal(f"{prefix}{folder}"))
    folder = changed(open_clip_folder, tmp_path / "std", "open_clip_config.json", preprocess_cfg__std=3)
    model = load(parse(str(folder)), **CPU)
    assert list(model.towers) == ["text"]
    assert model.notes[0].startswith("no vision tower: the preprocessing of")


def test_sizes_in_arguments_are_bounded_before_anything_is_built() -> None:
    name = "timm:vit_tiny_patch16_224"
    assert "depth is 1000000000" in str(refusal(name, model_args=["depth=1000000000"]))
    assert "parameters" in str(refusal(name, model_args=["embed_dim=9000000"], random_init=True))
    refuse_unreasonable({"depth": [2, 2, 18], "num_classes": 0, "patch_size": (4, 4), "head_dim": None}, "it")
    with pytest.raises(UserError, match=r"(?m)^it: a\.depth is 0$") as error:
        refuse_unreasonable({"a": {"depth": [2, 0]}}, "it")
    assert error.value.tip == "it can be from 1 to 1,000"
    with torch.device("meta"):
        huge, small = torch.nn.Linear(2**22, 2**22), torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="it would have 17,592,190,238,720 parameters"):
        refuse_too_large(huge, "it")
    refuse_too_large(small, "it")


def test_random_weights_beyond_memory_are_never_made(folder_of: Folders, tmp_path: Path) -> None:
    folder = changed(
        folder_of("llama"), tmp_path / "m", "config.json", hidden_size=2**20, vocab_size=9_999_999
    )
    assert "this machine has" in str(refusal(folder, random_init=True))


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ({"weight_map": {"a": "../x.safetensors"}}, "names a file elsewhere, '../x.safetensors': not read"),
        ({"weight_map": {"a": "/etc/x.safetensors"}}, "names a file elsewhere, '/etc/x.safetensors'"),
        ({"weight_map": {"a": "part-1.safetensors"}}, "'part-1.safetensors' is not there, which"),
        ({"weight_map": ["a"]}, "has no weight_map of tensors to files"),
        ({}, "has no weight_map of tensors to files"),
    ],
)
def test_an_index_of_several_files(
    folder_of: Folders, tmp_path: Path, index: dict[str, Any], told: str
) -> None:
    shutil.copytree(folder_of("gpt2"), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    for prefix in ("hf:", "tl:"):
        assert told in str(refusal(f"{prefix}{tmp_path / 'm'}"))


@pytest.mark.parametrize(
    ("files", "told", "tip"),
    [
        (
            {"adapter_config.json": "{}"},
            "holds an adapter, not a model, and peft, which reads it, is not installed",
            "pip install peft, or merge it into its model: merge_and_unload()",
        ),
        ({"model_index.json": "{}"}, "holds a pipeline of diffusers", "a text or vision transformer"),
        (
            {"model_index.json": "{}", "text_encoder/config.json": "{}"},
            "holds a pipeline of diffusers",
            "/text_encoder'",
        ),
        (
            {"model-q4.gguf": ""},
            "holds a model in GGUF, and gguf, which reads it, is not installed",
            "pip install gguf, or give the model that it was made from, with config.json and safetensors",
        ),
        (
            {"config.json": '{"_class_name": "AutoencoderKL", "_diffusers_version": "0.35"}'},
            "holds AutoencoderKL of diffusers, not a model of transformers",
            "encoder of its pipeline, or a diffusion transformer as diffusers:FOLDER",
        ),
        ({"config.json": "{}"}, "names no model_type", "save_pretrained or timm wrote"),
        ({"notes.txt": ""}, "has no config.json", "save_pretrained"),
    ],
)
def test_folders_that_are_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], told: str, tip: str
) -> None:
    monkeypatch.setattr("diag.models.families.hf.formats.find_spec", lambda name: None)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    for prefix in ("", "hf:"):
        error = refusal(f"{prefix}{tmp_path}")
        assert told in str(error)
        assert tip in (error.tip or "")


@pytest.mark.parametrize(
    ("files", "told", "tip"),
    [
        (
            {"adapter_config.json": "{}"},
            "holds an adapter, not a model, and does not say of which",
            "merge it",
        ),
        (
            {"a.gguf": "", "b.gguf": ""},
            "holds several models in GGUF: 'a.gguf' or 'b.gguf'",
            "leave one there",
        ),
        ({"a.gguf": "no"}, "of '.*' cannot be read", "save the model again"),
        (
            {"adapter_config.json": '{"base_model_name_or_path": "org/base"}'},
            "'config.json' of 'org/base' is not on this machine",
            "hf download org/base",
        ),
    ],
)
def test_what_an_installed_library_could_not_read_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], told: str, tip: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("diag.models.families.hf.formats.find_spec", lambda name: name)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    error = refusal(f"hf:{tmp_path}")
    assert re.search(told, str(error))
    assert tip in (error.tip or "")


def test_an_adapter_has_the_config_and_the_tokenizer_of_its_model(
    folder_of: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diag.models.families.hf.formats.find_spec", lambda name: name)
    base = folder_of("llama")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    spec = parse(f"hf:{tmp_path}")
    assert load_config(spec).hidden_size == 32
    assert load_tokenizer(spec).get_vocab() == load_tokenizer(parse(f"hf:{base}")).get_vocab()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers what is on its way out
def test_an_adapter_alone_is_put_onto_its_model(folder_of: Folders, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder_of("llama"))
    asked = peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(whole, asked).eval()
    adapted.save_pretrained(tmp_path)
    loaded = load(parse(f"hf:{tmp_path}"), **CPU)
    assert loaded.facts["weights"] == "with adapter"
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        merged = adapted.merge_and_unload().model(ids).last_hidden_state
        torch.testing.assert_close(loaded.module(ids).last_hidden_state, merged, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "torchao"])
def test_quantised_weights_without_their_library(folder_of: Folders, tmp_path: Path, method: str) -> None:
    of_method = {"quant_method": method, "bits": 4, "group_size": 32, "load_in_4bit": True}
    if method == "torchao":
        of_method["quant_type"] = {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}
    folder = changed(folder_of("llama"), tmp_path / "m", "config.json", quantization_config=of_method)
    error = refusal(folder)
    assert f"'{folder}', quantised with {method}, cannot be read: " in str(error)
    assert error.tip == "install what that names, or give the model that it was made from, not quantised"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("")
    with pytest.raises(UserError, match=r"a\.gguf' is a file") as error:
        parse(f"hf:{tmp_path / 'a.gguf'}")
    assert error.value.tip == "hf: takes the folder around it, or ORG/NAME"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"size": -1}, "image processor of"),
        ({"size": {"height": {}, "width": 32}}, "image processor of"),
        ({"image_mean": "text"}, "image processor of"),
        ({"image_processor_type": "NoSuch"}, "preprocessor_config.json of"),
    ],
)
def test_a_processor_that_cannot_be_used(
    folder_of: Folders, tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    folder = changed(folder_of("vit"), tmp_path / "m", "preprocessor_config.json", **fields)
    assert told in str(refusal(folder))


def test_a_processor_whose_size_does_not_fit_the_model(folder_of: Folders, tmp_path: Path) -> None:
    sizes = {"size": {"height": 40, "width": 40}}
    folder = changed(folder_of("vit"), tmp_path / "m", "preprocessor_config.json", **sizes)
    with pytest.raises(UserError, match=r"the model's vision tower fails on its own input: .*40") as error:
        load(parse(str(folder)), **CPU)
    assert "must belong together" in (error.value.tip or "")


@pytest.mark.parametrize("content", ["[]", "null", '{"model_max_length": ""}', '{"tokenizer_class": 3}'])
def test_a_tokenizer_config(folder_of: Folders, tmp_path: Path, content: str, texts: Inputs) -> None:
    shutil.copytree(folder_of("llama"), tmp_path / "m")
    (tmp_path / "m" / "tokenizer_config.json").write_text(content)
    try:
        tower = load(parse(str(tmp_path / "m")), **CPU).tower("text")
        next(tower.samples(texts, 8))
    except UserError as error:
        assert "tokenizer" in str(error)  # noqa: PT017  some versions read it all the same


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_a_t5_that_was_saved_as_an_encoder(tmp_path: Path, encoder_decoder: bool, texts: Inputs) -> None:
    sizes = {"num_layers": 2, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 64, "vocab_size": VOCABULARY}
    transformers.T5EncoderModel(transformers.T5Config(**sizes, pad_token_id=1)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, special=("<s>", "</s>"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": encoder_decoder}))
    tower = load(parse(str(tmp_path)), **CPU).tower("text")
    assert len(tower.layers) == 2
    assert list(measure(tower, [next(tower.samples(texts, 8))]))


def test_a_sliding_window_is_not_called_context(tmp_path: Path, texts: Inputs) -> None:
    sizes = TEXT_SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "num_key_value_heads": 2}
    config = transformers.MistralConfig(**sizes, sliding_window=16, bos_token_id=0, eos_token_id=1)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    tower = load(parse(f"tl:{tmp_path}"), **CPU).tower("text")
    assert tower.facts["context"] == 64
    with pytest.raises(UserError, match="--seq-len 20 is longer than the model's sliding window") as error:
        next(tower.samples(texts, 20))
    assert error.value.tip == "use at most 16"
    whole = load(parse(f"hf:{tmp_path}"), **CPU).tower("text")
    assert len(next(whole.samples(texts, 64)).read()) == 64


def test_what_has_no_attention_need_not_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = refusal("timm:resnet18")
    assert "no self-attention layer found in its vision tower" in str(error)
    assert "download" not in (error.tip or "")
