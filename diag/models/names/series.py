"""Series of models for controlled comparison, from `series.toml`: members, tokens, and what is controlled.

Resolving a series gives names, nothing is loaded; `attnbias probe --series NAME` and `attnbias compare
--series NAME` take them as if each were given with -m.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from diag.errors import UserError, did_you_mean, one_of

FILE = Path(__file__).parent / "series.toml"


@dataclass(frozen=True, kw_only=True)
class Series:
    """One series.

    members: names as `-m` takes them. tokens: patch tokens of each; empty for text.
    constant, varies: in words. control: a sentence, what is controlled and what is not.
    """

    name: str
    members: Sequence[str]
    tokens: Sequence[int] = ()
    constant: str
    varies: str
    control: str


def names() -> list[str]:
    """The names of all series, in the order of the data file."""
    return list(_all())


def find(name: str) -> Series:
    """A series by its name. Raises UserError for an unknown one, with near names."""
    if name not in _all():
        near = did_you_mean(name, _all())
        raise UserError(f"there is no series '{name}'", near or f"series are {one_of(list(_all())[:6])} …")
    return _all()[name]


def members(name: str) -> list[str]:
    """The models of a series, as `-m` takes them. Raises UserError as `find` does.

    >>> members("demo")
    ['demo:vit-p16', 'demo:vit-p8', 'demo:vit-p4']
    """
    return list(find(name).members)


def listing(query: str | None = None) -> list[dict[str, Any]]:
    """Rows `name, members, tokens, constant, varies, control` of all series, or of those that match.

    query: words that must all be in a series' name, or in one of its members.
    """
    words = (query or "").lower().split()

    def matches(series: Series) -> bool:
        return any(all(word in name.lower() for word in words) for name in (series.name, *series.members))

    return [asdict(series) for series in _all().values() if matches(series)]


@cache
def _all() -> dict[str, Series]:
    tables = tomllib.loads(FILE.read_text(encoding="utf-8"))
    found = {name: Series(name=name, **entry) for name, entry in tables["series"].items()}
    for rule, entry in tables["rules"].items():
        for size in entry["sizes"]:
            name, member, constant = (
                text.replace("{}", size) for text in (rule, entry["member"], entry["constant"])
            )
            found[name] = Series(
                name=name,
                members=[member.replace("#", str(step)) for step in _steps(entry)],
                constant=constant,
                varies=entry["varies"],
                control=entry["control"],
            )
    return found


def _steps(entry: Mapping[str, Any]) -> Sequence[int]:
    """Training steps as listed, or 0, 1, 2, 4 … and then in equal distances."""
    if "steps" in entry:
        return entry["steps"]
    doubling = [2**power for power in range(entry["doubling_to"].bit_length())]
    return [0, *doubling, *range(entry["then_every"], entry["until"] + 1, entry["then_every"])]
