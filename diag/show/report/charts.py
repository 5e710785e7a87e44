"""Curves as geometry: numbers in, positions and SVG paths out; the template only writes them down."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from matplotlib.ticker import MaxNLocator

from diag.metrics.catalogue import DrawnAs
from diag.results.decimals import fixed
from diag.show.figures.lines import runs_of

WIDTH, HEIGHT = 380, 236
LEFT, RIGHT, TOP, BOTTOM = 54, 8, 8, 38
"""Margins of the axes in units of the view box, which is about as wide as a phone."""

MARKERS = {
    "o": "M-2.7 0a2.7 2.7 0 1 0 5.4 0a2.7 2.7 0 1 0-5.4 0z",
    "s": "M-2.4-2.4h4.8v4.8h-4.8z",
    "^": "M0-3.1L3 2.3H-3z",
    "D": "M0-3.4L3.4 0L0 3.4L-3.4 0z",
    "v": "M0 3.1L3-2.3H-3z",
    "P": "M-1-3h2v2h2v2h-2v2h-2v-2h-2v-2h2z",
    "X": "M-3-1.8l1.2-1.2L0-1.2L1.8-3L3-1.8L1.2 0L3 1.8L1.8 3L0 1.2L-1.8 3L-3 1.8L-1.2 0z",
}
"""Marker -> its outline around (0, 0)."""

DASHES = {"-": "", "--": "6 3", ":": "1.5 3", "-.": "7 3 1.5 3"}
LONE = {"-": "o", "--": "D", ":": "X", "-.": "s"}
"""What tells lines without markers apart where there is only one layer, and so no line."""
MARKS = 16
"""At most so many markers on a line."""


@dataclass(frozen=True)
class ChartLine:
    """One line to draw.

    points: columns x (what the axis shows), layer, mean, ci_low, ci_high, sorted by x; NaN interval: no band.
    look: its colour is the name of a CSS variable. Without a marker, one of `LONE` marks the only point.
    """

    points: pd.DataFrame
    look: DrawnAs


@dataclass(frozen=True)
class DrawnLine:
    """A curve as SVG: paths, marker places, and its look. `data` is what tooltips read.

    between: the path over layers that are not measured.
    """

    label: str
    colour: str
    dash: str
    outline: str
    path: str
    between: str
    band: str
    bars: str
    marks: tuple[tuple[float, float], ...]
    data: dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """One pair of axes with its curves. exact: all curves have points at the same x."""

    name: str
    title: str
    hint: str
    description: str
    x_label: str
    y_label: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    rule: float | None
    curves: tuple[DrawnLine, ...]
    exact: bool

    @property
    def data(self) -> dict[str, Any]:
        """What tooltips read: positions and numbers."""
        return {"exact": self.exact, "curves": [curve.data for curve in self.curves]}


def limits_of(curves: Sequence[ChartLine], *, bands: bool = True) -> tuple[float, float]:
    """From the lowest to the highest mean, or end of a band, zero included, with a margin."""
    columns = ["mean", "ci_low", "ci_high"] if bands else ["mean"]
    numbers = pd.concat([curve.points[columns] for curve in curves])
    low, high = min(float(numbers.min().min()), 0.0), max(float(numbers.max().max()), 0.0)
    margin = 0.04 * max(high - low, 0.05)
    return (low - margin if low < 0 else 0.0), high + margin


def chart(
    name: str,
    curves: Sequence[ChartLine],
    *,
    title: str,
    hint: str,
    y_label: str,
    limits: tuple[float, float],
    relative: bool = False,
    rule: float = 0.0,
    layers: Sequence[float] = (),
    bands: bool = True,
) -> Chart:
    """Places curves, which have points, in the axes.

    relative: x is depth from 0 to 1 and curves need not share their points; otherwise x is the layer.
    layers: between which the axis of layers reaches, where not all of them have points.
    rule: where a thin line is drawn across, such as zero; none if outside the limits.
    bands: whether intervals are drawn; what tooltips read has them always.
    """
    xs = [*itertools.chain.from_iterable(curve.points["x"] for curve in curves), *layers]
    first, last = (0.0, 1.0) if relative else (float(min(xs)), float(max(xs)))
    margin = 0.5 if first == last else 0.03 * (last - first)
    across = scale(first - margin, last + margin, LEFT, WIDTH - RIGHT)
    up = scale(limits[0], limits[1], HEIGHT - BOTTOM, TOP)
    locator = MaxNLocator(nbins=6 if relative else 8, integer=not relative, min_n_ticks=1)
    x_ticks = [tick for tick in locator.tick_values(first, last) if first <= tick <= last]
    upwards = MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(*limits)
    y_ticks = [tick for tick in upwards if limits[0] <= tick <= limits[1] + 1e-9]
    return Chart(
        name=name,
        title=title,
        hint=hint,
        description=" ".join(map(_described, curves)),
        x_label="relative depth" if relative else "layer",
        y_label=y_label,
        x_ticks=tuple((round(across(tick), 1), f"{tick:g}") for tick in x_ticks),
        y_ticks=tuple((round(up(tick), 1), text) for tick, text in named(y_ticks)),
        rule=round(up(rule), 1) if limits[0] <= rule <= limits[1] else None,
        curves=tuple(
            drawn if bands else replace(drawn, band="", bars="")
            for drawn in (_drawn(curve, across, up) for curve in curves)
        ),
        exact=not relative,
    )


def scale(low: float, high: float, start: float, end: float) -> Any:
    """A function from numbers to places, linear."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def named(ticks: Sequence[float]) -> list[tuple[float, str]]:
    """Ticks with as many decimals as tell them apart."""
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 1
    decimals += round(step * 10**decimals, 6) % 1 > 0
    return [(tick, fixed(tick, decimals).replace("-", "−")) for tick in ticks]


def _drawn(curve: ChartLine, across: Any, up: Any) -> DrawnLine:
    points = curve.points
    xs = [f"{across(x):.1f}" for x in points["x"]]
    ys, lows, highs = ([f"{up(y):.1f}" for y in points[name]] for name in ("mean", "ci_low", "ci_high"))
    known = (points["ci_low"].notna() & points["ci_high"].notna()).to_numpy()
    places = iter(range(len(points)))
    runs = [[next(places) for _ in range(len(run))] for run in runs_of(points)]
    bands, bars = list[str](), list[str]()
    for run in runs:
        there = [place for place in run if known[place]]
        if len(run) == 1:
            bars += [f"M{xs[place]} {lows[place]}V{highs[place]}" for place in there]
        elif there:
            upper = [f"{xs[place]} {highs[place]}" for place in there]
            lower = [f"{xs[place]} {lows[place]}" for place in reversed(there)]
            bands.append(f"M{'L'.join(upper + lower)}z")
    lone = len(points) == 1 or len(runs) > 1
    step = 1 if len(runs) > 1 else math.ceil(len(points) / MARKS)
    outline = curve.look.marker or (LONE[curve.look.dashes] if lone else "")
    data: dict[str, Any] = {
        "label": curve.look.label,
        "colour": curve.look.colour,
        "layer": [int(layer) for layer in points["layer"]],
        "x": [float(x) for x in xs],
        "y": [float(y) for y in ys],
    }
    for name in ("mean", "ci_low", "ci_high"):
        numbers = [None if pd.isna(number) else round(float(number), 4) for number in points[name]]
        data[name.removeprefix("ci_")] = numbers  # `null` where there is no interval
    return DrawnLine(
        label=curve.look.label,
        colour=str(curve.look.colour),
        dash=DASHES[curve.look.dashes],
        outline=MARKERS[outline] if outline else "",
        path="".join(_way(xs, ys, run) for run in runs if len(run) > 1),
        between="".join(_way(xs, ys, [a[-1], b[0]]) for a, b in itertools.pairwise(runs)),
        band="".join(bands),
        bars="".join(bars),
        marks=tuple(zip(data["x"][::step], data["y"][::step], strict=True)) if outline else (),
        data=data,
    )


def _way(xs: Sequence[str], ys: Sequence[str], places: Sequence[int]) -> str:
    return "M" + "L".join(f"{xs[place]} {ys[place]}" for place in places)


def _described(curve: ChartLine) -> str:
    """A line for those who do not see it: where it begins, turns and ends."""
    means = curve.points["mean"].to_numpy()
    first, last, low, high = (
        f"{fixed(curve.points['mean'].iloc[place])} in layer {int(curve.points['layer'].iloc[place])}"
        for place in (0, -1, means.argmin(), means.argmax())
    )
    if len(means) == 1:
        return f"{curve.look.label}: {first}."
    return f"{curve.look.label}: from {first} to {last}; lowest {low}, highest {high}."
