"""The Typer application, and how every command ends: an exit code, two lines where something is wrong."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer import Option

from diag.cli.interrupts import interruption, signals_taken
from diag.cli.streams import Unprinted, standard_streams
from diag.cli.typed import CheckedVerbs
from diag.errors import EXTRAS, UserError, not_installed, say

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(
    cls=CheckedVerbs,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
    subcommand_metavar="COMMAND|MODEL [ARGS]...",
    help="How much of what attention returns does the token already have?",
)

FAILURES_SHOWN = 20
LONGEST_WORD = 200

USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
"""click's UsageError; typer carries its own copy of click from some version on."""


UNREAD = 128 + 13
"""The exit code where nobody read stdout to its end: what a shell says of a process that SIGPIPE ended."""

SYSTEM: Mapping[int, str] = {
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "ulimit -n 4096 allows more files; or fewer --workers"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room and run the same command again"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP),
        "give another path, or a folder that you may write",
    ),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "see to the disk and run the same command again"),
    errno.ENOMEM: "smaller --batch-size or --limit, or a shorter --seq-len",
}
"""What the system refuses wherever it is asked, and what helps; any other error of its is a fault of ours."""


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
    with signals_taken(), standard_streams():
        raise SystemExit(_exit_code("--debug" in sys.argv))


def _exit_code(debug: bool) -> int:
    """Carries out the command; its exit code, after what there is to say about it.

    debug: an error is raised, as it came, and not told in two lines.
    """
    try:
        code = _carried_out()
    except BaseException as error:
        if (stopped := interruption(error)) is not None:
            say("stopped")
            return stopped
        if isinstance(error, Unprinted):
            return _unprinted(error)
        if isinstance(error, USAGE_ERROR):
            context = error.ctx
            two_lines(error.format_message(), f"{context.command_path if context else 'attnbias'} --help")
            return 2
        if debug or not isinstance(error, Exception):
            raise
        two_lines(*_told(error))
        return error.exit_code if isinstance(error, UserError) else 1
    return code if isinstance(code, int) else 0


def _carried_out() -> object:
    """The exit code of the verb, if it has one to give."""
    try:
        code = app(prog_name="attnbias", standalone_mode=False)
    except SystemExit as ended:
        code = ended.code
    sys.stdout.flush()
    return code


def _unprinted(error: Unprinted) -> int:
    """Says where the result is, and gives the exit code."""
    where = f"; it is in '{error.place}'" if error.place else ""
    if error.unread:  # `| head` has what it wanted
        if error.place:
            say(f"the result was not read to its end{where}")
        return UNREAD
    two_lines(f"the result cannot be printed: {error}{where}", "see to where stdout goes, or leave it alone")
    return 1


def _told(error: Exception) -> tuple[str, str]:
    """What is wrong and what to type. What neither user nor system did is a fault of ours, seen as one."""
    if isinstance(error, UserError):
        return str(error), error.tip or "'attnbias --help' shows what can be typed"
    if isinstance(error, ModuleNotFoundError) and (library := (error.name or "").partition(".")[0]) in EXTRAS:
        return _told(not_installed("this", library))
    first = (str(error).splitlines() or [""])[0]
    if _memory_ran_out(error):
        return "there is not enough memory", SYSTEM[errno.ENOMEM]
    if isinstance(error, RecursionError):
        return f"what was read is nested too deeply ({first})", "attnbias --debug … shows what"
    if isinstance(error, OSError) and (tip := SYSTEM.get(error.errno or 0)):
        name = f": '{os.fsdecode(error.filename)}'" if isinstance(error.filename, str | bytes) else ""
        return f"{error.strerror}{name}", tip
    report = "this was not expected; attnbias --debug … shows the traceback for a report"
    return f"{type(error).__name__}: {first}", report


def _memory_ran_out(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from diag.measure.batch_size import is_out_of_memory

    return is_out_of_memory(error)


def two_lines(message: str, tip: str) -> None:
    """What went wrong and what to type, one line each whatever a library put into its message."""
    # a number of thousands of digits needs not all of them
    words = (word if len(word) <= LONGEST_WORD else f"{word[:60]}…{word[-20:]}" for word in message.split())
    say(f"error: {' '.join(words)}")
    say(f"tip: {' '.join(tip.split())}")


def say_failures(failures: Mapping[str, str], more: str = "") -> None:
    """What failed and why, the first few by name. more: where the others are listed."""
    say(f"{len(failures)} failed:")
    for name, why in list(failures.items())[:FAILURES_SHOWN]:
        say(f"  {name}: {why}")
    if len(failures) > FAILURES_SHOWN:
        say(f"  and {len(failures) - FAILURES_SHOWN} more{more}")


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as JSON has it: a document per row, with null for what is missing."""
    return json.loads(frame.to_json(orient="records"))
