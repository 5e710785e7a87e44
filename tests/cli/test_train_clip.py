"""`attnbias train-clip` as it is typed, and what is refused; whole runs: tests/studies/train/test_clip.py."""

from __future__ import annotations

import sys

import pytest
from commands import run_cli


def test_help_says_how_arguments_are_passed_on() -> None:
    ended = run_cli("train-clip", "--help")
    assert ended.code == 0
    assert "-- ARGUMENTS" in ended.out
    assert "torchrun --nproc-per-node 8 -m diag train-clip" in " ".join(ended.out.split())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--model", "ViT-B-16"), "error: No such option: --model"),
        (("--attention", "xas", "--"), "error: there is no attention variant 'xas'"),
        (("--text-attention", "xsa=0.5", "--"), "error: variant 'xsa' has no form '0.5'"),
        (("--", "--train-dota", "x"), "error: open_clip_train: unrecognized arguments: --train-dota x"),
        (("--", "--model", "ViT-B-14"), "error: there is nothing to train or evaluate on"),
        (("--config", "no.yaml", "--"), "error: cannot read flags 'no.yaml': No such file or directory"),
    ],
)
def test_mistakes_are_two_lines(given: tuple[str, ...], said: str) -> None:
    ended = run_cli("train-clip", *given)
    assert ended.code == 2
    assert ended.out == ""
    assert ended.lines[0].startswith(said)
    assert ended.lines[1].startswith(("tip: ", "attnbias train-clip"))
    assert len(ended.lines) == 2


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    for name in [name for name in sys.modules if name.startswith("open_clip_train")]:
        monkeypatch.delitem(sys.modules, name)
    ended = run_cli("train-clip", "--", "--model", "ViT-B-14")
    assert ended.code == 2
    assert ended.lines[0] == "error: open_clip_train needs 'webdataset', which is not installed"
    assert ended.lines[1] == 'tip: pip install "attnbias[train]"'
