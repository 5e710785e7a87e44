"""Layer x head maps as geometry: one SVG path per shade, so that 1,200 heads take a few kilobytes."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator

from diag.metrics.catalogue import MetricEntry, capitalised
from diag.results.decimals import fixed, shown
from diag.show.figures.heatmaps import head_fields
from diag.show.figures.panels import HEAD_METRICS
from diag.show.figures.style import COLOUR_MAPS
from diag.show.figures.tables import rows_of

WIDTH = 380
LEFT, RIGHT, TOP = 34, 6, 4
BELOW = 34
"""Units under the map for the head axis."""
SHADES = 48
MOST_HIGH = 400
"""Units of height that a map may take."""


@dataclass(frozen=True)
class Map:
    """One metric over layers (downwards) and heads (to the right).

    shades: (colour, path) pairs that fill the cells. bar: colours of the legend from low to high, with the
    numbers at its ends and middle. cell: width and height of a cell.
    """

    name: str
    metric: str
    title: str
    description: str
    first_layer: int
    layers: int
    heads: int
    cell: tuple[float, float]
    height: float
    shades: tuple[tuple[str, str], ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    bar: tuple[str, ...]
    ends: tuple[str, str, str]
    blank: bool


def head_maps(heads: pd.DataFrame, name: str) -> list[Map]:
    """The maps of one line, of its rows of heads.parquet. Metrics that were not measured are left out."""
    rows = rows_of(heads, HEAD_METRICS)
    if rows.empty:
        return []
    first, maps = head_fields(rows)
    return [_map(f"{name}-{entry.name}", entry, field, first, limits) for entry, field, limits in maps]


def _map(name: str, entry: MetricEntry, field: np.ndarray, first: int, limits: tuple[float, float]) -> Map:
    layers, heads = field.shape
    wide = (WIDTH - LEFT - RIGHT) / heads
    high = float(np.clip(wide, min(7.0, MOST_HIGH / layers), min(22.0, MOST_HIGH / layers)))
    colours = matplotlib.colormaps[COLOUR_MAPS[entry.scale]]
    level = np.clip((field - limits[0]) / (limits[1] - limits[0]) * SHADES, 0, SHADES - 1)
    paths: dict[int, list[str]] = {}
    for row, column in zip(*np.nonzero(~np.isnan(field)), strict=True):
        x, y = LEFT + column * wide, TOP + row * high
        paths.setdefault(int(level[row, column]), []).append(
            f"M{x:.1f} {y:.1f}h{wide:.1f}v{high:.1f}h-{wide:.1f}z"
        )
    return Map(
        name=name,
        metric=entry.name,
        title=capitalised(entry.labelled),
        description=_described(field, first),
        first_layer=first,
        layers=layers,
        heads=heads,
        cell=(round(wide, 3), round(high, 3)),
        height=round(TOP + layers * high + BELOW, 1),
        shades=tuple((to_hex(colours((key + 0.5) / SHADES)), "".join(paths[key])) for key in sorted(paths)),
        x_ticks=_ticks(0, heads, LEFT, wide),
        y_ticks=_ticks(first, layers, TOP, high),
        bar=tuple(to_hex(colours(place / 12)) for place in range(13)),
        ends=(number(limits[0]), number(sum(limits) / 2), number(limits[1])),
        blank=bool(np.isnan(field).any()),
    )


def _ticks(first: int, count: int, start: float, size: float) -> tuple[tuple[float, str], ...]:
    places = MaxNLocator(nbins=8, integer=True, min_n_ticks=1).tick_values(first, first + count - 1)
    inside = [int(place) for place in places if first <= place <= first + count - 1]
    return tuple((round(start + (place - first + 0.5) * size, 1), str(place)) for place in inside)


def _described(field: np.ndarray, first: int) -> str:
    low, high = (np.unravel_index(at(field), field.shape) for at in (np.nanargmin, np.nanargmax))
    return (
        f"{field.shape[0]} layers by {field.shape[1]} heads. "
        f"Highest {fixed(field[high])} in layer {first + high[0]}, head {high[1]}; "
        f"lowest {fixed(field[low])} in layer {first + low[0]}, head {low[1]}; "
        f"mean {fixed(np.nanmean(field))}."
    )


def number(value: float) -> str:
    """A number as tables show it, with a real minus."""
    return shown(value).replace("-", "−")
