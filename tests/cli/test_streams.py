"""Where results and advice go: full, closed, or nobody reads; and names that a terminal would obey."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Ended, probe_of

import diag
from diag.cli.streams import Advice, Results, Unprinted

Attnbias = Callable[..., Ended]

PROBE = probe_of()


class Broken(io.StringIO):
    """A stream that takes nothing."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def isatty(self) -> bool:
        raise ValueError("I/O operation on closed file")


@pytest.fixture
def broken(attnbias: Attnbias, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """`broken("stdout", errno.ENOSPC, …)` runs a command one of whose streams takes nothing."""

    def run(name: str, number: int, *arguments: object) -> Ended:
        with pytest.MonkeyPatch.context() as patch:
            # the command finds the broken stream where the test's own one would be
            kind = "Results" if name == "stdout" else "Advice"
            real = {"Results": Results, "Advice": Advice}[kind]
            patch.setattr(f"diag.cli.streams.{kind}", lambda stream: real(Broken(number)))
            return attnbias(*arguments)

    return run


def test_advice_that_cannot_be_written_changes_nothing(broken: Callable[..., Ended]) -> None:
    ended = broken("stderr", errno.ENOSPC, *PROBE)
    assert (ended.code, ended.err) == (0, "")
    assert "n = 1" in ended.out
    assert Path("run/manifest.json").exists()


def test_a_result_that_cannot_be_printed_is_told_with_its_folder(broken: Callable[..., Ended]) -> None:
    for form in ((), ("-q",), ("--json",)):
        ended = broken("stdout", errno.ENOSPC, *PROBE, *form)
        assert ended.code == 1
        said = "error: the result cannot be printed: No space left on device; it is in 'run'"
        assert ended.lines[-2:] == [said, "tip: see to where stdout goes, or leave it alone"]
        assert Path("run/manifest.json").exists()


def test_who_stops_reading_is_told_where_the_result_is(broken: Callable[..., Ended]) -> None:
    ended = broken("stdout", errno.EPIPE, *PROBE)
    assert ended.code == 141
    assert ended.lines[-1] == "the result was not read to its end; it is in 'run'"
    assert broken("stdout", errno.EPIPE, "metrics") == Ended(141, "", "")


CLOSED = """
import os, sys
for number in map(int, sys.argv.pop(1)):
    os.close(number)
sys.stdin, sys.stdout, sys.stderr = (
    None if closed else stream
    for closed, stream in zip([True, True, True], [sys.stdin, sys.stdout, sys.stderr])
)
from diag.cli import main
main()
"""


@pytest.mark.parametrize(("closed", "code"), [("02", 2), ("012", 2)])
def test_closed_streams_are_no_files(closed: str, code: int) -> None:
    """A file that is opened next must not get the number of stderr, and what is meant for it."""
    environment = {**os.environ, "PYTHONPATH": str(Path(diag.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", CLOSED, closed, "probe"], capture_output=True, env=environment, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


def test_a_failure_is_met_again_by_whoever_looks_later() -> None:
    stream = Results(Broken(errno.EPIPE))
    assert not stream.isatty()
    for _ in range(2):
        with pytest.raises(Unprinted) as caught:
            stream.write("a")
        assert caught.value.unread
    with pytest.raises(Unprinted):
        stream.flush()
    advice = Advice(Broken(errno.EIO))
    assert (advice.write("abc"), advice.isatty(), advice.flush()) == (3, False, None)


def test_nothing_that_a_terminal_would_obey_is_printed(attnbias: Attnbias) -> None:
    name = "a\x1b[2J\u202e\x9b"
    ended = attnbias(*PROBE[:-1], name)
    assert ended.code == 0
    assert ended.lines[-1] == "run: a\\u001b[2J\\u202e\\u009b"
    assert attnbias(*PROBE[:-1], name, "-q").out == "a\\u001b[2J\\u202e\\u009b\n"
    assert json.loads(attnbias(*PROBE[:-1], name, "--json").out)["run"] == name
    refused = attnbias("probe", "-m", "b\x1b[31m\nerror-c")
    assert refused.lines[0] == "error: the model's name 'b\\x1b[31m\\nerror-c' holds the character '\\x1b'"
    assert len(refused.lines) == 2
