"""`attnbias intervene` and `attnbias interventions`: change attention, and see what it costs or gains."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from diag.cli import options
from diag.cli.app import app, records, say_failures
from diag.cli.options import Read, fields_of, models_of, output, with_options
from diag.cli.streams import answer
from diag.errors import UserError, say

if TYPE_CHECKING:
    from diag.studies.intervene.run import Sweep
    from diag.studies.intervene.together import Together


SCOPES = ("one", "first", "last")
SPARING = ("skip", "window")
"""What is done where it is asked which layers can be spared."""


def _scopes(text: str | None) -> tuple[str, ...]:
    return SCOPES if text is None else tuple(part.strip() for part in text.split(","))


@dataclass(frozen=True, kw_only=True)
class InterveneOptions:
    """What `attnbias intervene` can be told."""

    model: Annotated[
        list[str] | None,
        Option("-m", "--model", help="Model name, repeatable: [family:]name[@revision] or a folder."),
    ] = None
    series: options.Series = None
    interventions: Annotated[
        list[str] | None,
        Option(
            "--intervene",
            help="NAME[=STRENGTH][:LAYERS[/HEADS]], repeatable; 'attnbias interventions' lists them "
            "[default: xsa; skip, window with --within].",
        ),
        Read(lambda words: tuple(words or ("xsa",))),
    ] = None
    scopes: Annotated[
        str | None,
        Option(
            "--scope",
            help="One layer at a time, from the first on, up to the last "
            "[default: one,first,last; one with --within].",
        ),
        Read(_scopes),
    ] = None
    heads: Annotated[
        bool,
        Option("--heads", help="Also every head alone: layers × heads more passes."),
    ] = False
    within: Annotated[
        float | None,
        Option(min=0, help="Rank layers by cost, and name those that cost less than so many per cent."),
    ] = None
    images: options.Images = None
    texts: options.Texts = None
    labelled: Annotated[
        bool, Option("--labelled", help="The image folder is DIR/class/*.jpg: also accuracy.")
    ] = False
    limit: options.Limit = 32
    seq_len: options.Length = None
    layers: options.Layers = None
    tokens: options.Tokens = None
    checkpoint: options.Checkpoint = None
    model_args: options.ModelArgs = None
    random_init: options.RandomInit = False
    trust_remote_code: options.TrustRemoteCode = False
    out: Annotated[
        Path | None,
        output("Folder; of several models, where each gets its own [default: runs/intervene-NAME-KEY]."),
    ] = None
    overwrite: options.Overwrite = False
    device: options.Device = "auto"
    dtype: options.Dtype = "float32"
    batch_size: options.AutoBatchSize = "8"
    seed: Annotated[int, Option(help="Seed of the bootstrap and of all that interventions draw.")] = 0
    as_json: options.AsJson = False
    quiet: options.QuietFolder = False


@app.command()
@with_options
def intervene(given: InterveneOptions) -> None:
    """Change each layer's attention in turn: what it costs, and whether the bias predicts it."""
    from diag.run.plan import RUNS, specs_of
    from diag.show.terminal import StderrListener
    from diag.studies.intervene.plan import IntervenePlan
    from diag.studies.intervene.run import run_intervene, sweep_folder
    from diag.studies.intervene.together import together

    models, fields = models_of(given.model, given.series), fields_of(given, IntervenePlan)
    if not models:
        raise UserError(
            "name what to change with -m/--model NAME or --series NAME",
            "for example -m demo:lm, or --series demo; attnbias intervene --help shows more",
        )
    if given.within is not None:
        fields["interventions"] = tuple(given.interventions or SPARING)
        fields["scopes"] = ("one",) if given.scopes is None else fields["scopes"]
    plans = {name: IntervenePlan.checked(models=(name,), **fields) for name in models}
    for plan in plans.values():
        specs_of(plan)  # a mistyped name ends the command before anything is measured
    found: list[Sweep] = []
    failed: dict[str, str] = {}
    several, root = len(plans) > 1, given.out or RUNS
    with StderrListener(quiet=given.quiet) as listener:
        for name, plan in plans.items():
            folder = sweep_folder(plan, root) if several else given.out
            try:
                found.append(run_intervene(plan, folder, overwrite=given.overwrite, listener=listener))
            except UserError as error:
                failed[name] = str(error)
                if len(failed) == len(plans):
                    raise
    beside = together(found, root) if len(found) > 1 else None
    with answer(root if several else found[0].folder):
        _print(found, given, several, beside)
    for sweep in found:
        failed |= sweep.manifest["failed_inputs"]
        if not given.as_json and not given.quiet:
            say(f"folder: {sweep.folder}")
    if beside is not None and not given.as_json and not given.quiet:
        say(f"together: {beside.folder}")
    if failed:
        say_failures(failed)
        raise SystemExit(3)


def _print(sweeps: Sequence[Sweep], given: InterveneOptions, several: bool, beside: Together | None) -> None:
    """The sweeps one after the other, and beside each other; as JSON a document, or of several models a list
    of them.
    """
    from diag.studies.intervene.costs import beside_each_other, costs
    from diag.studies.intervene.words import table

    if given.as_json:
        documents = [
            {
                "folder": str(sweep.folder),
                "manifest": sweep.manifest,
                "sensitivity": records(sweep.sensitivity),
                "relations": records(sweep.relations),
                "costs": records(costs(sweep.sensitivity)),
            }
            for sweep in sweeps
        ]
        print(json.dumps(documents if several else documents[0], indent=1, default=str))
    elif given.quiet:
        print(*(sweep.folder for sweep in sweeps), sep="\n")
    else:
        told = [table(s.sensitivity, s.relations, s.manifest, within=given.within) for s in sweeps]
        if beside is not None and (lines := beside_each_other(beside.costs)):
            told.append("\n".join(lines))
        print(*told, sep="\n\n")


@app.command()
def interventions(as_json: options.JsonOnly = False) -> None:
    """List what can be done to attention, with definitions."""
    from diag.models.hooks.interventions import INTERVENTIONS

    if as_json:
        rows = {
            name: {"definition": entry.definition, "where": entry.where, "strength": entry.strength}
            for name, entry in INTERVENTIONS.items()
        }
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for name, entry in INTERVENTIONS.items():
        print(f"{name}" + ("" if entry.strength is None else f"={entry.strength:g}"))
        print(textwrap.fill(entry.definition, 80, initial_indent="    ", subsequent_indent="    "))
