"""Whose folder it is: one run's, whoever comes first, and nobody's who comes after."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from diag.errors import UserError
from diag.results.writing import CannotWrite, write_json
from diag.run import run_folder as claims
from diag.run.run_folder import PROBE, check_room, claim, release


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    mine, other = {"key": "a", "plan": {}}, {"key": "b", "plan": {}}
    assert claim(folder, mine, overwrite=False) is False
    assert json.loads((folder / "plan.json").read_text()) == mine
    assert claim(folder, mine, overwrite=False) is False  # not finished: goes on
    with pytest.raises(UserError, match="holds another run"):
        claim(folder, other, overwrite=False)
    (folder / "manifest.json").write_text("{}")
    assert claim(folder, mine, overwrite=False) is True
    with pytest.raises(UserError, match="holds another run"):
        claim(folder, other, overwrite=False)


def test_overwriting_removes_a_run_and_nothing_else(tmp_path: Path) -> None:
    claim(tmp_path, {"key": "a"}, overwrite=False)
    for name in ("manifest.json", "layers.csv", "notes.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "shards").mkdir()
    assert claim(tmp_path, {"key": "b"}, overwrite=True) is False
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "plan.json"]
    assert json.loads((tmp_path / "plan.json").read_text()) == {"key": "b"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_folder_is_left_alone(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        claim(tmp_path, {"key": "a"}, overwrite=overwrite)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_claim_that_was_interrupted_can_be_made_again(tmp_path: Path) -> None:
    (tmp_path / ".plan.json.17.tmp").write_text("{")
    assert claim(tmp_path, {"key": "a"}, overwrite=False) is False


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        claim(tmp_path / "run", {"key": "a"}, overwrite=True)


def test_a_folder_is_given_up_only_if_nothing_was_measured(tmp_path: Path) -> None:
    empty, begun, shared = (tmp_path / name for name in ("empty", "begun", "shared"))
    for folder in (empty, begun, shared):
        claim(folder, {"key": "a"}, overwrite=False)
        (folder / "shards").mkdir()
    (begun / "shards" / "00-m-vision-00000.parquet").write_text("")
    (shared / "notes.txt").write_text("")
    for folder in (empty, begun, shared):
        release(folder)
    assert not empty.exists()
    assert (begun / "plan.json").exists()
    assert os.listdir(shared) == ["notes.txt"]


# --- several processes at once


def test_of_two_runs_that_begin_at_once_one_has_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one's plan appears between looking and writing."""
    mine, other = {"key": "a", "begun": "later"}, {"key": "b"}
    written = claims._written_first

    def overtaken(document: dict[str, Any], path: Path) -> bool:
        monkeypatch.setattr(claims, "_written_first", written)
        write_json(other, path)
        return written(document, path)

    monkeypatch.setattr(claims, "_written_first", overtaken)
    with pytest.raises(UserError, match="holds another run"):
        claim(tmp_path / "run", mine, overwrite=False)
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == other
    assert os.listdir(tmp_path / "run") == ["plan.json"]


def test_of_two_processes_of_one_run_the_first_ones_plan_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = {"key": "a", "shard_inputs": 32}, {"key": "a", "shard_inputs": 16}
    written = claims._written_first

    def overtaken(document: dict[str, Any], path: Path) -> bool:
        monkeypatch.setattr(claims, "_written_first", written)
        write_json(other, path)
        return written(document, path)

    monkeypatch.setattr(claims, "_written_first", overtaken)
    assert claim(tmp_path / "run", mine, overwrite=False) is False
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == other


def test_a_plan_that_appears_while_the_folder_is_looked_at_is_no_foreign_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.iterdir

    def slow(folder: Path) -> Any:
        write_json({"key": "a"}, folder / "plan.json")
        return original(folder)

    monkeypatch.setattr(Path, "iterdir", slow)
    assert claim(tmp_path, {"key": "a"}, overwrite=False) is False


def test_without_hard_links_a_plan_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(Path, "hardlink_to", none)
    assert claim(tmp_path / "run", {"key": "a"}, overwrite=False) is False
    assert os.listdir(tmp_path / "run") == ["plan.json"]


class Disk(NamedTuple):
    total: int
    used: int
    free: int


def test_room_is_what_the_disk_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Disk(9, 8, 1_000_000))
    check_room(tmp_path, 1_000_000)
    with pytest.raises(CannotWrite, match="needs about 3 MB more, and 1 MB are free"):
        check_room(tmp_path, 3_000_000)
