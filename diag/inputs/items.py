"""Inputs as ordered, re-readable lists of items with an id, opened lazily."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from diag.errors import UnreadableInput, UserError, need, one_of
from diag.inputs.outside import named, reason

COLUMNS_OF_TEXT = ("text", "content", "document")
"""What the column with the texts is called, where nobody says."""

CELLS_AT_ONCE = 1000
"""Rows of a data set that are read at once."""


@dataclass(frozen=True)
class Item:
    """One image or document: an id for the tables, and how to read it.

    read: gives an RGB image or a string. Raises UnreadableInput.
    """

    id: str
    read: Callable[[], Image.Image | str]


@dataclass(frozen=True)
class Listing(Sequence[Item]):
    """Items that come into being when they are asked for: 100,000 cost their ids.

    read: what reads the image at a place.
    """

    ids: Sequence[str]
    read: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: Any) -> Any:  # an item, or a list of them for a slice
        if isinstance(place, slice):
            return [self[one] for one in range(len(self))[place]]
        return Item(self.ids[place], partial(self.read, range(len(self))[place]))


@dataclass(frozen=True)
class Files:
    """The files that items are read from, so that it can be told what was read, and whether it was replaced.

    file: place → the file. told: place → its size and time (nanoseconds) when it was listed,
        zeros of what could not be read then, such as a pipe: it is not read later either.
    read: place → the bytes of the item in it. Raises OSError or UnreadableInput.
    """

    file: Callable[[int], Path]
    told: Callable[[int], tuple[int, int]]
    read: Callable[[int], bytes]

    def sha256(self, place: int) -> str:
        """Of the bytes of an item as they are now; empty where they cannot be read."""
        try:
            return hashlib.sha256(self.read(place)).hexdigest()
        except (OSError, UnreadableInput):
            return ""

    def content(self, ids: Sequence[str]) -> dict[str, str]:
        """What the first inputs are: id → SHA-256 of their bytes as they are now. ids: theirs, in order."""
        return {name: self.sha256(place) for place, name in enumerate(ids)}

    def check(self, place: int) -> None:
        """Raises UserError if a file was replaced since it was listed: either may have been measured."""
        file, told = self.file(place), self.told(place)
        try:
            status = file.stat()
        except OSError:
            return  # what cannot be read is told where it is read
        if any(told) and (status.st_size, status.st_mtime_ns) != told:
            raise UserError(
                f"'{file}' was replaced while it was measured",
                "start again, in another folder (-o) or with --overwrite, when inputs no longer change",
            )


@dataclass(frozen=True)
class Inputs:
    """A finite, ordered collection of items of one kind.

    kind: "images" or "texts". source: what the user typed.
    digest: what runs over the same inputs have in common, wherever and whenever those were read: names and
        sizes for image files, the text itself for texts.
    stamp: another one as soon as anything may have been replaced: for image files, their times as well.
        A run is found again by it, and goes on under it alone. The digest where that says as much.
    files: what the items are read from, where the digest is not of their content.
    """

    kind: str
    source: str
    items: Sequence[Item]
    digest: str
    stamp: str = ""
    files: Files | None = None

    def __post_init__(self) -> None:
        if not self.stamp:
            object.__setattr__(self, "stamp", self.digest)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    @property
    def tower(self) -> str:
        """The tower that takes them: "vision" or "text"."""
        return "vision" if self.kind == "images" else "text"


def data_set(source: str, columns: tuple[str, ...]) -> tuple[Any, str]:
    """The rows of a Hugging Face data set, and the column that holds what is wanted."""
    need(f"'{source}'", "datasets")
    import datasets

    name, *options = source.removeprefix("hf:").split(",")
    chosen = dict(option.partition("=")[::2] for option in options)
    for key in chosen:
        if key not in ("config", "split", "column"):
            raise UserError(f"unknown option '{key}' in '{source}'", "hf:NAME,config=…,split=…,column=…")
    split = chosen.get("split", "test")
    try:
        rows = datasets.load_dataset(name, chosen.get("config"), split=split)
    except Exception as error:  # the library raises many kinds, among them bare OSError and ValueError
        raise UserError(
            f"cannot load data set '{name}' ({reason(error)})",
            f"hf download --repo-type dataset {name}   # or give split=, config=: hf:{name},split=train",
        ) from error
    wanted = [chosen["column"]] if "column" in chosen else columns
    for column in wanted:
        if column in rows.column_names:
            return rows, column
    raise UserError(
        f"data set '{name}' has no column {one_of(wanted)}", f"choose from {one_of(rows.column_names)}"
    )


def stored(rows: Any, column: str) -> Any:
    """A data set with one column, whose cells are handed out as they are stored, in Arrow's tables.

    The library would decode images, sound and video, in every column of a row, with decoders of its own.
    """
    return rows.select_columns([column]).with_format("arrow")


def column_of(rows: Any, column: str, source: str) -> Iterator[Any]:
    """The cells of a data set's column. Raises UserError where the library cannot read them."""
    try:
        for table in stored(rows, column).iter(CELLS_AT_ONCE):
            yield from table[column].to_pylist()
    except Exception as error:  # as on loading; what is done with a cell does not raise in here
        raise UserError(
            f"cannot read column '{column}' of '{source}' ({reason(error)})", "give another with column=NAME"
        ) from error


def existing(source: str | Path, tip: str) -> Path:
    """A path that is there. Raises UserError with the tip if it is not, or cannot be looked at."""
    path = named(source, tip)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"'{source}' does not exist", tip) from error
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise UserError(f"cannot read '{source}': {reason(error)}", tip) from error
    return path


def content_digest(content: Mapping[str, str]) -> str:
    """Identifies inputs by their ids and the hashes of their bytes, in order."""
    return sha256(json.dumps(list(content.items())))


def sha256(text: str) -> str:
    """Identifies a text."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()  # names need not be UTF-8
