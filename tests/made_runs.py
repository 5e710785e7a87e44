"""Run folders out of made-up curves, without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diag.results.manifest import FORMAT
from diag.results.tables import tables
from diag.results.writing import write, write_json

BIAS = {"cos_y_vself": [0.6, 0.5, 0.4], "cos_y_vpartner": [0.3, 0.3, 0.3], "cos_y_vuniform": [0.2, 0.2, 0.2]}
BIAS |= {"excess": [0.3, 0.2, 0.1], "self_part": [0.06, 0.05, 0.04], "context_part": [0.54, 0.45, 0.36]}
CURVES: dict[str, list[float]] = BIAS | {
    "value_similarity": [0.2, 0.3, 0.5],
    "self_weight": [0.02, 0.02, 0.02],
}
"""A bias that falls, above both nulls; values that grow alike."""

Make = Callable[..., Path]


def made_run(
    folder: Path,
    *,
    model: str = "demo:vit-p8",
    tower: str = "vision",
    tokens: str = "patch",
    curves: Mapping[str, Sequence[float]] = CURVES,
    n: int = 8,
    heads: int = 2,
    noise: float = 0.01,
    numbers: Sequence[int] | None = None,
    entry: Mapping[str, Any] | None = None,
    manifest: Mapping[str, Any] | None = None,
    sha256: str = "photos",
    **constants: object,
) -> Path:
    """A finished run of one line: every metric's curve over layers, with noise per input, layer and head
    around it; means over inputs are exact.

    numbers: of the layers that the curves are of, where these are not the first ones.
    entry, manifest: what the manifest says otherwise. sha256: of the inputs. constants: columns.
    """
    layers = max(map(len, curves.values()))
    shape = (len(curves), layers, n, heads)
    values = np.full(shape, np.nan)
    for place, curve in enumerate(curves.values()):
        values[place, : len(curve)] = np.asarray(curve, float)[:, None, None]
    rng = np.random.default_rng(0)
    spread = noise * rng.normal(size=shape) + noise * rng.normal(size=(n, 1))
    values += spread - spread.mean((2, 3), keepdims=True)
    at = np.indices(shape).reshape(4, -1)
    samples = pd.DataFrame(
        {
            "model": model,
            "tower": tower,
            "layer": np.asarray(numbers or range(layers))[at[1]],
            "module": "attn",
            "tokens": tokens,
            "metric": np.array(list(curves))[at[0]],
            "n_tokens": 65,
            "patch_size": 8,
            "image_size": 64,
            "values": "as_computed",
            "intervention": "none",
            "dtype": "float32",
            "seed": 0,
            "input": [f"{index}.jpg" for index in at[2]],
            "input_index": at[2],
            "head": at[3],
            "value": values.ravel(),
        }
    ).assign(**constants)
    folder.mkdir(parents=True)
    per_layer, per_head = tables(samples, seed=0)
    write(samples, folder / "samples.parquet")
    write(per_layer, folder / "layers.csv")
    write(per_head, folder / "heads.parquet")
    told = {
        "given": model,
        "resolved": model,
        "tower": tower,
        "family": model.split(":")[0],
        "layers": layers,
    }
    document = {
        "format": FORMAT,
        "key": folder.name,
        "inputs": {tower: {"sha256": sha256, "count": n}},
        "models": [{**told, "weights_sha256": model, **(entry or {})}],
        **(manifest or {}),
    }
    write_json(document, folder / "manifest.json")
    return folder
