"""Where a language model looks in an image under two prompts: the table, its numbers by layer. No torch."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from diag.inputs.tables import COUNT, GRID, NAME, NUMBER, PLACE, TEXT, Layout
from diag.results.caveats import COLUMNS

GAZE = "gaze.parquet"
EPSILON = 0.01
"""ε of the contrast, as a share of the mean weight under the general prompt: 1 % of it."""

MAPS = ("task", "general", "contrast", "gaze_shift")
"""Per image token: the weight that the last token gives it under either prompt, their ratio, and how much
attention to it rises over the question."""

LOOKED = Layout(
    {
        "input": NAME,
        "model": NAME,
        "layer": PLACE,
        "head": NAME,
        "token": COUNT,
        **dict.fromkeys(MAPS, NUMBER),
    }
    | {"row": GRID, "col": GRID},
    dict.fromkeys(COLUMNS, TEXT),
    span=("row", "col"),
    rows=True,
)
"""Of `gaze.parquet`: a row per model, layer and image token, in the order of the image's tokens."""


def contrast_of(task: np.ndarray, general: np.ndarray) -> np.ndarray:
    """`a_j / (b_j + ε)`, ε = 0.01 · mean(b), over the last axis."""
    return task / (general + EPSILON * general.mean(-1, keepdims=True))


def gaze_shift_of(maps: np.ndarray) -> np.ndarray:
    """`Σ_t max(0, a_tj − a_(t−1)j)` over the query tokens t, `[…, query, key]` → `[…, key]`."""
    return np.clip(np.diff(maps, axis=-2), 0, None).sum(-2)


def entropy_of(weights: np.ndarray) -> np.ndarray:
    """Entropy of a map over the image alone, in nats: of its weights as shares of their sum."""
    shares = weights / weights.sum(-1, keepdims=True)
    logs = np.log(np.where(shares > 0, shares, 1.0))
    return -(shares * logs).sum(-1)


def per_layer(gaze: pd.DataFrame) -> pd.DataFrame:
    """By model and layer: `image_mass` and `entropy` of the map under the question and, with `_general`, of
    that under the general prompt; `contrast_entropy`; `gaze_shift`, all of it; `uniform`, ln of the number of
    image tokens.
    """
    rows = []
    for (model, layer), part in gaze.groupby(["model", "layer"], sort=False):
        task, general, contrast, shift = (part[name].to_numpy(float) for name in MAPS)
        rows.append(
            {
                "model": model,
                "layer": layer,
                "image_mass": task.sum(),
                "image_mass_general": general.sum(),
                "entropy": entropy_of(task),
                "entropy_general": entropy_of(general),
                "contrast_entropy": entropy_of(contrast),
                "gaze_shift": shift.sum(),
                "uniform": math.log(len(part)),
            }
        )
    return pd.DataFrame(rows)
