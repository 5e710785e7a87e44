"""Reading the long-form tables: what belongs in one figure, and how a caption describes it.

A *selection* is the rows that may stand in one figure: one model, tower and token set, measured in one way;
in a table of several runs, one `label`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from diag.errors import UserError, one_of, visible
from diag.results.caveats import BETWEEN, apart, of_table, with_caveats
from diag.show.figures.panels import COMPARISON_METRICS

IDENTITY = ("model", "tower", "tokens")
LABEL = "label"
"""Column of tables of several runs: unique to each line, also where one model was run on several lengths."""
CONDITIONS = ("values", "intervention", "patch_size", "image_size", "dtype", "seed")
"""Constants that make two measurements of one model different. `n_tokens`, `attn_scope` and `first_token`
are not among them: they may change from layer to layer or from metric to metric within one measurement."""

REQUIRED = (*IDENTITY, "layer", "metric", "mean", "ci_low", "ci_high", "n")
NUMBERS = ("mean", "ci_low", "ci_high", "n")


def check_columns(table: pd.DataFrame, extra: Sequence[str] = ()) -> pd.DataFrame:
    """The table with float numbers (`None` becomes NaN), no categories; UserError if a column is missing."""
    missing = [column for column in (*REQUIRED, *extra) if column not in table.columns]
    if missing:
        raise UserError(
            f"the table to draw has no column {one_of(missing)}",
            "give the tables of a run: layers.csv for curves, heads.parquet for heatmaps",
        )
    numbers = {column: pd.to_numeric(table[column]).astype(float) for column in NUMBERS}
    words = {column: table[column].astype(object) for column in (*IDENTITY, "metric")}
    names = {name: visible(name) for name in words["model"].unique() if isinstance(name, str)}
    if any(name != shown for name, shown in names.items()):  # no font has the others
        words["model"] = words["model"].replace(names)
    return table.assign(**numbers, **words)


def rows_of(table: pd.DataFrame, metrics: Iterable[str]) -> pd.DataFrame:
    """The rows of these metrics that hold a number; the data behind a figure. May be empty."""
    return table[table["metric"].isin(list(metrics)) & table["mean"].notna()]


def drawable(table: pd.DataFrame, metrics: Sequence[str], figure: str) -> pd.DataFrame:
    """`rows_of`, or UserError that names the metrics this figure is made of and those that the table has."""
    rows = rows_of(table, metrics)
    if rows.empty:
        there = sorted(table["metric"].dropna().unique())
        holds = f"only {', '.join(there)}" if there else "no rows"
        raise UserError(
            f"nothing to draw: {figure} need other metrics than the table holds ({holds})",
            f"measure at least one of: --metrics {','.join(metrics)}",
        )
    return rows


def selections(table: pd.DataFrame) -> list[pd.DataFrame]:
    """The table cut into its selections, in order of first appearance."""
    keys = [column for column in (LABEL, *IDENTITY, *CONDITIONS) if column in table.columns]
    return [rows for _, rows in table.groupby(keys, sort=False, dropna=False, observed=True)]


def one_selection(table: pd.DataFrame, figure: str, index: Sequence[str] = ("layer",)) -> pd.DataFrame:
    """The table itself if it is one selection with one row per metric and `index`; UserError otherwise."""
    for column in (*IDENTITY, *CONDITIONS, LABEL):
        if column in table.columns and table[column].nunique(dropna=False) > 1:
            found = [str(value) for value in table[column].unique()]
            shown = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
            raise UserError(
                f"{figure} show one {column} at a time, but the table holds {len(found)}: {shown}",
                f"choose one: table[table[{column!r}] == {table[column].iloc[0]!r}]",
            )
    repeated = table[table.duplicated([*index, "metric"])]
    if not repeated.empty:
        row = repeated.iloc[0]
        place = ", ".join(f"{column} {row[column]}" for column in index)
        raise UserError(
            f"the table holds more than one value of {row['metric']} at {place}",
            "give the table of one run; to put runs side by side, use the comparison figure",
        )
    return table


def compared_metrics(parts: Sequence[pd.DataFrame], *, least: int = 1) -> list[str]:
    """The metrics of a comparison that at least so many parts have.

    Of the two self weights the one that more of them have; the relative one compares 49 and 256 tokens.
    """
    having = {
        metric: sum(not rows_of(part, [metric]).empty for part in parts) for metric in COMPARISON_METRICS
    }
    spare = "self_weight" if having["self_weight_ratio"] >= having["self_weight"] else "self_weight_ratio"
    return [metric for metric, count in having.items() if count >= least and metric != spare]


def patch_size_of(part: pd.DataFrame) -> float | None:
    """The patch size of one line; None where it has none, or as `16x8` no place in an order."""
    if "patch_size" not in part.columns:
        return None
    size = pd.to_numeric(part["patch_size"], errors="coerce").iloc[0]
    return None if pd.isna(size) else float(size)


def last_layer(rows: pd.DataFrame) -> float:
    """What stands at relative depth 1: a model's last layer where the table knows it, else the last measured
    one. A model of one layer stands at 0.
    """
    counted = rows["layer_count"].max() - 1 if "layer_count" in rows else 0
    return max(float(rows["layer"].max()), float(counted), 1.0)


def depth_of(rows: pd.DataFrame) -> pd.Series:
    """The layers of rows, and the ends of their model's depth where the table knows it."""
    ends = [0.0, float(rows["layer_count"].max()) - 1] if "layer_count" in rows else []
    return pd.concat([rows["layer"].astype(float), pd.Series(ends, dtype=float)])


def profile(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One metric over depth: columns layer, mean, ci_low, ci_high, sorted by layer."""
    rows = table[table["metric"] == metric].sort_values("layer")
    return rows[["layer", "mean", "ci_low", "ci_high"]].astype(float).reset_index(drop=True)


def span(numbers: pd.Series) -> str:
    """`14`, or `12–14` where the numbers differ; empty where there are none."""
    known = pd.to_numeric(numbers).dropna()
    if known.empty:
        return ""
    low, high = f"{known.min():.15g}", f"{known.max():.15g}"
    return low if low == high else f"{low}–{high}"


LEAST = 16
"""Characters of a name that are always shown, however much is said behind it."""


def shorten(label: str, width: int) -> str:
    """A long name with its middle left out: family (in front) and variant (at the end) tell models apart.

    Caveats behind it are never cut: the name makes room for them, down to `LEAST` characters.
    """
    if len(label) <= width:
        return label
    name, said = apart(label)
    width = max(width - sum(len(BETWEEN + words) for words in said), min(LEAST, width))
    if len(name) > width:
        front = (width - 1) // 2
        name = f"{name[:front]}…{name[len(name) - (width - 1 - front) :]}"
    return BETWEEN.join([name, *said])


def label_of(rows: pd.DataFrame, *parts: str) -> str:
    """What one selection is called, its caveats behind it: its label, or else its model and further parts."""
    first = rows.iloc[0]
    if LABEL in rows.columns:
        return str(first[LABEL])
    return with_caveats(BETWEEN.join([str(first["model"]), *parts]), first)


def wrapped(parts: Iterable[str], width: int) -> list[str]:
    """Parts in as few lines as they take, broken between parts; one that is longer than a line, at spaces."""
    lines: list[str] = []
    for part in filter(None, parts):
        if lines and len(lines[-1] + BETWEEN + part) <= width:
            lines[-1] += BETWEEN + part
        else:
            lines += textwrap.wrap(part, width, break_long_words=False, break_on_hyphens=False)
    return lines


def title_lines(label: str, width: int) -> list[str]:
    """A label as a title: in one line where it fits, else its caveats below its name.

    Words are broken between them; a name that is longer than a line loses its middle.
    """
    if len(label) <= width:
        return [label]
    name, said = apart(label)
    return [*(shorten(line, width) for line in wrapped([name], width)), *wrapped(said, width)]


CAPTION_WIDTH = 128
"""Characters of a caption's line that fit a page-wide figure."""


def caption(rows: pd.DataFrame, *, bands: str, labelled: bool = True, width: int = CAPTION_WIDTH) -> str:
    """One or two lines under the title: token set, T, n, how it was measured, as far as the rows agree.

    Caveats stand in the title, or in the labels of several lines; not `labelled`: neither is there, and they
    are named here. `bands` says what the shading is; it is left out where no row has an interval. Empty: no
    lines are drawn.
    """
    parts = [
        _agreed(rows, "tower", "{} tower"),
        _agreed(rows, "tokens", "{} tokens"),
        _counted(rows, "n_tokens", "T = {}"),
        _agreed(rows.replace({"first_token": {"included": ""}}), "first_token", "t = 0 {}"),
        _counted(rows, "n", "n = {} input" if (rows["n"] == 1).all() else "n = {} inputs"),
        _agreed(rows, "values", "values {}"),
        _agreed(rows, "intervention", "intervention {}"),
        *([] if labelled else of_table(rows)),
    ]
    if np.isfinite(rows["ci_low"]).any():
        parts.append(bands)
    if bands and _has_gaps(rows):
        parts.append("dotted: over layers that are not measured")
    return "\n".join(wrapped(parts, width))


def _has_gaps(rows: pd.DataFrame) -> bool:
    """Whether a line leads over layers that are not there."""
    keys = [column for column in (LABEL, *IDENTITY, *CONDITIONS, "metric") if column in rows.columns]
    layers = rows.groupby(keys, sort=False, dropna=False, observed=True)["layer"]
    return any((np.diff(np.unique(part)) > 1).any() for _, part in layers)


def _agreed(rows: pd.DataFrame, column: str, template: str) -> str:
    if column not in rows.columns or rows[column].nunique(dropna=False) != 1:
        return ""
    value = rows[column].iloc[0]
    said = "" if pd.isna(value) else str(value).replace("_", " ")
    return "" if said in ("", "none") else template.format(said)


def _counted(rows: pd.DataFrame, column: str, template: str) -> str:
    counts = span(rows[column]) if column in rows.columns else ""
    return template.format(counts) if counts else ""
