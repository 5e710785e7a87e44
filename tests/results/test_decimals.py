"""Decimals: a fixed number of digits, and no minus where they show 0, wherever people read them."""

from __future__ import annotations

import doctest
from pathlib import Path

import pandas as pd
import pytest

from diag.results import decimals
from diag.results.decimals import fixed, shown
from diag.results.writing import write
from diag.show.report.maps import number as in_report
from diag.show.words.phrases import decimal, interval, percent


def test_examples() -> None:
    failed, tried = doctest.testmod(decimals)
    assert tried > 0
    assert failed == 0


@pytest.mark.parametrize("value", [-0.0, -1e-9, -0.00049])
def test_there_is_no_minus_before_what_is_shown_as_0(value: float, tmp_path: Path) -> None:
    assert [fixed(value), fixed(value, sign=True), shown(value)] == ["0.000"] * 3
    assert [decimal(value), in_report(value)] == ["0.000"] * 2
    assert interval(value, value, sign=True) == "0.000 to 0.000"
    assert percent(value) == "0%"
    write(pd.DataFrame({"v": [value]}), tmp_path / "table.tex")
    assert "\n0.000 \\\\\n" in (tmp_path / "table.tex").read_text()


def test_all_else_keeps_its_sign() -> None:
    assert [fixed(value, 2, sign=True) for value in (-0.006, 0.006, -10.0)] == ["-0.01", "+0.01", "-10.00"]
    assert [fixed(value, sign=True) for value in (0.0, 0.0004)] == ["+0.000"] * 2
    assert [shown(value) for value in (-0.0006, -123.456, float("nan"))] == ["-0.001", "-123.5", "–"]
    assert decimal(-0.0006, sign=True) == "−0.001"
