"""Writes the tables of docs/metrics.md from the catalogue; the prose between them is written by hand.

    python -m tools.metrics_page

A table stands between two lines, `<!-- table: TITLE -->`, the title a section of the catalogue, and
`<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from diag.metrics.catalogue import CATALOGUE, MetricEntry

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
TABLE = re.compile(r"(?<=<!-- table: )(.+?)( -->\n).*?(?=<!-- end -->)", re.DOTALL)


def written(page: str) -> str:
    """The page with every table as the catalogue has it.

    Raises LookupError if a section of the catalogue has no place on the page, or a place has no section.
    """
    sections: dict[str, list[MetricEntry]] = {}
    for entry in CATALOGUE.values():
        sections.setdefault(entry.place.section, []).append(entry)
    places = [title for title, _ in TABLE.findall(page)]
    if sorted(places) != sorted(sections):
        raise LookupError(f"{PAGE.name} has tables {places}, the catalogue {[*sections]}")
    return TABLE.sub(lambda found: f"{found[1]}{found[2]}{_table(sections[found[1]])}", page)


def _table(entries: Sequence[MetricEntry]) -> str:
    """A row per metric; without the column of sources where there are none."""
    rows = [["name", "formula", "what it says", "unit", "source"], ["---"] * 5]
    rows += [
        [f"`{entry.name}`", entry.formula, entry.sentence.rstrip("."), entry.unit, entry.source]
        for entry in entries
    ]
    width = 4 if all(entry.source == "–" for entry in entries) else 5
    return "".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row[:width])} |\n" for row in rows
    )


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
