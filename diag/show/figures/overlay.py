"""Published values laid over measured curves: hollow grey markers with error bars."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from diag.errors import UserError, one_of
from diag.show.figures.tables import shorten

COLUMNS = ("model", "metric", "layer", "value", "uncertainty", "source")
GREY = "0.45"
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

    def of(self, metrics: Iterable[str]) -> Overlay:
        """The same with the rows of these metrics only; may be empty."""
        return Overlay(self.rows[self.rows["metric"].isin(list(metrics))], self.label, self.marker)

    def handle(self) -> Line2D:
        """What stands for it in a legend."""
        return Line2D([], [], linestyle="", label=self.label, **_look(self.marker))  # type: ignore[arg-type]


def overlays(published: pd.DataFrame | None) -> list[Overlay]:
    """Published values by model and source, labelled `published (SOURCE)`, or with the model if several.

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
    return [
        Overlay(
            rows,
            f"published{f' {shorten(str(model), 40)}' if several else ''} ({shorten(str(source), 40)})",
            MARKERS[place % len(MARKERS)],
        )
        for place, ((model, source), rows) in enumerate(groups)
    ]


def draw_overlay(ax: Axes, overlay: Overlay, *, relative: bool = False) -> None:
    """The values over layers, or over depth relative to the last published layer. Empty: nothing.

    They have no label: names of sources are too long for a panel's legend, see `Overlay.handle`.
    """
    rows = overlay.rows.sort_values("layer")
    for _, points in rows.groupby("metric", sort=False):
        layer = points["layer"].astype(float)
        ax.errorbar(
            layer / overlay.last if relative else layer,
            points["value"].astype(float),
            yerr=points["uncertainty"].astype(float).fillna(0.0),
            linestyle="",
            ecolor=GREY,
            elinewidth=0.8,
            zorder=4,
            **_look(overlay.marker),  # type: ignore[arg-type]
        )


def _look(marker: str) -> dict[str, object]:
    return {
        "marker": marker,
        "markersize": 4,
        "markerfacecolor": "none",
        "markeredgecolor": GREY,
        "markeredgewidth": 0.9,
    }
