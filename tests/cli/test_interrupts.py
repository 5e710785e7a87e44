"""Signals: one line and 130 or 143, whatever a library makes of them."""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
from commands import Ended

from diag.cli.interrupts import Interrupted, interruption

Attnbias = Callable[..., Ended]


def stopped(*_: Any, **__: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError("the signal should have come first")


def tripped(*_: Any, **__: Any) -> NoReturn:
    """As a library does whose `finally` counts on what it was about to make."""
    try:
        stopped()
        made = 1
    finally:
        del made  # type: ignore[possibly-undefined]


def asked_by_a_library(*_: Any, **__: Any) -> NoReturn:
    raise KeyboardInterrupt


@pytest.mark.parametrize("ends", [stopped, tripped, asked_by_a_library])
def test_an_interruption_is_one_line_however_it_arrives(
    ends: Callable[..., NoReturn], attnbias: Attnbias, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diag.models.names.resolve.listing", ends)
    assert attnbias("models") == Ended(130, "", "stopped\n")
    monkeypatch.setattr("diag.run.run.load", ends)
    ended = attnbias("probe", "-m", "demo:vit-p16", "-q", "-o", "run")
    assert ended == Ended(130, "", "stopped after 0/0 shards; run the same command again to resume\n")


def test_an_interruption_that_python_drops_comes_again(
    attnbias: Attnbias, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Thing:
        pass

    def dropped(query: str) -> NoReturn:
        thing = Thing()
        kept = weakref.ref(thing, lambda _: stopped())
        del thing
        assert kept() is None
        signal.pause()
        raise AssertionError("it should have come again")

    monkeypatch.setattr("diag.models.names.resolve.listing", dropped)
    assert attnbias("models") == Ended(130, "", "stopped\n")


def test_asked_twice_a_process_ends_at_once(attnbias: Attnbias, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(BaseException):
        pass

    def leave(code: int) -> NoReturn:
        raise Gone(code)

    def slow_to_end(query: str) -> NoReturn:
        try:
            stopped()
        finally:
            stopped()

    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr("diag.models.names.resolve.listing", slow_to_end)
    assert attnbias("models").code == 130  # what `leave` raises came of the interruption


def test_what_an_error_came_of() -> None:
    assert interruption(Interrupted(signal.SIGTERM)) == 143
    assert interruption(KeyboardInterrupt()) == 130
    assert interruption(ValueError()) is None
