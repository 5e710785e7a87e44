"""A page of panels: title, caption, panels two to a row, or three, their letters, and the legend below."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diag.show.figures.style import PAGE_WIDTH
from diag.show.figures.tables import title_lines

TITLE_LENGTH = 66
"""Characters of a bold title that surely fit a page-wide figure."""
TITLE_LINE = 0.15
"""Inches of a further line of it."""
LEGEND_LENGTH = 104
"""Characters of a legend's row, with 8 for each line's mark."""


def page(
    count: int, *, row_height: float, title: str, caption: str, extra: float = 0.0, columns: int = 2
) -> tuple[Figure, list[Axes]]:
    """A page-wide figure with `count` panels.

    Heights in inches; `extra` is room for a legend below the panels; columns: panels to a row, at most.
    Caveats of a long title stand in lines of their own. Call it inside `style()`.
    """
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    titles = title_lines(title, TITLE_LENGTH)
    extra += TITLE_LINE * (len(titles) - 1 + max(caption.count("\n") - 1, 0))
    figure = Figure(figsize=(PAGE_WIDTH, row_height * rows + 0.6 + extra))
    # Constrained layout keeps room for one heading per figure; the caption, in its own size, needs a second.
    body = figure.subfigures(1, 1, squeeze=False)[0, 0]
    figure.suptitle("\n".join(titles))
    body.suptitle(caption, fontsize=7, fontweight="normal", color="0.3")
    grid = body.add_gridspec(rows, columns)
    return figure, [body.add_subplot(grid[index // columns, index % columns]) for index in range(count)]


def columns_for(panels: int) -> int:
    """Panels to a row: three of three, six, nine; else two."""
    return 3 if panels % 3 == 0 else 2


def letter(place: int, panels: int = 2) -> str:
    """`(a) `, what a panel's title begins with; nothing where there is one panel only."""
    return f"({string.ascii_lowercase[place % 26]}) " if panels > 1 else ""


def legend_size(labels: Sequence[str]) -> tuple[int, float]:
    """Columns of a legend below the panels, and the inches that its rows take."""
    columns = max(1, min(len(labels), LEGEND_LENGTH // (max(map(len, labels)) + 8)))
    return columns, 0.15 * math.ceil(len(labels) / columns) + 0.1
