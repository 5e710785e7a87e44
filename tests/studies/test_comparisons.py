"""A comparison that is there: the same command says it again; it is made anew where anything has changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Ended
from made_runs import CURVES, made_run

from diag.results.hashes import hashes
from diag.studies import compare as module
from diag.studies.comparisons import request_of

Attnbias = Callable[..., Ended]


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Two runs whose manifests tell the hashes of their tables."""
    found = [made_run(tmp_path / "one"), made_run(tmp_path / "two", curves=CURVES | {"entropy": [1.0] * 3})]
    for folder in found:
        sealed(folder)
    return found


def sealed(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    tables = hashes(folder, ("layers.csv", "heads.parquet", "samples.parquet"))
    (folder / "manifest.json").write_text(json.dumps(manifest | {"tables": tables}))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders in which figures were drawn, in order."""
    drawn, draw = list[Path](), module.draw_comparison

    def noted(found: module.Comparison, folder: Path, *how: Any) -> list[Path]:
        drawn.append(folder)
        return draw(found, folder, *how)

    monkeypatch.setattr(module, "draw_comparison", noted)
    return drawn


@pytest.mark.parametrize("place", [(), ("-o", "out")])
def test_the_same_command_says_the_same_and_draws_nothing(
    attnbias: Attnbias, two: list[Path], made: list[Path], place: tuple[str, ...]
) -> None:
    first = [attnbias("compare", *two, *place, *how) for how in ((), ("--json",), ("-q",))]
    assert [ended.code for ended in first] == [0, 0, 0]
    assert len(made) == 1
    folder = Path(first[2].out.strip())
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    shutil.move(folder, "aside")  # so that all is made anew, once, and as it was
    afresh = [attnbias("compare", *two, *place, *how) for how in (("--json",), (), ("-q",))]
    assert len(made) == 2
    assert [ended.out for ended in afresh] == [first[1].out, first[0].out, first[2].out]
    assert afresh[1].err == first[0].err
    assert {file.name for file in folder.rglob("*")} == {file.name for file in before}


CHANGES: dict[str, Callable[[list[Path], Path], object]] = {
    "a table": lambda runs, out: (out / "profiles.csv").write_text("x"),
    "a figure": lambda runs, out: (out / "figures" / "comparison.png").unlink(),
    "the answer": lambda runs, out: (out / "answer.json").write_text("{}"),
    "the next one": lambda runs, out: (out / ".next").mkdir(),
    "a run": lambda runs, out: (runs[0] / "manifest.json").write_text(
        (runs[0] / "manifest.json").read_text() + " "
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_made_anew_where_something_has_changed(
    attnbias: Attnbias, two: list[Path], made: list[Path], change: str
) -> None:
    first = attnbias("compare", *two, "-o", "out")
    CHANGES[change](two, Path("out"))
    for _ in range(2):
        again = attnbias("compare", *two, "-o", "out")
        assert (again.code, again.out, len(made)) == (0, first.out, 2)
    assert attnbias("compare", *two, "-o", "out", "--seed", 1).code == 0
    assert len(made) == 3


def test_a_run_that_was_edited_is_told_each_time(
    attnbias: Attnbias, two: list[Path], made: list[Path]
) -> None:
    table = two[0] / "layers.csv"
    table.write_text(table.read_text() + "\n")
    assert request_of(two, {}) is None
    for _ in range(2):
        assert "layers.csv of" in attnbias("compare", *two, "-o", "out").err
    assert len(made) == 2
    assert not Path("out/answer.json").exists()
