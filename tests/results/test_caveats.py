"""Caveats of a line: what they are, and that labels, captions and the run's own words say them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from commands import Ended, probe_of

from diag.results.caveats import BY_DEFAULT, caveats, of_table, with_caveats
from diag.results.collect import collect


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, []),
        ({"weights": "loaded", "positions": "native", "inputs": "given"}, []),
        ({"weights": "random"}, ["random weights"]),
        ({"weights": "without adapter"}, ["adapter not loaded"]),
        (
            {"positions": "interpolated", "patch_embedding": "resampled"},
            ["interpolated positions", "resampled patches"],
        ),
        ({"inputs": BY_DEFAULT}, ["demo inputs"]),
    ],
)
def test_what_is_unusual_is_a_caveat(row: dict[str, str], said: list[str]) -> None:
    assert caveats(row) == said
    assert with_caveats("m", row) == " · ".join(["m", *said])


def test_a_table_says_for_which_models_a_caveat_holds() -> None:
    rows = pd.DataFrame(
        {"model": ["a", "b"], "tower": "vision", "weights": ["random", "loaded"], "inputs": BY_DEFAULT}
    )
    assert of_table(rows) == ["random weights: a", "demo inputs"]
    assert of_table(rows[:1]) == ["random weights", "demo inputs"]
    twice = rows.assign(model="a", weights="loaded", inputs=["given", BY_DEFAULT])
    assert of_table(twice) == ["demo inputs"]  # of one of its lines
    assert of_table(rows.drop(columns="model")) == []


def test_inputs_that_nobody_chose_stand_in_columns_label_table_and_report(
    attnbias: Callable[..., Ended],
) -> None:
    ended = attnbias(
        "probe", "-m", "demo:vit-p16,img_size=48", "--limit", "2", "--metrics", "cos-y-vself", "-o", "run"
    )
    assert ended.code == 0
    assert "interpolated positions · demo inputs" in " ".join(ended.out.split())
    found = collect([Path("run")])
    assert found.labels == ["demo:vit-p16,img_size=48 · interpolated positions · demo inputs"]
    table = found.layers
    assert (set(table["weights"]), set(table["inputs"])) == ({"loaded"}, {BY_DEFAULT})
    attnbias(*probe_of(limit=2, out="asked"))
    assert collect([Path("asked")]).labels == ["demo:vit-p16"]
