"""A result put in the place of another: whole, whenever it is stopped, and nothing of anybody else's goes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diag.errors import UserError
from diag.results import staging, writing
from diag.results.staging import (
    NEXT,
    Owner,
    alone,
    check_free,
    clear,
    go_on,
    pictures,
    scratch,
    staged,
    sweep,
    verb_of,
)
from diag.results.writing import beside, keep, left_behind, write_json

OWNER = Owner(
    "compare",
    result=("manifest.json", "a.csv", "b.csv", "deep/*/*.csv", *pictures("curves-*")),
    work=("shards/*.parquet",),
)
SAME = {"figures/curves-1.png": "1"}
OLD = {"manifest.json": "{}", "a.csv": "old", "b.csv": "old", "deep/x/1.csv": "old"} | SAME
NEW = {"manifest.json": "{} ", "a.csv": "new", "deep/x/2.csv": "new"} | SAME
MINE = dict.fromkeys(("notes.txt", "figures/mine.png", "deep/x/notes.txt", "shards/mine.txt"), "mine")


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def files_in(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()
    }


def renewed(folder: Path) -> None:
    with staged(folder, OWNER) as place:
        put(place, NEW)


def test_a_new_result_takes_the_place_of_the_old_one_and_of_nothing_else(tmp_path: Path) -> None:
    put(tmp_path, OLD | MINE)
    before = (tmp_path / "figures" / "curves-1.png").stat().st_mtime_ns
    renewed(tmp_path)
    assert files_in(tmp_path) == NEW | MINE
    assert (tmp_path / "figures" / "curves-1.png").stat().st_mtime_ns == before  # it is the same
    assert not (tmp_path / NEXT).exists()


def test_what_fails_leaves_the_old_result_as_it_is(tmp_path: Path) -> None:
    put(tmp_path / "out", OLD)

    def fails(folder: Path) -> None:
        with staged(folder, OWNER) as place:
            put(place, NEW)
            raise KeyboardInterrupt

    for folder in (tmp_path / "out", tmp_path / "deep" / "new"):
        with pytest.raises(KeyboardInterrupt):
            fails(folder)
    assert files_in(tmp_path) == {f"out/{name}": text for name, text in OLD.items()}
    assert os.listdir(tmp_path) == ["out"]


class Stop(BaseException):
    """Stands for a power cut."""


def stopping(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The process ends at a rename or removal of a file or folder."""
    left = [at]

    def watched(step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            if left[0] == 0:
                raise Stop
            left[0] -= 1
            return step(*given, **named)

        return call

    for name in ("replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))


def test_putting_in_place_can_be_stopped_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = 0
    for at in range(100):
        folder = tmp_path / str(at)
        put(folder, OLD | MINE)
        with monkeypatch.context() as patch:
            stopping(patch, at)
            try:
                renewed(folder)
            except Stop:
                pass
            else:
                break
        seen = {name: text for name, text in files_in(folder).items() if not name.startswith(NEXT)}
        assert seen in (OLD | MINE, NEW | MINE) or "manifest.json" not in seen
        for left in folder.rglob(".*.tmp"):  # of a process that is this one
            left.unlink()
        begun += go_on(folder, OWNER)
        renewed(folder)
        assert files_in(folder) == NEW | MINE
        assert not (folder / NEXT).exists()
    assert begun > 5


def test_links_lead_nowhere(tmp_path: Path) -> None:
    """Neither a folder that is a link nor a list that was edited takes a file away from elsewhere."""
    outside = {"elsewhere/curves-1.png": "precious", "precious.csv": "precious", "linked.csv": "precious"}
    put(tmp_path, outside)
    folder = tmp_path / "out"
    put(folder, {"manifest.json": "{}", "notes.txt": "mine"})
    (folder / "figures").symlink_to(tmp_path / "elsewhere")
    (folder / "a.csv").symlink_to(tmp_path / "linked.csv")
    goes = ["../precious.csv", str(tmp_path / "precious.csv"), "notes.txt", "figures/curves-1.png", "a.csv"]
    put(folder / NEXT, {"manifest.json": "{} "})
    write_json({"verb": "compare", "comes": ["manifest.json"], "goes": goes}, folder / NEXT / ".staged.json")
    assert go_on(folder, OWNER)
    clear(folder, OWNER)
    assert {name: (tmp_path / name).read_text() for name in outside} == outside
    assert sorted(os.listdir(folder)) == ["figures", "notes.txt"]


def test_a_folder_tells_whose_it_is(tmp_path: Path) -> None:
    assert verb_of(tmp_path) is None
    for verb, file, document in (
        ("train", "plan.json", {"kind": "train"}),
        ("probe", "plan.json", {"shard_inputs": 16}),
        ("figures", "plan.json", {"attnbias": "1", "files": []}),
        ("attend", "manifest.json", {"kind": "attend"}),
        ("compare", ".next/.staged.json", {"verb": "compare"}),
    ):
        write_json(document, tmp_path / verb / file)
        assert verb_of(tmp_path / verb) == verb
        if verb != "compare":
            with pytest.raises(UserError, match=f"holds what attnbias {verb} wrote"):
                check_free(tmp_path / verb, OWNER)
    (tmp_path / "plan.json").write_text("[")
    assert verb_of(tmp_path) is None


def test_one_process_at_a_time(tmp_path: Path) -> None:
    code = "import sys, pathlib; from diag.results.staging import alone\n"
    code += "with alone(pathlib.Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        told: list[str] = []

        def waiting(text: str) -> None:
            told.append(text)
            other.kill()

        with alone(tmp_path, waiting):
            assert told == [f"waiting for another process, which works in '{tmp_path}'"]


# --- temporary files


def test_what_a_dead_process_left_is_swept_and_a_living_ones_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        dead = ended.pid
    own = beside(tmp_path / "a.csv").name
    gone = [own.replace(f".{os.getpid()}-", f".{dead}-"), f".b.json.{writing.HOST}.{dead}-0a.tmp"]
    elsewhere = [f".a.csv.another-machine.{dead}-0a.tmp", f".a.csv.{dead}-0a.tmp", ".mine.tmp", "a.csv"]
    put(tmp_path, dict.fromkeys([own, *gone, *elsewhere, f"deep/{gone[0]}"], ""))
    put(tmp_path, {f"{gone[1]}.folder/a.txt": ""})
    sweep(tmp_path)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {own, *elsewhere, "a.txt"}
    later = time.time() + 2 * writing.STALE
    monkeypatch.setattr(writing.time, "time", lambda: later)
    assert [left_behind(tmp_path / name) for name in elsewhere] == [True, True, False, False]


def test_a_scratch_folder_goes_and_takes_those_of_the_dead_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        left = tmp_path / f".attnbias.{writing.HOST}.{ended.pid}-0a0a0a.tmp"
    put(left, {"a.csv": ""})
    with scratch() as place:
        put(place, {"b.csv": ""})
        assert os.listdir(tmp_path) == [place.name]
    assert os.listdir(tmp_path) == []


def test_a_file_that_is_as_it_should_be_keeps_its_time(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.txt"
    keep(file, b"one")
    os.utime(file, (1, 1))
    keep(file, b"one")
    assert file.stat().st_mtime == 1
    keep(file, b"two")
    assert file.read_bytes() == b"two"
    assert file.stat().st_mtime > 1


def test_what_a_folder_that_was_removed_needs_is_not_room(tmp_path: Path) -> None:
    with pytest.raises(writing.CannotWrite, match="No such") as caught, writing.writing(tmp_path):
        os.stat(tmp_path / "x")
    assert "removed" in str(caught.value.tip)


def test_a_system_that_locks_and_opens_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Windows, where opening a folder is an error."""
    opened = os.open

    def only_files(path: Any, *given: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *given)

    monkeypatch.setattr(staging, "fcntl", None)
    monkeypatch.setattr(os, "open", only_files)
    folder = tmp_path / "new" / "result"
    with alone(folder) as made:
        assert made == [folder, folder.parent]
    assert not folder.parent.exists()
    with staged(folder, OWNER) as place:
        write_json({"kind": OWNER.verb}, place / OWNER.last)
    assert (folder / OWNER.last).is_file()


def test_whether_a_process_lives_is_asked_without_a_signal_where_that_would_be_ctrl_c(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = list[int]()
    monkeypatch.setattr(os, "name", "nt")
    monkeypatch.setattr(os, "kill", lambda process, number: pytest.fail("it would be interrupted"))
    monkeypatch.setattr("psutil.pid_exists", lambda process: not asked.append(process))
    assert writing._alive(4711)
    assert asked == [4711]
