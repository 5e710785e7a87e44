"""`attnbias intervene` and `attnbias interventions`: change attention, and see what it costs or gains."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from diag.cli.app import app, say
from diag.cli.options import ranges


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
    images: Annotated[str | None, typer.Option(help="Image folder or file, hf:NAME, or 'demo'.")] = None,
    texts: Annotated[str | None, typer.Option(help="Text file or folder, hf:NAME, or 'demo'.")] = None,
    labelled: Annotated[
        bool, typer.Option("--labelled", help="The image folder is DIR/class/*.jpg: also accuracy.")
    ] = False,
    limit: Annotated[int, typer.Option(help="At most so many inputs (images, or windows of text).")] = 32,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens per window of text [default: 128, or the context].")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Depth indices such as 0,5-11 [default: all].")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Your weights: safetensors, or a weights-only .pt.")
    ] = None,
    model_arg: Annotated[
        list[str] | None, typer.Option(help="key=value for the model's constructor, repeatable.")
    ] = None,
    random_init: Annotated[
        bool, typer.Option("--random-init", help="Build the model without pretrained weights.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--output-path", help="Folder [default: runs/intervene-NAME-KEY].")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Measure again what the folder holds.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    batch_size: Annotated[int, typer.Option(help="Inputs per forward pass.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap and of random directions.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document instead of a table.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print only the folder's path.")] = False,
) -> None:
    """Change each layer's attention in turn: what it costs, and whether the bias predicts it."""
    from diag.intervene.plan import checked
    from diag.intervene.run import run_intervene
    from diag.intervene.words import table
    from diag.terminal import StderrListener

    plan = checked(
        models=(model,),
        interventions=tuple(intervention or ("xsa",)),
        scopes=tuple(part.strip() for part in scope.split(",")),
        heads=heads,
        labelled=labelled,
        images=images,
        texts=texts,
        limit=limit,
        seq_len=seq_len,
        layers=ranges(layers),
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
    from diag.interventions import INTERVENTIONS

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
