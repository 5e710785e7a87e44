"""What was typed, looked at before a verb begins: what no verb can take is told for all of them here."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.core import TyperGroup

from diag.cli.interrupts import Interrupted
from diag.errors import LARGEST, UserError


class CheckedVerbs(TyperGroup):
    """All verbs. Refuses what would be lost silently: an option given twice, whose last value would count."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The verb and its arguments. Raises UserError for arguments that no verb can take."""
        name, verb, rest = super().resolve_command(ctx, args)
        if verb is not None:
            context = verb.make_context(name, list(rest), parent=ctx)
            words, _, order = verb.make_parser(context).parse_args(args=list(rest))
            for parameter, times in Counter(order).items():
                key = parameter.name
                _check(parameter, _listed(words.get(key)), _listed(context.params.get(key)), times)
        return name, verb, rest

    def invoke(self, ctx: Any) -> Any:
        """Carries out the verb. What typer ends with, and without a word, is raised as something else."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted from None
        except EOFError as error:
            raise RuntimeError(f"EOFError: {error}") from error
        except BrokenPipeError as error:
            raise RuntimeError(f"a process that this one wrote to has ended ({error.strerror})") from error


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _check(parameter: Any, words: Sequence[Any], values: Sequence[Any], times: int) -> None:
    """Raises UserError for one option or argument. words: as typed. values: as read. times: how often."""
    is_option = parameter.param_type_name == "option"
    said = (
        "/".join(parameter.opts) if is_option else (parameter.metavar or parameter.name.upper()).strip("[]")
    )
    texts = [word for word in words if isinstance(word, str)]  # a flag has none
    if is_option and not parameter.multiple and texts and times > 1:
        raise UserError(f"{said} is given {times} times", f"give it once: the last, '{_short(texts[-1])}'?")
    is_path = any(isinstance(value, Path) for value in values)
    for text in texts:
        if not text.strip() and (is_option or is_path):
            raise UserError(f"{said} is empty", "give it a value, or leave it out")
        if is_path:
            _check_path(text, said)
    for value in values:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise UserError(f"{said} is at most {LARGEST}", f"given: {_short(str(value))}")


def _check_path(word: str, said: str) -> None:
    """Raises UserError for a path that the system does not take, whether something is there or not."""
    try:
        os.lstat(Path(word))
    except (FileNotFoundError, NotADirectoryError):  # the verbs say what should be there
        return
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{said} '{_short(word)}': {reason}", "give another path") from error


def _short(word: str) -> str:
    """A word that fits into a line."""
    return word if len(word) <= 80 else f"{word[:40]}…{word[-20:]}"
