"""`attnbias intervene` and `attnbias interventions`: change attention, and see what it costs or gains."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from diag.cli import options
from diag.cli.app import app, records, say
from diag.cli.options import Read, fields_of, output, with_options


@dataclass(frozen=True, kw_only=True)
class InterveneOptions:
    """What `attnbias intervene` can be told."""

    model: Annotated[str, Option("-m", "--model", help="[family:]name[@revision] or a folder.")]
    interventions: Annotated[
        list[str] | None,
        Option("--intervene", help="NAME[=STRENGTH][:LAYERS[/HEADS]], repeatable [default: xsa]."),
        Read(lambda words: tuple(words or ("xsa",))),
    ] = None
    scopes: Annotated[
        str,
        Option("--scope", help="One layer at a time, from the first on, up to the last."),
        Read(lambda text: tuple(part.strip() for part in text.split(","))),
    ] = "one,first,last"
    heads: Annotated[
        bool,
        Option("--heads", help="Also every head alone: layers × heads more passes."),
    ] = False
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
    out: Annotated[Path | None, output("Folder [default: runs/intervene-NAME-KEY].")] = None
    overwrite: options.Overwrite = False
    device: options.Device = "auto"
    dtype: options.Dtype = "float32"
    batch_size: options.BatchSize = 8
    seed: Annotated[int, Option(help="Seed of the bootstrap and of random directions.")] = 0
    as_json: options.AsJson = False
    quiet: options.QuietFolder = False


@app.command()
@with_options
def intervene(given: InterveneOptions) -> None:
    """Change each layer's attention in turn: what it costs, and whether the bias predicts it."""
    from diag.show.terminal import StderrListener
    from diag.studies.intervene.plan import IntervenePlan
    from diag.studies.intervene.run import run_intervene
    from diag.studies.intervene.words import table

    plan = IntervenePlan.checked(models=(given.model,), **fields_of(given, IntervenePlan))
    with StderrListener(quiet=given.quiet) as listener:
        found = run_intervene(plan, given.out, overwrite=given.overwrite, listener=listener)
    if given.as_json:
        of: dict[str, Any] = {"folder": str(found.folder), "manifest": found.manifest}
        of |= {"sensitivity": records(found.sensitivity), "relations": records(found.relations)}
        print(json.dumps(of, indent=1, default=str))
    elif given.quiet:
        print(found.folder)
    else:
        print(table(found.sensitivity, found.relations, found.manifest))
        say(f"folder: {found.folder}")
    failed = found.manifest["failed_inputs"]
    for name, why in failed.items():
        say(f"failed: {name}: {why}")
    if failed:
        raise SystemExit(3)


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
