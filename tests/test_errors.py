"""The two lines that a user meets."""

from __future__ import annotations

import io
import pickle
import sys
import traceback

import pytest

from diag.errors import (
    BadInputs,
    MeasurementError,
    UnreadableInput,
    UserError,
    did_you_mean,
    one_of,
    ranges,
    say,
    spans,
)


def test_ranges_end_where_models_do() -> None:
    assert ranges("0,2-3", "--layers", "0") == (0, 2, 3)
    for text in ("0-4000000000", "9" * 5000):
        with pytest.raises(UserError, match="--layers goes beyond every model"):
            ranges(text, "--layers", "0")


def test_ranges_may_count_from_the_end() -> None:
    assert ranges("0, -1,-4--3", "--layers", "0", from_end=True) == (0, -1, -4, -3)
    assert ranges("last,-2-last", "--layers", "0", from_end=True) == (-1, -2)
    for text in ("8-last", "0--1"):
        with pytest.raises(UserError, match=f"--layers counts '{text}' from both ends"):
            ranges(text, "--layers", "0-2", from_end=True)
    for text in ("-1--4", "3-1", "-", "--1", "lasts"):
        with pytest.raises(UserError, match="--layers does not understand"):
            ranges(text, "--layers", "0", from_end=True)
    with pytest.raises(UserError, match="goes beyond every model"):
        ranges("-4000000000-last", "--layers", "0", from_end=True)
    with pytest.raises(UserError, match="does not understand 'last'"):
        ranges("last", "--layers", "0")


@pytest.mark.parametrize("text", ["1:3", ":4", "0:1", "-4:", "-4:-1", "2:12", "-1:", "-3:last"])
def test_slices_are_those_of_python(text: str) -> None:
    first, last = (None if end == "" else int(end.replace("last", "-1")) for end in text.split(":"))
    places = list(range(20))[first:last]
    found = ranges(text, "--layers", "0", from_end=True)
    assert [layer % 20 for layer in found] == places
    assert ranges(f"{text},{found[0]}", "--layers", "0", from_end=True) == found


@pytest.mark.parametrize("text", ["3:", ":"])
def test_a_slice_without_an_end_asks_for_one(text: str) -> None:
    with pytest.raises(UserError, match=f"--layers does not say where '{text}' ends"):
        ranges(text, "--layers", "0", from_end=True)


@pytest.mark.parametrize("text", [":-1", "-3:2"])
def test_a_slice_whose_end_only_the_model_knows_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"counts '{text}' from both ends"):
        ranges(text, "--layers", "0", from_end=True)
    with pytest.raises(UserError, match="does not understand '3:1'"):
        ranges("3:1", "--layers", "0", from_end=True)
    for empty in ("0:0", ":0", "-4:0", "1:3:2"):
        with pytest.raises(UserError, match=f"does not understand '{empty}'"):
            ranges(empty, "--layers", "0", from_end=True)


def test_spans_are_what_ranges_reads() -> None:
    assert spans([6, 0, 1, 2, 4, 5, 9]) == "0-2, 4-6, 9"
    assert ranges(spans([6, 0, 1, 2, 4, 5, 9]), "", "") == (0, 1, 2, 4, 5, 6, 9)
    assert spans([]) == ""


def test_advice_that_nobody_can_read_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    say("hello")


def test_exit_codes_tell_whose_mistake_it_was() -> None:
    assert UserError("given").exit_code == 2
    assert UnreadableInput("given").exit_code == 2
    assert MeasurementError("seen").exit_code == 1


def test_message_and_tip_are_apart() -> None:
    error = UserError("what was given", "what to type")
    assert (str(error), error.tip) == ("what was given", "what to type")
    assert UserError("alone").tip is None
    assert pickle.loads(pickle.dumps(error)).__notes__ == error.__notes__ == ["tip: what to type"]


def test_a_traceback_shows_both_lines() -> None:
    for error, last in (
        (UserError("what was given", "what to type"), ["what was given", "tip: what to type"]),
        (BadInputs({"a": "why"}, "what to type"), ["why (input 'a')", "tip: what to type"]),
        (UserError("alone"), ["alone"]),
    ):
        lines = "".join(traceback.format_exception(error)).splitlines()
        assert lines == [f"diag.errors.{type(error).__name__}: {last[0]}", *last[1:]]


@pytest.mark.parametrize(
    ("given", "tip"),
    [
        ("entrpy", "did you mean 'entropy'?"),
        ("ENTROPY", "did you mean 'entropy'?"),
        ("xyz", None),
    ],
)
def test_near_names(given: str, tip: str | None) -> None:
    assert did_you_mean(given, ["entropy", "cos_y_vself", "self_weight"]) == tip


def test_at_most_three_near_names_the_nearest_first() -> None:
    tip = did_you_mean("name_1", [f"name_{i}" for i in range(9)])
    assert tip is not None
    assert tip.count("'") == 6
    assert tip.startswith("did you mean 'name_1'")


def test_the_beginning_of_a_long_name_is_near() -> None:
    names = ["vit_base_patch32_224.augreg_in21k", "resnet50.a1_in1k"]
    assert did_you_mean("vit-p16", ["ViT-B-16", "demo:vit-p16"]).startswith("did you mean 'demo:vit-p16'")  # type: ignore[union-attr]
    assert did_you_mean("vit_bse_patch32", names) == "did you mean 'vit_base_patch32_224.augreg_in21k'?"


@pytest.mark.parametrize(
    ("names", "words"),
    [([], ""), (["a"], "'a'"), (["a", "b"], "'a' or 'b'"), (["a", "b", "c"], "'a', 'b' or 'c'")],
)
def test_choices_in_words(names: list[str], words: str) -> None:
    assert one_of(names) == words
