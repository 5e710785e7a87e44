"""What is unusual about the layers of one line: whose values, what W_O reads, what weights sum to."""

from __future__ import annotations

import pandas as pd

from diag.results.decimals import fixed

OTHER_KEYS = ("pooled", "others")
"""Whose values are those of no token, as `value_from` has it."""

SUMS_TO_ONE = 5e-4
"""How near 1 the sum of a row is where it is told as 1."""


def unusual(layers: pd.DataFrame) -> list[str]:
    """Sentences about layers of one line that are no plain attention; tables of old runs say less."""
    each = layers.drop_duplicates("layer").sort_values("layer").set_index("layer")
    said = []
    if "value_from" in each:
        for source, some in each.groupby("value_from", sort=False):
            if source == "mixed":
                said.append(f"In {_layers(some)} each value is made of several tokens.")
            elif source not in ("own", *OTHER_KEYS):
                said.append(f"{_layers(some, use=True)} the values of {source}.")
    if "projection" in each and (some := each[each["projection"] == "modified"]).size:
        said.append(f"In {_layers(some)} an output gate or a norm stands between y and W_O.")
    said += undefined(layers)
    if "row_sum" in each and (some := each[(each["row_sum"] - 1).abs() > SUMS_TO_ONE]).size:
        low, high = (fixed(end) for end in (some["row_sum"].min(), some["row_sum"].max()))
        number = low if low == high else f"{low} to {high}"
        said.append(
            f"In {_layers(some)} the weights of a row sum to {number}, not to 1: what takes them for shares "
            "(entropy, the uniform null) is left out where several maps are added up."
        )
    return said


def undefined(layers: pd.DataFrame) -> list[str]:
    """Which layers of one line have no softmax, or no value of a token's own, and what that means for its
    numbers; nothing if all have both."""
    each = layers.drop_duplicates("layer").sort_values("layer").set_index("layer")
    kinds = (
        ("mixer", ["linear"], "no softmax mixes the tokens: what needs attention weights is undefined there"),
        (
            "value_from",
            OTHER_KEYS,
            "keys are not the queries' own tokens (pooled or strided): no token has a value v_i, and what "
            "needs one is undefined there",
        ),
    )
    said = []
    for column, kind, why in kinds:
        some = each[each[column].isin(kind)] if column in each else each.iloc[:0]
        if len(some):
            both = ", and other means over layers are of both kinds" if len(some) < len(each) else ""
            said.append(f"In {_layers(some)} {why}{both}.")
    return said


def _layers(some: pd.DataFrame, *, use: bool = False) -> str:
    """`layer 3`, `layers 5-8`; with a verb, at the beginning of a sentence."""
    several = len(some) > 1
    named = f"{'layers' if several else 'layer'} {_spans([int(layer) for layer in some.index])}"
    return f"{named.capitalize()} {'use' if several else 'uses'}" if use else named


def _spans(layers: list[int]) -> str:
    """`0, 2-4` for 0, 2, 3, 4."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in zip(starts, ends, strict=True))
