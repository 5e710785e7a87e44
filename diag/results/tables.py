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

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diag.errors import UserError
from diag.inputs.tables import ANY, COUNT, NAME, NUMBER, PLACE, TEXT, WHOLE, Layout, read_table
from diag.metrics.catalogue import RATIOS
from diag.results.bootstrap import ratio, ratio_of_means, summary
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
    measured: LayerValues, ratios: Mapping[str, tuple[str, str]], constants: Mapping[str, Any]
) -> pd.DataFrame:
    """One layer's numbers as long-form rows, one per input and head (-1: of the whole layer).

    ratios: metrics to add, each the ratio of two that are there.
    constants: columns that are the same in every row of the tower (model, tower …).
    """
    names, values = list(measured.metrics), measured.values
    added = {k: v for k, v in ratios.items() if v[0] in names and v[1] in names}
    blocks = [values]
    for above, below in added.values():
        blocks.append(ratio(values[:, names.index(above)], values[:, names.index(below)])[:, None])
    values = np.concatenate(blocks, axis=1)
    names += list(added)
    token_set, metric, place, head = np.indices(values.shape).reshape(4, -1)
    frame = pd.DataFrame(
        {
            "tokens": _category(measured.token_sets, token_set),
            "metric": _category(names, metric),
            "input": _category(measured.ids, place),
            "input_index": place + measured.first_input,
            "head": head if measured.of_heads else WHOLE_LAYER,
            "value": values.reshape(-1),
        }
    )
    for name, constant in measured.columns(constants).items():
        frame[name] = (
            _category([constant], np.zeros(len(frame), int)) if isinstance(constant, str) else constant
        )
    return frame


def tables(
    samples: pd.DataFrame, ratios: Mapping[str, tuple[str, str]] = RATIOS, *, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`(layers, heads)` from samples.

    Where inputs differ in their number of tokens, the tables give the largest, so that a layer stays one row.
    """
    samples = largest(samples)
    of_heads = samples[samples["head"] != WHOLE_LAYER]
    heads = _summarise(of_heads, [*KEYS, *_constants_in(samples)], ratios, seed)
    keys = [key for key in KEYS if key != "head"]
    layers = layer_samples(samples, ratios)
    return _summarise(layers, [*keys, *_constants_in(samples)], ratios, seed), heads


def layer_samples(samples: pd.DataFrame, ratios: Mapping[str, tuple[str, str]] = RATIOS) -> pd.DataFrame:
    """One value per input, layer and metric: the mean over heads within each input.

    A ratio of a layer is the ratio of its components' means over heads, within each input.
    """
    keys = [key for key in KEYS if key != "head"]
    within = [*keys, *_constants_in(samples), "input", "input_index"]
    plain = samples[~samples["metric"].isin(list(ratios))]
    means = plain.groupby(within, observed=True, sort=False, dropna=False)["value"].mean().reset_index()
    parts = [means]
    on = [key for key in within if key != "metric"]
    for name, (above, below) in ratios.items():
        if not (samples["metric"] == name).any():
            continue
        both = means[means["metric"] == above].merge(
            means[means["metric"] == below], on=on, suffixes=("", "_below")
        )
        both["value"] = ratio(both["value"].to_numpy(), both["value_below"].to_numpy())
        parts.append(both.assign(metric=name)[[*within, "value"]])
    return pd.concat([_plain(part) for part in parts], ignore_index=True)


def _summarise(
    samples: pd.DataFrame, by: list[str], ratios: Mapping[str, tuple[str, str]], seed: int
) -> pd.DataFrame:
    """Statistics over inputs for every combination of `by`, model by model.

    A ratio is that of its components' means over inputs, resampled together: an input whose denominator is
    near zero would otherwise outweigh all others. It has no standard deviation of its own.
    """
    frames = []
    for _, part in samples.groupby(["model", "tower"], observed=True, sort=False):
        grouped = part.groupby(by, observed=True, sort=False, dropna=False)
        cell = grouped.ngroup().to_numpy()
        order, column = np.unique(part["input_index"].to_numpy(), return_inverse=True)
        matrix = np.full((len(order), cell.max() + 1), np.nan)
        matrix[column, cell] = part["value"].to_numpy(dtype=float)
        # ngroup numbers groups in order of appearance, as size() lists them
        rows = _plain(grouped.size().reset_index()[by])
        table = pd.concat([rows, summary(matrix, seed=seed)], axis=1)
        others = [key for key in by if key != "metric"]
        for name, (above, below) in ratios.items():
            places = _components(rows, others, name, above, below)
            if len(places):
                own, one, other = places.T
                table.loc[own, STATISTICS] = ratio_of_means(matrix[:, one], matrix[:, other], seed=seed)
        frames.append(table)
    front, rest = ([key for key in by if (key in KEYS) == first] for first in (True, False))
    columns = [*front, *STATISTICS, *rest]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def _components(rows: pd.DataFrame, keys: list[str], name: str, above: str, below: str) -> np.ndarray:
    """Where each cell of a ratio is in `rows`, and where its two components are: `[cell, 3]`."""
    code = rows.groupby(keys, sort=False, dropna=False, observed=True).ngroup()
    place = {pair: row for row, pair in enumerate(zip(code, rows["metric"], strict=True))}
    return np.array(
        [
            (row, place[group, above], place[group, below])
            for (group, metric), row in place.items()
            if metric == name and (group, above) in place and (group, below) in place
        ],
        dtype=int,
    ).reshape(-1, 3)


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


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Categories as strings: samples need them for their size, tables are easier without."""
    kinds = {name: str for name, kind in frame.dtypes.items() if isinstance(kind, pd.CategoricalDtype)}
    return frame.astype(kinds)


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


def _category(names: Sequence[Any], codes: np.ndarray) -> pd.Categorical:
    unique = list(dict.fromkeys(names))
    place = np.array([unique.index(name) for name in names])
    return pd.Categorical.from_codes(place[codes], categories=pd.Index(unique))
