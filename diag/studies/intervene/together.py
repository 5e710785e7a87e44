"""Sweeps of several models beside each other: one table with a column of models, and one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from diag.inputs.items import sha256
from diag.results.folder import MANIFEST, PLAN
from diag.results.hashes import hashes
from diag.results.staging import Owner, pictures, settle
from diag.results.writing import write, write_json, writing
from diag.run.environment import command_line, environment
from diag.run.run_folder import alone_at_work
from diag.studies.intervene.costs import costs
from diag.studies.intervene.run import Sweep

TABLES = ("sensitivity.csv", "costs.csv")
OWNER = Owner("intervene-together", result=(PLAN, MANIFEST, *TABLES, *pictures("costs")))


@dataclass(frozen=True)
class Together:
    """Several sweeps in one folder. sensitivity, costs: their tables, with a column `model`."""

    folder: Path
    sensitivity: pd.DataFrame
    costs: pd.DataFrame


def together(sweeps: Sequence[Sweep], root: Path) -> Together:
    """Writes the tables of several sweeps, one below the other, into `root/together-KEY`, with a figure.

    Raises UserError where the folder cannot be written.
    """
    keys = [str(sweep.manifest.get("key", sweep.folder.name)) for sweep in sweeps]
    key = sha256("/".join(keys))
    folder = root / f"together-{key[:8]}"
    sensitivity = pd.concat([sweep.sensitivity for sweep in sweeps], ignore_index=True)
    each = [costs(sweep.sensitivity).assign(model=sweep.manifest["model"]["given"]) for sweep in sweeps]
    found = Together(folder, sensitivity, pd.concat(each, ignore_index=True))
    document: Mapping[str, Any] = {
        "kind": OWNER.verb,
        "key": key,
        "sweeps": [sweep.folder.name for sweep in sweeps],
        "models": [sweep.manifest["model"]["given"] for sweep in sweeps],
    }
    with alone_at_work(folder, OWNER, document) as place:
        if place is not None:
            _written(found, place, document)
    return found


def _written(found: Together, folder: Path, document: Mapping[str, Any]) -> None:
    from diag.show.figures.sensitivity import costs_of_models
    from diag.show.figures.write import save

    for name, table in zip(TABLES, (found.sensitivity, found.costs), strict=True):
        write(table, folder / name)
    figures: list[Path] = []
    if len(found.costs):
        with writing(folder / "figures"):
            figures = save(costs_of_models(found.costs), found.costs, folder / "figures", "costs")
    settle(folder)
    write_json(
        {
            **document,
            "command": command_line(),
            "status": "complete",
            "figures": [str(path.relative_to(folder)) for path in figures],
            "tables": hashes(folder, TABLES),
            "environment": environment(),
        },
        folder / MANIFEST,
    )
