"""Files that others wrote, read within bounds: what is wrong with one is told in two lines that name it.

Every plan, manifest, configuration and text comes in through here, so that an empty file, a pipe, wrong
bytes or a list in place of a mapping is the user's to mend and never a traceback.
"""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

from diag.errors import UserError, visible

MEGABYTE = 1_000_000

MOST_DOCUMENT = 64 * MEGABYTE
"""Bytes of a JSON document, such as a manifest: those of real runs stay far below."""

MOST_LEVELS = 100
"""Of what stands within what in a document; what shows it calls itself for each."""

UTF_16 = (b"\xff\xfe", b"\xfe\xff")
"""How a file in UTF-16 begins, as PowerShell's `>` writes it."""

HALVES = re.compile(r"[\ud800-\udfff]")
"""Surrogates: halves of a character, which JSON can name and a command line can hold; UTF-8 has none."""


def named(given: str | Path, tip: str) -> Path:
    """The path that a user's words name, with `~` for a home folder.

    Raises UserError for nobody's home, and for a name that is not UTF-8: no result could say what it is of.
    """
    try:
        str(given).encode()
        return Path(given).expanduser()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the name '{visible(str(given))}' is not UTF-8", "rename it, or give a link to it: ln -s OLD NEW"
        ) from error
    except RuntimeError as error:
        raise UserError(f"'{given}' names the home folder of nobody here", tip) from error


def regular(path: Path, what: str, tip: str, *, most: int | None = None) -> None:
    """Raises UserError unless a path is a plain file that is there: reading a pipe would wait for ever.

    what: it, in words, for the first line. most: bytes that it may have.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise UserError(f"cannot read {what} '{path}': {reason(error)}", tip) from error
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"cannot read {what} '{path}': it is a folder", tip)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"cannot read {what} '{path}': it is no plain file", tip)
    if most is not None and status.st_size > most:
        raise UserError(f"cannot read {what} '{path}': {too_large(status.st_size, most)}", tip)


def too_large(size: int, most: int, what: str = "") -> str:
    """Bytes and how many there may be, in words. what: what they are of, if that is said."""
    return f"{size / MEGABYTE:,.0f} MB{what}, where {most / MEGABYTE:,.0f} are the most"


def text_of(path: Path, what: str, *, tip: str, most: int) -> str:
    """A UTF-8 file, at most `most` bytes of it. Raises UserError, naming what was read."""
    regular(path, what, tip, most=most)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        tip = as_utf_8(error.object) if error.object.startswith(UTF_16) else tip
        raise UserError(f"cannot read {what} '{path}': it is not UTF-8 (byte {error.start})", tip) from error
    except OSError as error:
        raise UserError(f"cannot read {what} '{path}': {reason(error)}", tip) from error


def as_utf_8(content: bytes) -> str:
    """The tip for a file that is not UTF-8."""
    known = "-f utf-16 " if content.startswith(UTF_16) else ""
    return f"convert it first: iconv {known}-t utf-8 FILE > NEW"


def json_of(path: Path, what: str, *, tip: str) -> dict[str, Any]:
    """A JSON file that holds a mapping. Raises UserError, naming what was read and where it breaks."""
    text = text_of(path, what, tip=tip, most=MOST_DOCUMENT)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "it is empty" if not text.strip() else f"it is not JSON ({reason(error)})"
        raise UserError(f"cannot read {what} '{path}': {why}", tip) from error
    if not isinstance(found, dict):
        raise UserError(f"cannot read {what} '{path}': it holds no mapping of names to values", tip)
    if _deeper(found, MOST_LEVELS):
        raise UserError(f"cannot read {what} '{path}': it is nested more than {MOST_LEVELS} levels deep", tip)
    if "\\u" in text and HALVES.search(json.dumps(found, ensure_ascii=False)):
        raise UserError(f"cannot read {what} '{path}': it holds half a character (\\ud800 to \\udfff)", tip)
    return found


def mapping_in(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where it is not there or cannot be read."""
    try:
        return json_of(path, "file", tip="")
    except UserError:
        return {}


def _deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inner) and (levels == 0 or any(_deeper(part, levels - 1) for part in inner))


def reason(error: BaseException) -> str:
    """What an error says, on one line and short enough for a terminal."""
    said = getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]
    return str(said)[:200]
