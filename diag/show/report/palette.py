"""Colours of the page: those of the figures, made dark or light enough to be seen on its two backgrounds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

from matplotlib.colors import to_hex, to_rgb

from diag.show.figures.style import BESIDE_ORDERED, OKABE_ITO, shades_of

PAPER = {"light": "#ffffff", "dark": "#1b1c1f"}
"""What charts are drawn on, by colour scheme."""

CONTRAST = {"light": 3.2, "dark": 4.8}
"""Least contrast of a line with its background. WCAG 2.2 (1.4.11) asks for 3 where graphics carry meaning;
on dark, 3 is there but dim."""

COMPARED = ("blue", "vermillion", "green", "purple", "orange", "sky", "black")
"""Okabe-Ito colours of compared lines, the well visible ones first; yellow is too pale for a thin line."""


def luminance(colour: str) -> float:
    """Relative luminance of a colour, 0 to 1, as WCAG 2.2 defines it."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    """Contrast of two colours, 1 to 21, as WCAG 2.2 defines it."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def readable(colour: str, background: str, ratio: float) -> str:
    """The colour, mixed with black or white as little as gives it that contrast with the background."""
    end = (0.0, 0.0, 0.0) if luminance(background) > 0.18 else (1.0, 1.0, 1.0)
    start = to_rgb(colour)
    for step in range(101):
        share = step / 100
        red, green, blue = ((1 - share) * a + share * b for a, b in zip(start, end, strict=True))
        mixed = to_hex((red, green, blue))
        if contrast(mixed, background) >= ratio:
            return mixed
    return to_hex(end)


def compared_colours(patch_sizes: Sequence[float | None]) -> list[str]:
    """One colour per line, as in the figures: dark to light from coarse to fine where every patch size
    occurs once, Okabe-Ito's for all others.
    """
    shades = {size: to_hex(shade) for size, shade in shades_of(patch_sizes).items()}
    others = cycle(BESIDE_ORDERED if shades else COMPARED)
    return [shades[size] if size in shades else OKABE_ITO[next(others)] for size in patch_sizes]


def variables(colours: Sequence[str], scheme: str) -> dict[str, str]:
    """CSS variables of a scheme: one per Okabe-Ito colour, and `line-0`, `line-1` … for compared lines."""
    paper, ratio = PAPER[scheme], CONTRAST[scheme]
    found = {name: readable(colour, paper, ratio) for name, colour in OKABE_ITO.items()}
    # black is the colour of the nulls; pure white would shine out of a dark page
    found["black"] = "#222222" if scheme == "light" else "#d6d3cc"
    # greys of classes of the ledger, far enough from each other and from black
    found |= {"ledger-rest": "#8e8e8e", "ledger-extra": "#4d4d4d" if scheme == "light" else "#bdbdbd"}
    found |= {f"line-{place}": readable(colour, paper, ratio) for place, colour in enumerate(colours)}
    return found
