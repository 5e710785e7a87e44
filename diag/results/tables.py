"""The tables of a run folder: how they follow from samples, and how they are read.

    samples.parquet  one value per input, layer, head and metric: everything else follows from it
    layers.csv       per layer: mean over heads within each input, then statistics over inputs
    heads.parquet    the same per head
    manifest.json    written last

The unit of replication is the input. Intervals are 95 % percentile bootstrap intervals of the mean
over inputs, with the same resamples for every cell; where a run keeps moments instead of all samples, they
are Student's t (`diag.results.moments`). No torch here.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diag.errors import LARGEST, UserError
from diag.inputs.tables import ANY, COUNT, NAME, NUMBER, PLACE, TEXT, WHOLE, Layout, read_table
from diag.metrics.catalogue import RATIOS
from diag.results.bootstrap import Bootstrap, ratio, statistics
from diag.results.folder import HEADS, LAYERS, MANIFEST, SAMPLES, is_finished
from diag.results.layer_values import LayerValues
from diag.results.manifest import PROBE, again
from diag.results.manifest import read as read_manifest_of

KEYS = ["model", "tower", "layer", "module", "head", "tokens", "metric"]
STATISTICS = ["mean", "std", "ci_low", "ci_high", "n"]
CONSTANTS = [
    "n_tokens",
    "patch_size",
    "image_size",
    "positions",
    "patch_embedding",
    "weights",
    "inputs",
    "attn_scope",
    "first_token",
    "projection",
    "value_from",
    "row_sum",
    "mixer",
    "values",
    "intervention",
    "dtype",
    "seed",
]

SIZES = ("n_tokens", "attn_scope", "projection", "row_sum")
"""What may differ between inputs of one layer; tables give the largest. Of scopes, that is "window"; of what
the projection read, "unknown", then "modified"."""

WHOLE_LAYER = -1
"""The `head` of a number that belongs to a layer; such rows are in samples.parquet and layers.csv only."""

_LINE = {"model": NAME, "tower": NAME, "layer": PLACE, "tokens": NAME, "metric": NAME}
_CONSTANTS = {"module": TEXT, **dict.fromkeys(CONSTANTS, TEXT), "n_tokens": WHOLE, "seed": WHOLE} | {
    "patch_size": ANY,
    "image_size": ANY,
    "row_sum": NUMBER,
}
_STATISTICS = {"mean": NUMBER, "std": NUMBER, "ci_low": NUMBER, "ci_high": NUMBER, "n": COUNT}
LAYOUTS = {
    LAYERS: Layout(_LINE | _STATISTICS, _CONSTANTS, key=tuple(_LINE), rows=True),
    HEADS: Layout(
        _LINE | {"head": PLACE} | _STATISTICS, _CONSTANTS, key=(*_LINE, "head"), span=("layer", "head")
    ),
    SAMPLES: Layout(
        _LINE | {"head": PLACE, "module": TEXT, "input": NAME, "input_index": COUNT, "value": NUMBER},
        _CONSTANTS,
        span=("layer", "head"),  # no rows, where no samples are kept
    ),
}
"""What the tables of a run hold, by file."""


def samples_frame(
    measured: Sequence[LayerValues], ratios: Mapping[str, tuple[str, str]], constants: Mapping[str, Any]
) -> pd.DataFrame:
    """Numbers of layers as long-form rows, in their order: one per input and head (-1: of the whole layer).

    ratios: metrics to add to each layer, each the ratio of two that are there.
    constants: columns that are the same in every row of the tower (model, tower …).
    """
    names, blocks = zip(*(_with_ratios(one, ratios) for one in measured), strict=True)
    sizes = [block.size for block in blocks]
    shapes = {block.shape: np.indices(block.shape, np.int32).reshape(4, -1) for block in blocks}
    places = [shapes[block.shape] for block in blocks]
    frame = {
        "tokens": _words([one.token_sets for one in measured], [place[0] for place in places]),
        "metric": _words(names, [place[1] for place in places]),
        "input": _words([one.ids for one in measured], [place[2] for place in places]),
        "input_index": np.concatenate(
            [place[2] + np.int64(one.first_input) for one, place in zip(measured, places, strict=True)]
        ),
        "head": np.concatenate(
            [
                place[3] if one.of_heads else np.full(place.shape[1], WHOLE_LAYER)
                for one, place in zip(measured, places, strict=True)
            ]
        ).astype(np.int64),
        "value": np.concatenate([block.reshape(-1) for block in blocks]),
    }
    zeros = [np.zeros(size, np.int32) for size in sizes]
    columns = [one.columns(constants) for one in measured]
    for name in columns[0]:
        of_layers = [column[name] for column in columns]
        if isinstance(of_layers[0], str):
            frame[name] = _words([[constant] for constant in of_layers], zeros)
        else:
            frame[name] = np.repeat(np.array(of_layers), sizes)
    return pd.DataFrame(frame)


def _with_ratios(
    measured: LayerValues, ratios: Mapping[str, tuple[str, str]]
) -> tuple[list[str], np.ndarray]:
    """The names of metrics and their values `[token set, metric, input, head]`, ratios of them behind."""
    names, blocks = list(measured.metrics), [measured.values]
    for name, (above, below) in ratios.items():
        if above in measured.metrics and below in measured.metrics:
            parts = (measured.values[:, [names.index(part)]] for part in (above, below))
            blocks.append(ratio(*parts))
            names.append(name)
    return names, np.concatenate(blocks, axis=1)


def _words(names: Sequence[Sequence[str]], codes: Sequence[np.ndarray]) -> Any:
    """A column of texts, given for each part by codes into its names.

    A category where all parts have the same names, else plain text, as `pandas.concat` has it.
    """
    known = {name: code for code, name in enumerate(dict.fromkeys(itertools.chain.from_iterable(names)))}
    column = np.concatenate(
        [
            np.array([known[name] for name in own], np.int32)[code]
            for own, code in zip(names, codes, strict=True)
        ]
    )
    texts = pd.Index(list(known))
    if all(len(set(own)) == len(known) for own in names):
        return pd.Categorical.from_codes(column, categories=texts)
    return texts.array.take(column)


def tables(
    samples: pd.DataFrame, ratios: Mapping[str, tuple[str, str]] = RATIOS, *, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`(layers, heads)` from samples.

    Where inputs differ in their number of tokens, the tables give the largest, so that a layer stays one row.
    """
    samples, bootstrap = largest(samples), Bootstrap(seed)
    whole_layer = (samples["head"] == WHOLE_LAYER).to_numpy()
    of_heads = samples[~whole_layer] if whole_layer.any() else samples
    heads = _summarise(of_heads, [*KEYS, *_constants_in(samples)], ratios, bootstrap)
    keys = [key for key in KEYS if key != "head"]
    layers = layer_samples(samples, ratios)
    return _summarise(layers, [*keys, *_constants_in(samples)], ratios, bootstrap), heads


def layer_samples(samples: pd.DataFrame, ratios: Mapping[str, tuple[str, str]] = RATIOS) -> pd.DataFrame:
    """One value per input, layer and metric: the mean over heads within each input.

    A ratio of a layer is the ratio of its components' means over heads, within each input.
    """
    keys = [key for key in KEYS if key != "head"]
    within = [*keys, *_constants_in(samples), "input", "input_index"]
    is_ratio = samples["metric"].isin(list(ratios)).to_numpy()
    plain = samples[~is_ratio] if is_ratio.any() else samples
    group, first = _groups(plain, within)
    value = plain["value"].to_numpy(dtype=float)
    there = ~np.isnan(value)
    # a layer of which no head is defined has no mean
    means = ratio(*(np.bincount(group, x, len(first)) for x in (np.where(there, value, 0.0), there)))
    found = _rows(plain, within, first).assign(value=means)
    parts = [found]
    line, _ = _groups(found, [key for key in within if key != "metric"])
    for name, components in ratios.items():
        if (samples["metric"] == name).any():
            above, below = _side_by_side(found["metric"], line, components)
            parts.append(found.iloc[above].assign(metric=name, value=ratio(means[above], means[below])))
    return pd.concat(parts, ignore_index=True)


def _summarise(
    samples: pd.DataFrame, by: list[str], ratios: Mapping[str, tuple[str, str]], bootstrap: Bootstrap
) -> pd.DataFrame:
    """Statistics over inputs for every combination of `by`, model by model.

    A ratio is that of its components' means over inputs, resampled together: an input whose denominator is
    near zero would otherwise outweigh all others. It has no standard deviation of its own.
    """
    frames = []
    towers, first_rows = _groups(samples, ["model", "tower"])
    for tower in range(len(first_rows)):
        part = samples[towers == tower] if len(first_rows) > 1 else samples
        cell, first = _groups(part, by)
        column, order = pd.factorize(part["input_index"], sort=True)
        matrix = np.full((len(order), len(first)), np.nan)
        matrix[column, cell] = part["value"].to_numpy(dtype=float)
        rows = _rows(part, by, first)
        numbers, plain = np.empty((len(first), len(STATISTICS))), np.ones(len(first), bool)
        line, _ = _groups(rows, [key for key in by if key != "metric"])
        for name, components in ratios.items():
            own, above, below = _side_by_side(rows["metric"], line, (name, *components))
            plain[own] = False
            numbers[own] = bootstrap.ratio_of_means(matrix[:, above], matrix[:, below])
        numbers[plain] = bootstrap.summary(matrix[:, plain])
        frames.append(pd.concat([rows, statistics(numbers)], axis=1))
    front, rest = ([key for key in by if (key in KEYS) == first] for first in (True, False))
    columns = [*front, *STATISTICS, *rest]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def _groups(frame: pd.DataFrame, columns: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The group of each row, those with the same values in all columns, and the first row of each group.

    Groups are numbered in the order in which they appear; what is missing is a value like others.
    """
    group, count = np.zeros(len(frame), np.int64), 1
    for name in columns:
        column = frame[name]
        if isinstance(column.dtype, pd.CategoricalDtype):
            missing = column.hasnans
            own, size = column.cat.codes.to_numpy() + missing, len(column.cat.categories) + missing
        else:
            own, different = pd.factorize(column, use_na_sentinel=False)
            size = len(different)
        if size > 1:
            if count > LARGEST // size:
                group, there = pd.factorize(group)
                count = len(there)
            group, count = group * size + own, count * size
    group, there = pd.factorize(group)
    first = np.empty(len(there), np.int64)
    first[group[::-1]] = np.arange(len(group))[::-1]
    return group, first


def _side_by_side(metric: pd.Series, line: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The rows of several metrics in each line that has them all, `[metric, line]`, ordered as the first.

    line: of each row; none has a metric twice.
    """
    rows = [np.flatnonzero(metric == name) for name in names]
    found = np.full((len(names), line.max(initial=-1) + 1), -1)
    for place, own in zip(found, rows, strict=True):
        place[line[own]] = own
    found = found[:, line[rows[0]]]
    return found[:, (found >= 0).all(0)]


def read_layers(folder: Path) -> pd.DataFrame:
    """`layers.csv` of a run folder. Raises UserError if it is no such table, as all of these do."""
    return _read(folder, LAYERS)


def read_heads(folder: Path) -> pd.DataFrame:
    """`heads.parquet` of a run folder."""
    return _read(folder, HEADS)


def read_samples(folder: Path) -> pd.DataFrame:
    """`samples.parquet` of a run folder."""
    return _read(folder, SAMPLES)


def read_manifest(folder: Path) -> dict[str, Any]:
    """`manifest.json` of a run folder, with all of its fields (`diag.results.manifest`)."""
    return read_manifest_of(_finished(folder), PROBE)


def _read(folder: Path, name: str) -> pd.DataFrame:
    tip = again(folder, PROBE)
    table = read_table(_finished(folder) / name, LAYOUTS[name], "table", tip=tip)
    # older runs measured no other layers
    return table if "mixer" in table else table.assign(mixer="softmax")


def _finished(folder: Path) -> Path:
    if not is_finished(folder):
        raise UserError(f"'{folder}' is not a finished run (no {MANIFEST})", f"attnbias probe … -o {folder}")
    return folder


def _rows(frame: pd.DataFrame, columns: Sequence[str], places: np.ndarray) -> pd.DataFrame:
    """Rows of a frame, categories as text: samples need them for their size, tables are easier without."""
    rows, changed = frame[columns].iloc[places].reset_index(drop=True), dict[str, Any]()
    for name, column in rows.items():
        if isinstance(column.dtype, pd.CategoricalDtype):
            words = column.cat.categories.take(
                column.cat.codes.to_numpy(), allow_fill=True, fill_value=np.nan
            )
            changed[str(name)] = words.array
        elif column.dtype == object and column.isna().all():  # what a model does not have
            changed[str(name)] = column.astype(float)
    return rows.assign(**changed)


def one_kind(samples: pd.DataFrame) -> pd.DataFrame:
    """Samples of several models, each constant of one type as Parquet wants it: text where one is text."""
    mixed = [
        name
        for name in _constants_in(samples)
        if samples[name].dtype == object and any(isinstance(value, str) for value in samples[name].unique())
    ]
    return samples.assign(**{name: samples[name].map(str, na_action="ignore") for name in mixed})


def largest(samples: pd.DataFrame) -> pd.DataFrame:
    """Samples with what may differ between inputs of one layer (`SIZES`) replaced by its largest value."""
    found = {}
    for name in SIZES:
        if name in samples and samples[name].nunique() > 1:
            text = isinstance(samples[name].dtype, pd.CategoricalDtype)
            values = samples.assign(**{name: samples[name].astype(str)}) if text else samples
            found[name] = values.groupby(["model", "tower", "layer"], observed=True)[name].transform("max")
    return samples.assign(**found)


def _constants_in(samples: pd.DataFrame) -> list[str]:
    return [name for name in CONSTANTS if name in samples]
