"""Documents: a text file, a folder of them, a data set by name, or the demo text."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from diag.errors import UserError, one_of, visible
from diag.inputs.folders import files_below
from diag.inputs.items import Inputs, Item, column_of, data_set, existing, sha256
from diag.inputs.outside import MEGABYTE, as_utf_8, reason, regular, too_large

MOST_TEXT = 1_000 * MEGABYTE
"""Bytes of the texts of one run, which are held in memory."""

TABLES = ("JSON", "lines of JSON", "a table", "a Parquet file")
"""Kinds of files with texts in them, which `datasets` reads."""

OTHER_SUFFIXES = {
    **dict.fromkeys((".json", ".ipynb"), "JSON"),
    **dict.fromkeys((".jsonl", ".ndjson"), "lines of JSON"),
    **dict.fromkeys((".csv", ".tsv", ".xls", ".xlsx", ".ods"), "a table"),
    **dict.fromkeys((".parquet", ".arrow", ".feather"), "a Parquet file"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "a web page"),
    **dict.fromkeys((".pdf", ".ps", ".djvu"), "a printed page"),
    **dict.fromkeys((".doc", ".docx", ".odt", ".rtf", ".epub"), "a document of a word processor"),
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz"), "an archive"),
    **dict.fromkeys((".npy", ".npz", ".pt", ".pth", ".pkl", ".safetensors", ".gguf"), "a file of numbers"),
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"), "an image"),
}
"""What is no prose, by its suffix: read as such, its brackets and tags would be measured."""

OTHER_STARTS = {
    b"%PDF-": "a printed page",
    b"{\\rtf": "a document of a word processor",
    b"PK\x03\x04": "an archive",
    b"\x1f\x8b": "an archive",
    b"BZh": "an archive",
    b"\xfd7zXZ": "an archive",
    b"\x28\xb5\x2f\xfd": "an archive",
    b"PAR1": "a Parquet file",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
}
"""The same by the first bytes, whatever a file is called."""

AS_TABLE = "texts in a column: --texts hf:FOLDER,split=train,column=NAME of the folder that it lies in"
AS_TEXT = "save its text as UTF-8, in a .txt file"


def texts(source: str | Path) -> Inputs:
    """`demo`, a UTF-8 text file, a folder of .txt files, or `hf:NAME[,config=…][,split=…][,column=…]`.

    A file is one document, empty ones of a folder left out; the rows of a data set are joined by blank lines
    into one.
    Raises UserError if there is no text, it is too long or not UTF-8, or a file is none of prose.
    """
    if str(source) == "demo":
        return documents("demo", {"python-help": demo_text()})
    if str(source).startswith("hf:"):
        return _hub_texts(str(source))
    tip = "--texts takes a text file, a folder of .txt files, hf:NAME or 'demo'"
    path = existing(source, tip)
    if not path.is_dir():
        return documents(str(source), {visible(path.name): read_text(path)})
    found, unreadable = files_below(path, lambda name: name.lower().endswith(".txt"))
    for name, why in unreadable.items():
        raise UserError(
            f"cannot read '{visible(str(path / name))}': {why}", "mend it, or leave it out of the folder"
        )
    if not found:
        raise UserError(f"no text file in '{path}'{_others(path)}", "text files end in '.txt'")
    if (size := sum(size for _, size, _ in found)) > MOST_TEXT:
        raise _too_long(f"the texts in '{path}'", size)
    read = {visible(name): _read(path / name) for name, *_ in found}
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


def _read(file: Path) -> str:
    """`read_text`, which may be empty."""
    tip = "--texts takes a UTF-8 text file"
    regular(file, "text", tip)
    kind = OTHER_SUFFIXES.get(file.suffix.lower())
    try:
        if (size := file.stat().st_size) > MOST_TEXT:
            raise _too_long(f"'{file}'", size)
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read '{file}': {reason(error)}", tip) from error
    kind = kind or next((kind for start, kind in OTHER_STARTS.items() if content.startswith(start)), None)
    if kind is not None:
        raise UserError(f"'{file}' is {kind}, not a text", AS_TABLE if kind in TABLES else AS_TEXT)
    try:
        text = plain(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"'{file}' is not UTF-8 (byte {error.start})", as_utf_8(content)) from error
    if "\0" in text:
        raise UserError(
            f"'{file}' holds null characters: it is no text, or UTF-16",
            "convert UTF-16 first: iconv -f utf-16 -t utf-8 FILE > NEW",
        )
    return text


def _others(folder: Path) -> str:
    """What else lies in a folder that somebody may have taken for texts."""
    found = {Path(name).suffix for name, *_ in files_below(folder, lambda name: bool(Path(name).suffix))[0]}
    return f", only {one_of(sorted(map(visible, found))[:3])}" if found else ""


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
    rows, column = data_set(source, ("text", "content", "document"))
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
