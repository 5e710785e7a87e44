"""What has to be known of a line before its numbers: said in labels, under titles, in verdicts. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

RANDOM, WITHOUT_ADAPTER, BY_DEFAULT = "random", "without adapter", "demo, by default"
"""Of the column `weights`: nothing was learned, or an adapter beside them was not loaded. Of `inputs`: nobody
named any."""

NOISE, NO_PROMPT = "noise latents", "no prompt"
"""Of the column `inputs`, for diffusion models: what stands in place of an image, or of a text, that nothing
in the model's folder encodes."""

CAVEATS: Mapping[tuple[str, str], str] = {
    ("weights", RANDOM): "random weights",
    ("weights", WITHOUT_ADAPTER): "adapter not loaded",
    ("positions", "interpolated"): "interpolated positions",
    ("patch_embedding", "resampled"): "resampled patches",
    ("inputs", BY_DEFAULT): "demo inputs",
    **{("inputs", words): words for words in (NOISE, NO_PROMPT, f"{NOISE}, {NO_PROMPT}")},
}
"""Column and value -> the words."""

COLUMNS = tuple(dict.fromkeys(column for column, _ in CAVEATS))


def caveats(row: Mapping[str, Any] | pd.Series) -> list[str]:
    """Those of one line, by its columns; columns that an older table lacks say nothing."""
    return [words for (column, value), words in CAVEATS.items() if row.get(column) == value]


def with_caveats(name: str, row: Mapping[str, Any] | pd.Series) -> str:
    """A line's name with its caveats behind it."""
    return " · ".join([name, *caveats(row)])


def of_table(rows: pd.DataFrame) -> list[str]:
    """Those of a table of several models: words that hold for all, or for which of them they hold."""
    found, models = dict[str, list[str]](), list(rows["model"].unique())
    for _, line in rows.drop_duplicates(["model", "tower"]).iterrows():
        for words in caveats(line):
            found.setdefault(words, []).append(str(line["model"]))
    return [words if {*named} == {*models} else f"{words}: {_few(named)}" for words, named in found.items()]


def _few(names: Iterable[str]) -> str:
    every = list(dict.fromkeys(names))
    return ", ".join(every[:2]) + (f" and {len(every) - 2} more" if len(every) > 2 else "")
