"""Texts in a column: CSV and TSV, lines of JSON, Parquet, as `FILE[,column=NAME]`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diag.errors import UserError, one_of, visible
from diag.inputs.items import COLUMNS_OF_TEXT
from diag.inputs.outside import as_utf_8, reason

SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")

COLUMN = ",column="
"""What stands between a file and its column."""


def named_table(source: str) -> tuple[Path, str | None] | None:
    """The file and column of `FILE[,column=NAME]`; None for what is no such file's name."""
    name, _, column = source.partition(COLUMN)
    path = Path(name)
    return (path, column or None) if path.suffix.lower() in SUFFIXES else None


def cells(file: Path, content: bytes, column: str | None) -> list[str]:
    """The texts of a column, rows without one left out. column: None for the first that is called as usual.

    Raises UserError where the file is none of its kind, lacks the column, or it holds something else.
    """
    kind = file.suffix.lower()
    try:
        rows = _parquet(content, column) if kind == ".parquet" else _lines(content, kind)
        names = list(dict.fromkeys(name for row in rows[:100] for name in row))
    except UnicodeDecodeError as error:
        raise UserError(f"'{file}' is not UTF-8 (byte {error.start})", as_utf_8(content)) from error
    except Exception as error:  # pyarrow, json and csv have errors of their own
        raise UserError(
            f"cannot read '{file}' as {kind}: {reason(error)}", "mend it, or name it for what it is"
        ) from error
    wanted = [column] if column else list(COLUMNS_OF_TEXT)
    chosen = next((name for name in wanted if name in names), None)
    if chosen is None:
        has = f"it has {one_of(visible(name) for name in names)}" if names else "it has no rows"
        raise UserError(
            f"'{file}' has no column {one_of(wanted)}: {has}", f"name one: --texts {file}{COLUMN}NAME"
        )
    found = list[str]()
    for place, row in enumerate(rows):
        cell = row.get(chosen)
        if cell is not None and not isinstance(cell, str):
            raise UserError(
                f"'{file}': column '{chosen}' holds no text (row {place}: {type(cell).__name__})",
                f"name another: --texts {file}{COLUMN}NAME",
            )
        if cell and cell.strip():
            found.append(cell)
    return found


def _lines(content: bytes, kind: str) -> list[dict[str, Any]]:
    text = content.decode("utf-8-sig")
    if kind in (".csv", ".tsv"):
        csv.field_size_limit(len(content) + 1)
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if kind == ".tsv" else ","))
    return list(_documents(text))


def _documents(text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object")
            yield row


def _parquet(content: bytes, column: str | None) -> list[dict[str, Any]]:
    import pyarrow.parquet as parquet

    file = parquet.ParquetFile(io.BytesIO(content))
    names = file.schema_arrow.names
    wanted = [name for name in ([column] if column else COLUMNS_OF_TEXT) if name in names][:1]
    if not wanted:
        return [dict.fromkeys(names)]
    return file.read(columns=wanted).to_pylist()
