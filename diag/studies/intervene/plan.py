"""What a sweep is to do: a probe's plan, and interventions with their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field, field_validator

from diag.errors import UserError, one_of
from diag.models.hooks.interventions import Edit, parse
from diag.models.names.changes import CONTROLS, MATCHED, WRITTEN
from diag.run.plan import ProbePlan
from diag.studies.intervene.sweep import SCOPES


class IntervenePlan(ProbePlan):
    """A probe's plan, and what is to be done to the model."""

    flags: ClassVar[Mapping[str, str]] = {
        **ProbePlan.flags,
        "scopes": "--scope",
        "interventions": "--intervene",
    }

    interventions: tuple[str, ...] = Field(default=("xsa",), min_length=1)
    scopes: tuple[str, ...] = Field(default=("one",), min_length=1)
    heads: bool = False
    labelled: bool = False

    @field_validator("scopes")
    @classmethod
    def _known_scopes(cls, scopes: tuple[str, ...]) -> tuple[str, ...]:
        for scope in scopes:
            if scope not in SCOPES:
                raise ValueError(f"is one of {one_of(SCOPES)}")
        return scopes

    @field_validator("interventions")
    @classmethod
    def _known_interventions(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            parse(text)
        return texts

    @property
    def changes(self) -> tuple[str, ...]:
        return (*self.intervene, *self.interventions)

    def edits(self) -> list[Edit]:
        """The interventions, and behind them the matched control of each that has one.

        Raises UserError for two that the tables could not tell apart.
        """
        found = [parse(text, self.seed) for text in self.interventions]
        controls = [
            replace(edit, name=CONTROLS[edit.name], text=f"{CONTROLS[edit.name]}={_strength(edit)}")
            for edit in found
            if edit.name in CONTROLS and (isinstance(edit.strength, float) or CONTROLS[edit.name] == MATCHED)
        ]
        return _together([*found, *controls])


def _together(edits: Sequence[Edit]) -> list[Edit]:
    """Edits of one name and strength as one, on the layers of all of them: the tables tell no more apart.

    Raises UserError where such edits are of different heads, or take their strengths from different files.
    """
    found = dict[tuple[str, float | None], Edit]()
    for edit in edits:
        key = (edit.name, edit.strength if isinstance(edit.strength, float) else None)
        first = found.setdefault(key, edit)
        if (first.heads, first.strength) != (edit.heads, edit.strength):
            raise UserError(
                f"--intervene {first.text} and {edit.text}: the tables tell two such changes not apart",
                "sweep one after the other, into folders of their own; --heads sweeps every head alone",
            )
        layers = None if first.layers is None or edit.layers is None else first.layers | edit.layers
        found[key] = replace(first, layers=layers)
    return list(found.values())


def _strength(edit: Edit) -> str:
    """An edit's strength as it was typed: a number, or the file of one for each head."""
    typed = WRITTEN.fullmatch(edit.text)
    return str(edit.strength) if isinstance(edit.strength, float) or typed is None else str(typed[2])
