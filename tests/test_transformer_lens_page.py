"""The page that answers one question twice: both programs run as they stand there, and say the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import diag
from diag.models.families.demo import EMBEDDED

PAGE = (Path(__file__).parents[1] / "docs" / "transformer-lens.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n([\s\S]*?)```", PAGE)
A_PAGE = 60
"""Lines."""


def answered(program: str) -> pd.DataFrame:
    names: dict[str, Any] = {}
    exec(program.replace('"my-model"', repr(str(EMBEDDED / "lm"))), names)
    return names["table"].set_index(["layer", "metric"])[["mean", "ci_low", "ci_high"]]


@pytest.mark.filterwarnings("default")  # as for a reader
def test_both_programs_give_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(str(diag.texts("demo").items[0].read())[:20_000], encoding="utf-8")
    assert [program.count("\n") < A_PAGE for program in PROGRAMS] == [True, True]
    theirs, ours = map(answered, PROGRAMS)
    assert len(theirs) == 6 * 4
    ours = ours.loc[theirs.index]
    assert (theirs["mean"] - ours["mean"]).abs().max() < 1e-5
    assert theirs["mean"].abs().min() > 1e-3
    # drawn at random, by each for itself
    assert (theirs - ours).abs().max().max() < 0.01
