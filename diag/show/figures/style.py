"""How figures look: the style sheet as a context, the width of a page, every colour, marker and dash.

Everything is set on matplotlib's defaults, so that a reader's own matplotlibrc cannot change a figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import matplotlib.style

from diag.metrics.catalogue import Dashes
from diag.show.figures.glyphs import families

STYLE_SHEET = Path(__file__).with_name("attnbias.mplstyle")


@dataclass(frozen=True)
class Paper:
    """Where a figure is to stand.

    width: inches. columns: panels to a row, at most. height: of a panel, relative to that on a page.
    title, panel, caption, legend: characters that surely fit a line of the bold title, of one panel's, of the
    caption, and a legend's row, with 8 for each line's mark. settings: of the style, beyond the style sheet.
    """

    width: float
    columns: int
    height: float
    title: int
    panel: int
    caption: int
    legend: int
    settings: Mapping[str, float] = field(default_factory=dict)


SIZES = (
    "font.size",
    "figure.titlesize",
    "axes.titlesize",
    "axes.labelsize",
    "xtick.labelsize",
    "ytick.labelsize",
    "legend.fontsize",
)
PAPERS = {
    "page": Paper(6.75, 3, 1.0, title=66, panel=90, caption=128, legend=104),
    "column": Paper(
        3.25,
        1,
        0.8,
        title=34,
        panel=38,
        caption=60,
        legend=46,
        settings=dict.fromkeys(SIZES, 8),
    ),
}
"""A page: both columns of a paper. A column: one of them, all print but the caption's in 8 points."""
PAGE_WIDTH = PAPERS["page"].width
_PAPER = ContextVar("paper", default=PAPERS["page"])

Colour = str | tuple[float, float, float]

OKABE_ITO = {
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#009E73",
    "orange": "#E69F00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "black": "#000000",
    "yellow": "#F0E442",
}
"""Eight colours that readers with colour-blindness tell apart (Okabe and Ito, 2008)."""

LINE_COLOURS = tuple(OKABE_ITO.values())[:7]
"""Yellow is too pale for a thin line."""
BESIDE_ORDERED = ("vermillion", "purple", "black")
"""Names of the colours that the map of `ordered_colours` does not hold."""
RULE = "0.35"
"""Grey of thin lines that measure nothing, such as zero."""
PUBLISHED = "0.45"
"""Grey of published values of several metrics; where each has its own curve, they take the curve's colour."""

COLOUR_MAPS = {
    "cosine": "viridis",
    "signed": "RdBu_r",
    "weight": "cividis",
    "value_cosine": "RdBu_r",
    "times_uniform": "Purples",
}
"""What a field of numbers holds -> its map; those of signed numbers are centred on 0."""

MARKERS = "osD^vP*X"
DASHES: tuple[Dashes, ...] = ("-", "--", ":", "-.")
BAND_OPACITY = 0.18
MOST_BANDS = 5
"""With more lines in a panel, their bands lie over each other as one grey: only lines are drawn."""


def paper() -> Paper:
    """What is drawn for now."""
    return _PAPER.get()


@contextmanager
def on_paper(name: str) -> Iterator[None]:
    """Figures that are made and saved in the `with` block are for this one of `PAPERS`."""
    token = _PAPER.set(PAPERS[name])
    try:
        yield
    finally:
        _PAPER.reset(token)


@contextmanager
def style() -> Iterator[None]:
    """Apply the package's style sheet for the time of a `with` block, or of a function as `@style()`.

    Needed when a figure is made *and* when it is saved: fonts and embedding are read on saving.
    """
    with matplotlib.style.context(
        ["default", str(STYLE_SHEET), {"font.family": list(families()), **paper().settings}]
    ):
        yield


def ordered_colours(count: int) -> list[tuple[float, float, float]]:
    """`count` colours from dark to light, for things that have an order, such as patch sizes.

    The light end of the map stops at 0.82: beyond it, lines vanish on white paper.
    """
    sequence = matplotlib.colormaps["viridis"]
    positions = [0.82 * step / max(count - 1, 1) for step in range(count)]
    return [sequence(position)[:3] for position in positions]


def shades_of(sizes: Sequence[float | None]) -> dict[float, tuple[float, float, float]]:
    """A colour of `ordered_colours` for each size, the largest darkest; none unless every size occurs once.

    None stands for a line without a size, which takes no shade.
    """
    known = sorted({size for size in sizes if size is not None}, reverse=True)
    if len(known) < 2 or len(known) < sum(size is not None for size in sizes):
        return {}
    return dict(zip(known, ordered_colours(len(known)), strict=True))
