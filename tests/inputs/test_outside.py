"""Files of others: each thing that can be wrong with one is a sentence that names it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diag.errors import UserError
from diag.inputs import outside
from diag.inputs.outside import json_of, mapping_in, text_of

WRONG = {
    "empty": (b"", "it is empty"),
    "no JSON": (b"{", "it is not JSON"),
    "a list": (b"[1]", "it holds no mapping"),
    "null": (b"null", "it holds no mapping"),
    "other bytes": (b"\xff\xff", "it is not UTF-8 (byte 0)"),
    "too deep": (b"[" * 100_000, "it is not JSON"),
    "a number beyond reason": (b'{"a": ' + b"9" * 5000 + b"}", "it is not JSON"),
    "nested": (b'{"a": ' + b"[" * 150 + b"1" + b"]" * 150 + b"}", "nested more than 100 levels deep"),
    "half a character": (b'{"a": "\\ud83d"}', "holds half a character"),
    "too large": (b'"' + b"a" * 3_000_000 + b'"', "3 MB, where 2 are the most"),
}


@pytest.mark.parametrize(("content", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_is_no_mapping_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes, said: str
) -> None:
    monkeypatch.setattr(outside, "MOST_DOCUMENT", 2_000_000)
    file = tmp_path / "manifest.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        json_of(file, "the manifest", tip="measure again")
    assert str(caught.value).startswith(f"cannot read the manifest '{file}': ")
    assert said in str(caught.value)
    assert caught.value.tip == "measure again"
    assert mapping_in(file) == {}


def test_a_mapping_is_read(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    file.write_text('{"a": [1, null], "b": "\\ud83d\\ude00"}', encoding="utf-8")
    assert (
        json_of(file, "the manifest", tip="")
        == {"a": [1, None], "b": "\N{GRINNING FACE}"}
        == mapping_in(file)
    )


def test_nothing_but_a_plain_file_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for a writer
    for name, said in (
        ("pipe", "no plain file"),
        (".", "a folder"),
        ("none", "No such file"),
        ("\0", "null"),
    ):
        with pytest.raises(UserError, match=said):
            text_of(tmp_path / name, "the text", tip="give a file", most=100)
        assert mapping_in(tmp_path / name) == {}
