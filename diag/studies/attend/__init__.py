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
from diag.results.hashes import edited
from diag.run.environment import command_line
from diag.run.progress import Listener, Silent
from diag.run.run_folder import alone_at_work
from diag.studies.attend.folder import OWNER, Attended, read, read_manifest, write
from diag.studies.attend.plan import AttendPlan, folder_of

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
    what = {"kind": OWNER.verb, "key": plan.key(given), "plan": plan.model_dump(mode="json")}
    document, say = what | {"command": command_line()}, (listener or Silent()).say
    with alone_at_work(folder, OWNER, document, overwrite=overwrite, waiting=say) as place:
        if place is None:
            say(f"already complete: {folder} (measure again with --overwrite)")
            for note in edited(folder, read_manifest(folder)):
                say(note)
        else:
            write(attend(plan, listener, given=given), plan, place)
    return folder
