"""Numbers of single tokens, kept where somebody asked for them: `diag.probe(…, per_token=True)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch

from diag.attention.call import AttentionCall
from diag.errors import UserError
from diag.metrics.readings import Reading

MOST_ROWS = 100_000_000
"""Rows of one table, which is held in memory."""

COLUMNS = ["layer", "tokens", "metric", "input", "head", "token", "value"]


@dataclass(frozen=True)
class Part:
    """One metric of one call. values: `[input, head, token]`, NaN where the token does not count.

    first: the number of the first of these tokens in its input.
    """

    layer: int
    tokens: str
    metric: str
    values: np.ndarray
    first: int


def parts_of(
    call: AttentionCall, token_set: str, readings: Mapping[str, Reading], inputs: int, first: int
) -> list[Part]:
    """The metrics of a call that have a number for each token; windows of an input follow each other.

    Of sequences whose rows are sampled, those of all tokens only.
    """
    whole, found = (call.batch, call.heads, call.tokens), list[Part]()
    for name, reading in readings.items():
        if reading.values.shape[-1] != call.tokens or call.tokens == 1:
            continue
        values, weights = reading.values.expand(whole), reading.weights.expand(whole)
        numbers = torch.where(weights > 0, values.float(), torch.nan).unflatten(0, (inputs, -1))
        by_input = numbers.transpose(1, 2).flatten(2)  # [input, head, window · token]
        found.append(Part(call.layer, token_set, name, by_input.cpu().numpy(), first))
    return found


@dataclass
class TokenValues:
    """What is kept of all batches; filled while the loop runs."""

    parts: list[tuple[Sequence[str], Part]] = field(default_factory=list)
    rows: int = 0

    def add(self, ids: Sequence[str], parts: Sequence[Part]) -> None:
        """The parts of one batch. Raises UserError where they are more than a table can hold."""
        self.rows += sum(int((~np.isnan(part.values)).sum()) for part in parts)
        if self.rows > MOST_ROWS:
            raise UserError(
                f"more than {MOST_ROWS:,} numbers of single tokens", "give fewer metrics=, layers= or limit="
            )
        self.parts += [(ids, part) for part in parts]

    def frame(self) -> pd.DataFrame:
        """One row per layer, token set, metric, input, head and token that counts."""
        frames = []
        for ids, part in self.parts:
            places = np.nonzero(~np.isnan(part.values))
            columns = {
                "layer": part.layer,
                "tokens": part.tokens,
                "metric": part.metric,
                "input": np.asarray(ids, dtype=object)[places[0]],
                "head": places[1],
                "token": places[2] + part.first,
                "value": part.values[places],
            }
            frames.append(pd.DataFrame(columns))
        whole = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)
        return whole.astype(dict.fromkeys(("tokens", "metric", "input"), "category"))
