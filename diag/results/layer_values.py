"""One layer's numbers for some inputs: all that lies between the loop that measures and a table's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class LayerFacts:
    """What a layer turned out to be; constants of every row of its table.

    All but the sizes are read off the first batch.

    n_tokens: queries of one softmax (the most, if a layer is called once per window), and as a rule its keys.
    attn_scope: "full", or "window" if an input's tokens are split over several softmaxes or a mask
        hides real keys beyond causality.
    first_token: "excluded" where the first token sees only itself (causal), else "included".
    projection: whether the output projection read Y "as captured", "modified" or "unknown".
    gate_error: relative error of A V rebuilt from the call; NaN of a layer without softmax.
    value_from: whose the values are: "own", another layer's ("layer 12"), "mixed"; or of no token: "pooled",
        and "others" (keys that are other tokens than the queries, such as of strided queries).
    row_sum: what the weights of a row sum to, on average over the rows that are checked; 1 unless weights
        are no softmax, or several are added up. NaN of a layer without softmax.
    mixer: what makes its outputs, "softmax", or "linear" of a layer without it.
    """

    n_tokens: int
    attn_scope: str
    first_token: str
    projection: str
    gate_error: float
    value_from: str = "own"
    row_sum: float = 1.0
    mixer: str = "softmax"


@dataclass(frozen=True, eq=False)
class LayerValues:
    """One layer's numbers for inputs that follow each other, a batch of them as a rule; NaN where undefined.

    values: `[token set, metric, input, head]`, float64. of_heads: False for numbers of a whole layer, whose
        head axis is 1.
    layer, module: the layer's depth index and path. ids: of the inputs. first_input: the number of the first
        one among all that are measured.
    """

    layer: int
    module: str
    facts: LayerFacts
    token_sets: Sequence[str]
    metrics: Sequence[str]
    ids: Sequence[str]
    first_input: int
    values: np.ndarray
    of_heads: bool = True

    def until(self, number: int) -> LayerValues | None:
        """The same without inputs from a number on; None where nothing is left."""
        left = number - self.first_input
        if left >= len(self.ids):
            return self
        return replace(self, values=self.values[:, :, :left], ids=self.ids[:left]) if left > 0 else None

    def columns(self, constants: Mapping[str, Any]) -> dict[str, Any]:
        """What is the same in every row: constants of the tower, then what the layer is."""
        return {**constants, "layer": self.layer, "module": self.module, **asdict(self.facts)}
