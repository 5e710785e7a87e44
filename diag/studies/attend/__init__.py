"""One token of one input: where it attends, whose values are like its own, and what its output is made of.

    plan = AttendPlan(models=("demo:vit-p8",), image="demo:astronaut", layer=5, patch=(2, 3))
    found = attend(plan)
    found.tokens           # one row per model and token: weight, value cosine, rank
    found.decomposition    # one row per model and head: the token's bias, its split, its nulls
    folder = run_attend(plan)          # the same, kept under runs/
    read(folder)                       # without torch

Importing this package does not import torch; measuring does.
"""

from __future__ import annotations

from pathlib import Path

from diag.inputs.items import Inputs
from diag.run.progress import Listener, Silent
from diag.studies.attend.folder import OWNER, Attended, read, write
from diag.studies.attend.plan import AttendPlan, folder_of
from diag.studies.once import once

__all__ = ["AttendPlan", "Attended", "attend", "folder_of", "read", "run_attend", "write"]


def attend(plan: AttendPlan, listener: Listener | None = None, *, given: Inputs | None = None) -> Attended:
    """Measures one token of one input in every model of the plan. Nothing is written.

    given: the input, where it was read already.
    Raises UserError for what you can mend. A model that fails beside others is named in `failed`; if
    the first one fails, the whole does, because the target is given in its grid.
    """
    from diag.studies.attend.measure import measure_models

    return measure_models(plan, listener, given=given)


def run_attend(
    plan: AttendPlan,
    folder: Path | None = None,
    *,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> Path:
    """The folder of a plan (default: `folder_of(plan)` under `runs/`), measured and drawn if it is not there.

    Raises UserError as `attend` does, and if the folder holds something else.
    """
    given = plan.inputs()
    folder = folder or folder_of(plan, given=given)
    once(
        plan,
        plan.key(given),
        folder,
        OWNER,
        lambda place, document: write(attend(plan, listener, given=given), plan, place),
        overwrite=overwrite,
        listener=listener or Silent(),
        complete=f"already complete: {folder} (measure again with --overwrite)",
    )
    return folder
