"""The command line, run inside the process of the tests."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines of stderr."""
        return self.err.splitlines()


def run_cli(*arguments: object) -> Ended:
    """Runs `attnbias ARGUMENTS` in this process."""
    from diag.cli import main

    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["attnbias", *map(str, arguments)])
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert isinstance(code, int)
    return Ended(code, out.getvalue(), err.getvalue())
