"""What a readout found, as tables: how well each layer is read, and what goes with it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
import pandas as pd

from diag.inputs.tables import COUNT, NAME, NUMBER, OPEN, PLACE, TEXT, Layout
from diag.results.bootstrap import summary
from diag.results.caveats import COLUMNS
from diag.studies.intervene.relation import spearman

MEAN, CLS, ATTENTIVE = "mean", "cls", "attentive"
READOUTS = {
    MEAN: "linear, on the mean of the patch tokens",
    CLS: "linear, on the class token",
    ATTENTIVE: "one learned query over the patch tokens, then linear",
}

ACCURACY, LOSS, GAIN = "accuracy", "loss", "gain_over_mean"
MEASURES = {
    ACCURACY: "share of the images whose class is named by a classifier that was fitted without them",
    LOSS: "their cross-entropy, in nats",
    GAIN: "accuracy beyond that on mean tokens, image by image",
}

PREDICTORS = ("value_similarity", "excess", "cos_y_vself", "cos_y_vuniform")
"""Metrics of a probe that may say which layer is read well."""

LAYOUTS = {
    "readout.csv": Layout(
        {"readout": NAME, "measure": NAME, "layer": PLACE}
        | {"mean": NUMBER, "std": NUMBER, "ci_low": NUMBER, "ci_high": NUMBER, "n": COUNT},
        dict.fromkeys(("model", "tower", *COLUMNS), TEXT),
        rows=True,
    ),
    "relations.csv": Layout(
        {"readout": NAME, "predictor": NAME, "rho": OPEN, "ci_low": OPEN, "ci_high": OPEN, "p": OPEN}
        | {"places": COUNT, "n": COUNT},
        dict.fromkeys(("model", "tower", *COLUMNS), TEXT),
    ),
}

Found = Mapping[str, Mapping[int, np.ndarray]]
"""Readout → layer → `[2, image]`: whether rightly, and the loss."""


def samples(found: Found, ids: list[str]) -> pd.DataFrame:
    """A row per readout, layer, measure and image."""
    rows = [
        pd.DataFrame({"readout": name, "layer": layer, "measure": measure, "input": ids, "value": values})
        for name, layers in found.items()
        for layer, array in layers.items()
        for measure, values in _measured(found, name, layer, array).items()
    ]
    return pd.concat(rows, ignore_index=True)


def readout(rows: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Per readout, measure and layer: mean, std, 95 % bootstrap interval over images, n."""
    keys = ["readout", "measure", "layer"]
    wide = rows.pivot_table(index="input", columns=keys, values="value", sort=False)
    table = summary(wide.to_numpy(float), seed=seed)
    return pd.concat([wide.columns.to_frame(index=False), table], axis=1)


def relations(
    found: Found, ids: list[str], measured: Mapping[str, tuple[list[str], np.ndarray]], *, seed: int
) -> pd.DataFrame:
    """Spearman's ρ over layers between a metric of a probe and the accuracy of a readout, same images.

    measured: metric → ids and `[image, layer]`, layers as in `found`.
    """
    rows = []
    for name, layers in found.items():
        right = np.stack([array[0] for array in layers.values()], -1)
        for predictor, (others, values) in measured.items():
            at = {image: place for place, image in enumerate(others)}
            both = [place for place, image in enumerate(ids) if image in at]
            pair = values[[at[ids[place]] for place in both]], right[both]
            rows.append({"readout": name, "predictor": predictor, **asdict(spearman(*pair, seed=seed))})
    return pd.DataFrame(rows)


def _measured(found: Found, name: str, layer: int, array: np.ndarray) -> dict[str, np.ndarray]:
    values = {ACCURACY: array[0], LOSS: array[1]}
    return values if name == MEAN else values | {GAIN: array[0] - found[MEAN][layer][0]}
