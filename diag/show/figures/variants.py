"""How trained variants look in every figure of a grid, one colour, marker and dash each; its patch sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.artist import Artist

from diag.metrics.catalogue import Dashes, DrawnAs
from diag.show.figures.lines import handle
from diag.show.figures.style import OKABE_ITO
from diag.show.figures.tables import span

BASELINE = "sa"
CONTROLS = ("random_direction", "matched_direction")
COLOURS = ("vermillion", "green", "orange", "purple", "sky")
MARKERS = "s^vPX"
DASHES: tuple[Dashes, ...] = ("-", ":", "-.")
CONTROL_DASHES: tuple[Dashes, ...] = ("--", ":")
UNITS = {"accuracy": "accuracy, points", "loss": "loss, nats"}


def styles_of(variants: Sequence[str]) -> dict[str, DrawnAs]:
    """A style for each variant: the baseline blue, controls black and broken, others in their order."""
    found: dict[str, DrawnAs] = {}
    others = controls = 0
    for name in dict.fromkeys(variants):
        base = name.partition(":")[0].partition("=")[0]
        if base == BASELINE:
            found[name] = DrawnAs(name, OKABE_ITO["blue"])
        elif base in CONTROLS:
            dashes = CONTROL_DASHES[controls % 2]
            found[name] = DrawnAs(name, OKABE_ITO["black"], dashes, "dH8p"[controls % 4])
            controls += 1
        else:
            turn, place = divmod(others, len(COLOURS))
            dashes = DASHES[turn % len(DASHES)]
            marker = MARKERS[(place + turn) % len(MARKERS)]
            found[name] = DrawnAs(name, OKABE_ITO[COLOURS[place]], dashes, marker)
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
    return f"n = {span(counts)} seed{'s' if counts.max() != 1 else ''}"


def handles_of(shown: Mapping[str, DrawnAs], *, lines: bool = True) -> list[Artist]:
    """What a legend of the variants shows; its entries do not depend on what a panel lacks."""
    return [handle(look if lines else replace(look, dashes="")) for look in shown.values()]
