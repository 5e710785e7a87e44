"""SIGINT and SIGTERM: whatever runs ends in one line and 130 or 143, and at once if it is asked again."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from diag.errors import say

AGAIN = 0.05
"""Seconds until an interruption that got lost is tried once more."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM; carries the exit code."""

    def __init__(self, signal_number: int = signal.SIGINT) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


@contextmanager
def signals_taken() -> Iterator[None]:
    """From now on the first signal raises Interrupted, wherever this process is."""
    own, asked, before = os.getpid(), 0, sys.unraisablehook

    def stop(number: int, frame: object) -> NoReturn:
        nonlocal asked
        # a second time nobody wants to wait; a process that a library forked has nothing to say
        if asked or os.getpid() != own:
            os._exit(128 + number)
        asked = number
        raise Interrupted(number)

    def lost(ignored: sys.UnraisableHookArgs) -> None:
        """Python drops what is raised where an object is let go, and goes on."""
        if isinstance(ignored.exc_value, Interrupted):
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        else:
            before(ignored)

    def again(number: int, frame: object) -> NoReturn:
        raise Interrupted(asked)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.signal(signal.SIGALRM, again)
        sys.unraisablehook = lost
    try:
        yield
    finally:
        sys.unraisablehook = before


def interruption(error: BaseException | None) -> int | None:
    """The exit code of the interruption that an error is, or came of; None for any other error.

    A library that is interrupted halfway may trip over what it left half done, and raise that instead.
    """
    while error is not None:
        if isinstance(error, Interrupted | KeyboardInterrupt):  # a library may raise the latter itself
            return getattr(error, "exit_code", Interrupted().exit_code)
        error = error.__context__
    return None


@contextmanager
def interruptible(last_words: Callable[[], str]) -> Iterator[None]:
    """Where a signal may end what can be resumed. last_words: what is said then, as things stand."""
    try:
        yield
    except BaseException as error:
        if (code := interruption(error)) is None:
            raise
        say(last_words())
        raise SystemExit(code) from None
