"""Tables out of files: what a column holds is declared, never guessed, and what is wrong is told by its name.

    RUN = Layout({"model": NAME, "layer": PLACE, "mean": NUMBER}, key=("model", "layer"))
    read_table(folder / "layers.csv", RUN, "the table", tip="measure it again")

Text is text, also where it is `001` or `NA`; only an empty field is a missing value. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from diag.errors import UserError, one_of
from diag.inputs.csv_injection import without_guard
from diag.inputs.outside import MEGABYTE, reason, regular

if TYPE_CHECKING:
    import pandas as pd

NAME, PLACE, COUNT = "name", "place", "count"
TEXT, GRID, WHOLE, NUMBER, OPEN, ANY = "text", "grid", "whole", "number", "open", "any"
"""What a column may hold. In every row: a text; a layer or head (-1: of the whole layer); a whole number. Or
nothing, or: a text; a row or column of a grid; a whole number; a finite number; a number that may be
infinite, such as the loss of a training that failed; anything, such as a patch size of 16 or of 16x8."""

WORDS = (NAME, TEXT)
FILLED = (NAME, PLACE, COUNT)

MOST_PLACES = 10_000
"""Layers, and heads of a layer. Figures have a cell for each, so that a head 10,000,000 would fill memory."""
MOST_CELLS = 1_000_000
"""Layers times heads of a table, rows times columns of a grid."""
_PLACE = f"a whole number from -1 to {MOST_PLACES - 1}"
_DUE = {PLACE: _PLACE, GRID: _PLACE, NUMBER: "a finite number", OPEN: "a number"}
_DUE |= dict.fromkeys((NAME, TEXT), "a text") | dict.fromkeys((COUNT, WHOLE), "a whole number")
"""What an error says is due."""

MOST = 1e100
"""Of a number: what is measured in float32 stays below 1e39, and axes end in infinity beyond 1e308."""


@dataclass(frozen=True)
class Layout:
    """The columns that a table must have, and those that it may have, each with what it holds.

    key: columns whose values no two rows share. span: two columns whose ranges are the sides of a picture.
    rows: whether there must be any.
    Columns that are not named are read as they come.
    """

    needed: Mapping[str, str]
    known: Mapping[str, str] = field(default_factory=dict)
    key: tuple[str, ...] = ()
    span: tuple[str, ...] = ()
    rows: bool = False

    @property
    def kinds(self) -> dict[str, str]:
        """What every declared column holds."""
        return {**self.needed, **self.known}


def read_table(file: Path, layout: Layout, what: str, *, tip: str) -> pd.DataFrame:
    """A CSV file, or by its suffix a Parquet file, whose columns hold what the layout says.

    what: it, in words. Raises UserError that names file, column and row.
    """
    regular(file, what, tip)
    table = _parquet(file, what, tip) if file.suffix == ".parquet" else _csv(file, layout, what, tip)

    def refuse(why: str) -> NoReturn:
        raise UserError(f"cannot read {what} '{file}': {why}", tip)

    if missing := [name for name in layout.needed if name not in table]:
        refuse(_semicolons(file, layout) or f"it has no column {one_of(missing)}")
    if layout.rows and table.empty:
        refuse("it has no rows")
    # the heading is line 1 of a CSV file; a text with line breaks moves what follows it
    row, first = ("row", 0) if file.suffix == ".parquet" else ("line", 2)
    for name, kind in layout.kinds.items():
        if name in table and (wrong := _wrong(table[name], kind)) is not None:
            place, due = wrong
            given = _said(table[name].iloc[place])
            refuse(f"column '{name}' holds {given} in {row} {place + first}, where {due} is due")
    sides = [table[name].dropna() for name in layout.span if name in table]
    cells = math.prod(int(side.max() - min(side.min(), 0)) + 1 for side in sides if len(side))
    if cells > MOST_CELLS:
        named = " and ".join(f"'{name}'" for name in layout.span)
        refuse(f"columns {named} span {cells:,} places, where {MOST_CELLS:,} are the most")
    if layout.key and (again := table.duplicated(list(layout.key))).any():
        place = int(again.to_numpy().argmax())
        said = ", ".join(f"{name} {table[name].iloc[place]}" for name in layout.key)
        refuse(f"{row} {place + first} repeats {said}")
    return table


def _csv(file: Path, layout: Layout, what: str, tip: str) -> pd.DataFrame:
    import pandas as pd

    words = [name for name, kind in layout.kinds.items() if kind in WORDS]
    try:
        table = pd.read_csv(
            file,
            dtype=dict.fromkeys(words, str),
            keep_default_na=False,
            na_values=[""],
            low_memory=False,  # in parts, a column would have a type per part
        )
    except Exception as error:  # the parser raises many kinds, and OSError
        why = "it is empty" if isinstance(error, pd.errors.EmptyDataError) else reason(error)
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else why
        why = _semicolons(file, layout) or why
        raise UserError(f"cannot read {what} '{file}': {why}", tip) from error
    if not isinstance(table.index, pd.RangeIndex):  # the parser takes what is too much in front for an index
        why = _semicolons(file, layout) or "its lines have more fields than its heading"
        raise UserError(f"cannot read {what} '{file}': {why}", tip)
    return without_guard(table, words)


def _semicolons(file: Path, layout: Layout) -> str | None:
    """Whether that is what is wrong with a file that could not be read, in words."""
    try:
        with file.open("rb") as lines:
            heading = lines.readline(MEGABYTE).decode("utf-8-sig").strip().replace('"', "").split(";")
    except (OSError, UnicodeDecodeError):
        return None
    if len(heading) < 2 or not set(layout.needed) <= set(heading):
        return None
    return "its fields are separated by ';', as spreadsheets of some countries have it, not by ','"


def _parquet(file: Path, what: str, tip: str) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_parquet(file.absolute())  # what looks like `NAME:` is a file system to it
    except Exception as error:  # as above; some of the format's errors are of no common kind
        raise UserError(f"cannot read {what} '{file}': {reason(error)}", tip) from error


def _wrong(column: pd.Series, kind: str) -> tuple[int, str] | None:
    """The first row that does not hold what it should, and what is due there; None where all do."""
    import pandas as pd

    missing = column.isna().to_numpy()
    if kind in FILLED and missing.any():
        return int(missing.argmax()), _DUE[kind]
    if kind in WORDS:
        # a category may be of few words in many rows
        category = isinstance(column.dtype, pd.CategoricalDtype)
        words: Any = column.cat.categories if category else column.dropna()
        if missing.all() or pd.api.types.infer_dtype(words) == "string":
            return None
        texts = column.map(lambda value: isinstance(value, str)).astype(bool).to_numpy()
        return int((~texts & ~missing).argmax()), _DUE[kind]
    if kind == ANY or missing.all():
        return None
    due = _DUE[kind]
    if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        numbers = column.astype(object).map(_is_number).to_numpy(bool)
        return int((~numbers & ~missing).argmax()), due
    if kind == OPEN:
        return None
    values = column.to_numpy(dtype=float, na_value=np.nan)
    with np.errstate(invalid="ignore"):
        right = np.abs(values) < (2**63 if kind in (COUNT, WHOLE) else MOST)
        if kind != NUMBER:
            right &= values % 1 == 0
        if kind in (PLACE, GRID):
            right &= (values >= -1) & (values < MOST_PLACES)
    bad = ~right & ~missing
    return (int(bad.argmax()), due) if bad.any() else None


def _is_number(value: Any) -> bool:
    """Whether a cell of a mixed column reads as a number: what the type of the whole column cannot tell."""
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(value, bool)


def _said(value: Any) -> str:
    """A cell as an error shows it."""
    if value is None or str(value) in ("nan", "<NA>"):
        return "nothing"
    return f"'{value:.60}'" if isinstance(value, str) else f"{value!s:.60}"
