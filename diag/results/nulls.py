"""What is left of the bias after each null: a row per line and null, with paired intervals. No torch.

Left is bias minus null within each input, averaged over layers, and so is its interval: what bias and null
have in common cancels. The resamples are those of `diag.results.profiles`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from diag.results.decimals import fixed
from diag.results.null_names import NULLS, Null
from diag.results.profiles.curves import Curve, curves_of, interval, over

MEASURED, UNDEFINED, NOT_MEASURED = "measured", "undefined", "not measured"

COLUMNS: dict[str, type] = dict.fromkeys(("label", "model", "tower", "tokens", "null"), object)
COLUMNS |= dict.fromkeys(("bias", "value", "left", "ci_low", "ci_high"), float)
COLUMNS |= dict.fromkeys(("share_left", "share_ci_low", "share_ci_high"), float) | {"n": int, "state": object}


def left_after(samples: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """What is left of every line's bias after each null of `NULLS`, with the columns of `COLUMNS`.

    samples: `Collection.samples`. value: the null's mean over layers. left: bias - null, with its interval.
    bias: null + left, the bias of what has the null: of the same layers and tokens. share_left: left / bias;
    none where the bias is not clearly above 0. state: "measured"; "not measured"; or "undefined" where it was
    measured and has no value, such as across groups in a model of one KV head. Lines without a bias are left
    out.
    """
    rows = []
    for label, line in samples.groupby("label", sort=False, observed=True):
        metrics = ["cos_y_vself", *(null.metric for null in NULLS)]
        curves, there = curves_of([line], metrics, seed)[0], set(line["metric"].unique())
        if "cos_y_vself" not in curves:
            continue
        names = {name: str(line[name].iloc[0]) for name in ("model", "tower", "tokens")}
        for null in NULLS:
            known = null.metric in there
            found = _left(null, curves) if known else None
            state = MEASURED if found else UNDEFINED if known else NOT_MEASURED
            rows.append(
                {"label": str(label), **names, "null": null.name, "state": state, "n": 0} | (found or {})
            )
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def missing_nulls(table: pd.DataFrame) -> dict[str, list[Null]]:
    """The nulls that were not measured, by label; lines that have all are not there."""
    lacking = table[table["state"] == NOT_MEASURED].groupby("label", sort=False)["null"].agg(set)
    return {str(label): [null for null in NULLS if null.name in names] for label, names in lacking.items()}


def _left(null: Null, curves: Mapping[str, Curve]) -> dict[str, object] | None:
    if null.metric not in curves or null.excess not in curves:
        return None
    value, left = curves[null.metric], curves[null.excess]
    value, left = value.where(left), left.where(value)
    (of_null, null_draws), (of_left, left_draws) = value.over_layers(), left.over_layers()
    same = len(null_draws) == len(left_draws)
    bias = of_null + of_left, null_draws + left_draws if same else np.array([])
    low, high = interval(left_draws)
    found: dict[str, object] = {"bias": bias[0], "value": of_null, "left": of_left, "n": left.n}
    found |= {"ci_low": low, "ci_high": high}
    if (share := over((of_left, left_draws), bias)) is not None:
        found |= dict(
            zip(("share_left", "share_ci_low", "share_ci_high"), (share[0], *interval(share[1])), strict=True)
        )
    return found


def for_people(table: pd.DataFrame, verdicts: Iterable[str]) -> pd.DataFrame:
    """The table as it is printed: one column for an interval, and what can be said.

    verdicts: a word or two for each row.
    """
    spread = [
        "" if np.isnan(low) else f"{fixed(low)} … {fixed(high)}"
        for low, high in zip(table["ci_low"], table["ci_high"], strict=True)
    ]
    named = {"label": "model", "null": "null", "bias": "bias", "value": "null value", "left": "left"}
    shown = table[[*named]].rename(columns=named)
    shares = ["" if np.isnan(share) else f"{fixed(100 * share, 0)}%" for share in table["share_left"]]
    return shown.assign(**{"95 % interval": spread, "share left": shares, "verdict": list(verdicts)})
