"""The standard streams as a command needs them: a result that cannot be printed is told, advice may be lost.

They may be closed, full, or a pipe that nobody reads any more, and what is printed may hold names that a
terminal would obey.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from diag.errors import visible
from diag.inputs.outside import reason


class Unprinted(Exception):  # noqa: N818  it is nobody's mistake
    """The result, or a part of it, did not reach stdout. place: where else it lies, if anywhere."""

    def __init__(self, error: OSError | ValueError) -> None:
        super().__init__(reason(error))
        self.unread = isinstance(error, BrokenPipeError)
        self.place: Path | None = None


class Advice:
    """stderr, also for the libraries that write to it. What cannot be written is lost.

    What it does not do itself, the stream under it does.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # whoever finds it writes past this stream, as click does
            raise AttributeError(name)
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Writes a text; its length."""
        try:
            self.stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self._failed(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Writes several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Brings what was written to whoever reads it."""
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._failed(error)

    def isatty(self) -> bool:
        """Whether somebody looks at it."""
        try:
            return self.stream.isatty()
        except (OSError, ValueError):
            return False

    def _failed(self, error: OSError | ValueError) -> None:
        """What follows goes nowhere: Python would try once more as it ends, and change the exit code."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


class Results(Advice):
    """stdout. Raises Unprinted where nothing can be written, and from then on always."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.failure: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        """Writes a text; JSON that it holds stays the same JSON."""
        super().write(visible(text, keep="\n"))
        return len(text)

    def flush(self) -> None:
        """Brings what was written to whoever reads it. Whoever caught an error before meets it here again."""
        super().flush()
        if self.failure is not None:
            raise Unprinted(self.failure)

    def _failed(self, error: OSError | ValueError) -> None:
        super()._failed(error)
        self.failure = error
        raise Unprinted(error) from error


@contextmanager
def standard_streams() -> Iterator[None]:
    """`sys.stdout` and `sys.stderr` are there, and fail as this module says, until the context ends."""
    _open_what_is_closed()
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a dash that the terminal lacks must not end a run
    sys.stdout, sys.stderr = Results(before[0]), Advice(before[1])  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _open_what_is_closed() -> None:
    """Takes the places of closed streams: the next file that is opened would get what is meant for one."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError as error:
            if error.errno == errno.EBADF:
                # reading from it gives nothing; writing to stdout fails, as to a closed one
                os.open(os.devnull, os.O_WRONLY if descriptor == 2 else os.O_RDONLY)
                os.set_inheritable(descriptor, True)
    if sys.stdin is None:
        sys.stdin = io.StringIO()
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


@contextmanager
def answer(place: Path | None = None) -> Iterator[None]:
    """Around what prints a result: it is on its way when the context ends.

    place: where it lies as well, which is told if it cannot be printed. Raises Unprinted.
    """
    try:
        yield
        sys.stdout.flush()
    except Unprinted as error:
        error.place = place
        raise
