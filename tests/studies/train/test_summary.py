"""A grid in words: what is claimed, what is not, and the table for people."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd
import pytest
from made_grids import grid, learned, probed, watched

from diag.results.writing import write
from diag.studies.train.outcomes import outcome_tables
from diag.studies.train.summary import shown, words

NOTHING = pd.DataFrame()


def said(results: pd.DataFrame, *, measured: bool = True) -> str:
    measurements = [probed(results), learned(results), *watched(results)] if measured else [NOTHING] * 4
    return "\n".join(words(outcome_tables(results, *measurements)))


def sentence(text: str, start: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return line


def test_a_gain_is_claimed_where_its_interval_leaves_out_0() -> None:
    text = said(grid(noise=1e-4))
    assert sentence(text, "Task crops").startswith(
        "Task crops at patch size 16, 8 and 4: xsa, gated_xsa and random_direction against sa, 3 seeds;"
    )
    line = sentence(text, "xsa − sa, accuracy (above 0 is better): at patch 16 +2.0")
    assert "n = 3); all above 0. Per halving of the patch size it changes by" in line
    assert "all above 0" in sentence(text, "xsa − its control random_direction")
    assert "Of the 30 intervals" in text


def test_nothing_is_claimed_where_it_does_not() -> None:
    text = said(grid(noise=0.05, gains={}))
    line = sentence(text, "xsa − sa")
    assert "none distinguishable from 0 with n = 3 seeds" in line
    assert line.endswith("that it depends on the patch size is not shown.")
    assert "own value matters more than a random direction is not shown" in text
    for line in text.splitlines():
        assert not re.search(r"− (sa|its).*(above|below) 0[;.]", line)


def test_the_words_judge_as_the_intervals_do() -> None:
    results = grid(noise=0.01, drawn=3)
    tables = outcome_tables(results, *[NOTHING] * 4)
    text = "\n".join(words(tables))
    rows = tables["gains"].query("outcome == 'accuracy'")
    assert 0 < (rows["ci_low"] > 0).sum() < len(rows)
    for row in rows.to_dict("records"):
        start = f"{row['variant']} − {'sa' if row['against'] == 'sa' else 'its control'}"
        part = sentence(text, start).split(f"at patch {row['patch_size']:g} ")[1].split("; at patch")[0]
        claimed = re.search(r"\), above 0|all above 0", sentence(text, start) if "all" in text else part)
        if row["ci_low"] <= 0:
            assert not re.search(r"\), above 0", part)
        else:
            assert claimed


@pytest.mark.parametrize(
    ("better", "word"),
    [(1.0, "with smaller patches it fares better"), (-1.0, "with smaller patches it fares worse")],
)
@pytest.mark.parametrize("task", ["crops", "losses"])
def test_a_trend_is_named_by_what_it_does(better: float, word: str, task: str) -> None:
    results = grid(variants=("sa", "xsa"), noise=1e-3, gains={})
    halvings = 4 - (results["patch_size"].map({16: 4, 8: 3, 4: 2}))
    moved = 0.02 * better * halvings * (results["variant"] == "xsa")
    results = results.assign(accuracy=results["accuracy"] + moved, loss=results["loss"] - 2 * moved)
    if task == "losses":
        results["accuracy"] = math.nan
    line = sentence(said(results, measured=False), "xsa − sa")
    assert f"{word}, over these sizes." in line


def test_one_seed_judges_nothing() -> None:
    text = said(grid(seeds=1))
    assert "one seed, not judged" in text
    assert not re.search(r"(above|below) 0[;.]|distinguishable", text)
    assert "too few for a correlation" in text


def test_without_a_control_it_is_open() -> None:
    text = said(grid(variants=("sa", "xsa")))
    assert "Without random_direction on the same layers, it is open" in text
    assert "Without" not in said(grid(variants=("sa", "cb")))


def test_what_is_missing_is_said() -> None:
    results = grid()
    results.loc[results["cell"] == "p8-xsa-s1", "loss"] = math.nan
    text = said(results.query("cell != 'p4-xsa-s2'"))
    assert "Missing: 1 of 36 cells; left out, because their loss is not finite: 1 of 35 cells" in text
    assert words(outcome_tables(grid().head(0), *[NOTHING] * 4)) == [
        "No cell is finished, so there is nothing to compare."
    ]


def test_patch_size_is_named_as_what_moves_both() -> None:
    line = sentence(said(grid()), "Baseline value similarity")
    assert "over 9 pairs of cells at 3 patch sizes and 3 seeds" in line
    assert "Patch size moves both sides" in line
    assert "within patch sizes r = " in line


def test_language_is_about_the_loss() -> None:
    text = said(grid(task="language", patches=(math.nan,)))
    assert "xsa − sa, loss (below 0 is better): −0.0" in text
    assert "patch" not in text


def test_alpha_that_is_never_0_is_not_said_to_differ_from_it() -> None:
    assert "heads with an interval that leaves out 0" in said(grid(variants=("sa", "gated_xsa")))
    assert "heads with an interval" not in said(grid(variants=("sa", "gated_xsa=sigmoid")))


class TestTable:
    def test_numbers_with_their_intervals(self, tmp_path: Path) -> None:
        tables = outcome_tables(grid(), *[NOTHING] * 4)
        table = shown(tables)
        assert list(table) == [
            "patch",
            "variant",
            "seeds",
            "accuracy, %",
            "accuracy − sa, points [95 %]",
            "accuracy − control, points [95 %]",
            "loss, nats",
            "loss − sa, nats [95 %]",
            "loss − control, nats [95 %]",
        ]
        row = tables["outcomes"].iloc[1]
        cells = table.iloc[1]
        assert cells["accuracy, %"] == f"{row['accuracy']:.2f} ± {row['accuracy_sd']:.2f}"
        gain, low, high = row[["accuracy_gain", "accuracy_gain_low", "accuracy_gain_high"]]
        assert cells["accuracy − sa, points [95 %]"] == f"{gain:+.2f} [{low:+.2f} to {high:+.2f}]"
        assert list(table["patch"].unique()) == ["16", "8", "4"]
        write(table, tmp_path / "results.md")
        assert (tmp_path / "results.md").read_text().count("\n") == 2 + 12

    def test_columns_without_a_number_are_left_out(self) -> None:
        results = grid(task="language", patches=(math.nan,), variants=("sa", "xsa"), seeds=1)
        table = shown(outcome_tables(results, *[NOTHING] * 4))
        assert list(table) == ["variant", "seeds", "loss, nats", "loss − sa, nats [95 %]"]
        assert table["loss − sa, nats [95 %]"].tolist()[0] == "–"

    def test_tasks_are_named_where_there_are_two(self) -> None:
        both = pd.concat([grid(), grid(task="language", patches=(math.nan,))])
        table = shown(outcome_tables(both, *[NOTHING] * 4))
        assert list(table["task"].unique()) == ["crops", "language"]
