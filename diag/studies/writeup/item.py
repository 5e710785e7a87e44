"""What all figures and tables of a plan have in common, and the types of what they may say."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _listed(given: object) -> object:
    """One value as a list of one."""
    return given if isinstance(given, list | tuple) or given is None else [given]


def _parted(given: object) -> object:
    """`a,b` as on the command line, beside a list."""
    return [part.strip() for part in given.split(",")] if isinstance(given, str) else given


def _layers(given: object) -> object:
    """`0,5-11` as on the command line, beside a number and a list of numbers."""
    if not isinstance(given, str):
        return _listed(given)
    found: list[int] = []
    for part in given.split(","):
        ends = re.fullmatch(r"\s*([0-9]+)(?:-([0-9]+))?\s*", part)
        if not ends:
            raise ValueError(f"layers '{part.strip()}' is neither a number nor a range such as 5-11")
        found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return found


Numbers = Annotated[tuple[Annotated[int, Field(gt=0)], ...], BeforeValidator(_listed)]
Names = Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)]
Parted = Annotated[tuple[str, ...], BeforeValidator(_parted), Field(min_length=1)]
Layers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_layers), Field(min_length=1)]
Published = bool | dict[str, str]
"""false; true: what the models' names stand for; or model -> name of what is published."""


class Strict(BaseModel):
    """A part of a plan, which has no other keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class WriteupItem(Strict):
    """A figure or table. name: of its files; by default the kind and the probe. caption: see `captions`.

    Each kind has `made(stem, material)`: what is written. It raises UserError where runs or metrics are
    lacking.
    """

    name: str | None = None
    caption: str | None = None


class OfProbe(WriteupItem):
    """model: only this one; tokens: only this token set."""

    probe: str
    model: str | None = None
    tokens: str | None = None


class Panels(WriteupItem):
    """A figure of panels. width: both columns of a paper, or one of them."""

    width: Literal["page", "column"] = "page"
