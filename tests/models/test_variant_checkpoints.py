"""Checkpoints of trained variants: every loader brings back what was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from checkpoints import OPEN_CLIP_SIZES, save_language_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diag.errors import UserError
from diag.models import load
from diag.models.checkpoint import read_variants
from diag.models.names.resolve import parse as parse_name
from diag.models.names.spec import ModelSpec
from diag.studies.train.folders import save_timm, save_transformers, save_weights, timm_model
from diag.variants import apply, parse, restore, variants_in

CPU: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
SIZES = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 4}
ARGUMENTS = ["img_size=32", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=4", "num_classes=3"]
VARIANTS = [
    *("xsa", "gated_xsa:1", "gated=headwise", "random_direction", "matched_direction", "cb_s"),
    *("affine", "mixture_of_heads"),
]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(build: Callable[[], nn.Module], variant: str) -> nn.Module:
    """A model with random weights, and random α and λ, as if it had been trained."""
    torch.manual_seed(0)
    model = build()
    apply(getattr(model, "visual", model), parse(variant))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".change." in name:
                parameter.normal_()
    return model.eval()


def vit() -> nn.Module:
    return timm_model(SIZES, 8, 3)


def same(model: nn.Module, loaded: nn.Module, run: Callable[[Any], Tensor]) -> bool:
    with torch.inference_mode():
        return torch.equal(run(model), run(loaded))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_timm_folder(tmp_path: Path, variant: str) -> None:
    model = trained(vit, variant)
    save_timm(model, SIZES, tmp_path / "m", ("a", "b", "c"))
    found = load(parse_name(str(tmp_path / "m")), **CPU)
    assert same(model, found.module, lambda m: m(IMAGES))
    count = len(variants_in(model))
    assert found.notes == (f"trained with {parse(variant).kind} in {count} modules",)
    assert found.tower("vision").facts["patch_size"] == 8


def test_timm_itself_reads_the_folder(tmp_path: Path) -> None:
    model = trained(vit, "sa")
    save_timm(model, SIZES, tmp_path / "m", ("a", "b", "c"))
    assert same(
        model, timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval(), lambda m: m(IMAGES)
    )
    found = load(parse_name(str(tmp_path / "m")), **CPU)
    assert found.notes == ()
    assert same(model, found.module, lambda m: m(IMAGES))
    exclusive = trained(vit, "xsa")
    save_timm(exclusive, SIZES, tmp_path / "x", ("a", "b", "c"))
    unaware = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).eval()
    assert unaware.state_dict().keys() == exclusive.state_dict().keys()
    assert not same(exclusive, unaware, lambda m: m(IMAGES))


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "wrapped.pt"])
def test_a_timm_checkpoint(tmp_path: Path, suffix: str) -> None:
    model = trained(vit, "gated_xsa")
    file = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_weights(model, file)
    elif suffix == "pt":
        torch.save(model.state_dict(), file)
    else:
        torch.save({"step": 3, "model": nn.ModuleDict({"module": model}).state_dict()}, file)
    assert read_variants(file) == variants_in(model)
    spec = parse_name("timm:vit_tiny_patch16_224", checkpoint=file, model_args=ARGUMENTS)
    assert same(model, load(spec, **CPU).module, lambda m: m(IMAGES))


def test_weights_without_a_variant_say_nothing(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    assert read_variants(tmp_path / "a.safetensors") == read_variants(tmp_path / "a.pt") == {}


@pytest.mark.parametrize("variant", ["xsa", "gated_xsa"])
def test_an_open_clip_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", OPEN_CLIP_SIZES)
    model = trained(lambda: open_clip.create_model("tiny"), variant)
    file = tmp_path / "epoch_1.pt"
    state = nn.ModuleDict({"module": model}).state_dict()
    torch.save({"epoch": 1, "name": "tiny", "state_dict": state}, file)
    found = load(ModelSpec("tiny", "open_clip", "tiny", checkpoint=file), **CPU)
    assert same(model, found.module, lambda m: m.encode_image(IMAGES))
    assert found.notes == (f"trained with {variant} in 2 modules",)
    if variant == "xsa":  # no parameters: open_clip's own tools take the file
        unaware = open_clip.create_model("tiny", pretrained=str(file))
        after = unaware.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("variant", ["xsa", "gated_xsa:1", "cb_s"])
def test_a_hugging_face_folder(tmp_path: Path, kind: str, variant: str) -> None:
    source = save_language_model(tmp_path / "source", kind)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model: Any = trained(
        lambda: transformers.AutoModelForCausalLM.from_pretrained(source, attn_implementation="sdpa"), variant
    )
    save_transformers(model, tokenizer, tmp_path / "m")
    found = load(parse_name(f"hf:{tmp_path / 'm'}"), **CPU)
    ids = torch.arange(12)[None] + 5
    base = getattr(model, model.base_model_prefix)
    assert same(base, found.module, lambda m: m(input_ids=ids).last_hidden_state)
    assert list(variants_in(found.module).values()) == list(variants_in(model).values())
    assert found.notes == (f"trained with {parse(variant).kind} in {len(variants_in(model))} modules",)


def test_what_a_change_learned_may_not_be_missing(tmp_path: Path) -> None:
    source = save_language_model(tmp_path / "source", "gpt2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = trained(
        lambda: transformers.AutoModelForCausalLM.from_pretrained(source, attn_implementation="sdpa"),
        "gated_xsa",
    )
    save_transformers(model, tokenizer, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    save_file(
        {k: v for k, v in load_file(file).items() if ".change." not in k}, file, metadata={"format": "pt"}
    )
    with pytest.raises(UserError, match="it lacks 'gate'"):
        load(parse_name(f"hf:{tmp_path / 'm'}"), **CPU)


def test_a_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"the checkpoint changes 'blocks\.5\.attn', which the model does not have"
    ):
        restore(vit(), {"blocks.5.attn": "xsa"})
