"""Plans and the runs that are there already: what was measured once is found again by its content."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from diag.errors import UserError
from diag.inputs.items import Inputs
from diag.results.folder import is_finished
from diag.results.manifest import PROBE
from diag.results.manifest import read as manifest_of
from diag.run.content import replaced
from diag.run.plan import RUNS, ProbePlan, default_folder, inputs_of, specs_of
from diag.run.progress import Listener
from diag.show.figures.drawer import Drawer


def folder_of(plan: ProbePlan, root: Path = RUNS, inputs: Mapping[str, Inputs] | None = None) -> Path:
    """The folder that a plan's run has, whether it is there or not. Does not import torch.

    inputs: the plan's, if they are listed already.
    Raises UserError if an input is not there, or a model's arguments are not understood.
    """
    inputs = inputs_of(plan) if inputs is None else inputs
    stamps = {kind: found.stamp for kind, found in inputs.items()}
    return default_folder(plan, plan.key(stamps), root.expanduser())


def is_measured(plan: ProbePlan, root: Path = RUNS) -> bool:
    """Whether a plan's run is there, finished."""
    return is_finished(folder_of(plan, root))


def measured(
    plan: ProbePlan,
    root: Path = RUNS,
    *,
    inputs: Mapping[str, Inputs] | None = None,
    listener: Listener | None = None,
    drawer: Drawer | None = None,
    following: ProbePlan | None = None,
) -> Path:
    """The run folder of a plan: as it is if it is finished, else measured (or resumed) now.

    inputs: the plan's, if they are listed already. drawer: draws its figures, and is started if it is needed.
    following: what will be measured next, of which the weights are read ahead.
    Raises UserError as `run.run_probe` does.
    """
    inputs = inputs_of(plan) if inputs is None else inputs
    folder = folder_of(plan, root, inputs)
    if is_finished(folder):
        if listener is not None:
            with suppress(UserError):  # a damaged manifest is told where the folder is read
                for note in replaced(plan, inputs, folder, manifest_of(folder, PROBE)):
                    listener.say(note)
        return folder
    if drawer is not None and plan.figures != "none":
        drawer.start()
    from diag.run.run import run_probe

    behind = None if following is None else specs_of(following)[0]
    return run_probe(plan, folder, inputs=inputs, listener=listener, drawer=drawer, following=behind).folder
