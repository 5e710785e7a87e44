"""Two independent routes give the same table: attention seen at the seam, and transformer-lens' patterns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import diag
from diag.inputs.texts import demo_text
from diag.models.families.demo import EMBEDDED

KEYS = ["layer", "head", "metric"]


@pytest.mark.parametrize("kind", ["trained", "gpt2", "llama"])
def test_hf_and_tl_give_the_same_table(kind: str, folder_of: Callable[[str], Path]) -> None:
    folder = EMBEDDED / "lm" if kind == "trained" else folder_of(kind)
    text = [demo_text()[5000:12000]]
    tables: list[pd.DataFrame] = []
    for family in ("hf", "tl"):
        found = diag.probe(f"{family}:{folder}", text, limit=3, seq_len=12, device="cpu").heads
        tables.append(found.set_index(KEYS)["mean"].unstack("metric").sort_index())
    assert list(tables[0].columns) == list(tables[1].columns)
    for metric in tables[0]:
        scale = max(1.0, tables[0][metric].abs().max())
        np.testing.assert_allclose(tables[0][metric], tables[1][metric], atol=2e-5 * scale, err_msg=metric)
