"""The plan of an audit: which models, on which inputs. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, field_validator

from diag.inputs.items import Inputs, sha256
from diag.results.writing import file_stem
from diag.run.plan import RUNS, Dtype, Plan, ProbePlan, inputs_of

DEFAULT_LENGTH = 32
"""Tokens of a text: everything that hooks show is kept at once."""
MOST_LENGTH = 4096


class AuditPlan(Plan):
    """Everything that `attnbias audit` needs to know.

    images, texts: as in a probe; the demo sets of both kinds where none are named. seq_len: tokens of the
    longest text, 32 where it is None, or what the model takes. lens: whether transformer-lens is asked, too.
    """

    models: tuple[str, ...] = Field(min_length=1)
    images: str | None = None
    texts: str | None = None
    seq_len: int | None = Field(default=None, ge=8, le=MOST_LENGTH)
    lens: bool = True
    checkpoint: Path | None = None
    model_args: tuple[str, ...] = ()
    random_init: bool = False
    trust_remote_code: bool = False
    dtype: Dtype = "float32"
    # below: how, not what; it does not change the result
    device: str = "auto"

    @field_validator("models")
    @classmethod
    def _once(cls, models: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(models))

    def probe_plan(self) -> ProbePlan:
        """The part that names models, weights and inputs, as a probe has it."""
        return ProbePlan(
            models=self.models,
            images=self.images,
            texts=self.texts,
            checkpoint=self.checkpoint,
            model_args=self.model_args,
            random_init=self.random_init,
            trust_remote_code=self.trust_remote_code,
            dtype=self.dtype,
        )

    def inputs(self) -> dict[str, Inputs]:
        """The inputs by kind. Raises UserError for what is not there."""
        return inputs_of(self.probe_plan())

    def key(self, given: Mapping[str, Inputs] | None = None) -> str:
        """Identifies the result: the plan without its `how`, the inputs, and local weights.

        given: the inputs, where they were listed already. Raises UserError if one is not there.
        """
        stamps = {kind: inputs.stamp for kind, inputs in (given or self.inputs()).items()}
        what = {"seq_len": self.seq_len, "lens": self.lens}
        return sha256(json.dumps({"audit": what, "probe": self.probe_plan().key(stamps)}, sort_keys=True))


def folder_of(plan: AuditPlan, root: Path = RUNS, given: Mapping[str, Inputs] | None = None) -> Path:
    """The folder that a plan's result has unless the user says otherwise, whether it is there or not."""
    return root / f"{file_stem('audit', '+'.join(plan.models))[:60]}-{plan.key(given)[:8]}"
