"""Plans of several verbs lie in one folder: each verb names the one that a file is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Ended

from diag.cli.plans import plans_for, verb_of

Attnbias = Callable[..., Ended]

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_plan_that_is_shipped_is_for_one_verb(file: Path) -> None:
    kinds = {"clip": "train-clip", "train": "train"}
    assert verb_of(file) == kinds.get(file.stem.split("-")[0], "figures")


def test_of_several_those_of_others_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    kept = plans_for("figures", CONFIGS)
    assert [verb_of(file) for file in kept] == ["figures"] * len(kept)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(CONFIGS) - len(kept) == 7
    assert said[0].startswith("left out: ")
    assert said[0].endswith("clip-cc12m-b14.yaml is for attnbias train-clip")


@pytest.mark.parametrize(
    ("verb", "name", "tip"),
    [
        ("figures", "train-smoke", "attnbias train "),
        ("train", "demo", "attnbias figures "),
        ("train", "clip-cc12m-b16", "attnbias train-clip --config "),
        ("train-clip --config", "demo", "attnbias figures "),
    ],
)
def test_one_for_another_verb_is_refused(verb: str, name: str, tip: str, attnbias: Attnbias) -> None:
    file = next(file for file in CONFIGS if file.stem == name)
    ended = attnbias(*verb.split(), file)
    assert (ended.code, len(ended.lines)) == (2, 2)
    assert ended.lines[0] == f"error: '{file}' is for {tip.strip().split(' --')[0]}, not {verb.split()[0]}"
    assert ended.lines[1] == f"tip: {tip}{file}"


def test_what_no_verb_is_for_is_for_whoever_was_asked_to_refuse(tmp_path: Path) -> None:
    for text in ("", "- a", "title: a", "a: [", "figures: []\nrecipe: {}"):
        (tmp_path / "a.yaml").write_text(text)
        assert verb_of(tmp_path / "a.yaml") is None
    assert verb_of(tmp_path / "none.yaml") is None
