"""What goes wrong on the command line: two lines, the right exit code, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from commands import Ended
from safetensors.torch import load_file, save_file

from diag import cli
from diag.errors import MeasurementError, UserError
from diag.models.families.demo import EMBEDDED
from diag.results.writing import WRITERS

Attnbias = Callable[..., Ended]

VIT = ("probe", "-m", "demo:vit-p16")
LM = ("probe", "-m", "demo:lm", "--texts", __file__, "--seq-len", 16)
FAST = ("--metrics", "cos_y_vself")


@pytest.fixture(scope="module")
def own_lm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, float], Path]:
    """A Hugging Face folder of the embedded language model with one weight changed."""

    def folder(weight: str, value: float) -> Path:
        made = tmp_path_factory.mktemp("own") / "lm"
        shutil.copytree(EMBEDDED / "lm", made)
        tensors = {name: tensor.float() for name, tensor in load_file(made / "model.safetensors").items()}
        tensors[weight].mul_(value)
        save_file(tensors, made / "model.safetensors", {"format": "pt"})
        return made

    return folder


def write(name: str, content: bytes) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content)
    return name


def assert_two_lines(ended: Ended, code: int, message: str, tip: str) -> None:
    assert ended.out == ""
    assert "Traceback" not in ended.err
    assert len(ended.lines) == 2, ended.err
    assert ended.lines[0].startswith("error: ")
    assert ended.lines[1].startswith("tip: ")
    assert message in ended.lines[0]
    assert tip in ended.lines[1]
    assert ended.code == code


MISTAKES: dict[str, tuple[tuple[object, ...], str, str]] = {
    "unknown model": (
        ("probe", "-m", "vit_bse_patch16_224"),
        "model 'vit_bse_patch16_224' not found",
        "vit_base",
    ),
    "unknown demo": (("probe", "-m", "demo:vit-p15"), "model 'demo:vit-p15' not found", "demo:vit-p16"),
    "not here": (("probe", "-m", "gpt2"), "cannot be reached", "hf download"),
    "images for text": (("probe", "-m", "demo:lm", "--images", "demo"), "no vision tower", "--texts"),
    "text for images": ((*VIT, "--texts", "demo"), "no text tower", "--images"),
    "no such folder": ((*VIT, "--images", "nowhere"), "'nowhere' does not exist", "hf:NAME"),
    "no such text": (("probe", "-m", "demo:lm", "--texts", "no.txt"), "'no.txt' does not exist", "hf:NAME"),
    "context": ((*LM[:-1], 300), "--seq-len 300 is longer than the model's context", "at most 256"),
    "token set": ((*VIT, "--tokens", "registers"), "no token set 'registers'", "'patch', 'all' or 'cls'"),
    "no token set": ((*VIT, "--tokens", "pach"), "no token set 'pach'", "'patch'"),
    "cls of text": ((*LM, "--tokens", "cls"), "text tower has no token set 'cls'", "'all'"),
    "layer": ((*VIT, "--layers", "2,6"), "no layer 6", "layers are 0 to 5"),
    "layer from the last": ((*VIT, "--layers", "-7"), "no layer -7", "or -1 to -6 from the last"),
    "layers of both ends": ((*VIT, "--layers", "2-last"), "counts '2-last' from both ends", "-4-last"),
    "layer words": ((*VIT, "--layers", "0,x"), "--layers does not understand 'x'", "0,5-11"),
    "layers backwards": ((*VIT, "--layers", "5-2"), "--layers does not understand '5-2'", "0,5-11"),
    "open layers": ((*VIT, "--layers", "5-"), "--layers does not understand '5-'", "0,5-11"),
    "odd layers": ((*VIT, "--layers", "²"), "--layers does not understand '²'", "0,5-11"),
    "no layers": ((*VIT, "--layers", ""), "--layers is empty", "leave it out"),
    "metric": ((*VIT, "--metrics", "entrpy"), "unknown metric 'entrpy'", "did you mean 'entropy'"),
    "no metric": ((*VIT, "--metrics", ","), "--metrics names nothing", "given"),
    "figures": ((*VIT, "--figures", "svg"), "--figures is 'none', 'png' or 'all'", "'svg'"),
    "figures of a comparison": (
        ("compare", "run", "--figures", "pdf"),
        "--figures is 'none', 'png'",
        "'pdf'",
    ),
    "dtype": ((*VIT, "--dtype", "float8"), "--dtype is one of float32, bfloat16, float16", "'float8'"),
    "limit": ((*VIT, "--limit", "0"), "--limit", "given: 0"),
    "no number": ((*VIT, "--limit", "many"), "--limit", "attnbias probe --help"),
    "device": ((*VIT, "--device", "cuda:77"), "device 'cuda:77' is not available", "--device auto"),
    "odd device": ((*VIT, "--device", "abacus"), "device 'abacus' is not available", "--device auto"),
    "checkpoint": (
        ("probe", "-m", "vit_tiny_patch16_224", "--checkpoint", "no.safetensors"),
        "checkpoint 'no.safetensors' does not exist",
        "--checkpoint takes",
    ),
    "argument": ((*VIT, "--model-arg", "depth"), "--model-arg 'depth' is not key=value", "img_size=224"),
    "no model": (("probe",), "--model", "attnbias probe --help"),
    "unknown option": ((*VIT, "--limt", "3"), "--limt", "attnbias probe --help"),
    "unknown verb": (("prob",), "prob", "attnbias --help"),
    "listing": (("models", "no-such-name-anywhere"), "no listed name contains", "hf:ORG/NAME"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_two_lines(attnbias: Attnbias, mistake: str) -> None:
    arguments, message, tip = MISTAKES[mistake]
    quiet = ("-q", "-o", "run") if arguments[0] == "probe" else ()
    assert_two_lines(attnbias(*arguments, *quiet), 2, message, tip)
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("content", "message", "tip"),
    [
        (b"", "holds no text", "give a file with text"),
        (b"\n \n", "holds no text", "give a file with text"),
        (b"caf\xe9", "is not UTF-8 (byte 3)", "iconv"),
        (b"x", "gives no sample", "--seq-len"),
    ],
)
def test_texts_that_cannot_be_measured(attnbias: Attnbias, content: bytes, message: str, tip: str) -> None:
    file = write("a.txt", content)
    assert_two_lines(attnbias("probe", "-m", "demo:lm", "--texts", file, "-q", "-o", "run"), 2, message, tip)
    assert not Path("run").exists()


def test_images_that_cannot_be_measured(attnbias: Attnbias) -> None:
    Path("empty").mkdir()
    write("broken/a.png", b"no image")
    for folder, message, tip in (("empty", "no image in 'empty'", ".png"), ("broken", "no input of", "JPEG")):
        assert_two_lines(attnbias(*VIT, "--images", folder, "-q", "-o", "run"), 2, message, tip)
        assert not Path("run").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_a_damaged_checkpoint(attnbias: Attnbias, name: str) -> None:
    file = write(name, b"\x10\x00\x00\x00 not weights")
    given = (
        "probe",
        "-m",
        "vit_tiny_patch16_224",
        "--checkpoint",
        file,
        "--images",
        "demo",
        "-q",
        "-o",
        "run",
    )
    assert_two_lines(attnbias(*given), 2, f"checkpoint '{name}' cannot be read", "download it again")


def test_weights_that_are_not_numbers_are_named(attnbias: Attnbias, own_lm: Callable) -> None:
    folder = own_lm("transformer.h.3.attn.c_attn.weight", float("nan"))
    given = ("probe", "-m", folder, "--texts", __file__, "-q", "-o", "run")
    assert_two_lines(attnbias(*given), 2, "h.3.attn.c_attn.weight' hold NaN", "")


def test_activations_that_are_not_numbers_name_their_layer(attnbias: Attnbias, own_lm: Callable) -> None:
    folder = own_lm("transformer.h.2.attn.c_attn.weight", 1e30)
    given = ("probe", "-m", folder, "--texts", __file__, "--seq-len", 16, "-q", "-o", "run")
    assert_two_lines(
        attnbias(*given), 2, "layer 'h.2.attn' gives values that are not finite", "NaN or infinity"
    )
    assert not Path("run").exists()


def test_a_foreign_folder_is_refused_and_untouched(attnbias: Attnbias) -> None:
    write("mine/thesis.tex", b"years of work")
    for more in ((), ("--overwrite",)):
        ended = attnbias(*VIT, "-q", "-o", "mine", *more)
        assert_two_lines(ended, 2, "'mine' is not empty and holds no run", "-o")
        assert os.listdir("mine") == ["thesis.tex"]
    write("file", b"")
    assert_two_lines(attnbias(*VIT, "-q", "-o", "file"), 2, "'file' is a file", "-o")


def test_a_folder_with_another_run_is_refused(attnbias: Attnbias) -> None:
    given = (*VIT, "--limit", 1, "-o", "run", "-q", "--metrics")
    assert attnbias(*given, "entropy").code == 0
    assert_two_lines(attnbias(*given, "excess"), 2, "'run' holds another run", "--overwrite")
    assert attnbias(*given, "entropy").out == "run\n"
    assert attnbias(*given, "excess", "--overwrite").code == 0
    assert set(pd.read_csv("run/layers.csv")["metric"]) == {"excess"}


@pytest.mark.parametrize(
    "mistake",
    [
        ("--layers", 99),
        ("--seq-len", 9999),
        ("--tokens", "cls"),
        ("--intervene", "xsa:99"),
        ("-m", "hf:nobody/nothing", "-m", "demo:vit-p99"),
        ("--device", "tpu"),
    ],
)
def test_a_mistake_leaves_what_it_would_overwrite_as_it_is(
    attnbias: Attnbias, mistake: tuple[object, ...]
) -> None:
    given = (*LM, *FAST, "--limit", 1, "--layers", 0, "-q", "-o", "run")
    assert attnbias(*given).code == 0
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    ended = attnbias(*given, "--overwrite", *mistake)
    assert ended.code == 2, ended.err
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before


def test_what_another_verb_wrote_is_refused(attnbias: Attnbias) -> None:
    write("run/plan.json", b'{"kind": "train", "key": "a"}')
    for more in ((), ("--overwrite",)):
        ended = attnbias(*VIT, "-q", "-o", "run", *more)
        assert_two_lines(ended, 2, "'run' holds what attnbias train wrote", "-o")
    assert os.listdir("run") == ["plan.json"]


def test_a_full_disk_is_two_lines(attnbias: Attnbias, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(frame: pd.DataFrame, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setitem(WRITERS, ".csv", full)
    ended = attnbias(*VIT, "--limit", 1, *FAST, "-o", "run", "-q")
    assert_two_lines(ended, 2, "cannot write 'run/layers.csv': No space left on device", "same command again")
    assert not list(Path("run").rglob("*.tmp"))
    assert not Path("run/layers.csv").exists()
    assert list(Path("run/shards").glob("*.parquet"))


def test_a_folder_that_cannot_be_made(attnbias: Attnbias) -> None:
    write("file", b"")
    ended = attnbias(*VIT, "--limit", 1, "-o", "file/run", "-q")
    assert_two_lines(ended, 2, "cannot write 'file/run'", "-o")


def test_what_nobody_expected_is_two_lines_as_well(
    attnbias: Attnbias, monkeypatch: pytest.MonkeyPatch
) -> None:
    def surprise(*_: object, **__: object) -> None:
        raise KeyError("three\nlines\nhere")

    monkeypatch.setattr("diag.run.run.load", surprise)
    ended = attnbias(*VIT, "-q")
    assert_two_lines(ended, 1, "KeyError", "attnbias --debug")
    with pytest.raises(KeyError):
        attnbias("--debug", *VIT, "-q")


def test_debug_shows_the_traceback_of_a_mistake() -> None:
    with pytest.raises(UserError, match="not found"):
        cli_with("--debug", "probe", "-m", "demo:nothing")


def cli_with(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["attnbias", *arguments])
        patch.setattr(signal, "signal", lambda *_: None)
        cli.main()


def test_layers_that_cannot_be_seen_end_with_one(attnbias: Attnbias, monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(*_: object, **__: object) -> None:
        raise MeasurementError("layer 'a' was never run", "leave it out")

    monkeypatch.setattr("diag.run.shards.measure", blind)
    assert_two_lines(attnbias(*VIT, "-q"), 1, "layer 'a' was never run", "leave it out")


# --- finished, but not whole


def test_unreadable_images_are_listed_and_end_with_three(attnbias: Attnbias, noise: Path) -> None:
    for number in range(22):
        write(f"album/{number:02d}.png", b"no image")
    shutil.copy(noise / "00.png", "album/99.png")
    ended = attnbias(*VIT, "--images", "album", *FAST, "-o", "run")
    assert ended.code == 3
    assert "n = 1" in ended.out
    assert "22 failed:" in ended.lines
    assert "  00.png: cannot read image '00.png'" in ended.err
    assert "  and 2 more, in manifest.json" in ended.lines
    assert ended.lines[-1] == "run: run"
    told = json.loads(Path("run/manifest.json").read_text())
    assert told["status"] == "partial"
    assert len(told["failed_inputs"]) == 22
    again = attnbias(*VIT, "--images", "album", *FAST, "-o", "run", "-q")
    assert (again.code, again.out) == (3, "run\n")


def test_one_model_of_several_fails(attnbias: Attnbias) -> None:
    given = (*VIT, "-m", "demo:lm", "-m", "demo:vit-p8", "--images", "demo", "--limit", 1, *FAST)
    ended = attnbias(*given, "-o", "run")
    assert ended.code == 3
    assert "1 failed:" in ended.lines
    assert "  demo:lm: model 'demo:lm' has no vision tower" in ended.lines
    assert ended.lines[-1] == "run: run"
    assert [line.split(" ")[0] for line in ended.out.splitlines() if "n = 1" in line] == [
        "demo:vit-p16",
        "demo:vit-p8",
    ]
    assert json.loads(Path("run/manifest.json").read_text())["failed_models"] == {
        "demo:lm": "model 'demo:lm' has no vision tower"
    }


def test_all_models_fail(attnbias: Attnbias) -> None:
    ended = attnbias(*VIT, "-m", "demo:vit-p8", "--texts", "demo", "-q", "-o", "run")
    assert_two_lines(ended, 2, "model 'demo:vit-p8' has no text tower", "--images")
    assert not Path("run").exists()
