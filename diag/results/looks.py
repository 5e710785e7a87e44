"""The tables of an attend folder, as they are read: what a token attends to, what its output is made of.

No torch: the report shows them, and figures are redrawn from them.
"""

from __future__ import annotations

from diag.inputs.tables import ANY, COUNT, GRID, NAME, NUMBER, PLACE, TEXT, WHOLE, Layout
from diag.results.caveats import COLUMNS

TOKENS, DECOMPOSITION = "tokens.parquet", "decomposition.csv"

NUMBERS = (
    "cos_y_vself",
    "self_part",
    "context_part",
    "cos_y_vpartner",
    "cos_y_vuniform",
    "excess",
    "removed_energy",
    "self_weight",
    "output_norm",
    "projection",
    "exclusive_norm",
    "value_norm",
)
"""What is known of the row, per head. The first eight are metrics; `projection` is y·v̂, the others
are ‖y‖, ‖z‖ with z = y - (y·v̂)v̂, and ‖v‖."""

MEAN = "mean"
"""The `head` of a mean over heads."""

_HEAD = {"model": NAME, "layer": PLACE, "head": NAME}
_NUMBERS = dict.fromkeys(NUMBERS, NUMBER)

_CAVEATS = dict.fromkeys(COLUMNS, TEXT)

SPLIT = Layout(_HEAD, _NUMBERS | {"n_visible": COUNT} | _CAVEATS)
"""Of `decomposition.csv`, for who shows the numbers that are there."""
WHOLE_SPLIT = Layout(_HEAD | _NUMBERS | {"n_visible": COUNT}, _CAVEATS, rows=True)
"""The same for who draws them all."""
SEEN = Layout(
    {"input": NAME, "model": NAME, "tower": NAME, "layer": PLACE, "head": NAME, "token": COUNT, "kind": NAME}
    | {"row": GRID, "col": GRID, "text": TEXT, "weight": NUMBER, "value_cosine": NUMBER, "rank": WHOLE}
    | {"is_target": ANY},
    _CAVEATS,
    span=("row", "col"),
    rows=True,
)
"""Of `tokens.parquet`."""
