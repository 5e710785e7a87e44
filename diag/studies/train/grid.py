"""A grid carried out: every cell trained, every trained model probed, tables and figures written.

    plan.json  cells/CELL/…  probe/ (a run folder over all cells)  probed/ (its inputs)
    results.md  results.csv (a row per cell)  outcomes.csv  …  figures/  manifest.json (written last)

Cells are independent: each process under torchrun takes every n-th, and the last to finish goes on to the
probe. Running the same command again resumes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from diag.errors import UserError
from diag.inputs.tables import COUNT, NAME, OPEN, Layout, read_table
from diag.measure.device import device_of
from diag.results.folder import MANIFEST, PLAN
from diag.results.hashes import edited, hashes
from diag.results.manifest import again, finished
from diag.results.manifest import read as manifest_of
from diag.results.staging import Owner, clear, pictures, remove, settle
from diag.results.tables import read_layers
from diag.results.writing import write, write_json
from diag.run.environment import command_line, environment
from diag.run.plan import RUNS, ProbePlan
from diag.run.prepared import Prepared
from diag.run.processes import share_of
from diag.run.progress import Listener, Silent
from diag.run.run import run_probe
from diag.run.run_folder import PROBE, at_work, key_of
from diag.studies.train.cells import Cell, card_of, cells_of, train_cell
from diag.studies.train.outcomes import PLAIN, SHOWN, TABLES, outcome_tables
from diag.studies.train.plan import TrainPlan
from diag.studies.train.summary import shown, words
from diag.studies.train.tasks import Task, task_of

LOCK = "cells/.lock"

TRAIN = Owner(
    "train",
    result=(
        *(PLAN, MANIFEST, "results.md", *(f"{name}.csv" for name in ("results", *TABLES))),
        *(f"cells/*/{name}" for name in ("log.csv", "monitor.csv", "card.json")),
        *(f"cells/*/model/*.{ending}" for ending in ("json", "safetensors", "txt", "jinja")),
        *("probed/*.png", "probed/*.txt"),
        *PROBE.inside("probe"),
        *pictures("gain-*", "compensation-*", "alpha-*", "steps-*"),
    ),
    work=(LOCK, "cells/*/checkpoint.pt", *PROBE.inside("probe/.next"), "probe/.next/.staged.json"),
    kept=("cells/*/checkpoint.pt", "cells/*/card.json"),
)

RESULTS = (
    *("accuracy", "loss", "held_out", "steps", "parameters"),
    *("seconds_per_step", "initial_sha256", "sha256"),
)
"""Of a cell's card, columns of the results."""


LOGS = {
    "log": Layout({"step": COUNT, "loss": OPEN}),
    "monitor": Layout({"step": COUNT, "metric": NAME, "value": OPEN}),
}
"""What a cell's tables hold, by their name."""


@dataclass(frozen=True)
class TrainedGrid:
    """A finished grid: its folder, tables by name, and what they say in words."""

    folder: Path
    tables: Mapping[str, pd.DataFrame]
    words: Sequence[str]
    manifest: Mapping[str, Any]


def run_train(
    plan: TrainPlan,
    folder: Path | None = None,
    *,
    device: str = "auto",
    workers: int = 0,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> TrainedGrid | None:
    """Trains, probes and tabulates a grid in `folder` (default: `runs/train-KEY`); None from a process that
    leaves the rest to others.

    Raises UserError for what the user can mend.
    """
    listener = listener or Silent()
    stamps = plan.stamps()
    key = plan.key_of(stamps)
    folder = folder or RUNS / f"train-{key[:8]}"
    what = {"kind": "train", "key": key, "plan": plan.model_dump(mode="json")}
    inputs = {name: {"source": getattr(plan, name), "stamp": stamp} for name, stamp in stamps.items()}
    document = what | {"inputs": inputs, "command": command_line()}
    share = share_of(None, os.environ)
    if overwrite and share.of > 1:
        raise UserError(
            "--overwrite with several processes would remove what others train", f"rm -r {folder}"
        )
    on = device_of(device, share.local_rank)
    if not isinstance(on, torch.device):
        raise UserError(f"--device {device} is for one large model", "--device auto, cpu or cuda:0")
    started, cells = time.time(), cells_of(plan)
    with at_work(folder, TRAIN, document, lock=LOCK, overwrite=overwrite, keep=share.of > 1) as work:
        if work is None:
            listener.say(f"already complete: {folder} (train again with --overwrite)")
            for note in edited(folder, manifest_of(folder, "train")):
                listener.say(note)
            return open_grid(folder)
        task = task_of(plan)
        mine = range(share.rank, len(cells), share.of)
        listener.say(f"{len(mine)} of {len(cells)} cells, {plan.recipe.steps} steps each, on {on}")
        for number in mine:
            cell = cells[number]
            if not work.locks.take(number):
                listener.say(f"{cell.name} is in the hands of another process")
                continue
            listener.start(cell.name, plan.recipe.steps)
            own, hear = work.place / "cells" / cell.name, listener.advance
            train_cell(plan, cell, task, own, device=on, workers=workers, advance=hear)
            remove(work.place, TRAIN, [f"cells/{cell.name}/checkpoint.pt"])
            work.locks.give(number)
        there = [(work.place / "cells" / cell.name / "card.json").exists() for cell in cells]
        if not all(there) or not work.locks.take(len(cells)):
            listener.say("other processes are at work; the last one probes and tabulates")
            return None
        if plan.stamps() != stamps:
            raise UserError(
                f"what '{folder}' was trained on was replaced meanwhile",
                "start again, in another folder (-o) or with --overwrite, when it no longer changes",
            )
        _finish(plan, cells, task, work.place, document, str(on), listener, started)
    clear(folder, TRAIN, TRAIN.work)
    return open_grid(folder)


def open_grid(folder: Path) -> TrainedGrid:
    """A finished grid folder. Raises UserError if it is not one."""
    manifest = finished(folder, "train", f"grid (no {MANIFEST})", "attnbias train CONFIG -o FOLDER")
    tip = again(folder, "train")
    layouts = dict.fromkeys(manifest["tables"], PLAIN) | {"outcomes": SHOWN}
    tables = {
        name: read_table(folder / f"{name}.csv", layout, "table", tip=tip) for name, layout in layouts.items()
    }
    return TrainedGrid(folder, tables, manifest["words"], manifest)


def _finish(
    plan: TrainPlan,
    cells: Sequence[Cell],
    task: Task,
    folder: Path,
    document: Mapping[str, Any],
    device: str,
    listener: Listener,
    started: float,
) -> None:
    from diag.show.figures.training import outcome_figures
    from diag.show.figures.write import save_all

    layers = _probe(plan, cells, task, folder, device, listener)
    cards = {cell: card_of(folder / "cells" / cell.name) for cell in cells}
    results = pd.DataFrame(
        [{**cell.facts, **{name: card.get(name) for name in RESULTS}} for cell, card in cards.items()]
    )
    alphas = pd.DataFrame(
        [
            {**cell.facts, "layer": int(layer), "head": head, "alpha": alpha}
            for cell, card in cards.items()
            for layer, found in card["alphas"].items()
            for head, alpha in enumerate(found)
        ]
    )
    monitor, log = (_curves(cells, folder, name) for name in ("monitor", "log"))
    tables = {"results": results, **outcome_tables(results, layers, alphas, monitor, log)}
    for name, table in tables.items():
        write(table, folder / f"{name}.csv")
    write(shown(tables), folder / "results.md")
    figures = save_all(outcome_figures(tables), folder / "figures")
    said = words(tables)
    settle(folder)
    write_json(
        {
            **document,
            "status": "complete",
            "tables": list(tables),
            "hashes": hashes(folder, (f"{name}.csv" for name in tables)),
            "words": said,
            "figures": [str(path.relative_to(folder)) for path in figures],
            "device": device,
            "seconds": round(time.time() - started, 3),
            "environment": environment(),
        },
        folder / MANIFEST,
    )


def _probe(
    plan: TrainPlan, cells: Sequence[Cell], task: Task, folder: Path, device: str, listener: Listener
) -> pd.DataFrame:
    """The layers table of every trained model; the model column holds the cell's name."""
    paths, probe = {f"cells/{cell.name}/model": cell.name for cell in cells}, Path("probe")
    with chdir(folder):  # names in the tables depend neither on the folder's place nor on how it was given
        given = task.probed(Path("probed"))
        what = ProbePlan.checked(models=tuple(paths), limit=plan.probe_limit, device=device, **given)
        earlier = key_of(probe) not in (None, Prepared.of(what).key)
        run = run_probe(what, probe, overwrite=earlier, listener=listener)
    if run.manifest["failed_models"]:
        name, why = next(iter(run.manifest["failed_models"].items()))
        raise UserError(f"'{name}' could not be probed: {why}", "run the same command again")
    layers = read_layers(folder / "probe")
    return layers.assign(model=layers["model"].map(paths))


def _curves(cells: Sequence[Cell], folder: Path, name: str) -> pd.DataFrame:
    """`log.csv` or `monitor.csv` of every cell, one below the other, behind the cell's columns."""
    frames = []
    for cell in cells:
        file = folder / "cells" / cell.name / f"{name}.csv"
        tip = f"remove '{file.parent}' and run the same command again"
        frame = read_table(file, LOGS[name], "table", tip=tip) if file.stat().st_size > 1 else pd.DataFrame()
        frames.append(frame.assign(**cell.facts))
    return pd.concat(frames, ignore_index=True)
