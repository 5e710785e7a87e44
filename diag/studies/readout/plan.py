"""What a readout is to do: a probe's plan, and into how many parts the images are cut."""

from __future__ import annotations

from pydantic import Field

from diag.errors import LARGEST
from diag.run.plan import ProbePlan

LIMIT = 1000


class ReadoutPlan(ProbePlan):
    """A probe's plan for a labelled folder. limit: images, spread evenly over it. folds: parts of the images.

    Every image is predicted once, by classifiers that were trained on the other parts.
    """

    limit: int = Field(default=LIMIT, gt=0, le=LARGEST)
    folds: int = Field(default=5, ge=3, le=20)
