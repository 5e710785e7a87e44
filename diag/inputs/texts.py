"""Documents: text files, a column of a table, a data set by name, what was typed, or the demo text."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

from diag.errors import UserError, one_of, visible
from diag.inputs.folders import files_below
from diag.inputs.items import COLUMNS_OF_TEXT, Inputs, Item, column_of, data_set, existing, sha256
from diag.inputs.kinds import PROSE, kind_of, others
from diag.inputs.outside import MEGABYTE, as_utf_8, reason, regular, too_large
from diag.inputs.text_tables import SUFFIXES, cells, named_table

MOST_TEXT = 1_000 * MEGABYTE
"""Bytes of the texts of one run, which are held in memory."""

TABLES = ("JSON", "lines of JSON", "a table", "a Parquet file")
"""Kinds of files with texts in them."""

AS_TABLE = f"texts in a column: --texts FILE,column=NAME, where FILE ends in {one_of(SUFFIXES)}"
AS_TEXT = "save its text as UTF-8, in a .txt file"


def texts(source: str | Path) -> Inputs:
    """`demo`, a UTF-8 text file, a folder of them, `FILE[,column=NAME]` of a table, `hf:NAME[,config=…]
    [,split=…][,column=…]`, `-` for standard input, or a text of several words as it is typed.

    A file is one document, empty ones of a folder left out; the rows of a table or data set are joined by
    blank lines into one.
    Raises UserError if there is no text, it is too long or not UTF-8, or a file is none of prose.
    """
    if str(source) == "demo":
        return documents("demo", {"python-help": demo_text()})
    if str(source).startswith("hf:"):
        return _hub_texts(str(source))
    if str(source) == "-":
        return documents("-", {"stdin": _decoded(sys.stdin.buffer.read(MOST_TEXT + 1), "standard input")})
    if is_typed(str(source)):
        return documents("typed", {"typed": str(source)})
    tip = "--texts takes a text file, a folder of them, a table, hf:NAME, 'some words' or 'demo'"
    table = None if os.path.isdir(source) else named_table(str(source))
    path = existing(source if table is None else table[0], tip)
    if table is not None:
        found = cells(path, _content(path), table[1])
        if not found:
            raise UserError(f"'{path}' holds no text in its column", f"give another: {path},column=NAME")
        return documents(str(source), {visible(path.name): "\n\n".join(map(plain, found))})
    if not path.is_dir():
        return documents(str(source), {visible(path.name): read_text(path)})
    listed, unreadable = files_below(path, lambda name: name.lower().endswith(PROSE))
    for name, why in unreadable.items():
        raise UserError(
            f"cannot read '{visible(str(path / name))}': {why}", "mend it, or leave it out of the folder"
        )
    if not listed:
        raise UserError(f"no text file in '{path}'{others(path)}", f"text files end in {one_of(PROSE)}")
    if (size := sum(size for _, size, _ in listed)) > MOST_TEXT:
        raise _too_long(f"the texts in '{path}'", size)
    read = {visible(name): _read(path / name) for name, *_ in listed}
    filled = {name: text for name, text in read.items() if text.strip()}
    if not filled:
        raise UserError(f"'{path}' holds no text: its files are empty", "give a file with text")
    return documents(str(source), filled)


def read_text(file: Path) -> str:
    """A UTF-8 file of prose. Raises UserError where it is none, empty, too long or not UTF-8."""
    text = _read(file)
    if not text.strip():
        raise UserError(f"'{file}' holds no text", "give a file with text")
    return text


def is_typed(source: str) -> bool:
    """Whether it is a text itself: of several words, and no file that is there, or may have been meant."""
    words, suffix = source.split(), os.path.splitext(source)[1]
    looks_like_a_file = 1 < len(suffix) <= 6 and suffix[1:].isalnum()
    return len(words) > 1 and not looks_like_a_file and source[0] not in "/.~" and not _is_there(source)


def _is_there(source: str) -> bool:
    try:
        return os.path.lexists(source)
    except ValueError:  # a null character
        return False


def _read(file: Path) -> str:
    """`read_text`, which may be empty."""
    content = _content(file)
    if (kind := kind_of(file, content)) is not None:
        tip = AS_TABLE if kind in TABLES else f"--images {file}" if kind == "an image" else AS_TEXT
        raise UserError(f"'{file}' is {kind}, not a text", tip)
    return _decoded(content, f"'{file}'")


def _content(file: Path) -> bytes:
    """The bytes of a file. Raises UserError where it cannot be read, or is too long."""
    tip = "--texts takes a UTF-8 text file"
    regular(file, "text", tip)
    try:
        if (size := file.stat().st_size) > MOST_TEXT:
            raise _too_long(f"'{file}'", size)
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read '{file}': {reason(error)}", tip) from error


def _decoded(content: bytes, what: str) -> str:
    """A text of its bytes, which may be empty; what: it, in words."""
    if len(content) > MOST_TEXT:
        raise _too_long(what, len(content))
    try:
        text = plain(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 (byte {error.start})", as_utf_8(content)) from error
    if "\0" in text:
        raise UserError(
            f"{what} holds null characters: it is no text, or UTF-16",
            "convert UTF-16 first: iconv -f utf-16 -t utf-8 FILE > NEW",
        )
    return text


def _too_long(what: str, size: int) -> UserError:
    return UserError(
        f"{what}: {too_large(size, MOST_TEXT, ' of text')}",
        f"measure its beginning: head -c {MOST_TEXT // 10} FILE > PART.txt",
    )


def demo_text() -> str:
    """The help topics of Python's standard library, in alphabetical order, as one text."""
    import pydoc_data.topics

    return "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


def plain(text: str) -> str:
    """A text without the mark of its encoding, and with one kind of line ends: one text from every source."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def documents(source: str, documents: dict[str, str]) -> Inputs:
    """Texts by name, as inputs; each is made `plain`."""
    documents = {name: plain(text) for name, text in documents.items()}
    items = [Item(name, partial(str, text)) for name, text in documents.items()]
    digest = sha256("\0".join(documents.values()))
    return Inputs("texts", source, items, digest, sha256("\0".join([digest, *documents])))


def _hub_texts(source: str) -> Inputs:
    rows, column = data_set(source, COLUMNS_OF_TEXT)
    kept, size = list[str](), 0
    for place, row in enumerate(column_of(rows, column, source)):
        if row is not None and not isinstance(row, str):
            raise UserError(
                f"'{source}': column '{column}' holds no text (row {place}: {type(row).__name__})",
                "give another with column=NAME",
            )
        if row and (row := plain(row)).strip():
            kept.append(row)
            size += len(row)
        if size > MOST_TEXT:
            raise UserError(
                f"'{source}' holds more than {MOST_TEXT / MEGABYTE:,.0f} MB of text",
                "take a part of it: split=train[:1000]",
            )
    if not kept:
        raise UserError(f"'{source}' holds no text in column '{column}'", "give another with column=NAME")
    return documents(source, {source.removeprefix("hf:").split(",")[0]: "\n\n".join(kept)})
