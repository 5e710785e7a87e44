"""Plans of several verbs lie in one folder: each verb names the one that a file is for."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Ended

from diag.cli.plans import HOUSE, plans_for, shipped, verb_of
from diag.errors import UserError

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


def test_a_shipped_plan_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plans = {file.stem: file for file in CONFIGS}
    assert shipped() == plans
    spelled = {
        "train": (
            "patch-sizes",
            "train-patch-sizes",
            "train-patch-sizes.yaml",
            "configs/train-patch-sizes.yaml",
        ),
        "figures": ("patch-sizes", "patch-sizes.yaml", "configs/patch-sizes.yaml"),
    }
    for verb, names in spelled.items():
        file = plans["train-patch-sizes" if verb == "train" else "patch-sizes"]
        assert plans_for(verb, [Path(name) for name in names]) == [file] * len(names)
    # a file of one's own goes before the plan of its name
    Path("demo.yaml").write_text("figures: []")
    assert plans_for("figures", [Path("demo.yaml"), Path("demo")]) == [Path("demo.yaml"), plans["demo"]]


def test_a_wheel_has_its_plans_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "diag" / "configs" / "demo.yaml"
    inside.parent.mkdir(parents=True)
    inside.write_text((HOUSE.parent / "configs" / "demo.yaml").read_text())
    monkeypatch.setattr("diag.cli.plans.HOUSE", tmp_path / "diag")
    assert plans_for("figures", [Path("demo")]) == [inside]
    text = (HOUSE.parent / "pyproject.toml").read_text()
    included = tomllib.loads(text)["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {"configs": "diag/configs"}


@pytest.mark.parametrize(
    ("verb", "name", "tip"),
    [
        (
            "train",
            "patch-size",
            "for attnbias train there are 'language', 'patch-sizes', 'smoke' or 'ten-seeds'",
        ),
        ("train-clip", "b16", "for attnbias train-clip there are 'clip-cc12m-b14', 'clip-cc12m-b16' or "),
    ],
)
def test_names_of_no_plan_are_told_with_those_there_are(verb: str, name: str, tip: str) -> None:
    with pytest.raises(UserError, match=f"neither a file nor a shipped plan is called '{name}'") as caught:
        plans_for(verb, [Path(name)])
    assert (caught.value.tip or "").startswith(tip)


def test_what_has_an_ending_is_a_file_that_is_not_there(attnbias: Attnbias) -> None:
    ended = attnbias("train", "nowhere.yaml", "--dry-run")
    assert (ended.code, ended.lines[0]) == (
        2,
        "error: cannot read plan 'nowhere.yaml': No such file or directory",
    )
    ended = attnbias("train", "smoke", "--dry-run")
    assert (ended.code, ended.err) == (0, "")
    ended = attnbias("train", "demo", "--dry-run")
    assert ended.lines[0].endswith("demo.yaml' is for attnbias figures, not train")
