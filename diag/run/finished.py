"""A finished run: recognised by its plan, opened, and held against what lies there now. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from diag.inputs.items import Inputs
from diag.results.folder import MANIFEST, is_finished
from diag.results.hashes import edited
from diag.results.staging import NEXT, alone, check_free, sweep
from diag.results.tables import read_heads, read_layers, read_manifest
from diag.results.writing import write_json
from diag.run import finish
from diag.run.content import replaced
from diag.run.plan import ProbePlan, default_folder
from diag.run.progress import Listener
from diag.run.run_folder import PROBE, key_of
from diag.show.figures import ENDINGS

DEVICES = re.compile(r"auto|cpu|cuda(:\d+)?")
"""What can be said of a device without looking at it; of any other name it is asked whether there is one."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its folder and what it holds."""

    folder: Path
    layers: pd.DataFrame
    heads: pd.DataFrame
    manifest: Mapping[str, Any]

    @property
    def complete(self) -> bool:
        """Whether every model and input was measured."""
        return self.manifest.get("status") == "complete"


def open_run(folder: Path) -> FinishedRun:
    """A finished run folder. Raises UserError if it is not one."""
    return FinishedRun(folder, read_layers(folder), read_heads(folder), read_manifest(folder))


def found_again(
    plan: ProbePlan, inputs: Mapping[str, Inputs], folder: Path | None, listener: Listener
) -> FinishedRun | None:
    """The finished run of a plan, and what has changed since is said; None where anything is left to do.

    inputs: the plan's, by kind. folder: where it would be carried out, its `default_folder` if None.
    Raises UserError if the folder is another verb's.
    """
    key = plan.key({kind: given.stamp for kind, given in inputs.items()})
    folder = folder or default_folder(plan, key)
    if not DEVICES.fullmatch(plan.device) or not _holds(folder, key):
        return None
    check_free(folder, PROBE)
    with alone(folder):
        if not _holds(folder, key):  # another process puts a new one in its place
            return None
        sweep(folder)
        return opened(plan, inputs, folder, listener)


def opened(plan: ProbePlan, inputs: Mapping[str, Inputs], folder: Path, listener: Listener) -> FinishedRun:
    """Opens a plan's finished run; says that it was there, and what of it or of its inputs has changed.

    Call it `alone` in the folder: figures that the plan asks for and that are not there are drawn.
    """
    found = with_figures(open_run(folder), plan.figures)
    listener.say(f"already complete: {folder} (measure again with --overwrite)")
    for note in [*edited(folder, found.manifest), *replaced(plan, inputs, folder, found.manifest)]:
        listener.say(note)
    return found


def with_figures(found: FinishedRun, figures: str) -> FinishedRun:
    """A run with the figures that are asked for, where those that asked before wanted fewer.

    figures: of `ENDINGS`. Call it `alone` in the folder. Raises CannotWrite.
    """
    folder, plan = found.folder, found.manifest.get("plan") or {}
    if {*ENDINGS[figures]} <= {*ENDINGS.get(str(plan.get("figures")), ENDINGS["all"])}:
        return found
    models = found.manifest["models"]
    drawn = finish.draw(found.layers, found.heads, folder / "figures", models, ENDINGS[figures])
    names = [str(path.relative_to(folder)) for path in drawn]
    manifest = {**found.manifest, "plan": {**plan, "figures": figures}, "figures": names}
    write_json(manifest, folder / MANIFEST)
    return replace(found, manifest=manifest)


def _holds(folder: Path, key: str) -> bool:
    """Whether a folder holds this run, whole, and nothing is left on the way to it or to another."""
    if not is_finished(folder) or key_of(folder) != key:
        return False
    return not (folder / NEXT).exists() and not PROBE.files(folder, PROBE.work)
