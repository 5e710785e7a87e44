"""The run folder: tidy tables out of samples, written so that a half-written file is never read.

    samples.parquet  one value per input, layer, head and metric: everything else follows from it
    layers.csv       per layer: mean over heads within each input, then statistics over inputs
    heads.parquet    the same per head
    manifest.json    written last

The unit of replication is the input. Intervals are 95 % percentile bootstrap intervals of the mean
over inputs, with the same resamples for every cell. No torch here.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError

from diag.errors import UserError, one_of

KEYS = ["model", "tower", "layer", "module", "head", "tokens", "metric"]
STATISTICS = ["mean", "std", "ci_low", "ci_high", "n"]
CONSTANTS = [
    "n_tokens",
    "patch_size",
    "image_size",
    "positions",
    "patch_embedding",
    "attn_scope",
    "first_token",
    "values",
    "intervention",
    "dtype",
    "seed",
]
RESAMPLES = 2000

WHOLE_LAYER = -1
"""The `head` of a number that belongs to a layer; such rows are in samples.parquet and layers.csv only."""

FORMAT = 1
"""Of the run folder; written to its manifest. A folder of another format is not read."""

RATIOS: dict[str, tuple[str, str]] = {"self_specific_fraction": ("excess", "cos_y_vself")}
"""Metrics that are a ratio of two others' means over inputs: name -> (numerator, denominator)."""


class CannotWrite(UserError):  # noqa: N818  it says what is the matter
    """A full disk, or a folder that cannot be written: nothing that follows could be kept either."""


def samples_frame(
    values: np.ndarray,
    *,
    ids: Sequence[str],
    first_input: int,
    token_sets: Sequence[str],
    metrics: Sequence[str],
    ratios: Mapping[str, tuple[str, str]],
    constants: Mapping[str, Any],
    of_heads: bool = True,
) -> pd.DataFrame:
    """One layer's block `values[token set, metric, input, head]` as long-form rows.

    of_heads: False for numbers of a whole layer, whose `head` is -1.
    ratios: metrics to add, each the ratio of two that are there.
    constants: columns that are the same in every row (model, tower, layer, module …).
    """
    names = list(metrics)
    added = {k: v for k, v in ratios.items() if v[0] in names and v[1] in names}
    blocks = [values]
    for above, below in added.values():
        blocks.append(_ratio(values[:, names.index(above)], values[:, names.index(below)])[:, None])
    values = np.concatenate(blocks, axis=1)
    names += list(added)
    sets, metrics_n, inputs, heads = values.shape
    frame = pd.DataFrame(
        {
            "tokens": _category(token_sets, np.repeat(np.arange(sets), metrics_n * inputs * heads)),
            "metric": _category(names, np.tile(np.repeat(np.arange(metrics_n), inputs * heads), sets)),
            "input": _category(ids, np.tile(np.repeat(np.arange(inputs), heads), sets * metrics_n)),
            "input_index": np.tile(np.repeat(np.arange(inputs), heads), sets * metrics_n) + first_input,
            "head": np.tile(np.arange(heads) if of_heads else [WHOLE_LAYER], sets * metrics_n * inputs),
            "value": values.reshape(-1),
        }
    )
    for name, constant in constants.items():
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
        both["value"] = _ratio(both["value"].to_numpy(), both["value_below"].to_numpy())
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
    front = [key for key in by if key in KEYS]
    if not frames:
        return pd.DataFrame(columns=[*front, *STATISTICS, *[key for key in by if key not in front]])
    table = pd.concat(frames, ignore_index=True)
    return table[[*front, *STATISTICS, *[key for key in by if key not in front]]]


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


def ratio_of_means(above: np.ndarray, below: np.ndarray, *, seed: int) -> np.ndarray:
    """Ratios of means over inputs, both `[input, cell]`, as `[cell, mean std low high n]`.

    The interval is the 95 % bootstrap over inputs, numerator and denominator resampled together.
    NaN is missing; there is no standard deviation.
    """
    both = ~np.isnan(above) & ~np.isnan(below)
    above, below, count = np.where(both, above, 0.0), np.where(both, below, 0.0), both.sum(0)
    found = np.full((above.shape[1], 5), np.nan)
    found[:, 0], found[:, 4] = _ratio(above.sum(0), below.sum(0)), count
    total = len(above)
    if total > 1:
        draws = np.random.default_rng(seed).multinomial(total, np.full(total, 1 / total), size=RESAMPLES)
        drawn = _ratio(draws @ above, draws @ below)
        some = (count > 1) & ~np.isnan(drawn).all(0)
        if some.any():
            found[some, 2:4] = np.nanpercentile(drawn[:, some], [2.5, 97.5], axis=0).T
    return found


def summary(values: np.ndarray, *, seed: int, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Mean, standard deviation (n - 1), 95 % bootstrap interval and n of each column, `values[input, cell]`.

    NaN is missing. With one input there is no interval (NaN).
    """
    present = ~np.isnan(values)
    count = present.sum(0)
    filled = np.where(present, values, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = filled.sum(0) / count
        deviation = np.where(present, values - mean, 0.0)
        std = np.sqrt((deviation**2).sum(0) / (count - 1))
    std[count < 2] = np.nan
    low, high = np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    total = values.shape[0]
    if total > 1:
        draws = np.random.default_rng(seed).multinomial(total, np.full(total, 1 / total), size=resamples)
        for start in range(0, values.shape[1], 4096):
            part = slice(start, start + 4096)
            with np.errstate(invalid="ignore", divide="ignore"):
                # deviations from the mean keep the digits of small spreads
                means = (draws @ deviation[:, part]) / (draws @ present[:, part].astype(float))
            some = count[part] > 1
            if not some.any():
                continue
            bounds = np.nanpercentile(means[:, some], [2.5, 97.5], axis=0)
            low[part][some], high[part][some] = bounds + mean[part][some]
    return pd.DataFrame({"mean": mean, "std": std, "ci_low": low, "ci_high": high, "n": count})


def write(frame: pd.DataFrame, path: Path) -> None:
    """Writes a table in the format of the path's suffix, atomically. Raises UserError for an unknown one."""
    if path.suffix not in WRITERS:
        raise UserError(f"cannot write '{path.name}'", f"known formats: {one_of(WRITERS)}")
    atomically(path, lambda temporary: WRITERS[path.suffix](frame, temporary))


def write_json(document: Mapping[str, Any], path: Path) -> None:
    """Writes a JSON document, atomically."""
    text = json_text(document)
    atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def json_text(document: Mapping[str, Any]) -> str:
    """A JSON document as it is written."""
    return json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n"


def atomically(path: Path, write_to: Callable[[Path], object]) -> None:
    """Calls `write_to` with a temporary name beside `path`, then renames: readers see all of it or nothing.

    Raises CannotWrite if the disk is full or the folder cannot be written.
    """
    # two machines may have a process of the same number
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}.tmp")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_to(temporary)
            # a file system may find only now that it is full
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a full disk or a folder that cannot be written into CannotWrite, which names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CannotWrite(
            f"cannot write '{path}': {reason}",
            "make room and run the same command again, or choose another folder with -o",
        ) from error


def read_layers(folder: Path) -> pd.DataFrame:
    """`layers.csv` of a run folder."""
    return pd.read_csv(_finished(folder) / "layers.csv", keep_default_na=True)


def read_heads(folder: Path) -> pd.DataFrame:
    """`heads.parquet` of a run folder."""
    return pd.read_parquet(_finished(folder) / "heads.parquet")


def read_samples(folder: Path) -> pd.DataFrame:
    """`samples.parquet` of a run folder."""
    return pd.read_parquet(_finished(folder) / "samples.parquet")


def read_manifest(folder: Path) -> dict[str, Any]:
    """`manifest.json` of a run folder."""
    return json.loads((_finished(folder) / "manifest.json").read_text(encoding="utf-8"))


def _finished(folder: Path) -> Path:
    if not (folder / "manifest.json").is_file():
        raise UserError(
            f"'{folder}' is not a finished run (no manifest.json)", "attnbias probe … -o " + str(folder)
        )
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
    """Samples with what may differ between inputs of one layer replaced by its largest value.

    Of the scopes of attention, "window" is larger than "full": one input was split, so the layer can.
    """
    found = {}
    for name in ("n_tokens", "attn_scope"):
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


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below != 0, above / below, np.nan)


LATEX = {
    "−": "$-$",
    "±": "$\\pm$",
    "×": "$\\times$",
    "→": "$\\rightarrow$",
    "·": "$\\cdot$",
    "–": "--",
    "…": "\\dots{}",
}
"""Signs that not every TeX engine has in its fonts."""


def _latex(frame: pd.DataFrame) -> str:
    """A `tabular` between booktabs' rules, everything escaped: text to the left, numbers to the right."""
    numbers = [pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes]
    styler = frame.style.hide(axis="index").format(escape="latex", precision=3, na_rep="--")
    styler = styler.format_index(escape="latex", axis=1)
    text = styler.to_latex(hrules=True, column_format="".join("r" if number else "l" for number in numbers))
    for sign, command in LATEX.items():
        text = text.replace(sign, command)
    return "% needs \\usepackage{booktabs}\n" + text


def _markdown(frame: pd.DataFrame) -> str:
    """A pipe table. A bar inside a cell would end it."""
    cells = frame.map(lambda cell: cell.replace("|", "\\|") if isinstance(cell, str) else cell)
    # numbers that are text already keep their digits
    return cells.to_markdown(index=False, floatfmt=".3f", disable_numparse=True) + "\n"


WRITERS: dict[str, Callable[[pd.DataFrame, Path], object]] = {
    ".csv": lambda frame, path: frame.to_csv(path, index=False, float_format="%.9g"),
    ".parquet": lambda frame, path: frame.to_parquet(path, index=False, compression="zstd"),
    ".json": lambda frame, path: frame.to_json(path, orient="records", indent=1),
    ".tex": lambda frame, path: path.write_text(_latex(frame), encoding="utf-8"),
    ".md": lambda frame, path: path.write_text(_markdown(frame), encoding="utf-8"),
}
