"""Arguments in names: taken off, read, merged with the options, written back, and stamped in the key."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from diag.errors import UserError
from diag.models.names.arguments import local_files, merged, read, split
from diag.models.names.resolve import parse
from diag.models.names.spec import written
from diag.run.plan import ProbePlan, specs_of


@pytest.mark.parametrize(
    ("typed", "name", "pairs"),
    [
        ("gpt2", "gpt2", ()),
        ("pythia-160m@step3000", "pythia-160m@step3000", ()),
        ("ViT-B-16,datacomp_xl_s13b_b90k", "ViT-B-16,datacomp_xl_s13b_b90k", ()),
        ("ViT-B-16, tag, img_size=384 ", "ViT-B-16, tag", ("img_size=384",)),
        ("timm:swin,window=(4, 4),img_size=64", "timm:swin", ("window=(4, 4)", "img_size=64")),
        ("x,checkpoint=a/b=c,d.pt", "x", ("checkpoint=a/b=c,d.pt",)),
    ],
)
def test_arguments_are_taken_off_the_name(typed: str, name: str, pairs: tuple[str, ...]) -> None:
    assert split(typed) == (name, pairs)


def test_a_folder_of_exactly_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run,seed=3").mkdir()
    monkeypatch.chdir(tmp_path)
    for typed in ("run,seed=3", "hf:run,seed=3", "timm:local-dir:run,seed=3"):
        assert split(typed) == (typed, ())
    assert split("run,seed=4") == ("run", ("seed=4",))


def test_what_is_written_is_read_again() -> None:
    given = {
        "b": 3,
        "a": "avg",
        "flag": False,
        "none": None,
        "pair": (4, 4),
        "text": "12",
        "checkpoint": Path("w.pt"),
    }
    text = written(given)
    assert text == ",a=avg,b=3,checkpoint=w.pt,flag=False,none=None,pair=(4, 4),text='12'"
    assert read(split("x" + text)[1], "x") == given
    assert written({}) == ""


@pytest.mark.parametrize(
    ("typed", "message", "tip"),
    [
        (
            "demo:vit-p8,img_size=",
            "'img_size=' in 'demo:vit-p8,img_size=' is not key=value",
            "img_size=VALUE",
        ),
        (
            "demo:vit-p8,img_size",
            "'img_size' in 'demo:vit-p8,img_size' is not key=value",
            "demo:vit-p8,img_size=384",
        ),
        ("vit_tiny_patch16_224,wide", "'wide' in 'vit_tiny_patch16_224,wide' is not", "ARCHITECTURE,TAG"),
        ("demo:vit-p8,img_size=64,img_size=96", "gives img_size twice", "leave one img_size= out"),
        ("vit_bse_patch32_224,img_size=96", "model 'vit_bse_patch32_224' not found", "did you mean"),
    ],
)
def test_errors(typed: str, message: str, tip: str) -> None:
    with pytest.raises(UserError) as error:
        parse(typed)
    assert message in str(error.value)
    assert tip in (error.value.tip or "")


def test_options_hold_for_all_names_and_must_not_contradict_one() -> None:
    plan = ProbePlan.checked(
        models=("vit-b-16,img_size=384", "vit-b-32"), model_args=("force_quick_gelu=true",)
    )
    first, second = specs_of(plan)
    assert first.model_args == {"img_size": 384, "force_quick_gelu": True}
    assert second.model_args == {"force_quick_gelu": True}
    assert parse("vit-b-16,img_size=384", model_args=["img_size=384"]).model_args == {"img_size": 384}
    with pytest.raises(
        UserError, match="'vit-b-16,img_size=384' and --model-arg img_size=224 disagree"
    ) as error:
        parse("vit-b-16,img_size=384", model_args=["img_size=224"])
    assert error.value.tip == "give img_size in one place: in each name, or once for all models"
    with pytest.raises(UserError, match=r"and --checkpoint b\.pt disagree"):
        parse("ViT-B-14,checkpoint=a.pt", checkpoint="b.pt")
    assert merged({"a": 1}, {"b": 2}, "x") == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("typed", "resolved"),
    [
        ("vit-b-14,img_size=448", "timm:vit_base_patch14_dinov2.lvd142m,img_size=448"),
        (
            "timm:flexivit_base.300ep_in21k,patch_size=24,img_size=480",
            "timm:flexivit_base.300ep_in21k,img_size=480,patch_size=24",
        ),
        ("vit-b-16,img_size=384", "open_clip:ViT-B-16/datacomp_xl_s13b_b90k,img_size=384"),
        ("ViT-B-16,openai,img_size=384", "open_clip:ViT-B-16/openai,img_size=384"),
        ("pythia-160m@step3000,use_parallel_residual=no", None),
        ("vit-b-14,checkpoint=w.pt", "open_clip:ViT-B-14,checkpoint=w.pt"),
        ("vit-b-16,checkpoint=w.pt", "open_clip:ViT-B-16,checkpoint=w.pt"),
        (
            "open_clip:ViT-B-14,checkpoint=/a:b/w.pt,img_size=336",
            "open_clip:ViT-B-14,checkpoint=/a:b/w.pt,img_size=336",
        ),
        ("open_clip:hf-hub:org/name,checkpoint=w.pt", "open_clip:hf-hub:org/name,checkpoint=w.pt"),
        ("demo:vit-p8,img_size=128", "demo:vit-p8,img_size=128"),
    ],
)
def test_the_resolved_name_says_all_and_the_given_one_stays(typed: str, resolved: str | None) -> None:
    spec = parse(typed)
    assert spec.given == typed
    assert spec.resolved == (resolved or "hf:EleutherAI/pythia-160m@step3000,use_parallel_residual=no")
    assert parse(spec.resolved).resolved == spec.resolved
    assert "," not in spec.base


def test_an_ambiguous_name_keeps_its_arguments() -> None:
    with pytest.raises(UserError, match="is ambiguous") as error:
        parse("swin_base_patch4_window7_224,img_size=448")
    assert "'timm:swin_base_patch4_window7_224,img_size=448'" in (error.value.tip or "")


def test_several_checkpoints_in_one_command() -> None:
    specs = specs_of(
        ProbePlan.checked(models=("open_clip:ViT-B-14,checkpoint=a.pt", "open_clip:ViT-B-14,checkpoint=b.pt"))
    )
    assert [spec.checkpoint for spec in specs] == [Path("a.pt"), Path("b.pt")]
    assert [spec.model_args for spec in specs] == [{}, {}]


@pytest.mark.parametrize("form", ["{}", "hf:{}", "timm:local-dir:{}", "{},img_size=64", "hf:{},n_layer=1"])
def test_a_local_folder_is_stamped_whatever_follows_its_name(tmp_path: Path, form: str) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    os.utime(weights, ns=(0, 0))
    plan = ProbePlan.checked(models=(form.format(tmp_path),))
    assert local_files(plan.models[0]) == [tmp_path]
    before = plan.key({})
    os.utime(weights, ns=(0, 1))
    assert plan.key({}) != before


def test_a_checkpoint_in_a_name_is_stamped(tmp_path: Path) -> None:
    files = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for file in files:
        file.write_bytes(b"1")
    plan = ProbePlan.checked(models=tuple(f"open_clip:ViT-B-14,checkpoint={file}" for file in files))
    assert [path for name in plan.models for path in local_files(name)] == files
    before = plan.key({})
    files[1].write_bytes(b"12")
    assert plan.key({}) != before
    assert local_files("gpt2,checkpoint=nowhere.pt") == []


def test_commas_in_the_name_of_what_is_there_are_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "epoch=03,val_loss=0.12.ckpt").touch()
    (tmp_path / "run,seed=3,lr=1").mkdir()
    assert split("x,img_size=64,checkpoint=epoch=03,val_loss=0.12.ckpt,depth=2") == (
        "x",
        ("img_size=64", "checkpoint=epoch=03,val_loss=0.12.ckpt", "depth=2"),
    )
    assert split("hf:run,seed=3,lr=1,img_size=64") == ("hf:run,seed=3,lr=1", ("img_size=64",))
    spec = parse("open_clip:ViT-B-14,checkpoint=epoch=03,val_loss=0.12.ckpt")
    assert spec.checkpoint == Path("epoch=03,val_loss=0.12.ckpt")
    assert parse(spec.resolved) == replace(spec, given=spec.resolved)


def test_a_part_of_a_checkpoint_is_named_beside_it() -> None:
    spec = parse("open_clip:ViT-B-14,checkpoint=w.pt,checkpoint_key=model.ema,img_size=336")
    assert (spec.checkpoint, spec.checkpoint_key) == (Path("w.pt"), "model.ema")
    assert spec.model_args == {"img_size": 336}
    assert spec.resolved == "open_clip:ViT-B-14,checkpoint=w.pt,checkpoint_key=model.ema,img_size=336"
    assert parse("ViT-B-14", checkpoint="w.pt", model_args=["checkpoint_key=ema"]).checkpoint_key == "ema"
    with pytest.raises(UserError, match="gives checkpoint_key without a checkpoint") as error:
        parse("open_clip:ViT-B-14,checkpoint_key=ema")
    assert error.value.tip == "name the file, too: checkpoint=FILE,checkpoint_key=ema"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("gpt2\x1b[31m", r"the model's name 'gpt2\x1b[31m' holds the character '\x1b'"),
        ("gpt\x002", r"holds the character '\x00'"),
        ("gpt2\udcff", r"holds the character '\udcff'"),
        ("hf:" + "x" * 5000, "is 5,003 bytes long"),
        ("./" + "x" * 3000, "does not exist"),
        ("hf:" + "x" * 3000, None),
        ("~nobody-of-this-name/x", "folder '~nobody-of-this-name/x' does not exist"),
        ("x,checkpoint=~nobody-of-this-name", "model 'x' not found"),
    ],
)
def test_names_that_no_file_could_have(typed: str, message: str | None) -> None:
    if message is None:
        assert parse(typed).name == typed.removeprefix("hf:")
        return
    with pytest.raises(UserError) as error:
        parse(typed)
    assert message in str(error.value)
    assert error.value.tip
