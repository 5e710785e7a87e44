"""The nulls of the bias, by name: metrics, what they compare with, and what measures them."""

from __future__ import annotations

from typing import NamedTuple


class Null(NamedTuple):
    """A null of the bias.

    name: what it is called. metric, excess: of the null, and of the bias less the null. than: what it
    compares with. option: what measures it; nothing where every probe does.
    """

    name: str
    metric: str
    excess: str
    than: str
    option: str = ""


_GROUP = "--metrics default,nulls"
NULLS = (
    Null("partner", "cos_y_vpartner", "excess", "another token's value"),
    Null("uniform", "cos_y_vuniform", "excess_over_uniform", "uniform attention"),
    Null("neighbourhood", "cos_y_vnear", "excess_over_near", "a near token's value", _GROUP),
    Null("across inputs", "cos_y_vother_input", "excess_over_other_input", "another input's value", _GROUP),
    Null("across groups", "cos_y_vother_group", "excess_over_other_group", "another KV head's value", _GROUP),
    Null(
        "untrained", "cos_y_vself_untrained", "excess_over_untrained", "untrained weights", "--null untrained"
    ),
)
"""In the order in which they are shown."""
