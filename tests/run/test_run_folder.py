"""Whose folder it is: one run's, whoever comes first, and nobody's who comes after."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from diag.errors import UserError
from diag.results.writing import CannotWrite, write_json
from diag.run import run_folder as claims
from diag.run.run_folder import PROBE, Vanished, Work, at_work, check_room, claim, release
from diag.run.shard_ledger import SHARDS_LOCK


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    mine, other = {"key": "a", "plan": {}}, {"key": "b", "plan": {}}
    assert claim(folder, PROBE, mine) == folder
    assert json.loads((folder / "plan.json").read_text()) == mine
    assert claim(folder, PROBE, mine) == folder  # not finished: goes on
    with pytest.raises(UserError, match="holds another run"):
        claim(folder, PROBE, other)
    (folder / "manifest.json").write_text("{}")
    assert claim(folder, PROBE, mine) is None
    with pytest.raises(UserError, match="holds another run"):
        claim(folder, PROBE, other)


def test_what_overwrites_a_run_is_built_aside(tmp_path: Path) -> None:
    claim(tmp_path, PROBE, {"key": "a"})
    for name in ("manifest.json", "layers.csv", "notes.txt"):
        (tmp_path / name).write_text("{}")
    place = claim(tmp_path, PROBE, {"key": "b"}, overwrite=True)
    assert place == tmp_path / ".next"
    assert claim(tmp_path, PROBE, {"key": "b"}, overwrite=True) == place  # the same command again goes on
    assert claim(tmp_path, PROBE, {"key": "a"}) is None  # what was there is still there
    (place / "shards").mkdir()
    (place / "shards" / "00-m-vision-00000.parquet").touch()
    assert claim(tmp_path, PROBE, {"key": "c"}, overwrite=True) == place  # another one begins anew
    assert not (place / "shards").exists()
    write_json({}, place / "manifest.json")
    assert claim(tmp_path, PROBE, {"key": "c"}, overwrite=True) is None  # was whole, and is put in its place
    assert sorted(os.listdir(tmp_path)) == ["manifest.json", "notes.txt", "plan.json"]
    assert json.loads((tmp_path / "plan.json").read_text()) == {"key": "c"}


def test_an_unfinished_run_is_gone_on_with_by_its_own_command(tmp_path: Path) -> None:
    mine = {"key": "a", "command": "attnbias probe … --overwrite"}
    assert claim(tmp_path, PROBE, mine, overwrite=True) == tmp_path
    assert claim(tmp_path, PROBE, mine, overwrite=True) == tmp_path
    assert claim(tmp_path, PROBE, mine | {"command": "another"}, overwrite=True) == tmp_path / ".next"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("document", "verb"), [({"kind": "train"}, "train"), ({"attnbias": "1", "files": []}, "figures")]
)
def test_a_folder_of_another_verb_is_refused(
    tmp_path: Path, document: dict[str, Any], verb: str, overwrite: bool
) -> None:
    write_json(document | {"key": "a"}, tmp_path / "plan.json")
    with pytest.raises(UserError, match=f"holds what attnbias {verb} wrote"):
        claim(tmp_path, PROBE, {"key": "a"}, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_folder_is_left_alone(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        claim(tmp_path, PROBE, {"key": "a"}, overwrite=overwrite)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_claim_that_was_interrupted_can_be_made_again(tmp_path: Path) -> None:
    (tmp_path / ".plan.json.17.tmp").write_text("{")
    assert claim(tmp_path, PROBE, {"key": "a"}) == tmp_path


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        claim(tmp_path / "run", PROBE, {"key": "a"}, overwrite=True)


def test_a_folder_is_given_up_only_if_nothing_was_measured(tmp_path: Path) -> None:
    empty, begun, shared = (tmp_path / name for name in ("empty", "begun", "shared"))
    for folder in (empty, begun, shared):
        claim(folder, PROBE, {"key": "a"})
        (folder / "shards").mkdir()
    (begun / "shards" / "00-m-vision-00000.parquet").write_text("")
    (shared / "notes.txt").write_text("")
    for folder in (empty, begun, shared):
        release(folder, folder, PROBE)
    assert not empty.exists()
    assert (begun / "plan.json").exists()
    assert os.listdir(shared) == ["notes.txt"]


# --- several processes at once


def overtake(monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]) -> None:
    """Has another process's plan appear between looking and writing, once."""
    written = claims._written_first

    def overtaken(document: dict[str, Any], path: Path) -> bool:
        monkeypatch.setattr(claims, "_written_first", written)
        write_json(other, path)
        return written(document, path)

    monkeypatch.setattr(claims, "_written_first", overtaken)


def test_of_two_runs_that_begin_at_once_one_has_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = {"key": "a", "begun": "later"}, {"key": "b"}
    overtake(monkeypatch, other)
    with pytest.raises(UserError, match="holds another run"):
        claim(tmp_path / "run", PROBE, mine)
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == other
    assert os.listdir(tmp_path / "run") == ["plan.json"]


def test_of_two_processes_of_one_run_the_first_ones_plan_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = {"key": "a", "shard_inputs": 32}, {"key": "a", "shard_inputs": 16}
    overtake(monkeypatch, other)
    assert claim(tmp_path / "run", PROBE, mine) == tmp_path / "run"
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == other


def test_a_plan_that_appears_while_the_folder_is_looked_at_is_no_foreign_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.iterdir

    def slow(folder: Path) -> Any:
        write_json({"key": "a"}, folder / "plan.json")
        return original(folder)

    monkeypatch.setattr(Path, "iterdir", slow)
    assert claim(tmp_path, PROBE, {"key": "a"}) == tmp_path


def test_without_hard_links_a_plan_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(Path, "hardlink_to", none)
    assert claim(tmp_path / "run", PROBE, {"key": "a"}) == tmp_path / "run"
    assert os.listdir(tmp_path / "run") == ["plan.json"]


@contextmanager
def another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that works in a folder."""
    code = "import sys; from diag.run.locks import *; locks = Locks(sys.argv[1]); locks.share(PRESENT)"
    code += "; print(flush=True); sys.stdin.read()"
    given = [sys.executable, "-c", code, str(folder / SHARDS_LOCK)]
    with subprocess.Popen(given, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        yield other
        other.kill()


def work(folder: Path, key: str = "a", **given: Any) -> AbstractContextManager[Work | None]:
    return at_work(folder, PROBE, {"key": key}, lock=SHARDS_LOCK, **given)


def test_a_process_that_fails_leaves_a_living_one_its_folder(tmp_path: Path) -> None:
    """The claim goes with the last process, and not with the first that fails."""
    folder = tmp_path / "run"

    def fails(meanwhile: Callable[[], object] = lambda: None) -> None:
        with work(folder):
            meanwhile()
            raise UserError("mistake")

    with ExitStack() as stack:
        with pytest.raises(UserError, match="mistake"):
            fails(lambda: stack.enter_context(another(folder)))
        assert (folder / "plan.json").exists()
    with pytest.raises(UserError, match="mistake"):
        fails()
    assert not folder.exists()


def test_what_another_process_works_on_is_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    begins_anew = work(folder, "b", overwrite=True)
    with work(folder), another(folder), pytest.raises(UserError, match="another process is at work in"):
        begins_anew.__enter__()
    assert json.loads((folder / "plan.json").read_text()) == {"key": "a"}


def test_the_last_process_out_puts_the_new_result_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with work(tmp_path) as done:
        assert done is not None
        write_json({}, tmp_path / "manifest.json")
    found: list[Any] = []
    with ExitStack() as stack, work(tmp_path, "b", overwrite=True) as begun:
        assert begun is not None
        write_json({}, begun.place / "manifest.json")
        other = stack.enter_context(another(begun.place))

        def leave(seconds: float) -> None:
            found.append(json.loads((tmp_path / "plan.json").read_text()))
            other.kill()
            other.wait()

        monkeypatch.setattr(claims.time, "sleep", leave)
    assert found == [{"key": "a"}]
    assert json.loads((tmp_path / "plan.json").read_text()) == {"key": "b"}
    assert sorted(os.listdir(tmp_path)) == ["manifest.json", "plan.json"]


def test_a_run_whose_folder_is_removed_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    begun = work(folder)
    begun.__enter__()
    shutil.rmtree(folder)
    write_json({}, folder / "shards" / "00-m-vision.json")
    with pytest.raises(Vanished, match="was removed while it was written") as caught:
        begun.__exit__(None, None, None)
    assert caught.value.exit_code == 1
    assert not folder.exists()


class Disk(NamedTuple):
    total: int
    used: int
    free: int


def test_room_is_what_the_disk_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Disk(9, 8, 1_000_000))
    check_room(tmp_path, 1_000_000)
    with pytest.raises(CannotWrite, match="needs about 3 MB more, and 1 MB are free"):
        check_room(tmp_path, 3_000_000)
