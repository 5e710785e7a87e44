"""How figures look: the style sheet as a context, the widths of a paper's columns, the colours.

Everything is set on matplotlib's defaults, so that a reader's own matplotlibrc cannot change a figure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import matplotlib.style

STYLE_SHEET = Path(__file__).with_name("attnbias.mplstyle")

PAGE_WIDTH = 6.75
"""Inches: both columns of a paper."""

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

BAND_OPACITY = 0.18


@contextmanager
def style() -> Iterator[None]:
    """Apply the package's style sheet for the time of a `with` block.

    Needed when a figure is made *and* when it is saved: fonts and embedding are read on saving.
    """
    with matplotlib.style.context(["default", str(STYLE_SHEET)]):
        yield


def ordered_colours(count: int) -> list[tuple[float, float, float]]:
    """`count` colours from dark to light, for things that have an order, such as patch sizes.

    The light end of the map stops at 0.82: beyond it, lines vanish on white paper.
    """
    sequence = matplotlib.colormaps["viridis"]
    positions = [0.82 * step / max(count - 1, 1) for step in range(count)]
    return [sequence(position)[:3] for position in positions]
