"""The Typer application, and how every command ends: an exit code, two lines where something is wrong."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer import Option

from diag.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
    help="How much of what attention returns does the token already have?",
)

FAILURES_SHOWN = 20

USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
"""click's UsageError; typer carries its own copy of click from some version on."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM; carries the exit code."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """How much of what attention returns does the token already have?"""
    if version:
        from diag.run.environment import version as installed

        print(installed())
        raise typer.Exit
    context.obj = debug
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> NoReturn:
    """Runs the command line and turns every expected failure into two lines and an exit code."""
    debug = "--debug" in sys.argv

    def stop(number: int, frame: object) -> NoReturn:
        raise Interrupted(number)

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a dash that the terminal lacks must not end a run
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        code = app(prog_name="attnbias", standalone_mode=False)
    except UserError as error:
        if debug:
            raise
        two_lines(str(error), error.tip or "'attnbias --help' shows what can be typed")
        raise SystemExit(error.exit_code) from None
    except Interrupted as interrupted:
        say("stopped")
        raise SystemExit(interrupted.exit_code) from None
    except Exception as error:
        if isinstance(error, USAGE_ERROR):
            context = error.ctx
            two_lines(error.format_message(), f"{context.command_path if context else 'attnbias'} --help")
            raise SystemExit(2) from None
        if debug:
            raise
        two_lines(
            f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            "this was not expected; attnbias --debug … shows the traceback for a report",
        )
        raise SystemExit(1) from None
    raise SystemExit(code if isinstance(code, int) else 0)


@contextmanager
def interruptible(last_words: Callable[[], str]) -> Iterator[None]:
    """Where a signal may end what can be resumed. last_words: what is said then, as things stand."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stop:
        say(last_words())
        raise SystemExit(getattr(stop, "exit_code", 130)) from None


def two_lines(message: str, tip: str) -> None:
    """What went wrong and what to type, one line each whatever a library put into its message."""
    say(f"error: {' '.join(message.split())}")
    say(f"tip: {' '.join(tip.split())}")


def say_failures(failures: Mapping[str, str], more: str = "") -> None:
    """What failed and why, the first few by name. more: where the others are listed."""
    say(f"{len(failures)} failed:")
    for name, why in list(failures.items())[:FAILURES_SHOWN]:
        say(f"  {name}: {why}")
    if len(failures) > FAILURES_SHOWN:
        say(f"  and {len(failures) - FAILURES_SHOWN} more{more}")


def say(text: str) -> None:
    """A line on stderr; stdout is for results."""
    print(text, file=sys.stderr)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as JSON has it: a document per row, with null for what is missing."""
    return json.loads(frame.to_json(orient="records"))
