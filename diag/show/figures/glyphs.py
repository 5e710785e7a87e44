"""Names in any script: fonts of the machine beside DejaVu Sans, and signs written out where none has them."""

from __future__ import annotations

from functools import cache

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

OWN = "DejaVu Sans"
"""It ships inside matplotlib: but for signs that it lacks, a figure has the same bytes on every machine."""
OTHERS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans CJK KR",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Hiragino Sans",
    "Apple SD Gothic Neo",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Arial Unicode MS",
    "Noto Sans",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
)
"""Fonts of Linux, macOS and Windows, tried in turn for signs that DejaVu Sans lacks."""


@cache
def families() -> tuple[str, ...]:
    """DejaVu Sans and those of the others that are there."""
    there = set(font_manager.get_font_names())
    return (OWN, *(name for name in OTHERS if name in there))


@cache
def signs() -> frozenset[int]:
    """The code points that one of the fonts has."""
    paths = [font_manager.findfont(name, fallback_to_default=False) for name in families()]
    return frozenset(sign for path in paths for sign in FT2Font(path).get_charmap())


def legible(text: str) -> str:
    """Text with signs that no font has written out, as JSON writes them, so that two names stay two.

    >>> legible("cos(yᵢ, vᵢ)\\nvit")
    'cos(yᵢ, vᵢ)\\nvit'
    """
    if text.isascii():
        return text
    return "".join(sign if sign == "\n" or ord(sign) in signs() else f"\\u{ord(sign):04x}" for sign in text)


def make_legible(figure: Figure) -> None:
    """Writes out, everywhere in a figure, what no font has."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if (shown := legible(text.get_text())) != text.get_text():
            text.set_text(shown)
