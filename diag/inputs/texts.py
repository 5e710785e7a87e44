"""Documents: a text file, a folder of them, a data set by name, or the demo text."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from diag.errors import UserError
from diag.inputs.items import Inputs, Item, data_set, existing, sha256


def texts(source: str | Path) -> Inputs:
    """`demo`, a UTF-8 text file, a folder of .txt files, or `hf:NAME[,config=…][,split=…][,column=…]`.

    A file is one document; the rows of a data set are joined by blank lines into one.
    Raises UserError if there is no text, or it is not UTF-8.
    """
    if str(source) == "demo":
        return documents("demo", {"python-help": demo_text()})
    if str(source).startswith("hf:"):
        return _hub_texts(str(source))
    path = existing(source, "--texts takes a text file, a folder of .txt files, hf:NAME or 'demo'")
    files = [path] if path.is_file() else sorted(path.rglob("*.txt"))
    if not files:
        raise UserError(f"no text file in '{path}'", "text files end in '.txt'")
    root = path.parent if path.is_file() else path
    return documents(str(source), {str(file.relative_to(root)): read_text(file) for file in files})


def read_text(file: Path) -> str:
    """A UTF-8 file. Raises UserError where it is empty or not UTF-8."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"'{file}' is not UTF-8 (byte {error.start})", "convert it first: iconv -t utf-8 FILE > NEW"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read '{file}': {error.strerror}") from error
    if not text.strip():
        raise UserError(f"'{file}' holds no text", "give a file with text")
    return text


def demo_text() -> str:
    """The help topics of Python's standard library, in alphabetical order, as one text."""
    import pydoc_data.topics

    return "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


def documents(source: str, documents: dict[str, str]) -> Inputs:
    """Texts by name, as inputs."""
    items = [Item(name, partial(str, text)) for name, text in documents.items()]
    digest = sha256("\0".join(documents.values()))
    return Inputs("texts", source, items, digest, sha256("\0".join([digest, *documents])))


def _hub_texts(source: str) -> Inputs:
    rows, column = data_set(source, ("text", "content", "document"))
    text = "\n\n".join(row for row in rows[column] if row and row.strip())
    if not text:
        raise UserError(f"'{source}' holds no text in column '{column}'", "give another with column=NAME")
    return documents(source, {source.removeprefix("hf:").split(",")[0]: text})
