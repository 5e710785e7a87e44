"""The table of how attention agrees with saliency: its columns, and its numbers over inputs. No torch."""

from __future__ import annotations

import numpy as np
import pandas as pd

from diag.inputs.tables import COUNT, NAME, NUMBER, TEXT, WHOLE, Layout
from diag.results.bootstrap import summary
from diag.results.caveats import COLUMNS
from diag.results.correlation import LEAST_PLACES, pearson, ranks

AGREEMENT = "agreement.csv"

GRADIENT_X_INPUT, GRADIENT = "gradient x input", "gradient"
"""|g·x| and ‖g‖ of a token."""
SALIENCIES = {GRADIENT_X_INPUT: "|g·x|", GRADIENT: "‖g‖"}

ALL = "all"
"""The `head` of what all heads of all layers receive together; its layer is missing."""

AGREED = Layout(
    {"input": NAME, "model": NAME, "tower": NAME, "kind": NAME, "head": NAME, "saliency": NAME}
    | {"layer": WHOLE, "module": TEXT, "n_keys": COUNT, "rho": NUMBER},
    dict.fromkeys(COLUMNS, TEXT),
    rows=True,
)
"""Of `agreement.csv`: a row per input, layer, head and kind of saliency; the head "mean" is the mean map of a
layer's heads, and "all" that of all layers."""


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's ρ of each row, `[row, place]` with `[row or 1, place]`; NaN of too few places, and where one
    side does not vary.
    """
    if first.shape[1] < LEAST_PLACES:
        return np.full(len(first), np.nan)
    return pearson(ranks(first), ranks(np.broadcast_to(second, first.shape)))


def over_inputs(table: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Mean ρ over inputs with its 95 % bootstrap interval, per line of the table without `input`."""
    by = ["model", "tower", "kind", "saliency", "layer", "head"]
    wide = table.pivot_table(index="input", columns=by, values="rho", sort=False, dropna=False, observed=True)
    wide = wide.dropna(axis=1, how="all")
    found = summary(wide.to_numpy(), seed=seed)
    return pd.concat([wide.columns.to_frame(index=False), found], axis=1)
