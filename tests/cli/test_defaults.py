"""A model alone is enough for a look at one token: what is looked at then is taken, and said."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from commands import Ended

from diag.cli.attend import AttendOptions
from diag.cli.defaults import completed
from diag.cli.options import fields_of
from diag.errors import UserError
from diag.studies.attend.plan import AttendPlan

MIDDLE = "the patch in the middle (--patch ROW,COLUMN names another)"


def fields(**given: Any) -> Mapping[str, Any]:
    return fields_of(AttendOptions(model=["a"], **given), AttendPlan)


@pytest.mark.parametrize(
    ("model", "given", "taken", "said"),
    [
        (
            "demo:vit-p8",
            {},
            {"image": "demo:astronaut", "layer": -1},
            f"--image demo:astronaut, --layer last, {MIDDLE}",
        ),
        (
            "demo:lm",
            {},
            {"text": "demo", "layer": -1, "token": -1},
            "--text demo, --layer last, --token -1, the last",
        ),
        ("tl:gpt2", {"depth": 0.5}, {"text": "demo", "token": -1}, "--text demo, --token -1, the last"),
        ("gpt2", {"layer": "3"}, {"text": "demo", "token": -1}, "--text demo, --token -1, the last"),
        ("demo:vit-p8", {"token": 4}, {"text": "demo", "layer": -1}, "--text demo, --layer last"),
        ("demo:vit-p8", {"image": "a.png", "patch": "0,1"}, {"layer": -1}, "--layer last"),
        ("demo:lm", {"text": "some words", "token": 0, "layer": "last"}, {}, None),
    ],
)
def test_what_nobody_named_is_taken_and_said(
    model: str,
    given: dict[str, Any],
    taken: dict[str, Any],
    said: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = fields(**given)
    assert completed((model,), before, quiet=True) == {**before, **taken}
    assert capsys.readouterr().err == ""
    completed((model,), before)
    assert capsys.readouterr().err == (f"by default: {said}\n" if said else "")


def test_an_unknown_model_is_told_first() -> None:
    with pytest.raises(UserError, match="'demo:nothing' not found"):
        completed(("demo:nothing",), fields())


@pytest.mark.parametrize(
    ("key", "text"), [("vocab_size", True), ("image_size", False), ("vision_config", False)]
)
def test_the_config_of_a_folder_tells_what_a_model_takes(key: str, text: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "any", key: 1}))
    found = completed((f"hf:{tmp_path}",), fields(), quiet=True)
    assert (found["text"] is not None, found["image"] is None) == (text, text)


def test_a_model_alone_is_looked_at_in_the_middle(attnbias: Callable[..., Ended]) -> None:
    ended = attnbias("attend", "demo:vit-p16", "-o", "look")
    assert (ended.code, ended.lines[0]) == (
        0,
        f"by default: --image demo:astronaut, --layer last, {MIDDLE}",
    )
    (entry,) = json.loads(Path("look/manifest.json").read_text())["models"]
    assert (entry["grid"], entry["target"], entry["layer"]) == ([4, 4], [2, 2], 5)
    same = attnbias("attend", "demo:vit-p16", "--layer", "last", "--image", "demo:astronaut", "-o", "look")
    assert any("already complete" in line for line in same.lines)
