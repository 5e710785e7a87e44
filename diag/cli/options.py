"""The options of the verbs, each declared once: what --help says of it, and how what was typed is read.

A verb takes one dataclass of options, in the order of its --help. An option that is called like a field of
the verb's plan fills it (`fields_of`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

from typer import Option

from diag.errors import UserError, ranges

if TYPE_CHECKING:
    from diag.run.plan import Plan

Options = TypeVar("Options")


@dataclass(frozen=True)
class Read:
    """Stands beside an option whose words mean something else. by: makes the plan's value of what was typed.

    `by` raises UserError where it does not understand.
    """

    by: Callable[[Any], Any]


def names(text: str | None) -> tuple[str, ...] | None:
    """`cos-y-vself, excess` → ("cos_y_vself", "excess")."""
    if text is None:
        return None
    return tuple(part.strip().replace("-", "_") for part in text.split(",") if part.strip())


def inputs_at_once(text: str) -> int:
    """`8` → 8, `auto` → 0. Raises UserError."""
    if text == "auto":
        return 0
    return whole_numbers(text, "--batch-size", "a number of inputs, or auto", count=1, least=1)[0]


def whole_numbers(
    text: str, said: str, tip: str, *, count: int | None = None, least: int | None = None
) -> tuple[int, ...]:
    """`64, 128` → (64, 128). said: the option. count: how many there must be. least: the smallest allowed.

    Raises UserError for anything else, and for more digits than any number of these needs.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        understood = re.fullmatch(r"-?[0-9]{1,15}", part) and (least is None or int(part) >= least)
        if not understood or count not in (None, len(parts)):
            part = text if understood else part
            raise UserError(f"{said} does not understand '{part}'", tip)
    return tuple(map(int, parts))


def layer_ranges(text: str | None) -> tuple[int, ...] | None:
    """`0,5-11` → (0, 5, …, 11), `last` → (-1,). Raises UserError."""
    return None if text is None else ranges(text, "--layers", "--layers 0,5-11", from_end=True)


def drawn(text: str) -> str:
    """What is drawn of figures, as it was typed. Raises UserError for anything else."""
    if text not in ("none", "png", "all"):
        raise UserError("--figures is 'none', 'png' or 'all'", f"given: '{text}'")
    return text


def listed(words: list[str] | None) -> tuple[str, ...]:
    """What a repeatable option was given; nothing if it was not."""
    return tuple(words or ())


Images = Annotated[
    str | None,
    Option(
        help="Image folder, file or 'pattern', hf:NAME, demo or demo-crops; for video models a folder of "
        "frames per clip."
    ),
]
Texts = Annotated[
    str | None,
    Option(help="Text file or folder, table FILE[,column=NAME], hf:NAME, 'some words', - or demo."),
]
Limit = Annotated[int, Option(help="At most so many inputs (images, or windows of text).")]
Length = Annotated[int | None, Option(help="Tokens per window of text [default: 128, or the context].")]
Series = Annotated[
    list[str] | None, Option(help="Models of a series, repeatable; 'attnbias models --series' lists them.")
]
Metrics = Annotated[
    str | None, Option(help="Names or groups, comma-separated, or all; see 'attnbias metrics'."), Read(names)
]
Layers = Annotated[
    str | None,
    Option(
        help="The model's own numbers of layers, such as 0,5-11, or 1:3 for 1 and 2; -1 or last is its last "
        "[default: all]."
    ),
    Read(layer_ranges),
]
Tokens = Annotated[
    str | None,
    Option(
        help="patch, all, cls, registers, prompt or detection; all for text; image, text, last or all where "
        "a language model reads images; image, text or all in diffusion transformers. Comma-separated "
        "[default: patch; all for text; image,text]."
    ),
    Read(names),
]
Values = Annotated[str, Option(help="as-computed, or bias-free: without what biases add to every value.")]
Checkpoint = Annotated[Path | None, Option(help="Your weights: safetensors, or a weights-only .pt.")]
ModelArgs = Annotated[
    list[str] | None,
    Option("--model-arg", help="key=value for the model's constructor, repeatable."),
    Read(listed),
]
RandomInit = Annotated[bool, Option("--random-init", help="Build the model without pretrained weights.")]
Null = Annotated[
    str | None,
    Option(
        help="untrained, or untrained=5: beside each model, 3 (or 5) of its architecture with fresh weights."
    ),
]
TrustRemoteCode = Annotated[
    bool, Option("--trust-remote-code", help="Let a hub repository run its own code.")
]
AllowRandom = Annotated[
    bool, Option("--allow-random", help="Measure a model that gives other numbers for the same input.")
]
Overwrite = Annotated[bool, Option("--overwrite", help="Measure again what the folder holds.")]
Device = Annotated[str, Option(help="auto, cpu, cuda:0, or spread: an hf: model over every GPU.")]
Dtype = Annotated[str, Option(help="float32, bfloat16 (bf16) or float16 (fp16).")]
AutoBatchSize = Annotated[
    str,
    Option(help="Inputs per forward pass, or auto: as many as memory allows; same table."),
    Read(inputs_at_once),
]
Exact = Annotated[bool, Option("--exact", help="Compute every query row, also beyond 2,048 tokens.")]
SampledRows = Annotated[
    int | None, Option(help="Query rows that stand for all of them beyond 2,048 tokens [default: 1024].")
]
Workers = Annotated[
    int | None,
    Option(help="Processes that decode images ahead [default: by cores on CUDA; on a CPU 1 for many]."),
]
Figures = Annotated[
    str, Option(help="all: PDF and PNG; png: no PDFs; none: no figures. Draws the others later."), Read(drawn)
]
Shard = Annotated[
    str | None, Option(help="Only the i-th of n shares, i/n [default: as torchrun or a Slurm array says].")
]
KeepSamples = Annotated[
    int, Option(help="Keep the values of the first N inputs, and of all others moments and quantiles.")
]
JsonOnly = Annotated[bool, Option("--json", help="Print JSON.")]
AsJson = Annotated[bool, Option("--json", help="Print one JSON document instead of a table.")]
QuietFolder = Annotated[bool, Option("-q", "--quiet", help="Print only the folder's path.")]
QuietRun = Annotated[bool, Option("-q", "--quiet", help="Print only the run's path.")]


def output(help: str) -> Any:
    """Where a verb writes: the option that is called so in all of them."""
    return Option("-o", "--output-path", help=help)


def with_options(verb: Callable[[Options], None]) -> Callable[..., None]:
    """A verb that takes a dataclass of options, as typer wants it: a function of every single option."""
    (options,) = (kind for name, kind in get_type_hints(verb).items() if name != "return")
    hints = get_type_hints(options, include_extras=True)

    @wraps(verb)
    def command(**given: Any) -> None:
        verb(options(**given))

    parameters = inspect.signature(options).parameters.values()
    command.__annotations__ = hints
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(annotation=hints[parameter.name]) for parameter in parameters]
    )
    return command


def fields_of(given: Any, plan: type[Plan]) -> dict[str, Any]:
    """What a verb's options say of its plan, by field: those of one name.

    Raises UserError where what was typed is not understood.
    """
    fields = {}
    for name, hint in get_type_hints(type(given), include_extras=True).items():
        if name in plan.model_fields:
            read = next((mark.by for mark in hint.__metadata__ if isinstance(mark, Read)), None)
            typed = getattr(given, name)
            fields[name] = typed if read is None else read(typed)
    return fields


def models_of(given: list[str] | None, series: list[str] | None) -> tuple[str, ...]:
    """The models that were named, one by one and as series, each once.

    Raises UserError for a series that is not known.
    """
    from diag.models.names.series import members

    found = [*(given or ()), *(name for one in series or () for name in members(one))]
    return tuple(dict.fromkeys(found))
