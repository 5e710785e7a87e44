"""What has to be known of a line before its numbers: said in labels, under titles, in verdicts. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

BETWEEN = " · "
"""Between the parts of a label."""


def columns_of(model: Mapping[str, Any], tower: Mapping[str, Any]) -> dict[str, Any]:
    """What a loaded model says of itself, as columns; of what it was given it knows nothing."""
    return {
        "weights": model.get("weights", "as given"),
        **{column: tower.get(column) for column in ("positions", "patch_embedding")},
    }


def caveats(row: Mapping[str, Any] | pd.Series) -> list[str]:
    """Those of one line, by its columns; columns that an older table lacks say nothing."""
    return [words for (column, value), words in CAVEATS.items() if row.get(column) == value]


def with_caveats(name: str, row: Mapping[str, Any] | pd.Series) -> str:
    """A line's name with its caveats behind it."""
    return BETWEEN.join([name, *caveats(row)])


def apart(label: str) -> tuple[str, list[str]]:
    """A label without the caveats behind it, and these.

    >>> apart("demo:vit-p8 · T = 65 · random weights")
    ('demo:vit-p8 · T = 65', ['random weights'])
    """
    name, *parts = label.split(BETWEEN)
    said = list[str]()
    while parts and parts[-1] in CAVEATS.values():
        said.insert(0, parts.pop())
    return BETWEEN.join([name, *parts]), said


def filled_in(table: pd.DataFrame, entries: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """A table of several models with the columns that an earlier version did not write.

    entries: what the manifest says of each model, by its name `given`.
    """
    known = {entry.get("given"): entry for entry in entries}
    found: dict[str, Any] = {
        column: [known.get(name, {}).get(column) for name in table["model"]]
        for column in COLUMNS
        if column not in table
    }
    return table.assign(**found)


def of_table(rows: pd.DataFrame) -> list[str]:
    """Those of a table of several models: words that hold for all, or for which of them they hold.

    None where the table tells no models apart, as that of published values.
    """
    if not {"model", "tower"} <= set(rows):
        return []
    found, models = dict[str, list[str]](), list(rows["model"].unique())
    told = [column for column in COLUMNS if column in rows]  # of one model, lines may differ
    for _, line in rows.drop_duplicates(["model", "tower", *told]).iterrows():
        for words in caveats(line):
            found.setdefault(words, []).append(str(line["model"]))
    return [
        words if {*named} == {*models} else f"{words}: {', '.join(dict.fromkeys(named))}"
        for words, named in found.items()
    ]
