"""The manifest of a finished folder, checked once as it is read: whoever reads one can rely on its fields.

What other versions add stays, and what they lacked is filled in with what its absence means. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diag.errors import UserError
from diag.inputs.mistakes import WORDS, mistake
from diag.inputs.outside import json_of
from diag.results.folder import MANIFEST, is_finished

FORMAT = 1
"""Of what probe and attend write; written to the manifest. A folder of another format is not read."""

PROBE, ATTEND, AUDIT = "probe", "attend", "audit"
"""Verbs; the manifest of a probe names none."""


class _Read(BaseModel):
    """Fields that are read, of the type that JSON gives them; others may be there."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Model(_Read):
    given: str
    resolved: str | None = None
    tower: str
    takes: str | None = None
    tokenizer: str | None = None
    family: str | None = None
    layers: int | None = Field(default=None, ge=0, lt=10_000)
    notes: list[Any] | None = None
    skipped_layers: dict[str, Any] | None = None
    skipped_numbers: dict[str, int] | None = None


class _Input(_Read):
    source: str | None = None
    sha256: str | None = None


class _Environment(_Read):
    packages: dict[str, Any] | None = None


class _Any(_Read):
    """What manifests of all kinds may hold."""

    format: int | None = None
    kind: str | None = None
    key: str | None = None
    status: str | None = None
    command: str | None = None
    plan: dict[str, Any] | None = None
    environment: _Environment | None = None
    seconds: float | None = None
    figures: list[str] = []
    failed_models: dict[str, str] = {}
    failed_inputs: dict[str, str] = {}


class _Probe(_Any):
    models: list[_Model] = []
    inputs: dict[str, _Input] = {}


_Pair = Annotated[list[int], Field(min_length=2, max_length=2)]


class _Target(_Read):
    layer: int | None = None
    depth: float | None = None
    head: int | None = None
    patch: _Pair | None = None
    pixel: _Pair | None = None


class _Viewed(_Read):
    given: str
    resolved: str
    layer: int
    module: str
    heads: int
    n_tokens: int
    input: str
    picture: str | None = None


class _ViewedPatch(_Viewed):
    tower: Literal["vision"]
    target: _Pair
    grid: _Pair


class _ViewedToken(_Viewed):
    tower: Literal["text", "language"]
    target: int
    target_text: str


class _Attend(_Any):
    plan: _Target | None = None  # type: ignore[assignment]
    models: list[Annotated[_ViewedPatch | _ViewedToken, Field(discriminator="tower")]] = []
    input: _Input | None = None


class _Audited(_Read):
    model: str
    tower: str
    resolved: str | None = None


class _Audit(_Any):
    models: list[_Audited] = []
    verdicts: dict[str, dict[str, str]] = {}


class _Changed(_Read):
    given: str


class _Intervene(_Any):
    model: _Changed
    tower: str


class _Readout(_Any):
    model: _Changed
    classes: int
    chance: float
    words: list[str] = []


class _Train(_Any):
    tables: list[str]
    words: list[str]


KINDS: Mapping[str, tuple[type[_Any], str]] = {
    PROBE: (_Probe, "measure it again: attnbias probe … -o {folder} --overwrite"),
    ATTEND: (_Attend, "measure it again: attnbias attend … -o {folder} --overwrite"),
    AUDIT: (_Audit, "audit again: attnbias audit … -o {folder} --overwrite"),
    "compare": (_Any, "compare again into another folder: attnbias compare … -o FOLDER"),
    "intervene": (_Intervene, "measure it again: attnbias intervene … -o {folder} --overwrite"),
    "readout": (_Readout, "read it again: attnbias readout … -o {folder} --overwrite"),
    "train": (_Train, "train again: attnbias train … -o {folder} --overwrite"),
}
"""Verb -> the fields that are read of its manifest, and what makes the folder anew."""

FILLED = ("failed_models", "failed_inputs", "figures", "models", "inputs", "verdicts", "words")
"""What is empty where a manifest lacks it."""


def read(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of a folder that the verb `kind` finished; one of another verb comes as it is.

    Raises UserError where it cannot be read, is of another version, or a field is not what it should be.
    """
    fields, tip = KINDS[kind][0], again(folder, kind)
    found = json_of(folder / MANIFEST, "manifest", tip=tip)
    if found.get("kind", PROBE) != kind:
        return found
    if kind in (PROBE, ATTEND) and found.get("format") != FORMAT:
        raise UserError(f"'{folder}' has format {found.get('format')}; this version reads {FORMAT}", tip)
    try:
        checked = fields.model_validate(found)
    except ValidationError as error:
        steps, why, given = mistake(error)
        place = ".".join(map(str, steps))
        why = why if why == WORDS["missing"] else f"is {given!r:.60}: it {why}"
        raise UserError(f"cannot read manifest '{folder / MANIFEST}': '{place}' {why}", tip) from error
    lacking = [name for name in FILLED if name in fields.model_fields and name not in found]
    return {name: getattr(checked, name) for name in lacking} | found


def finished(folder: Path, kind: str, what: str, tip: str) -> dict[str, Any]:
    """The manifest of a folder that the verb `kind` finished.

    what: a result of it, in words. tip: what makes one. Raises UserError where there is none, or it is of
    another verb.
    """
    if not is_finished(folder):
        raise UserError(f"'{folder}' is not a finished {what}", tip)
    manifest = read(folder, kind)
    if manifest.get("kind") != kind:
        raise UserError(f"'{folder}' was not made by attnbias {kind}", again(folder, kind))
    return manifest


def again(folder: Path, kind: str) -> str:
    """What to type to have a folder anew."""
    return KINDS[kind][1].format(folder=folder)
