"""Which metrics share a table of the report, and a part of its glossary: the catalogue's sections."""

from __future__ import annotations

from collections.abc import Iterable

from diag.metrics.catalogue import CATALOGUE, OTHER

GROUPS: dict[str, tuple[str, ...]] = {
    title: tuple(name for name, entry in CATALOGUE.items() if entry.place.section == title)
    for title in dict.fromkeys(entry.place.section for entry in CATALOGUE.values())
}
"""Title of a table -> its columns."""


def grouped(metrics: Iterable[str]) -> dict[str, list[str]]:
    """The metrics that are there, by the title of their table; unlisted ones come last."""
    there = list(dict.fromkeys(metrics))
    found = {title: [name for name in names if name in there] for title, names in GROUPS.items()}
    found[OTHER] = [name for name in there if name not in CATALOGUE]
    return {title: names for title, names in found.items() if names}
