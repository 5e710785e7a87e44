"""The tables of docs/metrics.md are those that the catalogue gives."""

from __future__ import annotations

import pytest

from tools.metrics_page import PAGE, written

TEXT = PAGE.read_text(encoding="utf-8")


def test_the_page_is_what_the_program_writes() -> None:
    assert written(TEXT) == TEXT, "run python -m tools.metrics_page"


def test_a_changed_table_is_written_again_and_prose_is_left_alone() -> None:
    """A negative control of the test above."""
    row = next(line for line in TEXT.splitlines() if line.startswith("| `entropy` |"))
    changed = TEXT.replace(row, "| `entropy` | something else |").replace("# The metrics", "# These metrics")
    assert changed != TEXT
    assert written(changed) == TEXT.replace("# The metrics", "# These metrics")


def test_a_section_without_a_place_is_told() -> None:
    with pytest.raises(LookupError, match="Where attention goes"):
        written(TEXT.replace("<!-- table: Where attention goes -->\n", ""))
