"""`attnbias readout`: which layer can be read, by linear and by attentive probes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from diag.cli import options
from diag.cli.app import app, records, say_failures
from diag.cli.options import Read, fields_of, output, with_options
from diag.cli.streams import answer
from diag.errors import say


@dataclass(frozen=True, kw_only=True)
class ReadoutOptions:
    """What `attnbias readout` can be told."""

    models: Annotated[
        str,
        Option("-m", "--model", help="Model name: [family:]name[@revision] or a folder."),
        Read(lambda name: (name,)),
    ]
    images: Annotated[str, Option(help="Labelled images, DIR/class/*.jpg, or demo-crops.")]
    limit: Annotated[int, Option(help="At most so many images, spread evenly over the folder.")] = 1000
    folds: Annotated[int, Option(help="Parts; each is predicted by classifiers of the others.")] = 5
    layers: options.Layers = None
    checkpoint: options.Checkpoint = None
    model_args: options.ModelArgs = None
    random_init: options.RandomInit = False
    trust_remote_code: options.TrustRemoteCode = False
    out: Annotated[Path | None, output("Folder [default: runs/readout-NAME-KEY].")] = None
    overwrite: options.Overwrite = False
    device: options.Device = "auto"
    dtype: options.Dtype = "float32"
    batch_size: options.AutoBatchSize = "8"
    seed: Annotated[int, Option(help="Seed of the parts and of the bootstrap.")] = 0
    as_json: options.AsJson = False
    quiet: options.QuietFolder = False


@app.command()
@with_options
def readout(given: ReadoutOptions) -> None:
    """Read the class of an image from each layer: linear on mean and class token, and attentive."""
    from diag.show.terminal import StderrListener
    from diag.studies.readout.plan import ReadoutPlan
    from diag.studies.readout.run import run_readout
    from diag.studies.readout.words import table

    plan = ReadoutPlan.checked(**fields_of(given, ReadoutPlan))
    with StderrListener(quiet=given.quiet) as listener:
        found = run_readout(plan, given.out, overwrite=given.overwrite, listener=listener)
    with answer(found.folder):
        if given.as_json:
            document = {
                "folder": str(found.folder),
                "manifest": found.manifest,
                "readout": records(found.readout),
                "relations": records(found.relations),
            }
            print(json.dumps(document, indent=1, default=str))
        elif given.quiet:
            print(found.folder)
        else:
            print(table(found.readout, found.relations, found.manifest))
    if not given.as_json and not given.quiet:
        say(f"folder: {found.folder}")
    if failed := found.manifest["failed_inputs"]:
        say_failures(failed)
        raise SystemExit(3)
