"""Published values laid over measured curves, by model and source: hollow grey markers with error bars."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import pandas as pd
from matplotlib.axes import Axes

from diag.errors import UserError, one_of
from diag.show.figures.lines import published_points
from diag.show.figures.tables import shorten

COLUMNS = ("model", "metric", "layer", "value", "uncertainty", "source")
MARKERS = "sD^vo"


@dataclass(frozen=True)
class Overlay:
    """The published values of one model from one source, with how they are drawn."""

    rows: pd.DataFrame
    label: str
    marker: str

    @property
    def last(self) -> float:
        """The last published layer, which stands at relative depth 1."""
        return max(float(self.rows["layer"].max()), 1.0)

    def of(self, metrics: Collection[str]) -> Overlay:
        """The same with the rows of these metrics only; may be empty."""
        return replace(self, rows=self.rows[self.rows["metric"].isin(list(metrics))])

    def draw(self, ax: Axes, *, relative: bool = False) -> None:
        """The values over layers, or over depth relative to the last published layer."""
        for _, points in self.rows.sort_values("layer").groupby("metric", sort=False):
            places = points["layer"].astype(float) / (self.last if relative else 1)
            published_points(ax, points.assign(layer=places), marker=self.marker)


def overlays(published: pd.DataFrame | None, metrics: Collection[str]) -> list[Overlay]:
    """Those of the metrics by model and source, labelled `published (SOURCE)`, or with the model if several.

    Raises UserError if a column is missing.
    """
    if published is None or published.empty:
        return []
    missing = [column for column in COLUMNS if column not in published]
    if missing:
        raise UserError(
            f"the published values have no column {one_of(missing)}", f"columns: {','.join(COLUMNS)}"
        )
    several = published["model"].nunique() > 1
    # two lines of one model have the same published values
    groups = (
        published.dropna(subset=["value"])
        .drop_duplicates(subset=list(COLUMNS))
        .groupby(["model", "source"], sort=False, observed=True)
    )
    found = [
        Overlay(
            rows,
            f"published{f' {shorten(str(model), 40)}' if several else ''} ({shorten(str(source), 40)})",
            MARKERS[place % len(MARKERS)],
        ).of(metrics)
        for place, ((model, source), rows) in enumerate(groups)
    ]
    return [overlay for overlay in found if not overlay.rows.empty]
