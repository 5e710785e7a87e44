"""Head divergence: how far each head's output is from what it would be for an image without content.

Optional metrics of models that see: each input runs twice, once as it is and once with a neutral image of
the same size and mean colour, so that every token has its partner at the same position. Which tokens count
is as in `diag.metrics.default`.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor
from torch.linalg import vector_norm

from diag.errors import MeasurementError
from diag.metrics.default import Selection
from diag.metrics.readings import Reading
from diag.metrics.registry import metric, registered

Output = Float[Tensor, "batch head token dim"]


@metric("neutral")
def head_divergence(on: Selection, neutral: Output) -> Reading:
    return Reading(_distance(on, neutral), on.rows)


@metric("neutral")
def head_divergence_relative(on: Selection, neutral: Output) -> Reading:
    whole = on.values.output_norm + vector_norm(neutral.float(), dim=-1)
    return Reading(2 * _distance(on, neutral) / whole.where(whole > 0, 1.0), on.rows)


def _distance(on: Selection, neutral: Output) -> Float[Tensor, "batch head token"]:
    return vector_norm(on.call.output.float() - neutral.float(), dim=-1)


DIVERGENCE_METRICS = registered("neutral")
"""The metrics of head divergence, by name."""


def divergence_readings(on: Selection, neutral: Output, names: Sequence[str]) -> dict[str, Reading]:
    """The named metrics of one call seen through one token set.

    neutral: the same heads' output for the neutral image. Raises MeasurementError if it has other tokens.
    """
    call = on.call
    if neutral.shape != call.output.shape:
        raise MeasurementError(
            f"layer '{call.module}' has {tuple(neutral.shape)} outputs for a neutral image "
            f"and {tuple(call.output.shape)} for the image: tokens have no partner",
            "leave the divergence metrics out",
        )
    return {name: DIVERGENCE_METRICS[name].compute(on, neutral) for name in names}
