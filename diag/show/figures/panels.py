"""What each figure shows: which metrics share a panel. Names only; draws nothing.

Labels, titles, axes and colours are the catalogue's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from diag.metrics.catalogue import CATALOGUE, LEDGER_CLASSES, DrawnAs


@dataclass(frozen=True)
class Panel:
    """Metrics that share one pair of axes, as lines. hint: how to read them, for the report."""

    title: str
    y_label: str
    hint: str
    lines: Mapping[str, DrawnAs]

    @property
    def unit_interval(self) -> bool:
        """Whether it runs from 0 to 1, and not over the range of the cosines."""
        return all(CATALOGUE[metric].unit_interval for metric in self.lines)


def _lines(*metrics: str) -> dict[str, DrawnAs]:
    return {metric: CATALOGUE[metric].line for metric in metrics}


CURVES = (
    Panel(
        "Alignment bias",
        "cos(yᵢ, vᵢ) and its nulls",
        "The solid line is the bias. Where it does not rise above the dashed and dotted nulls, "
        "it is geometry: another token's value, or uniform attention, would give as much.",
        _lines("cos_y_vself", "cos_y_vpartner", "cos_y_vuniform"),
    ),
    Panel(
        "Where it comes from",
        "part of cos(yᵢ, vᵢ)",
        "An exact split: the self part is the token attending to itself, the context part is other tokens' "
        "values pointing the same way. The two add up to the bias.",
        {
            "cos_y_vself": replace(CATALOGUE["cos_y_vself"].line, label="sum = alignment bias", marker=""),
            **_lines("self_part", "context_part"),
        },
    ),
    Panel(
        "Similarity between tokens",
        "mean pairwise cosine",
        "How alike values and outputs are. The partial similarity stands beside the value it takes "
        "where values merely share one direction.",
        _lines(
            "value_similarity",
            "value_similarity_partial",
            "value_similarity_partial_reference",
            "output_similarity",
            "exclusive_output_similarity",
        ),
    ),
    Panel(
        "Where attention goes",
        "share, 0 to 1",
        "Weight on the token itself and on the first token; entropy is 1 where attention is uniform.",
        _lines("self_weight", "first_weight", "entropy_normalized"),
    ),
)
CURVE_METRICS = tuple(dict.fromkeys(metric for panel in CURVES for metric in panel.lines))

COMPARISON_METRICS = ("cos_y_vself", "excess", "value_similarity", "self_weight", "self_weight_ratio")
"""Only one of the two self weights is drawn."""

HEAD_METRICS = ("cos_y_vself", "excess", "self_weight", "value_similarity")


@dataclass(frozen=True)
class LedgerPanel:
    """One of the two ledgers. of: how its metrics' names begin. hint: how to read it, for the report."""

    of: str
    title: str
    y_label: str
    hint: str


LEDGERS = (
    LedgerPanel(
        "output",
        "Whose is y?",
        "share of y",
        "What attention returns, by the keys that it comes from: exact, signed shares that sum to 1. A key "
        "is of the first class that fits, in the order of the legend.",
    ),
    LedgerPanel(
        "bias",
        "Whose is the bias?",
        "part of cos(yᵢ, vᵢ)",
        "The alignment bias by the same keys: parts that sum to it (the black line).",
    ),
)
LEDGER_METRICS = tuple(f"{panel.of}_from_{name}" for panel in LEDGERS for name in LEDGER_CLASSES)
LEDGER_COLOURS = {
    "self": "vermillion",
    "sink": "blue",
    "cls": "purple",
    "registers": "orange",
    "prefix": "yellow",
    "near": "green",
    "image": "sky",
    "text": "yellow",
    "extra": "#6e6e6e",
    "rest": "#c4c4c4",
}
"""Class of keys -> the Okabe-Ito colour of its bars, or a grey. No model has both classes that are yellow."""
