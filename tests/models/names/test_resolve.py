"""What names resolve to, and what is said about those that do not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from diag.errors import UserError
from diag.models.names.arguments import read
from diag.models.names.resolve import listing, parse
from diag.models.names.spec import ModelSpec


@pytest.mark.parametrize(
    ("typed", "resolved"),
    [
        ("gpt2", "hf:openai-community/gpt2"),
        ("gpt2-small", "hf:openai-community/gpt2"),
        ("GPT2-XL", "hf:openai-community/gpt2-xl"),
        ("hf:gpt2", "hf:openai-community/gpt2"),
        ("tl:gpt2", "tl:openai-community/gpt2"),
        ("pythia-160m@step3000", "hf:EleutherAI/pythia-160m@step3000"),
        ("EleutherAI/pythia-160m@step3000", "hf:EleutherAI/pythia-160m@step3000"),
        ("hf:Qwen/Qwen3-0.6B", "hf:Qwen/Qwen3-0.6B"),
        ("vit-b-16", "open_clip:ViT-B-16/datacomp_xl_s13b_b90k"),
        ("vit-b-32", "open_clip:ViT-B-32/datacomp_xl_s13b_b90k"),
        ("ViT-B-16/datacomp_xl_s13b_b90k", "open_clip:ViT-B-16/datacomp_xl_s13b_b90k"),
        ("ViT-B-16, datacomp_xl_s13b_b90k", "open_clip:ViT-B-16/datacomp_xl_s13b_b90k"),
        ("open_clip:ViT-B-16,openai", "open_clip:ViT-B-16/openai"),
        ("vit_base_patch8_224.augreg_in21k", "timm:vit_base_patch8_224.augreg_in21k"),
        ("timm:vit_tiny_patch16_224", "timm:vit_tiny_patch16_224"),
        ("timm:hf-hub:UCSC-VLAA/openvision-vit-small-patch8-224", None),
        ("demo:vit-p8", "demo:vit-p8"),
        ("demo:lm", "demo:lm"),
    ],
)
def test_what_people_type_resolves(typed: str, resolved: str | None) -> None:
    assert parse(typed).resolved == (resolved or typed)


def test_vit_b_14_says_that_no_public_clip_exists() -> None:
    spec = parse("vit-b-14")
    assert spec.resolved == "timm:vit_base_patch14_dinov2.lvd142m,img_size=224"
    assert spec.model_args == {"img_size": 224}
    assert "no public CLIP ViT-B/14" in (spec.note or "")
    own = parse("vit-b-14", checkpoint="weights.pt")
    assert (own.base, own.model_args, own.note) == ("open_clip:ViT-B-14", {}, None)
    assert own.resolved == "open_clip:ViT-B-14,checkpoint=weights.pt"


def test_a_checkpoint_replaces_the_tag() -> None:
    spec = parse("vit-b-16", checkpoint="weights.pt")
    assert (spec.name, spec.checkpoint) == ("ViT-B-16", Path("weights.pt"))


def test_quickgelu_weights_take_the_variant_that_computes_it() -> None:
    spec = parse("vit_base_patch16_clip_224.openai")
    assert spec.name == "vit_base_patch16_clip_quickgelu_224.openai"
    assert "QuickGELU" in (spec.note or "")
    assert parse("timm:vit_base_patch16_clip_224.laion2b").name == "vit_base_patch16_clip_224.laion2b"
    with pytest.raises(UserError, match="would run with GELU") as error:
        parse("vit_base_patch16_clip_224.dfn2b")
    assert error.value.tip == "use open_clip:ViT-B-16-quickgelu/dfn2b"
    own = parse("vit_base_patch16_clip_224.openai", checkpoint="weights.pt")
    assert own.name == "vit_base_patch16_clip_224.openai"


@pytest.mark.parametrize(
    ("typed", "message", "tip"),
    [
        ("vit_bse_patch32_224", "model 'vit_bse_patch32_224' not found", "did you mean 'vit_base_patch32_"),
        ("gpt2-smal", "model 'gpt2-smal' not found", "did you mean 'gpt2-small'"),
        ("llama", "model 'llama' not found", "ORG/NAME: for example -m meta-llama/Llama-3.2-1B"),
        ("bert", "model 'bert' not found", "did you mean 'bert-base-uncased'?"),
        ("qwen3_vit_306", "model 'qwen3_vit_306' not found", "did you mean 'qwen3_vit_306m"),
        ("qqqqqqqqq", "model 'qqqqqqqqq' not found", "'attnbias models' lists"),
        ("timn:vit", "there is no family 'timn'", "did you mean 'timm'?"),
        ("xyzw:vit", "there is no family 'xyzw'", "families are 'timm', 'open_clip'"),
        ("timm:", "has no name after 'timm:'", "attnbias models"),
        ("demo:vit-p32", "model 'demo:vit-p32' not found", "demo:vit-p16, demo:vit-p8"),
        ("demo:lm@v1", "embedded models have no revisions", "write demo:lm"),
        ("./no/such/folder", "folder './no/such/folder' does not exist", "config.json"),
        ("hf:/no/such/folder", "folder '/no/such/folder' does not exist", "ORG/NAME"),
        ("timm:vit_tiny_patch16_224.agureg_in21k", "has no weights 'agureg_in21k'", "'augreg_in21k'"),
        ("open_clip:ViT-B-61", "not found in open_clip", "'ViT-B-16'"),
        ("ViT-B-61/openai", "model 'ViT-B-61/openai' not found", "'ViT-B-16/openai'"),
        ("vit-b-16@main", "names weights by tag", "write open_clip:NAME/TAG"),
        ("open_clip:ViT-B-16@main", "names weights by tag", "write open_clip:NAME/TAG"),
    ],
)
def test_errors_say_what_was_given_and_what_to_type(typed: str, message: str, tip: str) -> None:
    with pytest.raises(UserError) as error:
        parse(typed)
    assert message in str(error.value)
    assert tip in (error.value.tip or "")
    assert (error.value.tip or "").count("'") <= 12  # never a list of all names
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("typed", "forms"),
    [
        ("swin_base_patch4_window7_224", ["open_clip:swin_base_patch4", "timm:swin_base_patch4"]),
        ("hf-hub:org/name", ["timm:hf-hub:org/name", "open_clip:hf-hub:org/name"]),
    ],
)
def test_an_ambiguous_name_shows_the_explicit_forms(typed: str, forms: list[str]) -> None:
    with pytest.raises(UserError, match="is ambiguous") as error:
        parse(typed)
    assert all(form in (error.value.tip or "") for form in forms)


def test_a_folder_is_recognised_by_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "open_clip_config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    assert parse(str(tmp_path / "hf")).resolved == f"hf:{tmp_path}/hf"
    assert parse(str(tmp_path / "timm")).resolved == f"timm:local-dir:{tmp_path}/timm"
    assert parse(str(tmp_path / "clip")).resolved == f"open_clip:local-dir:{tmp_path}/clip"
    with pytest.raises(UserError, match=r"has no config\.json"):
        parse(str(tmp_path / "empty"))
    (tmp_path / "hf").rename(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'gpt2' is ambiguous") as error:
        parse("gpt2")
    assert error.value.tip == "write 'hf:gpt2' or 'hf:openai-community/gpt2'"


def test_model_arguments_are_literals() -> None:
    given = ["img_size=224", "class_token=false", "window=(4, 4)", "pool=avg", "tag=none"]
    assert read(given) == {
        "img_size": 224,
        "class_token": False,
        "window": (4, 4),
        "pool": "avg",
        "tag": None,
    }
    assert parse("vit-b-14", model_args=["img_size=518"]).model_args == {"img_size": 518}
    with pytest.raises(UserError, match="'img_size' is not key=value"):
        read(["img_size"])


def test_listing_searches_every_registry() -> None:
    rows = {row["name"]: row for row in listing()}
    assert rows["gpt2"]["resolves_to"] == "hf:openai-community/gpt2"
    assert rows["demo:vit-p4"]["tokens"] == "256 patches + 1"
    assert "no public CLIP" in rows["vit-b-14"]["note"]
    assert all(set(row) == {"name", "resolves_to", "tokens", "licence", "note"} for row in rows.values())
    found = {row["resolves_to"]: row for row in listing("patch8 augreg")}
    assert found["timm:vit_base_patch8_224.augreg_in21k"]["tokens"] == "784 patches"
    assert {row["resolves_to"]: row for row in listing("ViT-B-14")}["open_clip:ViT-B-14"][
        "tokens"
    ] == "256 patches"
    assert listing("no such model anywhere") == []


def test_every_short_name_resolves() -> None:
    for row in listing():
        assert parse(row["name"]).resolved == row["resolves_to"]


def test_names_are_resolved_without_torch() -> None:
    code = (
        "import sys, diag.models.names.resolve as n; n.parse('gpt2'); n.listing(); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_spec_resolves_to_itself() -> None:
    spec = ModelSpec("x", "hf", "org/name", revision="v1")
    assert parse(spec.resolved).resolved == spec.resolved
