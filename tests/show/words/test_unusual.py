"""Sentences about layers that are no plain attention."""

from __future__ import annotations

import pandas as pd

from diag.show.words.unusual import unusual

DEPTH = range(8)


def layers(**columns: list[object]) -> pd.DataFrame:
    """Two rows to each of eight layers, the last layer first."""
    return pd.DataFrame({"layer": [*DEPTH], **columns}).loc[lambda table: [*reversed(table.index)] * 2]


def test_nothing_is_said_of_plain_attention_or_of_tables_without_these_columns() -> None:
    usual = layers(
        value_from=["own"] * 8, projection=["as captured", "unknown"] * 4, row_sum=[1.0, 0.9999] * 4
    )
    assert unusual(usual) == unusual(layers()) == []
    assert unusual(usual.assign(value_from=None, projection=None, row_sum=float("nan"))) == []


def test_what_is_unusual_is_said_with_its_layers() -> None:
    table = layers(
        value_from=["own"] * 4 + ["layer 3"] * 3 + ["mixed"],
        projection=["modified"] * 2 + ["as captured"] * 5 + ["modified"],
        row_sum=[1.0] * 5 + [0.8, 0.7251, 0.8],
    )
    assert unusual(table) == [
        "Layers 4-6 use the values of layer 3.",
        "In layer 7 each value is made of several tokens.",
        "In layers 0-1, 7 an output gate or a norm stands between y and W_O.",
        "In layers 5-7 the weights of a row sum to 0.725 to 0.800, not to 1: what takes them for shares "
        "(entropy, the uniform null) is left out where several maps are added up.",
    ]
    assert unusual(table[table["layer"] == 4]) == ["Layer 4 uses the values of layer 3."]


def test_layers_without_values_of_their_own_are_named() -> None:
    said = "keys are not the queries' own tokens (pooled or strided): no token has a value v_i, and what "
    said += "needs one is undefined there"
    table = layers(value_from=["pooled"] * 3 + ["own"] * 4 + ["others"])
    assert unusual(table) == [f"In layers 0-2, 7 {said}, and other means over layers are of both kinds."]
    assert unusual(table[table["layer"] < 3]) == [f"In layers 0-2 {said}."]
    assert unusual(table[table["layer"] == 3]) == []


def test_layers_without_softmax_are_named() -> None:
    said = "no softmax mixes the tokens: what needs attention weights is undefined there"
    table = layers(mixer=["linear"] * 3 + ["softmax"] + ["linear"] * 4)
    assert unusual(table) == [f"In layers 0-2, 4-7 {said}, and other means over layers are of both kinds."]
    assert unusual(table[table["layer"] < 3]) == [f"In layers 0-2 {said}."]
    assert unusual(table[table["layer"] == 3]) == []
