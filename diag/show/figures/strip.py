"""One target token in its text: every token that it sees, coloured by attention and by value cosine."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle

from diag.errors import UserError
from diag.show.figures.style import PAGE_WIDTH, style
from diag.show.figures.tables import label_of, shorten
from diag.show.figures.token_scales import blank, colour_bar, colours_of, parts_of, scales, with_times_uniform

FONT = "DejaVu Sans Mono"
FONT_SIZE = 6.5
CHARACTER = 0.602 * FONT_SIZE / 72
"""Inches that one character of the font takes."""
PADDING = 0.7
"""Characters of room around each token's text."""
SIDE = 0.12
HEADING, LINE, UPPER, LOWER = 0.36, 0.275, 0.145, 0.07
"""Inches: above the first line of tokens, from line to line, the box with the text, and the band below it."""
LUMINANCE = (0.2126, 0.7152, 0.0722)
LONGEST = 24
"""Characters of a token that are shown."""


@style()
def heat_strip(tokens: pd.DataFrame) -> Figure:
    """Per model, the tokens that the target sees as boxes: weight over uniform above, value cosine below.

    The target is outlined. Both colours are shared by all models. Tokens that the target does not see
    are left out.

    Raises UserError if the table holds no text.
    """
    if not (tokens["kind"] == "text").all():
        raise UserError("the table holds no text to draw as a strip", "images are drawn by similarity_maps")
    seen = with_times_uniform(tokens)
    norms, room = scales(seen), (PAGE_WIDTH - 2 * SIDE) / CHARACTER
    parts = {model: (part, list(_placed(part, room))) for model, part in parts_of(seen).items()}
    heights = [HEADING + LINE * (placed[-1][0] + 1) for _, placed in parts.values()]
    total = 0.48 + sum(heights) + 0.5
    wide = 1 - 2 * SIDE / PAGE_WIDTH
    figure = blank(total, "What the target token attends to, and whose values are like its own", tokens)
    top = total - 0.48
    for (model, (part, placed)), height in zip(parts.items(), heights, strict=True):
        top -= height
        ax = figure.add_axes((SIDE / PAGE_WIDTH, top / total, wide, height / total))
        # in characters and inches, so that text and boxes agree
        ax.set(xlim=(0, room), ylim=(height, 0))
        ax.axis("off")
        hidden = int((tokens["model"] == model).sum()) - len(part)
        ax.text(0, 0.11, shorten(label_of(part), 96), fontsize=7, fontweight="bold", va="center")
        ax.text(0, 0.25, _seen(part, hidden), fontsize=7, va="center")
        filled = [colours_of(part, name, norms[name]) for name in ("times_uniform", "value_cosine")]
        for token, weight, cosine in zip(placed, *filled, strict=True):
            _draw(ax, token, weight, cosine)
    for left, quantity, before in ((0.06, "times_uniform", "above: "), (0.56, "value_cosine", "below: ")):
        ax = figure.add_axes((left, 0.38 / total, 0.38, 0.08 / total))
        colour_bar(figure, ax, quantity, norms[quantity], before=before)
    return figure


@style()
def printable(text: str) -> str:
    """A token's text in one line of signs that the font has: spaces `·`, line ends `↵`, others `□`.

    >>> printable(" the")
    '·the'
    """
    known = get_font(findfont(FontProperties(family=FONT)))
    plain = text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥").replace("\r", "↵")
    signs = "".join(sign if sign.isprintable() and known.get_char_index(ord(sign)) else "□" for sign in plain)
    return signs if len(signs) <= LONGEST else f"{signs[: LONGEST - 1]}…"


def _placed(part: pd.DataFrame, room: float) -> Iterator[tuple[int, float, str, bool]]:
    """Of each token its line, where it begins there in characters, its text, and whether it is the target."""
    line, start = 0, 0.0
    for given, is_target in zip(part["text"], part["is_target"], strict=True):
        text = printable(str(given)) or "□"
        width = len(text) + PADDING
        if start + width > room:
            line, start = line + 1, 0.0
        yield line, start, text, bool(is_target)
        start += width + 0.25


def _draw(ax: Axes, token: tuple[int, float, str, bool], weight: np.ndarray, cosine: np.ndarray) -> None:
    """A token of `_placed` as a box in two colours (red, green, blue, opacity), with its text."""
    line, start, text, target = token
    top, width = HEADING + line * LINE, len(text) + PADDING
    for begin, height, colour in ((top, UPPER, weight), (top + UPPER, LOWER, cosine)):
        filled = Rectangle((start, begin), width, height, facecolor=tuple(colour), linewidth=0)
        ax.add_patch(filled)
    ax.add_patch(
        Rectangle(
            (start, top),
            width,
            UPPER + LOWER,
            fill=False,
            edgecolor="black" if target else "0.6",
            linewidth=1.6 if target else 0.3,
            zorder=3 if target else 2,
            clip_on=False,
        )
    )
    ax.text(
        start + width / 2,
        top + UPPER / 2,
        text,
        family=FONT,
        fontsize=FONT_SIZE,
        ha="center",
        va="center_baseline",
        color="white" if np.dot(weight[:3], LUMINANCE) < 0.4 else "black",
    )


def _seen(part: pd.DataFrame, hidden: int) -> str:
    """The target, and how many tokens it sees."""
    target = part[part["is_target"]].iloc[0]
    said = f"target: token {target['token']} “{printable(str(target['text']))}” · sees {len(part)} tokens"
    return said + (f", {hidden} later ones are hidden" if hidden else "")
