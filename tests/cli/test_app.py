"""How a command ends where the system, not the user, is in the way."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import NoReturn

import pytest
from commands import Ended

Attnbias = Callable[..., Ended]

UNEXPECTED = "tip: this was not expected; attnbias --debug … shows the traceback for a report"


def system(number: int, name: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), name)


@pytest.mark.parametrize(
    ("error", "message", "tip"),
    [
        (system(errno.EMFILE), "Too many open files", "ulimit -n"),
        (system(errno.ENOSPC, "a/b"), "No space left on device: 'a/b'", "make room"),
        (system(errno.EACCES, "a\x1bb"), "Permission denied: 'a\\u001bb'", "another path"),
        (system(errno.EIO), "Input/output error", "the disk"),
        (MemoryError(), "there is not enough memory", "--batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory", "--batch-size"),
        (RecursionError("maximum depth"), "what was read is nested too deeply", "--debug"),
        (system(errno.EPIPE), "RuntimeError: a process that this one wrote to has ended", UNEXPECTED),
        (EOFError("ran out"), "RuntimeError: EOFError: ran out", UNEXPECTED),
        (FileNotFoundError("a"), "FileNotFoundError: a", UNEXPECTED),
    ],
)
def test_what_the_system_refuses_is_two_lines(
    error: Exception, message: str, tip: str, attnbias: Attnbias, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(query: str) -> NoReturn:
        raise error

    monkeypatch.setattr("diag.models.names.resolve.listing", fail)
    ended = attnbias("models")
    assert (ended.code, ended.out, len(ended.lines)) == (1, "", 2)
    assert message in ended.lines[0]
    assert tip in ended.lines[1]
    with pytest.raises(type(error) if tip != UNEXPECTED else Exception):
        attnbias("--debug", "models")
