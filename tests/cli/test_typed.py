"""What no verb can take is refused for all of them, before anything begins."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Ended

Attnbias = Callable[..., Ended]

LONG = "a" * 5000
BEYOND = 2**63
MODEL = ("-m", "demo:vit-p16")

SEEDED = [
    ("probe", *MODEL, "--seed", -1),
    ("compare", *MODEL, "--seed", -1),
    ("compare", "run", "--seed", -1),
    ("intervene", *MODEL, "--seed", -1),
    ("readout", *MODEL, "--images", "demo-crops", "--seed", -1),
]

REFUSED: list[tuple[tuple[object, ...], str, str]] = [
    (("probe", *MODEL, "--images", "a", "--images", "b"), "--images is given 2 times", "the last, 'b'?"),
    (("probe", *MODEL, "-o", "a", "--output-path", "b"), "-o/--output-path is given 2 times", "once"),
    (("compare", *MODEL, "--layers", 0, "--layers", 1), "--layers is given 2 times", "once"),
    (("attend", *MODEL, "--head", 0, "--head=1"), "--head is given 2 times", "once"),
    (("intervene", *MODEL, "--scope", "one", "--scope", "last"), "--scope is given 2 times", "once"),
    (("train", "a.yaml", "--device", "cpu", "--device", "cuda"), "--device is given 2 times", "once"),
    (("report", "run", "--title", "a", "--title", "b"), "--title is given 2 times", "once"),
    (("probe", "-m", ""), "-m/--model is empty", "leave it out"),
    (("probe", *MODEL, "-o", ""), "-o/--output-path is empty", "leave it out"),
    (("probe", *MODEL, "--texts", " "), "--texts is empty", "leave it out"),
    (("probe", *MODEL, "--limit", ""), "--limit is empty", "leave it out"),
    (("merge", ""), "RUN is empty", "name a file or folder"),
    (("figures", ""), "PLAN… is empty", "name a file or folder"),
    (("probe", *MODEL, "--limit", BEYOND), f"--limit is at most {BEYOND - 1}", f"given: {BEYOND}"),
    *((verb, "--seed is at least 0", "given: -1") for verb in SEEDED),
    (("attend", *MODEL, "--token", -BEYOND), f"--token is at most {BEYOND - 1}", "given"),
    (("probe", *MODEL, "--limit", "9" * 5000), "--limit does not understand '999", "attnbias probe --help"),
    (("train", "a.yaml", "--workers", -1), "--workers does not understand '-1'", "attnbias train --help"),
    (("compare", *MODEL, "--batch-size", 0), "--batch-size does not understand '0'", "auto"),
    (("probe", *MODEL, "--batch-size", "9" * 5000), "--batch-size does not understand", "auto"),
    (("probe", *MODEL, "--layers", "0-9999999999"), "--layers goes beyond every model", "0,5-11"),
    (("probe", *MODEL, "--shard", "1/0", "--dry-run"), "--shard does not understand '1/0'", "1/4"),
    (("compare", *MODEL, "--growth", "9" * 5000 + ",1"), "--growth does not understand", "5,11"),
    (("compare", *MODEL, "--image-size", "9" * 20), "--image-size does not understand", "64,128"),
    (("attend", *MODEL, "--patch", "9" * 20 + ",1"), "--patch does not understand", "--patch 3,4"),
    (("attend", *MODEL, "--pixel", "1,2,3"), "--pixel does not understand '1,2,3'", "--pixel 3,4"),
    (("probe", *MODEL, "-o", LONG), "File name too long", "give another path"),
    (("probe", *MODEL, "-o", "caf\udce9"), "-o/--output-path 'caf\\udce9' is not UTF-8", "renamed"),
    (("report", LONG), "RUN|FOLDER… 'aaaa", "give another path"),
    (("train", LONG), "CONFIG 'aaaa", "give another path"),
    (("probe", *MODEL, "-o", "a\0b"), "-o/--output-path does not understand 'a\\u0000b'", "--help"),
    (("probe", *MODEL, "-o", "loop"), "-o/--output-path 'loop/x': Too many levels", "give another path"),
]


@pytest.mark.parametrize(("arguments", "message", "tip"), REFUSED)
def test_it_is_refused_in_two_lines(
    arguments: tuple[object, ...], message: str, tip: str, attnbias: Attnbias
) -> None:
    if "loop" in arguments:
        Path("loop").symlink_to("loop")
        arguments = (*arguments[:-1], "loop/x")
    before = os.listdir()
    ended = attnbias(*arguments)
    assert (ended.code, ended.out, len(ended.lines)) == (2, "", 2), ended.err
    assert message in ended.lines[0]
    assert tip in ended.lines[1]
    assert os.listdir() == before
    assert max(map(len, ended.lines)) < 200


def test_flags_and_repeatable_options_may_be_repeated(attnbias: Attnbias) -> None:
    given = ("probe", *MODEL, "-m", "demo:vit-p8", "--intervene", "xsa:0", "--intervene", "skip:1")
    assert attnbias(*given, "--random-init", "--random_init", "-q", "-q", "--dry-run").code == 0


def test_a_folder_that_is_gone_is_no_place_to_run_in(attnbias: Attnbias, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    ended = attnbias("models", "demo")
    assert (ended.code, ended.lines[0]) == (2, "error: the folder that this is run in was removed")


def test_home_folders_need_no_shell(
    attnbias: Attnbias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert attnbias("merge", "~/r").lines[0] == f"error: '{tmp_path}/home/r' holds no run of attnbias probe"
    found = attnbias("compare", "a", "~/b", "--dry-run").out
    assert found.split()[1::2] == ["a", f"{tmp_path}/home/b"]
    ended = attnbias("probe", *MODEL, "--output-path=~nobody-here/r")
    assert ended.lines[0] == "error: -o/--output-path '~nobody-here/r': nobody here has this home"
    assert os.listdir() == []


def test_train_does_not_offer_what_it_refuses(attnbias: Attnbias) -> None:
    assert "spread" in attnbias("probe", "--help").out
    assert "spread" not in attnbias("train", "--help").out


@pytest.mark.parametrize(
    "words",
    [
        ("demo:vit-p16", "--limit", 2),
        ("probe", "demo:vit-p16", "--limit", 2),
        ("probe", "--limit", 2, "demo:vit-p16"),
        ("probe", "--limit", 2, "--", "demo:vit-p16"),
    ],
)
def test_a_model_needs_no_option(words: tuple[object, ...], attnbias: Attnbias) -> None:
    wanted = attnbias("probe", *MODEL, "--limit", 2, "--dry-run", "--json")
    found = attnbias(*words[:1], "--dry-run", "--json", *words[1:])
    assert found.code == 0, found.err
    plans = [json.loads(ended.out)["plan"] for ended in (found, wanted)]
    assert plans[0] == plans[1]  # the memory beside it is what happens to be there


def test_several_models_and_options_whose_values_are_like_them(attnbias: Attnbias) -> None:
    found = attnbias("probe", "demo:vit-p16", "-o", "demo:vit-p8", "demo:vit-p8", "--dry-run").out
    assert [line.split()[1] for line in found.splitlines()[:2]] == ["demo:vit-p16", "demo:vit-p8"]


@pytest.mark.parametrize(
    ("words", "message", "tip"),
    [
        (("prboe", "-m", "x"), "No such command 'prboe'", ""),
        (("gtp2-nothing",), "model 'gtp2-nothing' not found", ""),
        (
            ("probe", *MODEL, "--images", "a.png", "b.png"),
            "'b.png' is a file, and belongs to no option",
            "DIR/*.png",
        ),
        (("demo:vit-p16", "a.png"), "'a.png' is a file, and belongs to no option", "--images a.png"),
        (("attend", "demo:vit-p16", "a.PNG"), "'a.PNG' is a file", "--image a.PNG"),
        (("probe", "demo:lm", "--texts", "a.txt", "b.txt"), "'b.txt' is a file", "--texts DIR"),
        (("demo:lm", "a.csv"), "'a.csv' is a file", "--texts a.csv"),
        (("demo:vit-p16", "a.pt"), "'a.pt' is a file", "--checkpoint a.pt"),
        (("readout", "demo:vit-p16", "a.txt"), "'a.txt' is a file", "a model is a name"),
        (("report", "one", "--nothing"), "No such option", ""),
    ],
)
def test_what_is_no_model_is_told(
    words: tuple[object, ...], message: str, tip: str, attnbias: Attnbias
) -> None:
    for name in ("a.png", "b.png", "a.PNG", "a.txt", "b.txt", "a.csv", "a.pt"):
        Path(name).write_bytes(b"")
    ended = attnbias(*words)
    assert ended.code == 2
    assert message in ended.lines[0], ended.err
    assert tip in ended.lines[1]


@pytest.mark.parametrize(
    ("words", "due"),
    [
        ((), "a model"),
        (("probe",), "a model"),
        (("probe", "-m"), "a model"),
        (("attend", "-m", "demo:vit-p16"), "a model"),
        (("intervene",), "a model"),
        (("compare",), "a run"),
        (("report", "runs/a"), "a run"),
    ],
)
def test_a_plan_goes_to_the_verb_that_it_is_for(words: tuple[str, ...], due: str, attnbias: Attnbias) -> None:
    plans = {"figures": "figures: []", "train": "recipe: {}", "train-clip --config": "epochs: 1", "": "a: 1"}
    for verb, text in plans.items():
        Path("a.yml").write_text(text)
        ended = attnbias(*words, "a.yml")
        what = f"a plan for attnbias {verb.split()[0]}" if verb else "a YAML file"
        assert ended.lines[0] == f"error: 'a.yml' is {what}, not {due}"
        assert ended.lines[1].startswith(f"tip: attnbias {verb} a.yml" if verb else "tip: attnbias figures")
        assert (ended.code, ended.out) == (2, "")


def test_models_are_told_from_runs(attnbias: Attnbias) -> None:
    Path("demo:vit-p4").mkdir()
    given = ("demo:vit-p16", "runs/gpt2", "demo:vit-p4", "-m", "demo:vit-p8", "gone", "demo:vit-p16")
    rows = json.loads(attnbias("compare", *given, "--limit", 1, "--dry-run", "--json").out)
    assert [row.get("model", row["run"]) for row in rows] == [
        *("runs/gpt2", "demo:vit-p4", "gone"),
        *("demo:vit-p16", "demo:vit-p8"),
    ]


def test_help_shows_where_a_model_may_stand(attnbias: Attnbias) -> None:
    usage = {verb: attnbias(*verb.split(), "--help").out.splitlines()[0] for verb in ("", "probe", "compare")}
    assert usage == {
        "": "Usage: attnbias [OPTIONS] COMMAND|MODEL [ARGS]...",
        "probe": "Usage: attnbias probe [MODEL…] [OPTIONS]",
        "compare": "Usage: attnbias compare [OPTIONS] [RUN|MODEL]...",
    }
    for verb in ("attend", "audit", "intervene", "readout"):
        assert attnbias(verb, "--help").out.startswith(f"Usage: attnbias {verb} [MODEL…] [OPTIONS]\n")
    assert "MODEL" not in attnbias("merge", "--help").out


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (("--dtype", "bf16"), ("--dtype", "bfloat16")),
        (("--dtype", "torch.float16"), ("--dtype", "float16")),
        (("--dtype", "FP32"), ("--dtype", "float32")),
        (("--tokens", "patches,class"), ("--tokens", "patch,cls")),
        (("--metrics", "cos-y-vself"), ("--metrics", "cos_y_vself")),
    ],
)
def test_one_meaning_is_one_plan(typed: tuple[str, ...], meant: tuple[str, ...], attnbias: Attnbias) -> None:
    plans = [
        json.loads(attnbias("probe", *MODEL, *words, "--dry-run", "--json").out)["plan"]
        for words in (typed, meant)
    ]
    assert plans[0] == plans[1]


def test_all_metrics_are_every_group_that_any_model_has() -> None:
    from diag.metrics.names import GROUPS, metric_names

    of_any_model = [group for group in GROUPS if group not in ("untrained", "divergence", "followed")]
    assert metric_names(["all"]) == metric_names(of_any_model)


def test_models_stay_in_the_order_in_which_they_are_typed(attnbias: Attnbias) -> None:
    """The first one gives `attend` its grid, and `compare` what others are compared with."""
    for words in (("-m", "demo:vit-p8", "demo:vit-p16"), ("demo:vit-p8", "-m", "demo:vit-p16")):
        lines = attnbias("compare", *words, "--limit", 2, "--dry-run").out.splitlines()
        assert [line.rpartition(" ")[2] for line in lines] == ["demo:vit-p8", "demo:vit-p16"]


def test_a_word_that_is_a_model_and_an_options_value_is_both(attnbias: Attnbias) -> None:
    ended = attnbias("probe", "demo:vit-p8", "-o", "demo:vit-p8", "--layers", "-1", "--dry-run")
    assert (ended.code, "demo:vit-p8" in ended.out) == (0, True), ended.err
