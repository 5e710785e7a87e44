"""SIGINT and SIGTERM: whatever runs ends in one line and 130 or 143, and at once if it is asked again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from diag.errors import say


class Interrupted(BaseException):
    """SIGINT or SIGTERM; carries the exit code."""

    def __init__(self, signal_number: int = signal.SIGINT) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


def take_signals() -> None:
    """From now on the first signal raises Interrupted, wherever this process is."""
    own, stopped = os.getpid(), False

    def stop(number: int, frame: object) -> NoReturn:
        nonlocal stopped
        # a second time nobody wants to wait; a process that a library forked has nothing to say
        if stopped or os.getpid() != own:
            os._exit(128 + number)
        stopped = True
        raise Interrupted(number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


@contextmanager
def interruptible(last_words: Callable[[], str]) -> Iterator[None]:
    """Where a signal may end what can be resumed. last_words: what is said then, as things stand."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stop:  # a library may raise the latter itself
        say(last_words())
        raise SystemExit(getattr(stop, "exit_code", Interrupted().exit_code)) from None
