"""Tables of made-up looks at one token, as `attnbias attend` has them, without a model."""

from __future__ import annotations

import numpy as np
import pandas as pd

LONG_NAME = "timm:vit_small_patch14_reg4_dinov2.a_rather_long_tag_of_a_model_that_someone_trained_for_long"


def look(
    grids: dict[str, tuple[int, int]],
    *,
    prefix: tuple[str, ...] = ("cls",),
    head: str = "mean",
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, np.ndarray]]:
    """Tokens, decomposition and pictures of made-up models; the target is the patch at row 1, column 1."""
    rng = np.random.default_rng(seed)
    tokens, decomposition, pictures = [], [], {}
    for model, (rows, columns) in grids.items():
        count = len(prefix) + rows * columns
        target = len(prefix) + columns + 1
        weight = rng.dirichlet(np.full(count, 0.3))
        cosine = rng.uniform(-0.4, 0.6, count)
        cosine[target] = 1
        places = [(None, None)] * len(prefix) + list(np.ndindex(rows, columns))
        part = pd.DataFrame(
            {
                "input": "photo",
                "model": model,
                "tower": "vision",
                "layer": 3,
                "head": head,
                "token": range(count),
                "kind": [*prefix, *["patch"] * (rows * columns)],
                "row": [row for row, _ in places],
                "col": [column for _, column in places],
                "text": None,
                "weight": weight,
                "value_cosine": cosine,
                "is_target": np.arange(count) == target,
            }
        ).astype({"row": "Int64", "col": "Int64"})
        tokens.append(part.assign(rank=part["weight"].rank(ascending=False, method="first").astype("Int64")))
        for name, own in (("0", 0.1), ("1", 0.3), ("mean", 0.2)):
            numbers = {"self_part": own, "context_part": -0.05, "cos_y_vself": own - 0.05}
            nulls = {"cos_y_vuniform": 0.4, "cos_y_vpartner": -0.1, "removed_energy": (own - 0.05) ** 2}
            decomposition.append({"model": model, "layer": 3, "head": name, **numbers, **nulls})
        pictures[model] = rng.integers(0, 256, (8 * rows, 8 * columns, 3), dtype=np.uint8)
    return pd.concat(tokens, ignore_index=True), pd.DataFrame(decomposition), pictures


def text(count: int = 30, *, seen: int = 20, target: int = 19, model: str = "lm") -> pd.DataFrame:
    """Tokens of a causal model; those after `seen` are hidden."""
    rng = np.random.default_rng(1)
    weight = np.where(
        np.arange(count) < seen, np.append(rng.dirichlet(np.ones(seen)), [0] * (count - seen)), np.nan
    )
    cosine = np.where(np.arange(count) < seen, rng.uniform(-1, 1, count), np.nan)
    cosine[target] = 1
    table = pd.DataFrame(
        {"input": "text", "model": model, "tower": "text", "layer": 0, "head": "1"}, index=range(count)
    )
    table = table.assign(token=range(count), kind="text", row=pd.NA, col=pd.NA)
    table = table.assign(text=[f" word{i}" for i in range(count)], weight=weight, value_cosine=cosine)
    rank = table["weight"].rank(ascending=False, method="first").astype("Int64")
    return table.assign(rank=rank, is_target=table["token"] == target)
