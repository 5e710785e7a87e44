"""Whose y is, in one sentence: the class of keys that has most of the output, and where. No torch."""

from __future__ import annotations

import pandas as pd

from diag.metrics.catalogue import LEDGER_CLASSES
from diag.results.decimals import fixed
from diag.show.words.phrases import share

NAMED = {name: words for name, words in LEDGER_CLASSES.items() if name != "rest"}
"""Classes that answer the question; what is left over does not."""

SINKS = ("cls", "registers")
"""Classes whose keys, where they are sinks, are told as what they are."""


def ledger_sentence(layers: pd.DataFrame) -> str:
    """`In layer 9, 61 % of what comes back is the registers …`, of one line; `""` where nothing was measured.

    A sink that is the class token or a register counts as that, and no longer as the key that receives most.
    """
    shares = shares_of(layers)
    if shares.empty or not shares.notna().any(axis=None):
        return ""
    name = str(shares.max().idxmax())
    layer, most = int(str(shares[name].idxmax())), float(shares[name].max())
    rows = layers[(layers["layer"] == layer) & layers["mean"].notna()]
    said = f"In layer {layer}, {share(most)} of what comes back is {NAMED[name]}"
    n = int(rows.loc[rows["metric"].str.startswith("output_from_"), "n"].max())
    over = f"; {share(shares[name].mean())} over all layers" if len(shares) > 1 else ""
    means = rows.set_index("metric")["mean"]
    part = means.get(f"bias_from_{name}")
    if name not in SINKS and part is not None and "cos_y_vself" in means:
        over += f". Of the bias of {fixed(means['cos_y_vself'])} there, {fixed(part)} is from {NAMED[name]}"
    return f"{said} (n = {n}){over}."


def shares_of(layers: pd.DataFrame) -> pd.DataFrame:
    """Shares of y, layer × class, of the classes that answer the question."""
    rows = layers[layers["metric"].str.startswith("output_from_") & layers["mean"].notna()]
    wide = rows.pivot_table(index="layer", columns="metric", values="mean", aggfunc="first")
    shares = wide.rename(columns=lambda name: name.removeprefix("output_from_"))
    for name in SINKS:
        if f"sink_{name}" in shares and name in shares and "sink" in shares:
            shares[name] = shares[name] + shares[f"sink_{name}"].fillna(0.0)
            shares["sink"] = shares["sink"] - shares[f"sink_{name}"].fillna(0.0)
    return shares[[name for name in NAMED if name in shares]]
