"""`attnbias intervene` and `attnbias interventions`: change attention, and see what it costs or gains."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from diag.cli.app import app, say
from diag.cli.options import (
    AsJson,
    BatchSize,
    Checkpoint,
    Device,
    Dtype,
    Images,
    Layers,
    Length,
    Limit,
    ModelArg,
    Overwrite,
    QuietFolder,
    RandomInit,
    Texts,
    Tokens,
    layer_ranges,
    names,
)


@app.command()
def intervene(
    model: Annotated[str, typer.Option("-m", "--model", help="[family:]name[@revision] or a folder.")],
    intervention: Annotated[
        list[str] | None,
        typer.Option(
            "--intervene",
            help="NAME[=STRENGTH][:LAYERS[/HEADS]], repeatable [default: xsa].",
        ),
    ] = None,
    scope: Annotated[
        str,
        typer.Option(help="One layer at a time, from the first on, up to the last."),
    ] = "one,first,last",
    heads: Annotated[
        bool, typer.Option("--heads", help="Also every head alone: layers × heads more passes.")
    ] = False,
    images: Images = None,
    texts: Texts = None,
    labelled: Annotated[
        bool, typer.Option("--labelled", help="The image folder is DIR/class/*.jpg: also accuracy.")
    ] = False,
    limit: Limit = 32,
    seq_len: Length = None,
    layers: Layers = None,
    tokens: Tokens = None,
    checkpoint: Checkpoint = None,
    model_arg: ModelArg = None,
    random_init: RandomInit = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--output-path", help="Folder [default: runs/intervene-NAME-KEY].")
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 8,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap and of random directions.")] = 0,
    as_json: AsJson = False,
    quiet: QuietFolder = False,
) -> None:
    """Change each layer's attention in turn: what it costs, and whether the bias predicts it."""
    from diag.show.terminal import StderrListener
    from diag.studies.intervene.plan import IntervenePlan
    from diag.studies.intervene.run import run_intervene
    from diag.studies.intervene.words import table

    plan = IntervenePlan.checked(
        models=(model,),
        interventions=tuple(intervention or ("xsa",)),
        scopes=tuple(part.strip() for part in scope.split(",")),
        heads=heads,
        labelled=labelled,
        images=images,
        texts=texts,
        limit=limit,
        seq_len=seq_len,
        layers=layer_ranges(layers),
        tokens=names(tokens),
        checkpoint=checkpoint,
        model_args=tuple(model_arg or ()),
        random_init=random_init,
        dtype=dtype,
        seed=seed,
        device=device,
        batch_size=batch_size,
    )
    with StderrListener(quiet=quiet) as listener:
        found = run_intervene(plan, out, overwrite=overwrite, listener=listener)
    if as_json:
        print(json.dumps(_document(found), indent=1, default=str))
    elif quiet:
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
def interventions(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
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


def _document(found: Any) -> dict[str, Any]:
    return {
        "folder": str(found.folder),
        "manifest": found.manifest,
        "sensitivity": json.loads(found.sensitivity.to_json(orient="records")),
        "relations": json.loads(found.relations.to_json(orient="records")),
    }
