"""A page of panels: title, caption, panels side by side, their letters, and the legend below."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diag.results.caveats import BETWEEN
from diag.show.figures.style import paper
from diag.show.figures.tables import title_lines, wrapped

LINE = 0.15
"""Inches of a further line of words, and of a legend's row."""


def page(
    count: int, *, row_height: float, title: str, caption: str, columns: int = 2
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, as wide as the paper that is drawn for.

    row_height: inches, on a page. columns: panels to a row, at most. Caveats of a long title stand in lines
    of their own; the caption is broken between its parts. Call it inside `style()`.
    """
    sheet = paper()
    columns = min(count, columns, sheet.columns)
    rows = math.ceil(count / columns)
    titles = title_lines(title, sheet.title)
    said = [line for text in caption.split("\n") for line in wrapped(text.split(BETWEEN), sheet.caption)]
    further = LINE * (len(titles) - 1 + max(len(said) - 1, 0))
    figure = Figure(figsize=(sheet.width, sheet.height * row_height * rows + 0.6 + further))
    # Constrained layout keeps room for one heading per figure; the caption, in its own size, needs a second.
    body = figure.subfigures(1, 1, squeeze=False)[0, 0]
    figure.suptitle("\n".join(titles))
    body.suptitle("\n".join(said), fontsize=7, fontweight="normal", color="0.3")
    grid = body.add_gridspec(rows, columns)
    return figure, [body.add_subplot(grid[index // columns, index % columns]) for index in range(count)]


def columns_for(panels: int) -> int:
    """Panels to a row: three of three, six, nine; else two."""
    return 3 if panels % 3 == 0 else 2


def letter(place: int, panels: int = 2) -> str:
    """`(a) `, what a panel's title begins with; nothing where there is one panel only."""
    return f"({string.ascii_lowercase[place % 26]}) " if panels > 1 else ""


def legend_below(figure: Figure, handles: Sequence[Artist], labels: Sequence[str] | None = None) -> None:
    """One legend under all panels, in as many columns as fit; the figure grows by the height that it takes.

    labels: by default the handles' own.
    """
    words = [str(handle.get_label()) for handle in handles] if labels is None else list(labels)
    columns = max(1, min(len(words), paper().legend // (max(map(len, words)) + 8)))
    grow(figure, LINE * math.ceil(len(words) / columns) + 0.1)
    figure.legend(list(handles), words, loc="outside lower center", ncols=columns)


def grow(figure: Figure, inches: float) -> None:
    """Makes a figure higher, by what stands beside its panels."""
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + inches)
