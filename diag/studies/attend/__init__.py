"""One token of one input: where it attends, whose values are like its own, and what its output is made of.

    plan = AttendPlan(models=("demo:vit-p8",), image="demo:astronaut", layer=5, patch=(2, 3))
    found = attend(plan)
    found.tokens           # one row per model and token: weight, value cosine, rank
    found.decomposition    # one row per model and head: the token's bias, its split, its nulls
    folder = run_attend(plan)          # the same, kept under runs/
    read(folder)                       # without torch

    agreement(module, batches)         # does it attend to what its answer hangs on? One row per head
    against_complexity(run, images)    # does its attention spread where there is more to see?

Importing this package does not import torch; measuring does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diag.inputs.items import Inputs
from diag.run.progress import Listener, Silent
from diag.studies.attend.complexity import Complexity, against_complexity
from diag.studies.attend.folder import OWNER, Attended, read, write
from diag.studies.attend.plan import AttendPlan, folder_of
from diag.studies.once import once

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

__all__ = [
    "AttendPlan",
    "Attended",
    "Complexity",
    "against_complexity",
    "agreement",
    "attend",
    "folder_of",
    "read",
    "run_attend",
    "write",
]


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


def agreement(
    module: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    of: Callable[[Any], Tensor] | None = None,
    cross: bool = False,
    limit: int = 64,
) -> pd.DataFrame:
    """Rank correlation of received attention with saliency in a module on ready batches, per input and head.

    of: what the module returned → one number per input, of which saliency is taken; if None, the logit of the
        predicted class or, with `decoder_input_ids`, the loss of their next token.
    cross: also of an encoder–decoder's cross-attention, whose saliency is that of the encoder's tokens.
    Columns as in `diag.results.agreement.AGREED`; `over_inputs` there gives means and intervals.

    Raises UserError as `diag.probe` does, and where nothing is explained.
    """
    from diag.studies.attend.agreements import agreement_in

    return agreement_in(module, batches, of=of, cross=cross, limit=limit)
