"""What each figure shows: metrics, panels, labels, the role of every line. Names only; draws nothing."""

from __future__ import annotations

from dataclasses import dataclass


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
    """Lines that share one pair of axes. `unit_interval`: from 0 to 1, not the range of the cosines."""

    title: str
    y_label: str
    lines: tuple[Line, ...]
    unit_interval: bool = False


@dataclass(frozen=True)
class HeadMap:
    """One metric as a layer x head map. `scale` names the colours; maps of one scale share their range."""

    metric: str
    title: str
    scale: str


CURVES = (
    Panel(
        "Alignment bias",
        "cos(yᵢ, vᵢ) and its nulls",
        (
            Line("cos_y_vself", "own value", "blue"),
            Line("cos_y_vpartner", "partner null", "black", "--", ""),
            Line("cos_y_vuniform", "uniform-attention null", "black", ":", ""),
        ),
    ),
    Panel(
        "Where it comes from",
        "part of cos(yᵢ, vᵢ)",
        (
            Line("cos_y_vself", "sum = alignment bias", "blue", "-", ""),
            Line("self_part", "self part", "vermillion", "-", "s"),
            Line("context_part", "context part", "green", "-", "^"),
        ),
    ),
    Panel(
        "Similarity between tokens",
        "mean pairwise cosine",
        (
            Line("value_similarity", "values", "orange"),
            Line("value_similarity_partial", "values, partial", "purple", "-", "^"),
            Line("value_similarity_partial_reference", "partial, reference", "purple", ":", ""),
            Line("output_similarity", "outputs", "sky", "-", "s"),
            Line("exclusive_output_similarity", "exclusive outputs", "blue", "--", "D"),
        ),
    ),
    Panel(
        "Where attention goes",
        "share, 0 to 1",
        (
            Line("self_weight", "self weight", "vermillion", "-", "s"),
            Line("first_weight", "weight on first token", "purple", "-", "^"),
            Line("entropy_normalized", "entropy / maximum", "black", "--", "D"),
        ),
        unit_interval=True,
    ),
)

COMPARISON = {
    "cos_y_vself": ("Alignment bias", "cos(yᵢ, vᵢ)"),
    "excess": ("Excess over partner null", "cosine difference"),
    "value_similarity": ("Value similarity", "mean pairwise cosine"),
    "self_weight": ("Self weight", "Aᵢᵢ"),
    "self_weight_ratio": ("Self weight / uniform weight", "Aᵢᵢ × visible keys"),
}
"""Metric -> (title, y label). Only one of the two self weights is drawn."""

HEAD_MAPS = (
    HeadMap("cos_y_vself", "Alignment bias cos(yᵢ, vᵢ)", "cosine"),
    HeadMap("excess", "Excess over partner null", "signed"),
    HeadMap("self_weight", "Self weight Aᵢᵢ", "weight"),
    HeadMap("value_similarity", "Value similarity", "cosine"),
)

CURVE_METRICS = tuple(dict.fromkeys(line.metric for panel in CURVES for line in panel.lines))
COMPARISON_METRICS = tuple(COMPARISON)
HEAD_METRICS = tuple(head_map.metric for head_map in HEAD_MAPS)
