"""Whatever pydantic finds wrong is told in words of this package."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticKnownError, core_schema

from diag.inputs.mistakes import ELSE, WORDS, in_words, mistake

KNOWN = [kind for kind in core_schema.ErrorType.__args__ if isinstance(kind, str)]  # type: ignore[attr-defined]


class Odd(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: Annotated[str, Field(min_length=2, max_length=4, pattern="^a")] = "aa"
    word: Literal["none", "all"] = "all"
    part: Annotated[float, Field(multiple_of=0.5)] = 0.5
    names: dict[str, int] = {}
    several: set[int] = set()
    nothing: None = None


@pytest.mark.parametrize(
    ("given", "place", "why"),
    [
        ({"text": "a"}, ("text",), "is text of at least 2 signs"),
        ({"text": "aaaaa"}, ("text",), "is text of at most 4 signs"),
        ({"text": "bb"}, ("text",), "is text that matches ^a"),
        ({"text": 3}, ("text",), "is text"),
        ({"word": "some"}, ("word",), "is 'none' or 'all'"),
        ({"part": 0.3}, ("part",), "is a multiple of 0.5"),
        ({"names": [1]}, ("names",), "is a mapping of names to values"),
        ({"names": {"a": "x"}}, ("names", "a"), "is a whole number"),
        ({"several": 4}, ("several",), "is a list"),
        ({"nothing": 4}, ("nothing",), "is empty"),
        ({"more": 4}, ("more",), "is not known"),
        ([], (), "is a mapping of names to values"),
    ],
)
def test_a_field_is_told_as_what_it_may_be(given: Any, place: tuple[str, ...], why: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Odd.model_validate(given)
    assert mistake(caught.value)[:2] == (place, why)


def test_nothing_that_pydantic_says_reaches_anybody() -> None:
    assert set(WORDS) - {"path_type"} <= set(KNOWN)  # which pydantic raises as one of its own
    for kind in KNOWN:
        context = dict.fromkeys(
            ("gt", "ge", "lt", "le", "multiple_of", "min_length", "max_length", "actual_length"), 2
        ) | dict.fromkeys(("expected", "pattern", "error"), "ours")
        said = in_words({"type": kind, "ctx": context, "msg": "Input should be a valid thing"})
        assert (
            said == "ours"
            if kind in ("value_error", "assertion_error")
            else said.split()[0] in (*("is", "names", "has", "does"),)
        ), kind
        assert "nput should" not in said


def test_what_has_no_words_is_told_without_any_of_pydantic() -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(bytes).validate_python(4)
    assert mistake(caught.value) == ((), ELSE, 4)
    assert PydanticKnownError("date_type").message() not in ELSE
