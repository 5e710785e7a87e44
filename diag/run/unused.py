"""Options that say nothing to a model: what was typed for another kind of model is told, not lost."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from diag.run.plan import ProbePlan

TAKES = {"vision": "images", "text": "texts"}
"""Kind of input -> what is said of it."""


def unused(plan: ProbePlan, kinds: Collection[str], model: str) -> Iterator[str]:
    """A line for each option that was given and is not for this model.

    kinds: of the inputs that it is measured on.
    """
    taken = " and ".join(TAKES[kind] for kind in kinds)
    for kind, flag, given in (("vision", "--images", plan.images), ("text", "--texts", plan.texts)):
        if given is not None and kind not in kinds:
            yield f"{flag} is left out: '{model}' takes {taken}"
    if plan.seq_len is not None and "text" not in kinds:
        yield f"--seq-len is left out: it is for texts, and '{model}' takes {taken}"
    if plan.sampled_rows is not None and plan.exact:
        yield "--sampled-rows is left out: with --exact every row is computed"
