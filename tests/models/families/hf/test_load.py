"""Hugging Face: what a folder gives, which models are refused, and how."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import TEXT_SIZES, VOCABULARY, save_tokenizer
from safetensors.torch import load_file, save_file

from diag.attention.call import AttentionCall
from diag.attention.pattern import pattern_rows
from diag.errors import UserError
from diag.inputs.items import Inputs
from diag.measure.meaning import understood
from diag.models import load
from diag.models.base import Model
from diag.models.families.hf.files import is_causal
from diag.models.names.resolve import parse
from diag.models.names.spec import ModelSpec

CPU = {"device": "cpu", "dtype": torch.float32}
Folders = Callable[[str], Path]


def load_folder(folder: Path, **options: object) -> Model:
    return load(parse(f"hf:{folder}", **options), **CPU)


def test_causal_models_get_bare_text_and_bidirectional_ones_their_frame(
    folder_of: Folders, texts: Inputs
) -> None:
    bare = load_folder(folder_of("gpt2")).tower("text")
    framed = load_folder(folder_of("bert")).tower("text")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder_of("gpt2"))
    tokens = tokenizer(next(iter(texts)).read(), add_special_tokens=False)["input_ids"]
    first, second = [sample.read() for sample in bare.samples(texts, 10)][:2]
    assert first + second == tokens[:20]
    assert next(framed.samples(texts, 10)).read() == [0, *tokens[:8], 1]
    assert {s.id.partition(":")[0] for s in bare.samples(texts, 10)} == {"long"}


def test_the_default_length_is_the_context_and_more_is_refused(folder_of: Folders, texts: Inputs) -> None:
    tower = load_folder(folder_of("llama")).tower("text")
    assert len(next(tower.samples(texts, None)).read()) == 64
    with pytest.raises(UserError, match="--seq-len 65 is longer") as error:
        next(tower.samples(texts, 65))
    assert error.value.tip == "use at most 64"


def test_which_models_are_causal() -> None:
    causal = [transformers.GPT2Config(), transformers.LlamaConfig(), transformers.GPTNeoXConfig()]
    both_ways = [transformers.BertConfig(), transformers.RobertaConfig(), transformers.T5Config()]
    assert all(is_causal(config) for config in causal)
    assert not any(is_causal(config) for config in both_ways)


@pytest.mark.parametrize("kind", ["Roberta", "IBert"])  # whose embeddings are a class of its own
def test_positions_behind_the_padding_index_do_not_count(tmp_path: Path, texts: Inputs, kind: str) -> None:
    sizes = TEXT_SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 34, "pad_token_id": 1}
    config = getattr(transformers, f"{kind}Config")(**sizes, bos_token_id=0, eos_token_id=1)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    tower = load_folder(tmp_path).tower("text")
    assert tower.facts["context"] == 32
    tower.forward(tower.encode([next(tower.samples(texts, 32))]))


def test_weights_are_those_of_the_folder_in_the_dtype_asked_for(folder_of: Folders) -> None:
    stored = transformers.GPT2Model.from_pretrained(folder_of("gpt2")).state_dict()
    loaded = load_folder(folder_of("gpt2")).module.state_dict()
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)
    half = load(parse(f"hf:{folder_of('gpt2')}"), device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in half.module.parameters()} == {torch.bfloat16}
    assert half.facts["weights_sha256"] != load_folder(folder_of("gpt2")).facts["weights_sha256"]


GROUPED = TEXT_SIZES | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY}


@pytest.mark.parametrize(
    "config",
    [
        transformers.BloomConfig(n_layer=2, hidden_size=32, n_head=4, vocab_size=VOCABULARY),
        transformers.GPTJConfig(
            n_layer=2,
            n_embd=32,
            n_head=4,
            vocab_size=VOCABULARY,
            rotary_dim=4,
            bos_token_id=0,
            eos_token_id=1,
        ),
        transformers.Gemma2Config(**GROUPED, attn_logit_softcapping=0.1, initializer_range=0.3),
        transformers.T5GemmaConfig(
            encoder=GROUPED | {"attn_logit_softcapping": 0.1, "initializer_range": 0.3},
            decoder=GROUPED,
            vocab_size=VOCABULARY,
        ),
        transformers.GptOssConfig(
            **GROUPED, num_local_experts=2, num_experts_per_tok=1, eos_token_id=1, initializer_range=0.3
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_compute_softmax_themselves_are_measured(
    tmp_path: Path, texts: Inputs, config: transformers.PretrainedConfig
) -> None:
    """Their patterns are those that the library hands out: capped, and with the share of sinks left out."""
    kinds = {"t5gemma": transformers.T5GemmaModel}
    torch.manual_seed(0)
    kinds.get(config.model_type, transformers.AutoModel.from_config)(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    model = load_folder(tmp_path)
    samples = list(model.tower("text").samples(texts, 12))[:2]
    tower = understood(model, model.tower("text"), samples)
    assert tower.skipped == {}
    calls: list[AttentionCall] = []
    batch = tower.encode(samples)
    with torch.inference_mode(), tower.capture(tower.layers, calls.append):
        tower.forward(batch)
    whole = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = whole.get_encoder() if config.is_encoder_decoder else whole
        patterns = expected(input_ids=batch.data, output_attentions=True).attentions
    assert len(calls) == len(patterns) == 2
    for call, pattern in zip(calls, patterns, strict=True):
        torch.testing.assert_close(pattern_rows(call).float(), pattern.float(), atol=1e-6, rtol=1e-5)


def test_a_hub_miss_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        load(parse("gpt2@v1"), **CPU)
    message = "'config.json' of 'openai-community/gpt2' is not on this machine and the hub cannot be reached"
    assert str(error.value) == message
    assert "hf download openai-community/gpt2 " in (error.value.tip or "")
    assert "--revision v1" in (error.value.tip or "")


def test_a_half_downloaded_repository(
    folder_of: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "a" * 40
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text(commit)
    for missing, present in (("model.safetensors", "config.json"), ("tokenizer", "model.safetensors")):
        shutil.copy(folder_of("gpt2") / present, snapshot)
        with pytest.raises(UserError, match=f"no {missing}") as error:
            load(parse("hf:org/tiny"), **CPU)
        assert "hf download org/tiny --include" in (error.value.tip or "")
    for file in folder_of("gpt2").glob("tokenizer*"):
        shutil.copy(file, snapshot)
    assert load(parse("hf:org/tiny"), **CPU).facts["commit"] == commit


def broken(folder_of: Folders, kind: str, target: Path) -> Path:
    shutil.copytree(folder_of(kind), target)
    return target


def test_damaged_folders(folder_of: Folders, tmp_path: Path) -> None:
    folder = broken(folder_of, "gpt2", tmp_path / "corrupt")
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model\.safetensors of .* cannot be read"):
        load_folder(folder)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(UserError, match=r"has no model\.safetensors, but weights\.safetensors") as error:
        load_folder(folder)
    assert "'model.safetensors', 'model.safetensors.index.json'" in (error.value.tip or "")
    (folder / "config.json").write_text("{ not json")
    with pytest.raises(UserError, match=r"cannot read config '.*config\.json': it is not JSON"):
        load_folder(folder)
    folder = broken(folder_of, "gpt2", tmp_path / "shapes")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_embd": 64}))
    with pytest.raises(UserError, match=r"cannot be read: its tensors are of other sizes") as error:
        load_folder(folder)
    assert "its config.json" in (error.value.tip or "")
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    with pytest.raises(
        UserError, match=r"lack 'h\.2\.attn\.c_attn\.bias'.* and \d+ more: they would be random"
    ):
        load_folder(folder)


def test_missing_companions(folder_of: Folders, tmp_path: Path) -> None:
    folder = broken(folder_of, "gpt2", tmp_path / "no-tokenizer")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="tokenizer") as error:
        load_folder(folder)
    assert "tokenizer.save_pretrained" in (error.value.tip or "")
    folder = broken(folder_of, "vit", tmp_path / "no-processor")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="preprocessor_config") as error:
        load_folder(folder)
    assert "image_processor.save_pretrained" in (error.value.tip or "")
    folder = broken(folder_of, "clip", tmp_path / "no-text")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    model = load_folder(folder)
    assert list(model.towers) == ["vision"]
    assert "no text tower" in model.notes[0]


def without(folder: Path, *parts: str) -> None:
    """Takes tensors out of a folder's weights, by how their names begin."""
    file = folder / "model.safetensors"
    save_file({k: x for k, x in load_file(file).items() if not k.startswith(parts)}, file, {"format": "pt"})


def test_weights_that_are_not_there_leave_out_their_own_tower(folder_of: Folders, tmp_path: Path) -> None:
    folder = broken(folder_of, "clip", tmp_path / "clip")
    without(folder, "text_model.encoder", "text_projection")
    models = [load_folder(folder) for _ in range(2)]
    assert [list(model.towers) for model in models] == [["vision"]] * 2
    (note,) = models[0].notes
    assert note.startswith(
        f"no text tower: the weights of '{folder}' lack 'text_model.encoder.layers.0.layer_norm1"
    )
    assert note.endswith("they would be random")
    # what is not there is the same each time
    assert models[0].facts["weights_sha256"] == models[1].facts["weights_sha256"]
    without(folder, "vision_model.encoder.layers.1.self_attn")
    with pytest.raises(UserError, match=r"lack 'vision_model\.encoder\.layers\.1\.self_attn"):
        load_folder(folder)


def test_a_projection_that_is_not_there_takes_no_tower_but_its_classes(
    folder_of: Folders, tmp_path: Path
) -> None:
    folder = broken(folder_of, "clip", tmp_path / "clip")
    assert load_folder(folder).zero_shot is not None
    without(folder, "visual_projection")
    model = load_folder(folder)
    assert list(model.towers) == ["vision", "text"]
    assert model.zero_shot is None


def test_a_part_that_a_model_is_without(tmp_path: Path) -> None:
    """Gemma 4 without images and sound holds None where their towers would be."""
    text = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "vocab_size": VOCABULARY}
    text |= {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
    text |= {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.Gemma4Config(text_config=text, vision_config=None, audio_config=None)
    transformers.Gemma4Model(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert list(load_folder(tmp_path).towers) == ["text"]


def test_code_in_a_repository_does_not_run(tmp_path: Path) -> None:
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="would run code from its repository") as error:
        load_folder(tmp_path)
    assert "--trust-remote-code" in (error.value.tip or "")
    assert not (tmp_path / "ran").exists()


def test_arguments(folder_of: Folders) -> None:
    model = load_folder(folder_of("gpt2"), model_args=["n_layer=1"])
    assert len(model.tower("text").layers) == 1
    with pytest.raises(UserError, match="does not take the argument 'n_layers'") as error:
        load_folder(folder_of("gpt2"), model_args=["n_layers=1"])
    assert "'n_layer'" in (error.value.tip or "")
    with pytest.raises(UserError, match="--checkpoint does not go with"):
        load(ModelSpec("x", "hf", str(folder_of("gpt2")), checkpoint=Path("w.pt")), **CPU)


def test_loading_leaves_the_progress_bar_and_the_log_level(folder_of: Folders) -> None:
    log = transformers.utils.logging
    before = (log.get_verbosity(), log.is_progress_bar_enabled())
    load_folder(folder_of("gpt2"))
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before


def test_one_packed_image_for_each_batch(folder_of: Folders, photographs: Inputs) -> None:
    tower = load_folder(folder_of("qwen2_5_vl")).tower("vision")
    assert tower.max_batch == 1
    assert tower.facts["full_attention_layers"] == [1]
    calls = []
    with torch.inference_mode(), tower.capture(tower.layers, calls.append):
        tower.forward(tower.encode([next(tower.samples(photographs, None))]))
    windows = [call.tokens for call in calls if call.layer == 0]
    whole = [call.tokens for call in calls if call.layer == 1]
    assert len(windows) > len(whole) == 1
    assert sum(windows) == sum(whole)


# --- other image sizes than that of the weights


def tokens_seen(model: Model, photographs: Inputs) -> int:
    tower = model.tower("vision")
    calls: list = []
    with torch.inference_mode(), tower.capture(tower.layers, calls.append):
        tower.forward(tower.encode([next(tower.samples(photographs, None))]))
    return calls[0].tokens - len(tower.prefix)


@pytest.mark.parametrize(
    ("kind", "positions"),
    [
        ("vit", "interpolated"),
        ("clip", "interpolated"),
        ("siglip", "interpolated"),
        ("dinov2", "interpolated"),
        ("dinov3", "native"),
    ],
)
def test_another_image_size(folder_of: Folders, photographs: Inputs, kind: str, positions: str) -> None:
    model = load(parse(f"hf:{folder_of(kind)},img_size=64"), **CPU)
    facts = model.tower("vision").facts
    assert (facts["image_size"], facts["positions"], facts["patch_embedding"]) == (64, positions, "native")
    words = "position embeddings interpolated from 4×4 to 8×8: off the training distribution"
    assert model.notes == ((words,) if positions == "interpolated" else ())
    assert tokens_seen(model, photographs) == 64
    assert 64 in facts["preprocessing"]["size"].values()
    native = load_folder(folder_of(kind))
    assert native.tower("vision").facts["positions"] == "native"
    assert tokens_seen(native, photographs) == 16


def test_the_proportion_of_resizing_to_cropping_is_kept(folder_of: Folders, tmp_path: Path) -> None:
    folder = broken(folder_of, "clip", tmp_path / "clip")
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    facts = load(parse(f"hf:{folder},img_size=64"), **CPU).tower("vision").facts["preprocessing"]
    assert (facts["size"], facts["crop"]) == ({"shortest_edge": 80}, {"height": 64, "width": 64})


def test_a_processor_that_differs_from_the_config_is_marked(folder_of: Folders, tmp_path: Path) -> None:
    """Published DINOv2 is stored for 518 px and prepared at 224: its positions are always interpolated."""
    folder = broken(folder_of, "dinov2", tmp_path / "dinov2")
    transformers.ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(folder)
    model = load_folder(folder)
    assert model.tower("vision").facts["positions"] == "interpolated"
    assert "from 4×4 to 6×6" in model.notes[0]


@pytest.mark.parametrize(
    ("kind", "size", "message", "tip"),
    [
        ("vit", "60", "60 px is not a multiple of the patch size 8", "img_size=56 or img_size=64"),
        ("clip", "(64, 32)", "takes square images", "img_size=64"),
        ("qwen2_5_vl", "64", "does not take img_size: it takes every image at the image's own size", "leave"),
        ("gpt2", "64", "does not take the argument 'img_size'", ""),
    ],
)
def test_sizes_that_cannot_be(folder_of: Folders, kind: str, size: str, message: str, tip: str) -> None:
    with pytest.raises(UserError) as error:
        load(parse(f"hf:{folder_of(kind)},img_size={size}"), **CPU)
    assert message in str(error.value)
    assert tip in (error.value.tip or "")


def test_another_patch_size_is_refused_by_name(folder_of: Folders) -> None:
    with pytest.raises(UserError, match="keeps its patch size") as error:
        load(parse(f"hf:{folder_of('vit')},patch_size=4"), **CPU)
    assert error.value.tip == "timm: models take patch_size="
    assert load(parse(f"hf:{folder_of('vit')},patch_size=8"), **CPU).tower("vision").facts["patch_size"] == 8


def test_a_model_whose_forward_does_not_interpolate_is_refused_by_name(
    folder_of: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diag.models.families.hf.vision.FLAG", "another_flag")
    with pytest.raises(UserError, match="does not take img_size: its position embeddings are of one size"):
        load(parse(f"hf:{folder_of('vit')},img_size=64"), **CPU)
    assert load_folder(folder_of("vit")).tower("vision").facts["positions"] == "native"
