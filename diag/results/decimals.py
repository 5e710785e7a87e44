"""Decimals as people read them, in tables, sentences and figures alike."""

from __future__ import annotations


def fixed(value: float, digits: int = 3, *, sign: bool = False) -> str:
    """`0.511`, `-0.004`, or `+0.511` where the sign matters; `nan` where there is no number.

    There is no `-0.000`: what rounds to 0 from below is 0.

    >>> fixed(-0.0004), fixed(-0.0004, sign=True), fixed(-0.0006), fixed(0.25, 2, sign=True)
    ('0.000', '0.000', '-0.001', '+0.25')
    """
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text if text.strip("-0.") else text.lstrip("-")


def shown(value: float) -> str:
    """A number as tables show it: three decimals, one from a hundred on, a dash where there is none."""
    if value != value:
        return "–"
    return fixed(value) if abs(value) < 100 else fixed(value, 1)
