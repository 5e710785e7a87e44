"""Options and plans: which field an option fills, and that what nobody typed is what a plan has by itself."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest
import typer

from diag.cli.attend import AttendOptions
from diag.cli.compare import CompareOptions
from diag.cli.intervene import InterveneOptions
from diag.cli.options import fields_of, with_options
from diag.cli.probe import ProbeOptions
from diag.errors import UserError
from diag.run.plan import ProbePlan
from diag.studies.attend.plan import AttendPlan
from diag.studies.intervene.plan import IntervenePlan

ONE: Any = ("demo:vit-p16",)


def test_every_field_of_a_plan_has_an_option() -> None:
    assert {"models", *fields_of(ProbeOptions(), ProbePlan)} == set(ProbePlan.model_fields)
    assert {"models", *fields_of(AttendOptions(model=["a"]), AttendPlan)} == set(AttendPlan.model_fields)


def test_what_nobody_typed_is_what_a_plan_has_by_itself() -> None:
    for given in (ProbeOptions(), CompareOptions()):
        assert ProbePlan.checked(models=ONE, **fields_of(given, ProbePlan)) == ProbePlan(models=ONE)
    own = {"interventions": ("xsa",), "scopes": ("one", "first", "last"), "limit": 32}
    intervene = fields_of(InterveneOptions(model=[*ONE]), IntervenePlan)
    assert IntervenePlan.checked(models=ONE, **intervene) == IntervenePlan(models=ONE, **own)
    image = "demo:astronaut"
    attend = fields_of(AttendOptions(model=[*ONE], patch="3,4", image=image, layer="1"), AttendPlan)
    assert AttendPlan.checked(models=ONE, **attend) == AttendPlan(
        models=ONE, patch=(3, 4), image=image, layer=1
    )


def test_words_become_values() -> None:
    given = ProbeOptions(
        metrics="cos-y-vself, excess", layers="0,2-3", intervene=["xsa:1"], model_args=None, batch_size="auto"
    )
    fields = fields_of(given, ProbePlan)
    assert fields["metrics"] == ("cos_y_vself", "excess")
    assert fields["layers"] == (0, 2, 3)
    assert fields["intervene"] == ("xsa:1",)
    assert fields["model_args"] == ()
    assert fields["batch_size"] == 0
    with pytest.raises(UserError, match="--layers does not understand 'x'"):
        fields_of(ProbeOptions(layers="x"), ProbePlan)


@pytest.mark.parametrize("kind", [ProbeOptions, CompareOptions, InterveneOptions, AttendOptions])
def test_every_option_says_what_it_is(kind: type) -> None:
    for name, hint in get_type_hints(kind, include_extras=True).items():
        (said,) = (mark for mark in get_args(hint) if isinstance(mark, typer.models.ParameterInfo))
        assert said.help, name


SEEN: list[ProbeOptions] = []


def verb(given: ProbeOptions) -> None:
    SEEN.append(given)


def test_typer_sees_the_options_of_a_verb() -> None:
    app = typer.Typer()
    app.command()(with_options(verb))
    app(["-m", "a", "--seq-len", "3", "--random-init"], standalone_mode=False)
    assert [ProbeOptions(model=["a"], seq_len=3, random_init=True)] == SEEN
