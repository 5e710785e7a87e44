"""Manifests: fields are checked once, by verb; what earlier versions lacked is filled in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diag.errors import UserError
from diag.results import manifest

ENTRY = {"given": "demo:a", "tower": "vision", "layers": 3}
LOOK = {
    **{"given": "m", "resolved": "m", "layer": 5, "module": "attn", "heads": 2, "n_tokens": 5, "input": "i"},
    **{"tower": "vision", "target": [0, 1], "grid": [2, 2]},
}
GOOD: dict[str, dict[str, Any]] = {
    "probe": {"format": 1, "models": [ENTRY], "inputs": {"vision": {"sha256": "x"}}},
    "attend": {"kind": "attend", "format": 1, "models": [LOOK], "plan": {"patch": [2, 3], "depth": 0.5}},
    "compare": {"kind": "compare"},
    "intervene": {"kind": "intervene", "model": {"given": "m"}, "tower": "text"},
    "train": {"kind": "train", "tables": ["results"], "words": []},
}


def written(folder: Path, document: object) -> Path:
    (folder / "manifest.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("kind", GOOD)
def test_what_is_lacking_is_filled_in_and_what_is_unknown_stays(kind: str, tmp_path: Path) -> None:
    found = manifest.read(written(tmp_path, GOOD[kind] | {"later": [1]}), kind)
    assert found["later"] == [1]
    assert (found["failed_models"], found["failed_inputs"], found["figures"]) == ({}, {}, [])
    assert GOOD[kind].items() <= found.items()


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("probe", {"models": [{"given": "m"}]}, "'models.0.tower' is missing"),
    (
        "probe",
        {"models": [ENTRY | {"layers": "6"}]},
        "'models.0.layers' is '6': it is a whole number",
    ),
    (
        "probe",
        {"models": [ENTRY | {"layers": 10**9}]},
        "'models.0.layers' is 1000000000: it is below 10000",
    ),
    ("probe", {"models": {"a": 1}}, "'models' is {'a': 1}: it is a list"),
    ("probe", {"models": [None]}, "'models.0' is None: "),
    ("probe", {"failed_models": ["m"]}, "'failed_models' is ['m']: it is a mapping of names to values"),
    ("probe", {"failed_inputs": {"a": 1}}, "'failed_inputs.a' is 1: it is text"),
    ("probe", {"inputs": {"vision": None}}, "'inputs.vision' is None: "),
    ("probe", {"key": 5}, "'key' is 5: it is text"),
    ("probe", {"plan": []}, "'plan' is []: it is a mapping of names to values"),
    ("probe", {"seconds": "long"}, "'seconds' is 'long': it is a number"),
    ("attend", {"models": [LOOK | {"grid": None}]}, "'models.0.vision.grid' is None: "),
    ("attend", {"models": [LOOK | {"tower": "text"}]}, "'models.0.text.target' is [0, 1]: "),
    ("attend", {"plan": {"patch": [1]}}, "'plan.patch' is [1]: it names too little: at least 2"),
    ("compare", {"figures": [None]}, "'figures.0' is None: "),
    ("intervene", {"model": "m"}, "'model' is 'm': "),
    ("train", {"tables": None}, "'tables' is None: "),
]


@pytest.mark.parametrize(("kind", "change", "said"), WRONG)
def test_a_field_of_another_type_is_named(
    kind: str, change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        manifest.read(written(tmp_path, GOOD[kind] | change), kind)
    assert str(caught.value).startswith(f"cannot read manifest '{tmp_path / 'manifest.json'}': {said}")
    assert f"attnbias {kind} … " in str(caught.value.tip)
    assert ("--overwrite" in str(caught.value.tip)) == (kind != "compare")


def test_another_version_is_told_before_its_fields_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has format 2; this version reads 1"):
        manifest.read(written(tmp_path, {"format": 2, "models": "elsewhere"}), "probe")


def test_the_folder_of_another_verb_comes_as_it_is(tmp_path: Path) -> None:
    other = {"kind": "attend", "models": 5}
    assert manifest.read(written(tmp_path, other), "probe") == other
