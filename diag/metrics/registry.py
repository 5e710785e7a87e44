"""Which function measures which metric, and how its tokens become one number.

A new metric is a function with `@metric(...)` above it, in the file of its like (`default`, `stream`,
`pattern_shape`, `sink_events`, `divergence`, `ledger`, `nulls`, `followed`), and a line in
`diag.metrics.catalogue`. The decorator writes it into `REGISTRY`; a file is imported before anything of it
is measured, so nothing else has to list it. A ratio of two metrics' means needs its line only. Names come
from the catalogue: they are known without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from diag.metrics.catalogue import CATALOGUE

if TYPE_CHECKING:
    from diag.attention.call import AttentionCall

Reads = Literal["call", "pattern", "sinks", "neutral", "ledger", "nulls", "followed", "block", "depth"]
"""What a metric is computed from, and so which arguments its function takes.

call: a `Selection`, one attention call. pattern: a `View`, what the pass over its pattern found. sinks:
`SinkEvents`, the keys that heads of a call attend to. neutral: a `Selection` and the outputs for a neutral
image. ledger: a `Ledger`, what each class of keys gave. nulls: `Beside`, a selection and what its bias is
compared with. followed: `Followed`, image tokens that carry sinks of the vision tower.
block: a `Stream`, the states around one block. depth: `Sinks`, what the states of all blocks tell of one.
"""

Compute = TypeVar("Compute", bound=Callable[..., Any])


@dataclass(frozen=True)
class Metric:
    """One line of the registry.

    compute: gives a `Reading`. reduce: "mean" or "percentile", how tokens become one number per input.
    needs: what it reads of the pass over the pattern (`pattern_pass.QUANTITIES`).
    of_shares: whether it takes the weights of a row for shares of it, none of them negative. It is undefined
        where a layer adds up several maps, or a head's weights are negative.
    of_own_keys: whether it needs v_i, A_ii or another key by its place. It is undefined where the keys of a
        call are not the tokens' own.
    of_weights: whether it needs the weights themselves. It is undefined where a layer has no softmax.
    """

    name: str
    compute: Callable[..., Any]
    reads: Reads
    reduce: str = "mean"
    needs: tuple[str, ...] = ()
    of_shares: bool = False
    of_own_keys: bool = False
    of_weights: bool = False

    def defined_for(self, call: AttentionCall) -> bool:
        """Whether it can be read off a call, by the kind that the call is of."""
        there = (call.own_keys or not self.of_own_keys) and (call.has_pattern or not self.of_weights)
        return there and not (call.maps and self.of_shares)


REGISTRY: dict[str, Metric] = {}
"""Name -> how it is measured; of the files that were imported. Filled by `metric`."""


def metric(
    reads: Reads,
    *,
    name: str | None = None,
    reduce: str = "mean",
    needs: tuple[str, ...] = (),
    of_shares: bool = False,
    of_own_keys: bool = False,
    of_weights: bool = False,
) -> Callable[[Compute], Compute]:
    """Registers a function as the metric of its name, or of `name`, with the catalogue's definition.

    Raises LookupError if the catalogue has no such line.
    """

    def register(compute: Compute) -> Compute:
        known = name or compute.__name__
        if known not in CATALOGUE:
            raise LookupError(f"metric '{known}' has no line in diag/metrics/catalogue.py")
        compute.__doc__ = CATALOGUE[known].definition
        weighed = of_weights or reads == "pattern"
        REGISTRY[known] = Metric(known, compute, reads, reduce, needs, of_shares, of_own_keys, weighed)
        return compute

    return register


def registered(*reads: Reads) -> dict[str, Metric]:
    """The metrics that are computed from this, in the order of the catalogue."""
    return {name: REGISTRY[name] for name in CATALOGUE if name in REGISTRY and REGISTRY[name].reads in reads}
