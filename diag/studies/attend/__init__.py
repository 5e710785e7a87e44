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

from diag.run.environment import command_line
from diag.run.progress import Listener, Silent
from diag.run.run_folder import alone_at_work
from diag.studies.attend.folder import OWNER, Attended, read, write
from diag.studies.attend.plan import AttendPlan, folder_of

__all__ = ["AttendPlan", "Attended", "attend", "folder_of", "read", "run_attend", "write"]


def attend(plan: AttendPlan, listener: Listener | None = None) -> Attended:
    """Measures one token of one input in every model of the plan. Nothing is written.

    Raises UserError for what you can mend. A model that fails beside others is named in `failed`; if
    the first one fails, the whole does, because the target is given in its grid.
    """
    from diag.studies.attend.measure import measure_models

    return measure_models(plan, listener)


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
    folder = folder or folder_of(plan)
    what = {"kind": OWNER.verb, "key": plan.key(), "plan": plan.model_dump(mode="json")}
    document, say = what | {"command": command_line()}, (listener or Silent()).say
    with alone_at_work(folder, OWNER, document, overwrite=overwrite, waiting=say) as place:
        if place is None:
            say(f"already complete: {folder} (measure again with --overwrite)")
        else:
            write(attend(plan, listener), plan, place)
    return folder
