"""A plan read once, at the door: what its words stand for. Below it nobody reads them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from diag.attention.sampling import EXACT_TOKENS, SAMPLED_ROWS, RowSampling
from diag.errors import UserError, one_of
from diag.inputs.items import Inputs
from diag.measure.batch_readings import OF_HEADS
from diag.measure.device import device_of, dtype_of
from diag.metrics.catalogue import OF_UNTRAINED, RATIOS
from diag.metrics.names import metric_names
from diag.models.family import SPREAD
from diag.models.hooks.interventions import INTERVENTIONS, Edit, parse
from diag.models.names.spec import ModelSpec
from diag.run.plan import ProbePlan, inputs_of, specs_of

OF_CROSS = ("sink_share", "received_gini")
"""What is measured of cross-attention beside the default group: what a key receives."""


@dataclass(frozen=True)
class Measurement:
    """What a plan measures of a tower, whichever model and inputs.

    metrics: names, groups written out, in the order of tables. computed: the same with the two parts of
    a ratio in its place. ratios: those among the metrics, with their parts. edits: what is done to
    attention meanwhile. sampling: which query rows stand for all of them in long sequences.
    """

    plan: ProbePlan
    metrics: Sequence[str]
    computed: Sequence[str]
    ratios: Mapping[str, tuple[str, str]]
    edits: Sequence[Edit]
    sampling: RowSampling

    @staticmethod
    def of(plan: ProbePlan) -> Measurement:
        """Raises UserError for a metric or an intervention that is not known, and for an untrained null of
        nothing."""
        metrics = metric_names(plan.metrics)
        if plan.null is not None:
            _refuse_null(plan, metrics)
        return Measurement(
            plan,
            metrics,
            list(dict.fromkeys(part for name in metrics for part in RATIOS.get(name, (name,)))),
            {name: parts for name, parts in RATIOS.items() if name in metrics},
            _edits_of(plan),
            RowSampling(plan.sampled_rows or SAMPLED_ROWS, None if plan.exact else EXACT_TOKENS, plan.seed),
        )

    def of_untrained(self) -> Measurement:
        """What is measured of untrained twins: those of the metrics that have a null there."""
        names = [name for name in self.metrics if name in OF_UNTRAINED]
        return replace(self, metrics=names, computed=names, ratios={})

    def of_cross(self) -> Measurement:
        """What is measured where keys are other tokens: those of the metrics that need no v_i.

        By default also how evenly the keys share what they receive (`OF_CROSS`).
        """
        names = [*self.metrics, *(() if self.plan.metrics else OF_CROSS)]
        names = [name for name in names if name in OF_HEADS and not OF_HEADS[name].of_own_keys]
        return replace(self, metrics=names, computed=names, ratios={})


def _refuse_null(plan: ProbePlan, metrics: Sequence[str]) -> None:
    if plan.random_init:
        raise UserError(
            "--null untrained compares with random weights, and --random-init has no others",
            "leave one of them out",
        )
    if not plan.keep_samples:
        raise UserError(
            "--null untrained is taken input by input, and --keep-samples 0 keeps none", "--keep-samples 64"
        )
    if OF_UNTRAINED.keys().isdisjoint(metrics):
        raise UserError(
            f"--null untrained is of {one_of(OF_UNTRAINED)}, and none is measured",
            "name one with --metrics, or leave --metrics out",
        )


def _edits_of(plan: ProbePlan) -> list[Edit]:
    """What is done to attention while it is probed. Raises UserError for what takes other inputs first."""
    edits = [parse(text, plan.seed) for text in plan.intervene]
    for edit in edits:
        if INTERVENTIONS[edit.name].of_others:
            raise UserError(
                f"--intervene {edit.text}: '{edit.name}' takes what held-out inputs gave: a probe has none",
                f"attnbias intervene -m MODEL --intervene {edit.text}",
            )
    return edits


@dataclass(frozen=True)
class Prepared:
    """A plan with the models, inputs and device that it names. inputs: by kind, "vision" or "text"."""

    plan: ProbePlan
    measurement: Measurement
    specs: Sequence[ModelSpec]
    inputs: Mapping[str, Inputs]
    device: torch.device | str
    dtype: torch.dtype

    @staticmethod
    def of(
        plan: ProbePlan, local_rank: int | None = None, inputs: Mapping[str, Inputs] | None = None
    ) -> Prepared:
        """Everything that can be told without a model. Raises UserError for what is not known or not there.

        local_rank: which of several processes on this machine asks. inputs: the plan's, if they are listed.
        """
        measurement, device = Measurement.of(plan), device_of(plan.device, local_rank)
        specs, inputs = specs_of(plan), inputs_of(plan) if inputs is None else inputs
        return Prepared(plan, measurement, specs, inputs, device, dtype_of(plan.dtype))

    @property
    def key(self) -> str:
        """Identifies the result."""
        return self.plan.key({kind: inputs.stamp for kind, inputs in self.inputs.items()})

    @property
    def on_gpu(self) -> bool:
        """Whether what a model reads goes to a GPU."""
        return torch.cuda.is_available() if self.device == SPREAD else self.device != torch.device("cpu")
