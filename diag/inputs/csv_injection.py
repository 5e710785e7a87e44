"""CSV injection: a text that a spreadsheet would carry out gets an apostrophe, which our reader takes off.

A name such as `=HYPERLINK(…)` in a cell is a formula to a spreadsheet. An apostrophe in front makes it text
there, which is the custom. Numbers, also those written as text, stay as they are. No torch.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

NUMBER = r"[+-]?[\d.,]*(?:e[+-]?\d+)?\s?%?"
"""A number with its sign, or a sign alone: no formula."""

GUARDED = re.compile(rf"'*(?:[=@\t\r]|(?!{NUMBER}\Z)[+-])", re.IGNORECASE)
"""What is guarded: the beginning of a formula, also behind apostrophes, so that taking one off gives back
what was there."""


def guard(text: str) -> str:
    """A text as it stands in CSV.

    >>> guard("=1+1"), guard("-0.5"), guard("demo:vit-p8"), guard("'=1+1")
    ("'=1+1", '-0.5', 'demo:vit-p8', "''=1+1")
    """
    return f"'{text}" if GUARDED.match(text) else text


def unguard(text: str) -> str:
    """What `guard` was given.

    >>> unguard(guard("=1+1")), unguard(guard("'=1+1")), unguard("'quoted'")
    ('=1+1', "'=1+1", "'quoted'")
    """
    return text[1:] if text.startswith("'") and GUARDED.match(text) else text


def with_guard(table: pd.DataFrame) -> pd.DataFrame:
    """A table as it is written to CSV: its texts and headings guarded."""
    found = _each(table, table.select_dtypes(exclude="number"), guard)
    new = {name: guard(name) for name in table.columns if isinstance(name, str) and guard(name) != name}
    return found.rename(columns=new) if new else found


def to_csv(table: pd.DataFrame, path: Path, *, float_format: str | None = None) -> None:
    """Writes a table as CSV, its texts guarded."""
    guarded = with_guard(table)
    texts = guarded.select_dtypes(exclude="number")
    # the library quotes \n, which ends its lines, and not \r, which ends those of whoever reads them
    returns = any("\r" in value for name in texts for value in texts[name].unique() if isinstance(value, str))
    guarded.to_csv(
        path,
        index=False,
        float_format=float_format,
        lineterminator="\n",
        quoting=csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL,
    )


def without_guard(table: pd.DataFrame, words: Iterable[str]) -> pd.DataFrame:
    """A table as it was before `with_guard`. words: its columns of text; others are not looked at."""
    return _each(table, [name for name in words if name in table], unguard)


def _each(table: pd.DataFrame, names: Iterable[Any], change: Callable[[str], str]) -> pd.DataFrame:
    """The table with texts changed; itself where none does."""
    changed = {}
    for name in names:
        texts = [value for value in table[name].unique() if isinstance(value, str)]
        if new := {text: change(text) for text in texts if change(text) != text}:
            changed[name] = table[name].astype(object).replace(new)
    return table.assign(**changed) if changed else table
