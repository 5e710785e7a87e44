"""`attnbias train` and `attnbias variants`: a grid of small trainings, and what can be trained."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from diag.cli.app import app
from diag.cli.interrupts import interruptible
from diag.cli.options import AsJson, JsonOnly, QuietFolder, output
from diag.cli.plans import plans_for
from diag.cli.streams import answer
from diag.errors import say


@app.command()
def train(
    config: Annotated[
        Path, Argument(metavar="CONFIG", help="A plan in YAML, or the name of a shipped one, such as smoke.")
    ],
    out: Annotated[Path | None, output("Folder [default: runs/train-KEY].")] = None,
    device: Annotated[str, Option(help="auto, cpu or cuda:0.")] = "auto",
    workers: Annotated[int, Option(min=0, help="Processes that prepare batches.")] = 0,
    overwrite: Annotated[bool, Option("--overwrite", help="Train again what the folder holds.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="List the cells; train nothing.")] = False,
    as_json: AsJson = False,
    quiet: QuietFolder = False,
) -> None:
    """Train patch sizes × attention variants × seeds, probe them all, and say what removing V_self gains."""
    from diag.studies.train.cells import cells_of
    from diag.studies.train.plan import read_plan

    (config,) = plans_for("train", [config])
    plan = read_plan(config)
    if dry_run:
        cells = [cell.name for cell in cells_of(plan)]
        document = {"plan": plan.model_dump(mode="json"), "cells": cells}
        print(json.dumps(document, indent=1) if as_json else "\n".join(cells))
        return
    from diag.show.terminal import WIDTH, StderrListener, width
    from diag.studies.train.grid import run_train
    from diag.studies.train.summary import shown

    with (
        interruptible(lambda: "stopped; run the same command again to resume"),
        StderrListener(quiet=quiet) as listener,
    ):
        found = run_train(plan, out, device=device, workers=workers, overwrite=overwrite, listener=listener)
    if found is None:
        return
    with answer(found.folder):
        if as_json:
            document = {"folder": str(found.folder), "manifest": found.manifest}
            print(json.dumps(document, indent=1, default=str))
        elif quiet:
            print(found.folder)
        else:
            table, room = shown(found.tables), width()
            named = [str(column) for column in table]
            by_accuracy = any(column.startswith("accuracy") for column in named)
            kept = [column for column in named if not (by_accuracy and column.startswith("loss"))]
            print(table[kept].to_string(index=False, line_width=room if room < WIDTH else None))
            print(
                "",
                *(
                    textwrap.fill(sentence, 100 if room == WIDTH else min(room, 100))
                    for sentence in found.words
                ),
                sep="\n",
            )
    if not as_json and not quiet:
        say(f"folder: {found.folder}")


@app.command()
def variants(as_json: JsonOnly = False) -> None:
    """List the attention variants that can be trained, with definitions."""
    from diag.variants.text import listing

    rows = listing()
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for name, row in rows.items():
        forms = row["forms"]
        print(name + (f"[={'|'.join(forms)}]" if forms else ""))
        print(textwrap.fill(row["definition"], 80, initial_indent="    ", subsequent_indent="    "))
