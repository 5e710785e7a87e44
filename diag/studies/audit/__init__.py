"""Two audits of a model: is what people hook what attention uses, and do batches leak?

    plan = AuditPlan(models=("demo:lm",))
    found = audit(plan)
    found.hooks            # one row per layer and hook: relative error, and why
    found.leaks            # one row per case, change and layer
    found.verdicts         # a sentence each
    audit_module(module, [batch])      # of your own module
    folder = run_audit(plan)           # the same, kept under runs/
    read(folder)                       # without torch

Importing this package does not import torch; measuring does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diag.inputs.items import Inputs
from diag.run.progress import Listener, Silent
from diag.studies.audit.folder import OWNER, Audited, read, write
from diag.studies.audit.plan import AuditPlan, folder_of
from diag.studies.once import once

if TYPE_CHECKING:
    from torch import nn

__all__ = ["AuditPlan", "Audited", "audit", "audit_module", "folder_of", "read", "run_audit", "write"]


def audit(
    plan: AuditPlan, listener: Listener | None = None, *, given: Mapping[str, Inputs] | None = None
) -> Audited:
    """Audits every model of the plan. Nothing is written.

    given: the inputs, where they were listed already.
    Raises UserError for what you can mend. A model that fails beside others is named in `failed`; if all do,
    so does the whole.
    """
    from diag.studies.audit.measure import measure_models

    return measure_models(plan, listener, given=given)


def audit_module(module: nn.Module, batches: Sequence[Any]) -> Audited:
    """Audits your own module on ready batches, tensors or dicts of them, as `diag.probe` takes them.

    With `input_ids` in them, and a forward that takes `attention_mask` or `position_ids`, padded and packed
    batches are made of the ids; else the first two inputs of the first batch are told apart.
    Raises UserError as `diag.probe` does.
    """
    from diag.studies.audit.measure import measure_module

    return measure_module(module, batches)


def run_audit(
    plan: AuditPlan,
    folder: Path | None = None,
    *,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> Path:
    """The folder of a plan (default: `folder_of(plan)` under `runs/`), measured if it is not there.

    Raises UserError as `audit` does, and if the folder holds something else.
    """
    given = plan.inputs()
    folder = folder or folder_of(plan, given=given)
    once(
        plan,
        plan.key(given),
        folder,
        OWNER,
        lambda place, document: write(audit(plan, listener, given=given), plan, place, given),
        overwrite=overwrite,
        listener=listener or Silent(),
        complete=f"already complete: {folder} (measure again with --overwrite)",
    )
    return folder
