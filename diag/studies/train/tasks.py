"""What a cell learns: data, loss, evaluation, and how its model is built and saved.

Batches are a function of (seed, step) alone: variants of one seed see the same data in the same order, and
a resumed run continues where it stopped without any state of a loader.
"""

from __future__ import annotations

from diag.studies.train.crops import CropsTask
from diag.studies.train.image_task import Task
from diag.studies.train.plan import TrainPlan


def task_of(plan: TrainPlan) -> Task:
    """The plan's task, with its data at hand. Raises UserError where data cannot be read."""
    if plan.task == "crops":
        return CropsTask(plan)
    if plan.task == "images":
        from diag.studies.train.labelled import LabelledTask

        return LabelledTask(plan)
    from diag.studies.train.language import LanguageTask

    return LanguageTask(plan)
