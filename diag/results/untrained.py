"""The untrained null: what untrained twins gave for each input, beside what the model gave. No torch.

A twin is the model's architecture with fresh weights (`diag.models.untrained`), measured on the same inputs.
Its numbers become rows of the model, under names of their own: input by input, the mean over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from diag.metrics.catalogue import OF_UNTRAINED, OVER_UNTRAINED

CELL = ["tokens", "layer", "head", "input_index"]


def beside(trained: pd.DataFrame, twins: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Samples of one tower, with rows of its untrained null behind them.

    twins: samples of its untrained twins, a table for each seed. What one of them lacks is undefined.
    """
    parts = [trained]
    for metric, name in OF_UNTRAINED.items():
        own = trained[trained["metric"] == metric]
        if own.empty:
            continue
        place = pd.MultiIndex.from_frame(own[CELL].astype({"tokens": str}))
        null = np.mean([_at(place, twin[twin["metric"] == metric]) for twin in twins], axis=0)
        parts.append(own.assign(metric=name, value=null))
        if metric == "cos_y_vself":
            parts.append(own.assign(metric=OVER_UNTRAINED, value=own["value"].to_numpy(float) - null))
    return pd.concat(parts, ignore_index=True)


def _at(place: pd.MultiIndex, twin: pd.DataFrame) -> np.ndarray:
    """What a twin gave at these places; NaN where it has none."""
    index = pd.MultiIndex.from_frame(twin[CELL].astype({"tokens": str}))
    return pd.Series(twin["value"].to_numpy(float), index=index).reindex(place).to_numpy()
