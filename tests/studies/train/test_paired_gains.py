"""Pairs of cells: who is compared with whom, the t interval by hand and in simulation, what is no pair."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from made_grids import grid
from scipy import stats

from diag.errors import UserError
from diag.studies.train.paired_gains import (
    BASELINE,
    CONTROL,
    base_of,
    cleaned,
    control_of,
    of_cells,
    over_seeds,
)
from diag.studies.train.paired_gains import pairs as paired


def pairs(results: pd.DataFrame) -> pd.DataFrame:
    return paired(cleaned(results))


class TestInterval:
    @pytest.mark.parametrize("n", [2, 3, 10])
    def test_it_is_the_t_interval_of_scipy(self, n: int) -> None:
        values = np.random.default_rng(n).normal(1.0, 2.0, n)
        found = over_seeds(values)
        low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        assert (found["ci_low"], found["ci_high"]) == pytest.approx((low, high))
        assert (found["mean"], found["sd"]) == pytest.approx((values.mean(), values.std(ddof=1)))
        assert found["n"] == n

    def test_by_hand(self) -> None:
        # mean 2, sd 1, t(0.975, 2) = 4.3027, √3 = 1.7321
        found = over_seeds([1.0, 2.0, 3.0, math.nan])
        assert (found["mean"], found["sd"], found["n"]) == (2.0, 1.0, 3)
        assert found["ci_high"] - 2.0 == pytest.approx(4.3027 / 1.7321, abs=1e-4)

    def test_95_of_100_of_three_seeds_cover_the_truth(self) -> None:
        drawn = np.random.default_rng(0).normal(0.7, 1.3, (2000, 3))
        found = [over_seeds(row) for row in drawn]
        covered = np.mean([one["ci_low"] <= 0.7 <= one["ci_high"] for one in found])
        assert 0.935 < covered < 0.965
        # a normal's quantile would not do
        narrow = [abs(one["mean"] - 0.7) <= 1.96 * one["sd"] / 3**0.5 for one in found]
        assert np.mean(narrow) < 0.85

    @pytest.mark.parametrize("values", [[0.3], [0.1 + 0.2, 0.3, 0.3]])
    def test_one_seed_or_equal_seeds_have_none(self, values: list[float]) -> None:
        found = over_seeds(values)
        assert found["mean"] == pytest.approx(0.3)
        assert math.isnan(found["ci_low"])
        assert math.isnan(found["ci_high"])

    def test_nothing_is_nothing(self) -> None:
        found = over_seeds([math.nan])
        assert found["n"] == 0
        assert math.isnan(found["mean"])


class TestPairs:
    def test_differences_by_hand(self) -> None:
        results = grid(patches=(8,), variants=("sa", "xsa", "random_direction"), seeds=2)
        cells = results.set_index(["variant", "seed"])
        found = pairs(results).set_index(["variant", "against", "outcome", "seed"])["difference"]
        for seed in (0, 1):
            ours, base, control = (cells.loc[(name, seed)] for name in ("xsa", BASELINE, CONTROL))
            assert found["xsa", BASELINE, "accuracy", seed] == pytest.approx(
                100 * (ours["accuracy"] - base["accuracy"])
            )
            assert found["xsa", CONTROL, "loss", seed] == pytest.approx(ours["loss"] - control["loss"])
            assert found[CONTROL, BASELINE, "loss", seed] == pytest.approx(control["loss"] - base["loss"])
        assert len(found) == 3 * 2 * 2  # three comparisons, two outcomes, two seeds

    def test_the_luck_of_a_seed_drops_out(self) -> None:
        results = grid(seeds=5, noise=1e-6)
        spread = pairs(results).groupby(["variant", "against", "outcome", "patch_size"])["difference"].std()
        assert spread.max() < 1e-2  # points; the cells themselves differ by 2
        assert 100 * results["accuracy"].std() > 1

    def test_a_control_is_on_the_same_layers(self) -> None:
        variants = ("sa", "xsa:0-2", "xsa", "random_direction", "gated_xsa=sigmoid:0-2")
        found = pairs(grid(variants=variants))
        controlled = found[found["against"] != BASELINE]
        assert set(controlled["variant"]) == {"xsa"}
        variants = (*variants, "random_direction:0-2")
        found = pairs(grid(variants=variants))
        against = found[found["against"] != BASELINE].set_index("variant")["against"].to_dict()
        assert against == {
            "xsa": CONTROL,
            "xsa:0-2": f"{CONTROL}:0-2",
            "gated_xsa=sigmoid:0-2": f"{CONTROL}:0-2",
        }

    def test_language_has_no_patches_and_no_accuracy(self) -> None:
        found = pairs(grid(task="language", patches=(math.nan,)))
        assert set(found["outcome"]) == {"loss"}
        assert found["patch_size"].isna().all()
        assert len(found) == 3 * (3 + 2)

    def test_what_is_missing_is_left_out(self) -> None:
        whole = grid()
        results = whole.drop(
            index=whole.index[(whole["variant"] == "sa") & (whole["patch_size"] == 4) & (whole["seed"] == 1)]
        )
        gone = pairs(results).query("patch_size == 4 and seed == 1")
        assert set(gone["against"]) == {CONTROL}
        assert len(pairs(whole)) - len(pairs(results)) == 3 * 2
        assert pairs(grid(variants=("xsa",))).empty
        assert pairs(grid(variants=("sa",))).empty

    def test_a_training_that_went_astray_is_no_pair(self) -> None:
        results = grid()
        results.loc[results["cell"] == "p8-xsa-s1", ["loss", "accuracy"]] = [math.inf, math.nan]
        found = pairs(results).query("variant == 'xsa' and patch_size == 8")
        assert set(found["seed"]) == {0, 2}

    def test_names(self) -> None:
        assert base_of("gated_xsa=sigmoid:0-5") == "gated_xsa"
        assert (control_of("xsa"), control_of("xsa:0,3-5")) == (CONTROL, f"{CONTROL}:0,3-5")

    def test_they_are_those_of_the_variants(self) -> None:
        from diag import variants

        assert variants.BASELINE == BASELINE
        assert CONTROL in variants.NAMES


class TestChecked:
    def test_order_is_of_tasks_and_variants_as_given_and_patches_from_coarse_to_fine(self) -> None:
        shuffled = pd.concat([grid(patches=(4, 16, 8)), grid(task="language", patches=(math.nan,))])
        found = cleaned(shuffled)
        assert list(found["task"].unique()) == ["crops", "language"]
        assert list(found["patch_size"].dropna().unique()) == [16, 8, 4]
        assert list(found["variant"].unique()) == ["sa", "xsa", "gated_xsa", "random_direction"]
        assert list(found["seed"][:3]) == [0, 1, 2]

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            (lambda table: table.drop(columns="seed"), "no column 'seed'"),
            (lambda table: pd.concat([table, table.head(1)]), "cell 'p16-sa-s0' is in the results twice"),
            (
                lambda table: pd.concat([table, table.head(1).assign(cell="other")]),
                "'other' is in the results",
            ),
            (lambda table: table.assign(steps=[600] * 35 + [300]), "trained for 300, 600 steps"),
        ],
    )
    def test_what_is_no_grid(self, wrong: object, said: str) -> None:
        with pytest.raises(UserError, match=said):
            cleaned(wrong(grid()))

    def test_rows_of_other_cells_are_left_out(self) -> None:
        results = grid(patches=(8,), seeds=1)
        table = pd.DataFrame({"cell": ["p8-xsa-s0", "p4-xsa-s0"], "seed": [7, 7], "alpha": [0.1, 0.2]})
        found = of_cells(results, table)
        assert found[["cell", "seed", "variant", "alpha"]].to_numpy().tolist() == [
            ["p8-xsa-s0", 0, "xsa", 0.1]
        ]


def test_xsa_is_compared_with_what_takes_as_much() -> None:
    results = grid(patches=(8,), variants=("sa", "xsa:0-2", "gated_xsa", "matched_direction:0-2"), seeds=2)
    found = pairs(results)
    against = found[found["against"] == "matched_direction:0-2"]
    assert set(against["variant"]) == {"xsa:0-2"}  # of a gated one it takes more than that does
    cells = results.set_index(["variant", "seed"])["loss"]
    row = against[(against["outcome"] == "loss") & (against["seed"] == 1)]["difference"].item()
    assert row == pytest.approx(cells["xsa:0-2", 1] - cells["matched_direction:0-2", 1])
