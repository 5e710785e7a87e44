"""What an audit gives, and the folder it is kept in. No torch.

hooks.csv       one row per model, layer and hook: relative error, what is left of it, the reason
leaks.csv       one row per model, case, change and layer: by how much the watched tokens change
manifest.json   "kind": "audit", with a sentence on hooks and one on leaks per tower; written last
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from diag.errors import UserError
from diag.inputs.items import Inputs
from diag.inputs.tables import NAME, OPEN, PLACE, TEXT, Layout, read_table
from diag.results.folder import MANIFEST, PLAN, is_finished
from diag.results.hashes import hashes
from diag.results.manifest import AUDIT, again
from diag.results.manifest import read as manifest_of
from diag.results.staging import Owner, settle
from diag.results.writing import write as write_table
from diag.results.writing import write_json
from diag.run.environment import command_line, environment
from diag.studies.audit.plan import AuditPlan
from diag.studies.audit.words import verdicts

HOOKS, LEAKS = "hooks.csv", "leaks.csv"

OWNER = Owner(AUDIT, result=(PLAN, MANIFEST, HOOKS, LEAKS))

_OF_TOWER = {"model": NAME, "tower": NAME}
LAYOUTS = {
    HOOKS: Layout(
        _OF_TOWER
        | {"layer": PLACE, "hook": NAME, "path": TEXT, "of": NAME}
        | {"relative_error": OPEN, "remaining_error": OPEN, "reason": NAME, "detail": TEXT}
    ),
    LEAKS: Layout(
        _OF_TOWER
        | {"case": NAME, "changed": NAME, "layer": PLACE, "change": OPEN, "noise": OPEN, "control": OPEN}
        | {"level": NAME, "why": TEXT}
    ),
}
"""What the tables hold, by file. An error is missing where shapes allow none; layer -1 is the output."""


@dataclass(frozen=True)
class Audited:
    """What was found of each model.

    hooks: one row per model, tower, layer and hook; columns of `LAYOUTS`, `reason` one of
        `diag.studies.audit.reasons`. leaks: one row per model, tower, case, change and layer.
    models: one entry per tower: what its name resolved to, its layers, what is skipped.
    failed: model -> why it is missing.
    """

    hooks: pd.DataFrame
    leaks: pd.DataFrame
    models: Sequence[Mapping[str, Any]]
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def verdicts(self) -> dict[str, dict[str, str]]:
        """Model and tower -> "hooks" and "leaks", a sentence each."""
        return verdicts(self.hooks, self.leaks)


def table_of(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rows in the columns of a table, also where there are none."""
    return rows.reindex(columns=list(LAYOUTS[name].needed))


def write(found: Audited, plan: AuditPlan, folder: Path, given: Mapping[str, Inputs]) -> None:
    """Writes the folder. Raises UserError if it cannot."""
    write_table(found.hooks, folder / HOOKS)
    write_table(found.leaks, folder / LEAKS)
    settle(folder)
    write_json(
        {
            "kind": AUDIT,
            "status": "partial" if found.failed else "complete",
            "key": plan.key(given),
            "plan": plan.model_dump(mode="json"),
            "command": command_line(),
            "inputs": {kind: {"source": x.source, "sha256": x.digest} for kind, x in given.items()},
            "models": [dict(entry) for entry in found.models],
            "verdicts": found.verdicts,
            "failed_models": dict(found.failed),
            "environment": environment(),
            "tables": hashes(folder, (HOOKS, LEAKS)),
        },
        folder / MANIFEST,
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an audit's folder. Raises UserError if it is none, or cannot be read."""
    if not is_finished(folder):
        raise UserError(f"'{folder}' is no finished audit (no {MANIFEST})", f"attnbias audit … -o {folder}")
    manifest = manifest_of(folder, AUDIT)
    if manifest.get("kind") != AUDIT:
        raise UserError(
            f"'{folder}' is not what attnbias audit wrote (kind {manifest.get('kind', 'of a probe')!r})",
            "give a folder of attnbias audit",
        )
    return manifest


def read(folder: Path) -> Audited:
    """What `write` wrote. Raises UserError if the folder is none, or lacks a file. Does not import torch."""
    manifest, tip = read_manifest(folder), again(folder, AUDIT)
    hooks, leaks = (read_table(folder / name, layout, "table", tip=tip) for name, layout in LAYOUTS.items())
    return Audited(hooks, leaks, manifest["models"], manifest["failed_models"])
