"""YAML of others: values with the lines they are on, and each thing that can be wrong as a sentence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diag.errors import UserError
from diag.inputs.document import MOST_VALUES, read_document


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return tmp_path / "plan.yaml"


def test_lines_of_keys_and_entries(plan: Path) -> None:
    plan.write_text("a: 1\nb:\n  - {c: 2}\n  - &x\n    d: 3\ne:\n  <<: *x\n  f: 4\n")
    document = read_document(plan)
    assert document.data == {"a": 1, "b": [{"c": 2}, {"d": 3}], "e": {"d": 3, "f": 4}}
    places = [("a",), ("b", 0, "c"), ("b", 1, "d"), ("e",), ("e", "f"), ("e", "nothing", 7)]
    assert [document.line(place) for place in places] == [1, 3, 5, 6, 8, 6]


def test_what_is_taken_over_gives_way(plan: Path) -> None:
    plan.write_text(
        "a: &a {x: 1, y: 1, z: 1}\nb: &b {y: 2, w: 2}\nc: {z: 3, <<: [*a, *b]}\nd: {<<: *a, x: 4}\n"
    )
    found = read_document(plan).data
    assert found["c"] == {"x": 1, "y": 1, "w": 2, "z": 3}
    assert found["d"] == {"x": 4, "y": 1, "z": 1}


def _doubled(line: str) -> str:
    """A line that names the one before twice, often enough to be beyond the bound."""
    return "".join(line.format(this=number, last=number - 1) for number in range(1, 20))


WRONG = {
    "control character": ("a: 1\nb: x\x07\n", "line 2: the character U+0007 is not for YAML"),
    "no such date": ("a: 1\nb: 2026-02-30\n", "line 2: '2026-02-30' is no timestamp (day is out of range"),
    "no number": ("a:\n  - !!int many\n", "line 2: 'many' is no int (invalid literal"),
    "no truth": ("a: !!bool perhaps\n", "line 1: 'perhaps' is no bool ("),
    "no moment": ("a: !!timestamp soon\n", "line 1: 'soon' is no timestamp ("),
    "unknown tag": ("a: !thing 1\n", "line 1: could not determine a constructor for the tag '!thing'"),
    "a date as key": ("2026-02-30: 1\n", "line 1: '2026-02-30' is no timestamp ("),
    "a list as key": ("a: 1\n? [b, c]\n: 2\n", "line 2: a key is one word"),
    "a key again": ("a: 1\na: 2\n", "line 2: 'a' is given again"),
    "merged no mapping": ("a: {<<: 1}\n", "line 1: '<<' takes over a mapping"),
    "many digits": (f"a: {'1' * 400}\n", "line 1: a number of 400 signs"),
    "deep": ("a: " + "[" * 60 + "]" * 60, "line 1: nested too deeply, 40 levels"),
    "too deep to parse": ("[" * 5000, "nested too deeply, 40 levels"),
    "itself within": ("a: &a [*a]\n", "line 1: nested too deeply"),
    "aliases that multiply": (
        "a0: &a0 [1]\n" + _doubled("a{this}: &a{this} [*a{last}, *a{last}]\n"),
        f"more than {MOST_VALUES:,} values, aliases written out",
    ),
    "mappings that multiply": (
        "a0: &a0 {x: 1}\n" + _doubled("a{this}: &a{this} {{<<: [*a{last}, *a{last}]}}\n"),
        f"more than {MOST_VALUES:,} values, aliases written out",
    ),
    "two documents": ("a: 1\n---\nb: 2\n", "line 2: but found another document"),
    "broken": ("a: [\n", "line 2: expected the node content"),
}


@pytest.mark.parametrize(("text", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_told_with_its_line(plan: Path, text: str, said: str) -> None:
    plan.write_text(text)
    with pytest.raises(UserError) as caught:
        read_document(plan)
    assert str(caught.value).startswith(str(plan))
    assert said in str(caught.value)
    assert caught.value.tip


def test_what_is_no_text(tmp_path: Path, plan: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"\xff\xff")
    (tmp_path / "large").write_text("a" * 1_200_000)
    for name, said in (("pipe", "no plain file"), ("bytes", "not UTF-8"), ("large", "1 are the most")):
        with pytest.raises(UserError, match=said) as caught:
            read_document(tmp_path / name, "flags", like="configs/x.yaml")
        assert str(caught.value).startswith("cannot read flags")
        assert caught.value.tip == "give a YAML file, such as configs/x.yaml"


def test_an_empty_file_and_plain_values(plan: Path) -> None:
    plan.write_text("")
    assert read_document(plan).data is None
    plan.write_text("{1: 2.5, true: 0x10, no: null, day: 2026-01-31, empty: , word: text}")
    found = read_document(plan).data
    assert list(found) == ["1", "True", "False", "day", "empty", "word"]
    assert (found["1"], found["True"], found["False"], found["word"]) == (2.5, 16, None, "text")


def test_what_editors_and_shells_make_of_a_plan_has_its_own_tip(plan: Path) -> None:
    for content, tip in ((b"a:\n\tb: 1\n", "with spaces"), ("a: 1".encode("utf-16"), "iconv -f utf-16")):
        plan.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_document(plan)
        assert tip in str(caught.value.tip)
