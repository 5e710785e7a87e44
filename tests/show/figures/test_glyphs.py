"""Names in any script are drawn, or written out where no font has their signs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
from matplotlib.figure import Figure

from diag.show.figures import glyphs
from diag.show.figures.style import style
from diag.show.figures.write import pictures

CHINESE, LISU = "模型-甲", "ꓐ"


@pytest.fixture
def no_other_font(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(glyphs, "OTHERS", ())
    for cached in (glyphs.families, glyphs.signs):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (glyphs.families, glyphs.signs):
        cached.cache_clear()


def drawn(name: str) -> Figure:
    with style():
        figure = Figure(figsize=(2, 1))
        ax = figure.add_subplot(title=f"{name} (T = 64)", xlabel="cos(yᵢ, vᵢ)")
        ax.plot([0, 1], label=name)
        ax.legend()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a sign that no font has
        pictures(figure)
    return figure


@pytest.mark.usefixtures("no_other_font")
def test_signs_that_no_font_has_are_written_out_everywhere() -> None:
    (ax,) = drawn(CHINESE).axes
    assert ax.get_title(loc="left") == "\\u6a21\\u578b-\\u7532 (T = 64)"
    assert ax.get_legend().get_texts()[0].get_text() == "\\u6a21\\u578b-\\u7532"
    assert ax.get_xlabel() == "cos(yᵢ, vᵢ)"


@pytest.mark.usefixtures("no_other_font")
def test_a_font_of_the_machine_lends_its_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ships with matplotlib stands for one of the machine's."""
    lent = next(chr(code) for code in sorted(charmap("STIXGeneral") - glyphs.signs()) if code > 0x2000)
    monkeypatch.setattr(glyphs, "OTHERS", ("No such font", "STIXGeneral"))
    for cached in (glyphs.families, glyphs.signs):
        cached.cache_clear()
    assert glyphs.families() == ("DejaVu Sans", "STIXGeneral")
    assert drawn(lent).axes[0].get_title(loc="left") == f"{lent} (T = 64)"


def charmap(name: str) -> set[int]:
    return set(glyphs.FT2Font(glyphs.font_manager.findfont(name)).get_charmap())
