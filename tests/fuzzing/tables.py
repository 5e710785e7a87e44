"""CSV and Parquet tables that are spoilt: columns, cells, rows."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import pyarrow

from fuzzing.odd import ODD, near

CELLS: tuple[Any, ...] = (math.nan, math.inf, -math.inf, 1e308, -1e308, 1e-320, 0, -1, 10**7, 2**62)
CELLS += (None, "text", "", "001", "NA", "=1+1", "\x1b[31mred", "two\nlines", "a" * 5000)


def table(draw: Random, file: Path) -> str:
    """One thing about a table, which is written in its own format again."""
    frame = _read(file)
    if frame.empty:
        return f"left as it is: {len(frame)} rows"
    name = str(draw.choice(list(frame.columns)))
    way = draw.choice(
        ("drop", "rename", "retype", "cell", "column", "rows", "add", "twice", "cell", "column")
    )
    said = f"{name}: {way}"
    if way == "drop":
        frame = frame.drop(columns=name)
    elif way == "rename":
        frame = frame.rename(columns={name: draw.choice((name.upper(), f"{name} ", "", "x", "é"))})
    elif way == "retype":
        kind = draw.choice(("str", "float64", "bool", "category", "bytes", "list", "datetime64[ns]"))
        frame[name], said = _retyped(frame[name], kind), f"{name} as {kind}"
    elif way == "cell":
        old = frame[name].iloc[0]
        new = (
            draw.choice(CELLS)
            if draw.random() < 0.7
            else near(draw, old.item() if hasattr(old, "item") else old)
        )
        new = str(new) if isinstance(new, list | dict) else new
        place = draw.randrange(len(frame))
        values = frame[name].astype(object)
        values.iloc[place] = new
        frame[name], said = values, f"{name}, row {place} → {ascii(new)[:50]}"
    elif way == "column":
        new = draw.choice(CELLS)
        frame[name], said = new, f"{name} everywhere → {ascii(new)[:50]}"
    elif way == "rows":
        ways = {
            "no rows": frame.iloc[:0],
            "one row": frame.iloc[:1],
            "all rows twice": pd.concat([frame, frame]),
            "rows backwards": frame.iloc[::-1],
            "half the rows": frame.iloc[: len(frame) // 2],
            "no columns": frame[[]],
            "a row lost": frame.drop(index=frame.index[draw.randrange(len(frame))]),
        }
        said = draw.choice(list(ways))
        frame = ways[said]
    elif way == "add":
        value = draw.choice([value for value in ODD if not isinstance(value, list | dict)])
        frame["unknown"], said = str(value).encode("utf-8", "replace").decode(), "a column more"
    elif way == "twice":
        frame = frame.assign(**{f"{name}.1": frame[name]})
    _write(frame, file)
    return said


def csv_text(draw: Random, file: Path) -> str:
    """The text of a CSV file: separators, quotes, rows of other lengths."""
    text = file.read_bytes().decode("utf-8", "surrogateescape")
    lines = text.splitlines()
    place = draw.randrange(len(lines))
    edits = {
        "semicolons": text.replace(",", ";"),
        "an open quote": "\n".join([*lines[:place], f'"{lines[place]}', *lines[place + 1 :]]),
        "a longer row": "\n".join([*lines[:place], f"{lines[place]},1,2,3", *lines[place + 1 :]]),
        "a shorter row": "\n".join([*lines[:place], lines[place].partition(",")[0], *lines[place + 1 :]]),
        "no header": "\n".join(lines[1:]),
        "only the header": lines[0],
        "a header twice": "\n".join([lines[0], *lines]),
        "columns of one name": "\n".join(
            [",".join([lines[0].split(",")[0]] * len(lines[0].split(","))), *lines[1:]]
        ),
        "a null character": text.replace(",", ",\0", 3),
        "windows' line ends": text.replace("\n", "\r\n"),
        "old line ends": text.replace("\n", "\r"),
        "a long field": text.replace(",", "," + "a" * 200_000, 1),
        "UTF-16": text,
        "blank lines": "\n\n\n".join(lines),
        "decimal commas": text.replace(".", ","),
    }
    said = draw.choice(list(edits))
    content = edits[said].encode("utf-16" if said == "UTF-16" else "utf-8", "surrogateescape")
    file.unlink()
    file.write_bytes(content)
    return said


def _read(file: Path) -> pd.DataFrame:
    return pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file)


def _write(frame: pd.DataFrame, file: Path) -> None:
    file.unlink()
    if file.suffix != ".parquet":
        frame.to_csv(file, index=False, errors="replace")
        return
    for name in frame.columns:
        try:
            pyarrow.array(frame[name])
        except (ValueError, TypeError, OverflowError):  # Parquet has columns of one type
            frame = frame.assign(**{name: frame[name].map(ascii)})
    frame.to_parquet(file, index=False)


def _retyped(values: pd.Series, kind: str) -> Any:
    if kind == "list":
        return [[value] for value in values]
    if kind == "bytes":
        return [str(value).encode() for value in values]
    if kind == "str":
        return [f"{value} of it" for value in values]
    if kind == "datetime64[ns]":
        return pd.Timestamp("2024-01-01")
    try:
        return values.astype(kind)
    except (ValueError, TypeError):
        return values.astype("category")
