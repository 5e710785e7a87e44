"""The figures of a run: tables in, matplotlib figures out. Knows no model, and never loads torch.

`FIGURES` lists those of a run's tables, and `draw_run` draws all that the tables allow. What other folders
show is listed where it is drawn: `training` for trained grids, `attend` for one token, the kinds of a
writeup in `diag.studies.writeup.drawing`. Nothing heavy is imported before something is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from diag.results.writing import file_stem, free_stem
from diag.show.figures.panels import COMPARISON_METRICS, CURVE_METRICS, HEAD_METRICS, LEDGER_METRICS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """A figure: the table it takes (`layers` or `heads`), the metrics it shows, and where it is drawn.

    `compares`: it takes the rows of several models; otherwise those of one (model, tower, tokens).
    """

    table: str
    metrics: tuple[str, ...]
    function: str
    compares: bool = False

    def draw(self, rows: pd.DataFrame) -> Figure:
        """The figure of these rows."""
        figure: Figure = resolve_name(f"diag.show.figures.{self.function}")(rows)
        return figure


FIGURES: dict[str, Drawing] = {
    "curves": Drawing("layers", CURVE_METRICS, "curves:layer_curves"),
    "heads": Drawing("heads", HEAD_METRICS, "heatmaps:head_heatmaps"),
    "ledger": Drawing("layers", LEDGER_METRICS, "ledger:ledger_over_depth"),
    "comparison": Drawing("layers", COMPARISON_METRICS, "curves:model_comparison", compares=True),
}


ENDINGS: dict[str, tuple[str, ...]] = {"none": (), "png": ("png",), "all": ("pdf", "png")}
"""What --figures may say -> the pictures of each figure; where there are none, its rows are not written."""


def draw_run(
    layers: pd.DataFrame, heads: pd.DataFrame, depths: Mapping[tuple[str, str], int] | None = None
) -> dict[str, tuple[Figure, pd.DataFrame]]:
    """Every figure of a run with the rows behind it, by file stem, such as `curves-demo-vit-p8-vision-patch`.

    depths: how many layers each model and tower has, also where only some of them are measured.

    One of each kind per (model, tower, tokens) and way of measuring, and a `comparison` if there is more
    than one model. Figures whose metrics were not measured are left out, so the answer may be empty.
    """
    from diag.show.figures.tables import check_columns, rows_of

    tables = {"layers": check_columns(layers), "heads": check_columns(heads, ["head"])}
    drawn: dict[str, tuple[Figure, pd.DataFrame]] = {}
    taken: set[str] = set()
    for kind, drawing in FIGURES.items():
        table = tables[drawing.table]
        parts = _comparable(table) if drawing.compares else _separate(table)
        for suffix, part in parts:
            rows = rows_of(part, drawing.metrics)
            if not rows.empty:
                stem = free_stem(file_stem(kind, *suffix), taken)
                drawn[stem] = (drawing.draw(_with_depths(rows, depths)), rows)
    return drawn


def _with_depths(rows: pd.DataFrame, depths: Mapping[tuple[str, str], int] | None) -> pd.DataFrame:
    """Rows with the column `layer_count` where the depth of each of their models is known."""
    lines = list(zip(rows["model"], rows["tower"], strict=True))
    if depths is None or not depths.keys() >= set(lines):
        return rows
    return rows.assign(layer_count=[depths[line] for line in lines])


def _separate(table: pd.DataFrame) -> Iterator[tuple[list[object], pd.DataFrame]]:
    """The table's selections, each with the words of its stem: names, and the conditions that differ."""
    from diag.show.figures.tables import CONDITIONS, IDENTITY, selections

    for names, alike in table.groupby(list(IDENTITY), sort=False, dropna=False):
        differing = [c for c in CONDITIONS if c in table.columns and alike[c].nunique(dropna=False) > 1]
        for part in selections(alike):
            yield [*names, *(part[column].iloc[0] for column in differing)], part


def _comparable(table: pd.DataFrame) -> Iterator[tuple[list[object], pd.DataFrame]]:
    """What is compared: all models together if each has one tower and token set, else those that share one.

    If none share one, all together after all: the user asked for more than one model.
    """
    if table["model"].nunique() < 2:
        return
    shared = [
        (list(names), part)
        for names, part in table.groupby(["tower", "tokens"], sort=False, observed=True)
        if part["model"].nunique() > 1
    ]
    single = len(table[["model", "tower", "tokens"]].drop_duplicates()) == table["model"].nunique()
    if single or not shared:
        yield [], table
    elif len(shared) == 1:
        yield [], shared[0][1]
    else:
        yield from shared
