"""What each figure shows: metrics, panels, the lines in them. Names only; draws nothing.

Labels, titles, axes and colours are the catalogue's: here stands which metrics share a panel.
"""

from __future__ import annotations

from dataclasses import dataclass

from diag.metrics.catalogue import CATALOGUE, capitalised


@dataclass(frozen=True)
class Line:
    """One metric as a line: its name in the tables, its label, its Okabe-Ito colour and how it is dashed."""

    metric: str
    label: str
    colour: str
    dashes: str = "-"
    marker: str = "o"


@dataclass(frozen=True)
class Panel:
    """Lines that share one pair of axes."""

    title: str
    y_label: str
    lines: tuple[Line, ...]

    @property
    def unit_interval(self) -> bool:
        """Whether it runs from 0 to 1, and not over the range of the cosines."""
        return all(CATALOGUE[line.metric].unit_interval for line in self.lines)


@dataclass(frozen=True)
class HeadMap:
    """One metric as a layer x head map. `scale` names the colours; maps of one scale share their range."""

    metric: str
    title: str
    scale: str


def _lines(*metrics: str) -> tuple[Line, ...]:
    drawn = {name: CATALOGUE[name].line for name in metrics}
    return tuple(Line(name, as_.label, as_.colour, as_.dashes, as_.marker) for name, as_ in drawn.items())


CURVES = (
    Panel(
        "Alignment bias",
        "cos(yᵢ, vᵢ) and its nulls",
        _lines("cos_y_vself", "cos_y_vpartner", "cos_y_vuniform"),
    ),
    Panel(
        "Where it comes from",
        "part of cos(yᵢ, vᵢ)",
        (
            Line("cos_y_vself", "sum = alignment bias", CATALOGUE["cos_y_vself"].line.colour, marker=""),
            *_lines("self_part", "context_part"),
        ),
    ),
    Panel(
        "Similarity between tokens",
        "mean pairwise cosine",
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
        _lines("self_weight", "first_weight", "entropy_normalized"),
    ),
)

COMPARISON_METRICS = ("cos_y_vself", "excess", "value_similarity", "self_weight", "self_weight_ratio")
COMPARISON = {name: CATALOGUE[name].panel for name in COMPARISON_METRICS}
"""Metric -> (title, y label). Only one of the two self weights is drawn."""

HEAD_METRICS = ("cos_y_vself", "excess", "self_weight", "value_similarity")
HEAD_MAPS = tuple(
    HeadMap(name, capitalised(CATALOGUE[name].labelled), CATALOGUE[name].scale) for name in HEAD_METRICS
)

CURVE_METRICS = tuple(dict.fromkeys(line.metric for panel in CURVES for line in panel.lines))
