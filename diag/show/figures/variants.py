"""How trained variants look in every figure of a grid, one colour, marker and dash each; its patch sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from diag.show.figures.style import OKABE_ITO, RULE

BASELINE = "sa"
CONTROL = "random_direction"
COLOURS = ("vermillion", "green", "orange", "purple", "sky")
MARKERS = "s^vPX"
Dashes = Literal["-", "--", ":", "-."]
DASHES: tuple[Dashes, ...] = ("-", ":", "-.")
CONTROL_DASHES: tuple[Dashes, ...] = ("--", ":")
LEGEND_COLUMNS = 4
UNITS = {"accuracy": "accuracy, points", "loss": "loss, nats"}


@dataclass(frozen=True)
class VariantStyle:
    """Colour, marker and dash of a variant."""

    colour: str
    marker: str
    dashes: Dashes


def styles_of(variants: Sequence[str]) -> dict[str, VariantStyle]:
    """A style for each variant: the baseline blue, controls black and broken, others in their order."""
    found: dict[str, VariantStyle] = {}
    others = controls = 0
    for name in dict.fromkeys(variants):
        base = name.partition(":")[0].partition("=")[0]
        if base == BASELINE:
            found[name] = VariantStyle(OKABE_ITO["blue"], "o", "-")
        elif base == CONTROL:
            dashes = CONTROL_DASHES[controls % 2]
            found[name] = VariantStyle(OKABE_ITO["black"], "dH8p"[controls % 4], dashes)
            controls += 1
        else:
            turn, place = divmod(others, len(COLOURS))
            dashes = DASHES[turn % len(DASHES)]
            marker = MARKERS[(place + turn) % len(MARKERS)]
            found[name] = VariantStyle(OKABE_ITO[COLOURS[place]], marker, dashes)
            others += 1
    return found


def patches_of(table: pd.DataFrame) -> list[float]:
    """Patch sizes of a table from coarse to fine; one NaN where the task has none."""
    sizes = sorted(table["patch_size"].dropna().unique(), reverse=True)
    return [float(size) for size in sizes] or [float("nan")]


def at_patch(table: pd.DataFrame, patch: float) -> pd.DataFrame:
    """Rows of one patch size; NaN stands for the rows that have none."""
    return table[table["patch_size"].isna() if np.isnan(patch) else table["patch_size"] == patch]


def patch_word(patch: float, task: str) -> str:
    """`patch 16`, or the task where it has no patches."""
    return task if np.isnan(patch) else f"patch {patch:g}"


def seeds_word(counts: pd.Series) -> str:
    """`n = 3 seeds`, `n = 1–3 seeds`."""
    low, high = int(counts.min()), int(counts.max())
    return f"n = {low if low == high else f'{low}–{high}'} seed{'s' if high != 1 else ''}"


def zero_line(ax: Axes) -> None:
    """Where nothing differs."""
    ax.axhline(0, color=RULE, linewidth=0.7, zorder=1)


def legend_height(shown: Mapping[str, VariantStyle]) -> float:
    """Inches that `legend_below` takes."""
    return 0.15 * math.ceil(len(shown) / LEGEND_COLUMNS) + 0.15


def legend_below(figure: Figure, shown: Mapping[str, VariantStyle], *, lines: bool = True) -> None:
    """One legend of the variants under all panels; its entries do not depend on what a panel lacks."""
    handles = [
        Line2D(
            [],
            [],
            color=look.colour,
            marker=look.marker,
            linestyle=look.dashes if lines else "",
            markersize=4,
            label=name,
        )
        for name, look in shown.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), LEGEND_COLUMNS))
