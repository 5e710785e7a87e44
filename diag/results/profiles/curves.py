"""Samples as curves over depth, with what resampling the inputs makes of them.

Lines of one source share their resamples: weights are drawn by input, so what two lines have in common
cancels in their difference. Lines of different sources are drawn apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from diag.results.bootstrap import drawn

DERIVED: dict[str, tuple[str, str]] = {
    "excess": ("cos_y_vself", "cos_y_vpartner"),
    "excess_over_uniform": ("cos_y_vself", "cos_y_vuniform"),
    "excess_over_near": ("cos_y_vself", "cos_y_vnear"),
    "excess_over_other_input": ("cos_y_vself", "cos_y_vother_input"),
    "excess_over_other_group": ("cos_y_vself", "cos_y_vother_group"),
    "excess_over_untrained": ("cos_y_vself", "cos_y_vself_untrained"),
}
"""Curves that are a difference of two metrics within each input: name -> (of, over)."""

Drawn = tuple[float, np.ndarray]
"""A number and its value in every resample; no resamples where there is one input."""


@dataclass(frozen=True)
class Curve:
    """One metric of one line over its measured layers.

    layers, mean: [layer]. draws: [resample, layer], the means of the resamples. n: inputs with a value.
    """

    layers: np.ndarray
    mean: np.ndarray
    draws: np.ndarray
    n: int

    def at(self, place: int) -> Drawn:
        """The value at a place in `layers`."""
        return float(self.mean[place]), self.draws[:, place]

    def over_layers(self) -> Drawn:
        """The mean over layers."""
        return float(self.mean.mean()), self.draws.mean(1)

    def where(self, other: Curve) -> Curve:
        """The same in the layers that another curve has as well."""
        both = np.isin(self.layers, other.layers)
        return Curve(self.layers[both], self.mean[both], self.draws[:, both], self.n)


def minus(a: Drawn, b: Drawn) -> Drawn:
    """The difference of two numbers of the same resamples."""
    return a[0] - b[0], a[1] - b[1] if len(a[1]) == len(b[1]) else np.array([])


def over(a: Drawn, b: Drawn) -> Drawn | None:
    """The ratio of two numbers; None where the lower one is not clearly above 0, so that there is none."""
    if not b[0] > 0 or (len(b[1]) and np.percentile(b[1], 2.5) <= 0):
        return None
    return a[0] / b[0], a[1] / b[1] if len(a[1]) == len(b[1]) else np.array([])


def share(part: Curve, of: Curve) -> Drawn | None:
    """The ratio of two curves' means over the layers that have both: weights are not known in all of them."""
    return over(part.where(of).over_layers(), of.where(part).over_layers())


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval; NaN where there are no resamples."""
    if not len(draws) or np.isnan(draws).all():
        return np.nan, np.nan
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return float(low), float(high)


def inputs_of(line: pd.DataFrame) -> set[tuple[str, str]]:
    """The inputs of a line as (source, id)."""
    known = line[line["value"].notna()]
    return {(_source(line), str(name)) for name in known["input"].unique()}


def curves_of(lines: Sequence[pd.DataFrame], metrics: Sequence[str], seed: int) -> list[dict[str, Curve]]:
    """The curves of lines by metric, all drawn in one resampling; metrics without a value are not there."""
    sources = list(dict.fromkeys(_source(line) for line in lines))
    listed: dict[str, list[str]] = {}
    for source in sources:
        alike = [line[["input", "input_index"]] for line in lines if _source(line) == source]
        once = pd.concat(alike).drop_duplicates("input").sort_values("input_index", kind="stable")
        listed[source] = [str(name) for name in once["input"]]
    weights = {
        # the first source is drawn as the intervals of the run folder are
        source: drawn(len(listed[source]), [seed, place] if place else seed).astype(float)
        for place, source in enumerate(sources)
    }
    return [_curves(line, metrics, listed[_source(line)], weights[_source(line)]) for line in lines]


def _curves(
    line: pd.DataFrame, metrics: Sequence[str], inputs: Sequence[str], weights: np.ndarray
) -> dict[str, Curve]:
    layers = np.unique(line["layer"])
    rows = dict(iter(line.groupby("metric", observed=True)))
    values = {name: _matrix(rows[name], inputs, layers) for name in [*metrics, *DERIVED] if name in rows}
    for name, (of, what) in DERIVED.items():
        if name not in values and of in values and what in values:
            values[name] = values[of] - values[what]
    return {
        name: _curve(layers, matrix, weights) for name, matrix in values.items() if not np.isnan(matrix).all()
    }


def _matrix(rows: pd.DataFrame, inputs: Sequence[str], layers: np.ndarray) -> np.ndarray:
    """[input, layer], NaN where there is no value."""
    matrix = np.full((len(inputs), len(layers)), np.nan)
    place = pd.Index(inputs).get_indexer(pd.Index(rows["input"].astype(str)))
    matrix[place, np.searchsorted(layers, rows["layer"])] = rows["value"].to_numpy(float)
    return matrix


def _curve(layers: np.ndarray, values: np.ndarray, weights: np.ndarray) -> Curve:
    known = ~np.isnan(values).all(0)  # [layer]
    layers, values = layers[known], values[:, known]
    present = ~np.isnan(values)
    mean = np.where(present, values, 0.0).sum(0) / present.sum(0)
    n = int(present.any(1).sum())
    if n < 2:
        return Curve(layers, mean, np.empty((0, len(layers))), n)
    with np.errstate(invalid="ignore", divide="ignore"):
        # deviations from the mean keep the digits of small spreads
        moved = (weights @ np.where(present, values - mean, 0.0)) / (weights @ present.astype(float))
    return Curve(layers, mean, mean + moved, n)


def _source(line: pd.DataFrame) -> str:
    return str(line["source"].iloc[0]) if "source" in line else ""
