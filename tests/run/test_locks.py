"""Locks: one process's until it gives them or ends, and free where there are none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diag.run import locks as module
from diag.run.locks import Locks

HOLD = """
import sys
from pathlib import Path
from diag.run.locks import Locks
with Locks(Path(sys.argv[1])) as locks:
    print(locks.take(1 << 33), locks.take(1 << 33), flush=True)
    sys.stdin.readline()
    locks.give(1 << 33)
    print("given", flush=True)
    sys.stdin.readline()
"""


def test_a_lock_is_one_processs_until_it_is_given_or_the_process_is_killed(tmp_path: Path) -> None:
    file, place = tmp_path / ".lock", 1 << 33
    with (
        Locks(file) as locks,
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other,
    ):
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "True True\n"
        assert not locks.take(place)
        assert locks.take(place + 1)
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "given\n"
        assert locks.take(place)
        locks.give(place)
        other.kill()
        other.wait()
        assert locks.take(place)


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with (
        Locks(file) as locks,
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other,
    ):
        assert other.stdout is not None
        other.stdout.readline()
        assert not locks.take(1 << 33)
        other.kill()  # SIGKILL
        other.wait()
        assert locks.take(1 << 33)


def test_without_locks_every_lock_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file system or Windows has none: work may be done twice, and is the same."""
    import errno

    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    with Locks(tmp_path / ".lock") as locks:
        monkeypatch.setattr(module.fcntl, "lockf", unknown)
        assert locks.take(0)
        locks.give(0)
        monkeypatch.setattr(module, "fcntl", None)
        assert locks.take(0)
        locks.give(0)
