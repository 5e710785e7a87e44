"""Curves over depth in a few numbers: ends, extremes, shape, onset, growth, excess over nulls, differences.

Every number comes with a 95 % percentile bootstrap interval over inputs. All numbers of a line, and of
lines with the same inputs, share their resamples; `first` and `last` have the intervals of `layers.csv`.
`docs/compare.md` explains every quantity. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from diag.errors import UserError, one_of
from diag.results.profiles.curve_shape import DOUBTS, FEWEST, SHAPES, UNCLEAR, onset_of, shape_of
from diag.results.profiles.curves import (
    DERIVED,
    Curve,
    Drawn,
    curves_of,
    inputs_of,
    interval,
    minus,
    over,
    share,
)

__all__ = ["DOUBTS", "FEWEST", "SHAPES", "UNCLEAR", "differences", "missing", "profiles", "strongest"]

CURVES = ("cos_y_vself", "value_similarity", "self_weight", *DERIVED)
"""Metrics that get all quantities of depth."""
SHARES = ("self_part", "context_part", "cos_y_vpartner", "cos_y_vuniform")
"""Metrics that are also given as a share of the bias: the ratio of means over layers and inputs."""
METRICS = tuple(dict.fromkeys((*CURVES[:3], *SHARES)))
"""What a whole profile is made of."""

SMALLEST = 0.02
"""Smallest size of interest: a change of a cosine below it is none, whatever its interval."""
SMALLEST_WEIGHT = 0.1
"""The same for the self weight, as a share of its mean over layers: weights shrink with T."""
MANY_LINES = 6
"""Lines above which each is compared with the first only."""

NEEDED = ("label", "model", "tower", "tokens", "layer", "metric", "input", "input_index", "value")
COLUMNS: dict[str, type] = dict.fromkeys(("label", "model", "tower", "tokens", "metric", "quantity"), object)
COLUMNS |= dict.fromkeys(("layer", "relative_depth", "value", "ci_low", "ci_high"), float)
COLUMNS |= {"n": int, "word": object}

DIFFERENCES: dict[str, tuple[str, str]] = {
    "bias": ("cos_y_vself", "mean"),
    "excess_over_partner": ("excess", "mean"),
    "excess_over_uniform": ("excess_over_uniform", "mean"),
    "value_similarity": ("value_similarity", "mean"),
    "self_share": ("self_part", "share"),
    "bias_last_minus_first": ("cos_y_vself", "last_minus_first"),
}
"""What is compared between lines: name -> metric and quantity of the profile."""


def profiles(samples: pd.DataFrame, *, seed: int = 0, growth: tuple[int, int] | None = None) -> pd.DataFrame:
    """Every line's curves in numbers, a row per label, metric and quantity, with the columns of `COLUMNS`.

    samples: `Collection.samples`. growth: the two layers between which curves grow; by default the first
    and the last measured one.

    Quantities of each metric of `CURVES`: `first`, `minimum`, `maximum`, `last` (with their layer),
    `last_minus_first`, `mean` over layers, `growth` (value at the second layer over value at the first),
    `shape` (in `word`, or `unclear: ` and why; `value` is the share of resamples that have it),
    `likeliest_shape` (the shape that most resamples have, decided or not), and of value similarity `onset`
    (`value` is a layer). Of each of `SHARES`: `mean`, and `share` of the bias. What was not measured has no
    rows; see `missing`.

    `relative_depth`: layer / (layers of the model - 1). `n`: inputs. `word`: also why a value is NaN.
    Raises UserError if a column is missing.
    """
    rows: list[dict[str, object]] = []
    for label, line in _lines(samples).items():
        names = {name: line[name].iloc[0] for name in ("model", "tower", "tokens")}
        # the last layer of the model; without that column, the last that was measured
        deepest = int(max(line["layer_count"].max() - 1 if "layer_count" in line else 0, line["layer"].max()))
        for row in _rows(curves_of([line], METRICS, seed)[0], growth):
            layer = float(row.get("layer", np.nan))  # type: ignore[arg-type]
            depth = layer / deepest if deepest > 0 else 0.0 * layer
            rows.append({"label": label, **names, **row, "relative_depth": depth})
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def missing(samples: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    """Metrics that a profile is made of and a line has no value of, by label; empty where all are there."""
    lacking = {}
    for label, line in _lines(samples).items():
        there = set(line["metric"][line["value"].notna()])
        lacking[label] = tuple(name for name in METRICS if name not in there)
    return {label: names for label, names in lacking.items() if names}


def differences(
    samples: pd.DataFrame, *, seed: int = 0, pairs: Sequence[tuple[str, str]] | None = None
) -> pd.DataFrame:
    """How lines differ: a row per pair and quantity of `DIFFERENCES`.

    `difference` = b - a: above 0, b has more.
    pairs: labels (a, b); by default every pair in the order of lines, or where there are more than six, the
    first and each of the others.

    Columns a, b, quantity, difference, ci_low, ci_high, n_a, n_b, n_shared, paired. Inputs that both lines
    have are resampled together, so that what they have in common cancels; `paired`: all inputs are.
    Lines of different inputs are resampled apart. A quantity that one of the two lacks has no row.
    """
    lines = _lines(samples)
    if not lines:
        pairs = ()
    if pairs is None:
        first, *others = lines
        many = len(lines) > MANY_LINES
        pairs = [(first, label) for label in others] if many else list(combinations(lines, 2))
    rows = []
    for a, b in pairs:
        ours, theirs = (_numbers(found) for found in curves_of([lines[a], lines[b]], METRICS, seed))
        inputs_a, inputs_b = inputs_of(lines[a]), inputs_of(lines[b])
        for quantity in DIFFERENCES:
            if quantity not in ours or quantity not in theirs:
                continue
            (value_a, n_a), (value_b, n_b) = ours[quantity], theirs[quantity]
            difference, draws = minus(value_b, value_a)
            shared = len(inputs_a & inputs_b)
            paired = inputs_a == inputs_b
            rows.append((a, b, quantity, difference, *interval(draws), n_a, n_b, shared, paired))
    columns = ["a", "b", "quantity", "difference", "ci_low", "ci_high", "n_a", "n_b", "n_shared", "paired"]
    return pd.DataFrame(rows, columns=columns)


def strongest(samples: pd.DataFrame, *, seed: int = 0) -> pd.Series:
    """By label, the share of resamples in which that line has the largest mean bias; NaN with one input.

    Lines without a bias are left out; the largest observed mean comes first.
    """
    lines = _lines(samples)
    found = zip(lines, curves_of(list(lines.values()), METRICS, seed), strict=True)
    bias = {label: curves["cos_y_vself"].over_layers() for label, curves in found if "cos_y_vself" in curves}
    order = sorted(bias, key=lambda label: -bias[label][0])
    drawn = [bias[label][1] for label in order]
    if not drawn or not all(map(len, drawn)):
        return pd.Series(np.nan, index=order, dtype=float)
    first = np.stack(drawn).argmax(0)
    return pd.Series([float((first == place).mean()) for place in range(len(order))], index=order)


def _rows(curves: Mapping[str, Curve], growth: tuple[int, int] | None) -> Iterable[dict[str, object]]:
    for metric in CURVES:
        if metric in curves:
            for row in _depth_rows(curves[metric], metric, growth):
                yield {"metric": metric, "n": curves[metric].n, **row}
    for metric in SHARES:
        if metric in curves:
            curve = curves[metric]
            here = {"metric": metric, "n": curve.n}
            yield here | {"quantity": "mean"} | _valued(curve.over_layers())
            if "cos_y_vself" in curves:
                yield here | {"quantity": "share"} | _valued(share(curve, curves["cos_y_vself"]))


def _depth_rows(curve: Curve, metric: str, growth: tuple[int, int] | None) -> Iterable[dict[str, object]]:
    mean, draws, last = curve.mean, curve.draws, len(curve.mean) - 1
    extremes = {"first": 0, "minimum": int(mean.argmin()), "maximum": int(mean.argmax()), "last": last}
    for quantity, place in extremes.items():
        yield {"quantity": quantity, "layer": curve.layers[place]} | _valued(curve.at(place))
    rise = _valued(minus(curve.at(-1), curve.at(0))) if last else {"word": "one layer"}
    yield {"quantity": "last_minus_first", **rise}
    yield {"quantity": "mean"} | _valued(curve.over_layers())
    smallest = SMALLEST_WEIGHT * abs(float(mean.mean())) if metric == "self_weight" else SMALLEST
    shape = shape_of(mean, draws, smallest=smallest, n=curve.n)
    word = f"{shape.word}: {shape.doubt}" if shape.doubt else shape.word
    yield {"quantity": "shape", "word": word, "value": shape.share}
    yield {"quantity": "likeliest_shape", "word": shape.likeliest, "value": shape.likeliest_share}
    if metric not in DERIVED:
        yield {"quantity": "growth"} | _growth(curve, growth)
    if metric == "value_similarity":
        begin, placed = onset_of(mean, draws, smallest=smallest, n=curve.n)
        layer, layers = _layers_at(curve, [begin])[0], _layers_at(curve, placed)
        yield {"quantity": "onset", "layer": layer} | _valued(
            (layer, layers if layer == layer else layers[:0])
        )


def _growth(curve: Curve, between: tuple[int, int] | None) -> dict[str, object]:
    start, end = between or (int(curve.layers[0]), int(curve.layers[-1]))
    said = f"layer {start} to {end}"
    unknown = [layer for layer in (start, end) if layer not in curve.layers]
    if unknown:
        return {"word": f"{said}: layer {unknown[0]} was not measured"}
    if start == end:
        return {"word": f"{said}: one layer"}
    early, late = (int(np.searchsorted(curve.layers, layer)) for layer in (start, end))
    found = _valued(over(curve.at(late), curve.at(early)))
    return {**found, "layer": end, "word": f"{said}: {found['word']}" if "word" in found else said}


def _numbers(curves: Mapping[str, Curve]) -> dict[str, tuple[Drawn, int]]:
    """The quantities of `DIFFERENCES` that a line has, each with its n."""
    found: dict[str, tuple[Drawn, int]] = {}
    for name, (metric, quantity) in DIFFERENCES.items():
        if metric not in curves:
            continue
        curve, value = curves[metric], None
        if quantity == "mean":
            value = curve.over_layers()
        elif quantity == "share" and "cos_y_vself" in curves:
            value = share(curve, curves["cos_y_vself"])
        elif quantity == "last_minus_first" and len(curve.layers) > 1:
            value = minus(curve.at(-1), curve.at(0))
        if value is not None:
            found[name] = value, curve.n
    return found


def _valued(number: Drawn | None) -> dict[str, object]:
    """The columns of a number; for None, why it has no value."""
    if number is None:
        return {"word": "no ratio to a value that is not clearly above 0"}
    low, high = interval(number[1])
    return {"value": number[0], "ci_low": low, "ci_high": high}


def _layers_at(curve: Curve, places: Iterable[float]) -> np.ndarray:
    return np.array([np.nan if place != place else curve.layers[int(place)] for place in places], dtype=float)


def _lines(samples: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The samples of every line by label, in order. Raises UserError if a column is missing."""
    absent = [name for name in NEEDED if name not in samples]
    if absent:
        raise UserError(
            f"the samples have no column {one_of(absent)}",
            "give Collection.samples of diag.results.collect.collect",
        )
    return {str(label): part for label, part in samples.groupby("label", sort=False, observed=True)}
