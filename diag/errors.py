"""The errors a user meets: what was given, what is allowed, what to type. Two lines, never a traceback."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.util import find_spec

OBEYED = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal would obey, not show: control characters, changes of direction, bytes that are no text."""

LARGEST = 2**63 - 1
"""The largest whole number that every library takes."""

EXTRAS = {
    "timm": ("timm", "vision"),
    "open_clip": ("open_clip_torch", "vision"),
    "torchvision": ("torchvision", "vision"),
    "skimage": ("scikit-image", "vision"),
    "transformers": ("transformers", "text"),
    "huggingface_hub": ("huggingface_hub", "text"),
    "accelerate": ("accelerate", "text"),
    "datasets": ("datasets", "text"),
    "transformer_lens": ("transformer-lens", "tl"),
    "webdataset": ("webdataset", "train"),
    "diffusers": ("diffusers", "diffusers"),
}
"""Libraries that come with an extra alone: as they are imported -> as they are installed, and the extra."""

DIGITS = 5
"""Of the number of a layer or head. No model has more, and a range of billions would fill memory."""

NONE = 1, 0
"""The ends of no number at all."""


class UserError(Exception):
    """Something the user can mend: `str(error)` is the first line, `tip` the second, `exit_code` the code.

    The tip is a note of the exception, too: a traceback shows both lines.
    """

    exit_code = 2

    def __init__(self, message: str, tip: str | None = None) -> None:
        super().__init__(message)
        self.tip = tip
        if tip:
            self.add_note(f"tip: {tip}")


class UnreadableInput(UserError):  # noqa: N818  it is no mistake of anybody's
    """One input that could not be read; the run goes on without it."""


class BadInputs(UserError):  # noqa: N818  it is no mistake of anybody's
    """Inputs that nothing can be measured of, told when their batch runs: it is run again without them.

    inputs: id → why.
    """

    def __init__(self, inputs: Mapping[str, str], tip: str | None = None) -> None:
        name, why = next(iter(inputs.items()))
        more = f" and {len(inputs) - 1} more" if len(inputs) > 1 else ""
        super().__init__(f"{why} (input '{name}'{more})", tip)
        self.inputs = dict(inputs)


class NotFinite(BadInputs):
    """Inputs of which the model makes NaN or infinity; each is told by the layer that first showed it."""

    def __init__(self, inputs: Mapping[str, str]) -> None:
        super().__init__(inputs, "the weights or activations hold NaN or infinity; try --dtype float32")


class MeasurementError(UserError):
    """The model ran, but what it did cannot be measured honestly; names the layer."""

    exit_code = 1


def not_installed(what: str, library: str) -> UserError:
    """The error where something needs a library that is not there: it names the extra that brings it."""
    package, extra = EXTRAS[library]
    return UserError(f"{what} needs {package}, which is not installed", f'pip install "attnbias[{extra}]"')


def need(what: str, *libraries: str) -> None:
    """Raises UserError for the first library that is not installed. None of them is imported.

    what: what needs them, as it was given. libraries: keys of `EXTRAS`.
    """
    for library in libraries:
        if find_spec(library) is None:
            raise not_installed(what, library)


def visible(text: str, *, keep: str = "") -> str:
    """Text with what a terminal would obey written out, as JSON writes it. keep: such signs that stay.

    File names and model names are whatever somebody called them.

    >>> visible("a\\x1b[2J\\nb")
    'a\\\\u001b[2J\\\\u000ab'
    """
    return OBEYED.sub(lambda found: found[0] if found[0] in keep else f"\\u{ord(found[0]):04x}", text)


def say(text: str) -> None:
    """A line on stderr. It is advice: where it cannot be written it is lost, and nothing else is."""
    with suppress(OSError, ValueError):  # ValueError: the stream is closed
        print(visible(" ".join(text.splitlines())), file=sys.stderr, flush=True)


def did_you_mean(given: str, allowed: Iterable[str]) -> str | None:
    """The tip for a mistyped name: up to three near names, or None where nothing is near.

    >>> did_you_mean("vit_bse", ["vit_base", "gpt2"])
    "did you mean 'vit_base'?"
    """

    def likeness(name: str) -> float:
        # names carry long endings (…_patch32_224.augreg_in21k): compare with the beginning as well
        pairs = (name, name[: len(given)], name.partition(":")[2])  # without the family, too
        return max(difflib.SequenceMatcher(None, given.lower(), text.lower()).ratio() for text in pairs)

    nearest = sorted((-likeness(name), name) for name in set(allowed))[:3]
    near = [name for score, name in nearest if -score > 0.6]
    return f"did you mean {one_of(near)}?" if near else None


def one_of(names: Iterable[str]) -> str:
    """`'a'`, `'a' or 'b'`, `'a', 'b' or 'c'`: a choice in words."""
    quoted = [f"'{name}'" for name in names]
    if len(quoted) <= 1:
        return "".join(quoted)
    return ", ".join(quoted[:-1]) + " or " + quoted[-1]


def ranges(text: str, said: str, example: str, *, from_end: bool = False) -> tuple[int, ...]:
    """`0,5-11` → (0, 5, …, 11), each once, in the order written; `1:3` → (1, 2), as Python has it.

    said: where it was written, for the error; example: what to write instead. from_end: whether -1, or
    `last`, is the last, `-4-last` and `-4:` the last four. Raises UserError where a part is no number or
    range, or counts further than models do.
    """
    found: dict[int, None] = {}
    end = "-?[0-9]+|last" if from_end else "[0-9]+"
    for part in map(str.strip, text.split(",")):
        ends = re.fullmatch(f"({end})(?:-({end}))?", part) or re.fullmatch(f"({end})?:({end})?", part)
        if ends and max(len(end.lstrip("-0")) for end in ends.groups("")) > DIGITS:
            raise UserError(f"{said} goes beyond every model with '{part}'", f"for example {example}")
        first, last = _ends(ends, ":" in part) if ends else NONE
        if from_end and re.fullmatch("[0-9]*:", part):
            raise UserError(
                f"{said} does not say where '{part}' ends: only the model knows how many there are",
                f"give its end as well: {first}:{first + 4}; -4: are the last four",
            )
        if (first < 0) != (last < 0):
            raise UserError(
                f"{said} counts '{part}' from both ends",
                f"count from one: {example} from the first, -4-last for the last four",
            )
        span = range(first, last + 1)
        if not span:
            raise UserError(f"{said} does not understand '{part}'", f"for example {example}")
        found |= dict.fromkeys(span)
    return tuple(found)


def _ends(typed: re.Match[str], cut: bool) -> tuple[int, int]:
    """The first and the last number of a range as typed. cut: of a slice, which is without its end."""
    first, last = (None if end is None else int(end.replace("last", "-1")) for end in typed.groups())
    if cut and last == 0:
        return NONE
    if cut:
        return first or 0, -1 if last is None else last - 1
    assert first is not None
    return first, first if last is None else last


def counted(number: int, what: str) -> str:
    """
    >>> counted(1, "layer"), counted(12, "layer")
    ('1 layer', '12 layers')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"


def spans(numbers: Iterable[int]) -> str:
    """Numbers as `ranges` reads them: `0-2, 4-6`, `3`.

    >>> spans([6, 0, 1, 2, 4, 5])
    '0-2, 4-6'
    """
    parts = list[list[int]]()
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
