"""What `--metrics` may name: every metric, and groups of them. Optional ones have to be named."""

from __future__ import annotations

from collections.abc import Sequence

from diag.metrics import shape
from diag.metrics.attention import METRICS, chosen
from diag.metrics.catalogue import RATIOS
from diag.metrics.divergence import DIVERGENCE_METRICS
from diag.metrics.shape import SHAPE_METRICS
from diag.metrics.stream import STREAM_METRICS

GROUPS: dict[str, tuple[str, ...]] = {
    "default": (*METRICS, *RATIOS),
    "stream": tuple(STREAM_METRICS),
    **shape.GROUPS,
    "divergence": tuple(DIVERGENCE_METRICS),
}
"""Name of a group -> its metrics."""


def metric_names(names: Sequence[str] | None) -> list[str]:
    """What `--metrics` stands for: the default metrics if None, groups written out.

    Raises UserError with the nearest name.
    """
    written = [part for name in names or ("default",) for part in GROUPS.get(name, (name,))]
    return chosen(written, [*METRICS, *RATIOS, *STREAM_METRICS, *SHAPE_METRICS, *DIVERGENCE_METRICS, *GROUPS])
