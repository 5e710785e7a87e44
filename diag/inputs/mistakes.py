"""What pydantic finds wrong with a plan, a document or a manifest, in words: what the field is, or may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

WORDS = {
    "greater_than": "is above {gt:.16g}",
    "greater_than_equal": "is at least {ge:.16g}",
    "less_than": "is below {lt:.16g}",
    "less_than_equal": "is at most {le:.16g}",
    "multiple_of": "is a multiple of {multiple_of:.16g}",
    "finite_number": "is a number, and finite",
    **dict.fromkeys(("literal_error", "enum"), "is {expected}"),
    "too_short": "names too little: at least {min_length}",
    "too_long": "names too much: at most {max_length}",
    "string_too_short": "is text of at least {min_length} signs",
    "string_too_long": "is text of at most {max_length} signs",
    "string_pattern_mismatch": "is text that matches {pattern}",
    "missing": "is missing",
    "extra_forbidden": "is not known",
    **dict.fromkeys(("value_error", "assertion_error"), "{error}"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "is a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "is a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "is true or false"),
    **dict.fromkeys(("string_type", "string_unicode", "path_type"), "is text"),
    **dict.fromkeys(("tuple_type", "list_type", "set_type", "frozen_set_type", "iterable_type"), "is a list"),
    **dict.fromkeys(
        ("dict_type", "mapping_type", "model_type", "model_attributes_type", "dataclass_type"),
        "is a mapping of names to values",
    ),
    "invalid_key": "has names that are no text",
    "none_required": "is empty",
    "union_tag_invalid": "is of no known kind",
    "union_tag_not_found": "does not say of which kind it is",
    **dict.fromkeys(("recursion_loop", "recursion_depth_exceeded"), "is nested too deeply"),
}
"""What pydantic calls a mistake -> how it is told."""

ELSE = "is not what is due here"
"""What is told of any other."""


def in_words(mistake: Mapping[str, Any]) -> str:
    """One of pydantic's errors, as what its field is or may be."""
    return WORDS.get(mistake["type"], ELSE).format(**mistake.get("ctx", {}))


def mistake(error: ValidationError) -> tuple[tuple[int | str, ...], str, Any]:
    """The first thing that is wrong: where, why in words, and what was given."""
    first = error.errors(include_url=False)[0]
    return first["loc"], in_words(first), first["input"]
