"""A metric as a line with its interval, over depth or what varies; published values as open points."""

from __future__ import annotations

import math
import string

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from diag.errors import UserError
from diag.show.figures.style import BAND_OPACITY
from diag.show.figures.tables import shorten, span

Colour = str | tuple[float, float, float]
PUBLISHED = "published"
"""What marks published points, in legends and as the group id of their lines."""


SEEN = 0.005
"""Uncertainty from which a bar is longer than its marker."""


def columns_for(panels: int) -> int:
    """Panels to a row: three of three, six, nine; else two."""
    return 3 if panels % 3 == 0 else 2


def heading(place: int, label: str, rows: pd.DataFrame, panels: int) -> str:
    """The title of a line's panel: a letter, the label, and T; short enough for the panel's width."""
    letter = f"({string.ascii_lowercase[place % 26]}) " if panels > 1 else ""
    length = span(rows["n_tokens"]) if "n_tokens" in rows and "T =" not in label else ""
    width = 80 if panels == 1 else 24 if columns_for(panels) == 3 else 36
    return letter + shorten(label, width) + (f" (T = {length})" if length else "")


def line(
    ax: Axes, curve: pd.DataFrame, *, label: str, colour: Colour, marker: str = "o", dashes: str = "-"
) -> Line2D | None:
    """A mean with its 95 % interval: a band, or bars where there is one point. Draws nothing if it is empty.

    curve: columns x, mean, ci_low, ci_high; sorted by x. At most about 16 points are marked.
    """
    if curve.empty:
        return None
    if curve["ci_low"].notna().any():
        if len(curve) == 1:
            ax.vlines(curve["x"], curve["ci_low"], curve["ci_high"], color=colour, linewidth=1)
        else:
            ax.fill_between(
                curve["x"], curve["ci_low"], curve["ci_high"], color=colour, alpha=BAND_OPACITY, linewidth=0
            )
    (drawn,) = ax.plot(
        curve["x"],
        curve["mean"],
        color=colour,
        linestyle=dashes,
        marker=marker if marker or len(curve) > 1 else "x",
        markersize=3,
        markevery=math.ceil(len(curve) / 16),
        label=label,
        gid="model",
    )
    return drawn


def published_points(
    ax: Axes, values: pd.DataFrame, *, colour: Colour, marker: str = "o", size: float = 4.2
) -> Line2D | None:
    """Published values as open markers without a line, above what was measured; with their uncertainty.

    values: columns layer, value, uncertainty.
    """
    if values.empty:
        return None
    wide = values[values["uncertainty"] >= SEEN]
    ax.vlines(
        wide["layer"],
        wide["value"] - wide["uncertainty"],
        wide["value"] + wide["uncertainty"],
        color=colour,
        linewidth=0.7,
    )
    (drawn,) = ax.plot(
        values["layer"],
        values["value"],
        linestyle="",
        marker=marker,
        markersize=size,
        markerfacecolor="none",
        markeredgecolor=colour,
        markeredgewidth=0.8,
        label=PUBLISHED,
        gid=PUBLISHED,
        zorder=3,
    )
    return drawn


def depth_curve(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One metric over layers: columns x (the layer), mean, ci_low, ci_high.

    Raises UserError if a layer has more than one value.
    """
    part = rows[rows["metric"] == metric].sort_values("layer")
    if part["layer"].duplicated().any():
        raise UserError(
            f"the table holds more than one value of {metric} in one layer of a line",
            "choose a model and a token set, or give runs of other lengths labels of their own",
        )
    return pd.DataFrame(
        {
            "x": part["layer"].to_numpy(float),
            **{name: part[name].to_numpy(float) for name in ("mean", "ci_low", "ci_high")},
        }
    )


def lines_of(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each line by its label, in order; without a column `label`, by model, tower and tokens."""
    if "label" in rows:
        return {str(label): part for label, part in rows.groupby("label", sort=False)}
    keys = ["model", "tower", "tokens"]
    parts = dict(iter(rows.groupby(keys, sort=False)))
    alone = len({names[0] for names in parts}) == len(parts)
    return {str(names[0]) if alone else " · ".join(map(str, names)): part for names, part in parts.items()}


def finite_range(numbers: pd.DataFrame) -> tuple[float, float]:
    """Smallest and largest of all numbers that are there."""
    array = numbers.to_numpy(float)
    return float(np.nanmin(array)), float(np.nanmax(array))
