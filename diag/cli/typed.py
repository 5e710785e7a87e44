"""What was typed, looked at before a verb begins: what no verb can take is told for all of them here.

A model may be named without `-m`, also where no verb is: `attnbias gpt2` is `attnbias probe -m gpt2`.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from diag.cli.interrupts import Interrupted
from diag.cli.plans import YAML, for_verb, verb_of
from diag.errors import LARGEST, UserError
from diag.inputs.outside import reason

DEFAULT, MODEL, RUNS = "probe", "--model", "runs"
"""The verb that is meant where none is typed, the option that a word alone stands for, and the argument that
takes run folders."""

OPTIONS: Mapping[str, Sequence[str]] = {
    "--images": (".jpg", ".jpeg", ".png", ".webp", ".tar"),
    "--texts": (".txt", ".md", ".markdown", ".rst", ".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"),
    "--checkpoint": (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz"),
}
"""What takes files, by their endings."""


class CheckedVerbs(TyperGroup):
    """All verbs. Refuses what would be lost silently: an option given twice, whose last value would count."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The verb and its arguments. Raises UserError for arguments that no verb can take."""
        if args and self.get_command(ctx, args[0]) is None and not _meant(args[0], self.commands):
            args = [DEFAULT, *args]
        name, verb, rest = super().resolve_command(ctx, args)
        if verb is None:
            return name, verb, rest
        try:
            os.getcwd()
        except FileNotFoundError:  # torch would end the process, in words of its own
            raise UserError("the folder that this is run in was removed", "cd to one that is there") from None
        for parameter in verb.params:
            parameter.callback = _at_home
        if _takes_models(verb) and all(parameter.name != RUNS for parameter in verb.params):
            verb.options_metavar = "[MODEL…] [OPTIONS]"
        parser = verb.make_parser(typer.Context(verb, parent=ctx, info_name=name))
        words, alone, order = parser.parse_args(args=list(rest))
        models = [*alone, *filter(_is_model, _listed(words.get(RUNS)))] if _takes_models(verb) else []
        if models:
            rest = _named(rest, models, verb)
            words, _, order = parser.parse_args(args=list(rest))
        given = {parameter: _listed(words.get(parameter.name)) for parameter in order}
        for parameter, times in Counter(order).items():
            _check_words(parameter, given[parameter], times)
            if MODEL in parameter.opts or parameter.name == RUNS:
                for word in map(str, given[parameter]):
                    _refuse_plan(word, "a model" if MODEL in parameter.opts else "a run")
        try:
            context = verb.make_context(name, list(rest), parent=ctx)
        except typer.BadParameter as error:
            wrong = getattr(error, "param", None)
            if type(error) is not typer.BadParameter or wrong not in given:
                raise  # something is missing
            what = " ".join(_short(str(word)) for word in given[wrong])
            tip = f"attnbias {name} --help"
            raise UserError(f"{_said(wrong)} does not understand '{what}'", tip) from error
        for parameter, texts in given.items():
            _check_values(_said(parameter), texts, _listed(context.params.get(parameter.name)))
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
            raise RuntimeError(f"a process that this one wrote to has ended ({reason(error)})") from error


def _meant(word: str, verbs: Iterable[str]) -> bool:
    """Whether a first word is an option, or a verb that was mistyped."""
    return word.startswith("-") or bool(difflib.get_close_matches(word.lower(), verbs, cutoff=0.7))


def _is_model(word: object) -> bool:
    """Whether what may be a run or a model is a model: a name that is known, and no path."""
    if not isinstance(word, str) or os.path.lexists(word) or ("/" in word and ":" not in word):
        return False
    from diag.models.names.resolve import parse

    try:
        parse(word)
    except UserError:
        return False
    return True


def _takes_models(verb: Any) -> bool:
    return any(MODEL in parameter.opts for parameter in verb.params)


def _named(arguments: Sequence[str], alone: Sequence[str], verb: Any) -> list[str]:
    """Arguments in their order, with `--model` before each word that belongs to no option.

    Raises UserError for files.
    """
    takes = {name for parameter in verb.params for name in parameter.opts}
    for word in alone:
        if os.path.isfile(word):
            raise _no_model(word, takes, arguments)
    valued = {name for parameter in verb.params if not _is_flag(parameter) for name in parameter.opts}
    found, of_option, left = list[str](), False, list(alone)
    for word in arguments:
        if not of_option and left and word == left[0]:
            found += [MODEL, left.pop(0)]
        elif of_option or word != "--":
            found.append(word)
        of_option = not of_option and word in valued
    return found


def _is_flag(parameter: Any) -> bool:
    return bool(getattr(parameter, "is_flag", False) or getattr(parameter, "count", False))


def _no_model(file: str, takes: Collection[str], arguments: Sequence[str]) -> UserError:
    """The error for a file where a model may be named: what takes it. takes: the verb's options."""
    _refuse_plan(file, "a model")
    ending = os.path.splitext(file)[1].lower()
    options = [name for name, endings in OPTIONS.items() if ending in endings]
    option = next((name for one in options for name in (one, one.removesuffix("s")) if name in takes), None)
    tip = "a model is a name, or a folder; attnbias models lists names"
    if option in arguments:  # a pattern that the shell has written out
        whole = "give a folder: --texts DIR"
        tip = f"a pattern stands in quotes: --images 'DIR/*{ending}'" if option == "--images" else whole
    elif option is not None:
        tip = f"{option} {_short(file)}"
    return UserError(f"'{_short(file)}' is a file, and belongs to no option", tip)


def _refuse_plan(word: str, due: str) -> None:
    """Raises UserError for a plan in YAML. due: what was expected in its place."""
    if not word.lower().endswith(YAML) or not os.path.isfile(word):
        return
    verb = verb_of(Path(word))
    what = f"a plan for attnbias {verb}" if verb else "a YAML file"
    tip = for_verb(verb, word) if verb else "attnbias figures and attnbias train take plans in YAML"
    raise UserError(f"'{_short(word)}' is {what}, not {due}", tip)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _said(parameter: Any) -> str:
    """An option or argument as --help shows it."""
    if parameter.param_type_name == "option":
        return "/".join(parameter.opts)
    return str(parameter.metavar or parameter.name.upper()).strip("[]")


def _check_words(parameter: Any, words: Sequence[Any], times: int) -> None:
    """Raises UserError for an option that was given more than once, or empty. words: none of a flag."""
    texts = [word for word in words if isinstance(word, str)]
    if parameter.param_type_name != "option" or not texts:
        return
    if times > 1 and not parameter.multiple:
        last = _short(texts[-1])
        raise UserError(f"{_said(parameter)} is given {times} times", f"give it once: the last, '{last}'?")
    if not all(text.strip() for text in texts):
        raise UserError(f"{_said(parameter)} is empty", "give it a value, or leave it out")


def _check_values(said: str, words: Sequence[Any], values: Sequence[Any]) -> None:
    """Raises UserError for numbers and paths that no system takes. words: as typed. values: as read."""
    for word, value in zip(words, values, strict=False):
        if isinstance(value, Path) and not word.strip():
            raise UserError(f"{said} is empty", "name a file or folder; . is this one")
        if isinstance(value, Path):
            _check_path(str(value), said)
        if isinstance(value, int) and abs(value) > LARGEST:
            raise UserError(f"{said} is at most {LARGEST}", f"given: {_short(str(value))}")


def _at_home(context: Any, parameter: Any, value: Any) -> Any:
    """Paths with `~` for a home folder, which no shell expands in quotes or behind `=`."""
    try:
        if isinstance(value, list | tuple):
            return type(value)(_at_home(context, parameter, one) for one in value)
        return value.expanduser() if isinstance(value, Path) else value
    except RuntimeError as error:
        raise UserError(
            f"{_said(parameter)} '{value}': nobody here has this home", "give its path"
        ) from error


def _check_path(word: str, said: str) -> None:
    """Raises UserError for a path that the system does not take, whether something is there or not."""
    try:
        word.encode()
    except UnicodeEncodeError as error:  # the libraries that write and read tables and weights take no other
        tip = "give a name in UTF-8; what is there can be renamed"
        raise UserError(f"{said} '{_short(word)}' is not UTF-8", tip) from error
    try:
        os.lstat(Path(word))
    except (FileNotFoundError, NotADirectoryError):  # the verbs say what should be there
        return
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise UserError(f"{said} '{_short(word)}': {reason(error)}", "give another path") from error


def _short(word: str) -> str:
    """A word that fits into a line."""
    return word if len(word) <= 80 else f"{word[:40]}…{word[-20:]}"
