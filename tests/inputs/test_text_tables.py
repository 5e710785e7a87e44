"""Texts in a column of a table, and what people type in place of a file."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
import pytest

from diag.errors import UserError
from diag.inputs.images import images
from diag.inputs.texts import texts

ROWS = pd.DataFrame(
    {"n": [1, 2, 3], "text": ["one, two", None, 'a "third"\r\nline'], "other": ["x", "y", "z"]}
)
WRITERS = {
    "a.csv": lambda file: ROWS.to_csv(file, index=False),
    "a.tsv": lambda file: ROWS.to_csv(file, index=False, sep="\t"),
    "a.jsonl": lambda file: ROWS.to_json(file, orient="records", lines=True),
    "a.NDJSON": lambda file: ROWS.to_json(file, orient="records", lines=True),
    "a.parquet": lambda file: ROWS.to_parquet(file),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_column_is_one_document(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    found = texts(tmp_path / name)
    assert [(item.id, item.read()) for item in found] == [(name, 'one, two\n\na "third"\nline')]
    (other,) = texts(f"{tmp_path / name},column=other")
    assert other.read() == "x\n\ny\n\nz"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"n,m\n1,2\n", "has no column 'text', 'content' or 'document': it has 'n' or 'm'"),
        ("a.csv", b"text\n", "has no column .*: it has no rows"),
        ("a.csv", b"text\n \n", "holds no text in its column"),
        ("a.csv", b"text\n\xff\n", r"is not UTF-8 \(byte 5\)"),
        ("a.jsonl", b'{"text": 1}\n', r"column 'text' holds no text \(row 0: int\)"),
        ("a.jsonl", b"[1]\n", "as .jsonl: line 1 is no object"),
        ("a.jsonl", b"{\n", "cannot read .* as .jsonl"),
        ("a.parquet", b"text", "cannot read .* as .parquet"),
    ],
)
def test_a_table_without_texts_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        texts(tmp_path / name)
    assert caught.value.tip


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        write(tmp_path / name)
        with pytest.raises(UserError, match="has no column 'body': it has 'n', 'text' or 'other'"):
            texts(f"{tmp_path / name},column=body")


def test_a_sentence_is_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (item,) = texts("How much of it? Not and/or e.g. all.")
    assert item.read() == "How much of it? Not and/or e.g. all."
    for missing in ("my notes.txt", "./some words", "/no such", "word"):
        with pytest.raises(UserError, match="does not exist"):
            texts(missing)
    Path("two words").write_text("three words here")
    assert [item.read() for item in texts("two words")] == ["three words here"]


def test_standard_input_is_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\r\nb"), encoding="ascii"))
    assert [item.read() for item in texts("-")] == ["a\nb"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="ascii"))
    with pytest.raises(UserError, match=r"standard input is not UTF-8 \(byte 0\)"):
        texts("-")


def test_markdown_is_prose_and_what_is_not_is_called_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    (tmp_path / "b.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"only '.jpg' \(an image\) and '.pdf' \(a printed page\)"):
        texts(tmp_path)
    (tmp_path / "c.md").write_text("# words")
    assert [item.id for item in texts(tmp_path)] == ["c.md"]


def test_a_pattern_is_the_images_that_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.png", "deep/c.png", "x[1].png"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(name)
    Path("a.txt").write_text("")
    assert [item.id for item in images("[ab]*")] == ["a.png", "b.png"]
    assert [item.id for item in images("**/*.png")] == ["a.png", "b.png", "deep/c.png", "x[1].png"]
    assert [item.id for item in images("x[1].png")] == ["x[1].png"]  # what is there is no pattern
    for pattern, why in (("*.gif", "(?m)no image matches '\\*.gif'$"), ("*.txt", "none of 1 matches is one")):
        with pytest.raises(UserError, match=why):
            images(pattern)
