"""Tables of a grid: gains, trends, compensation, α and curves, against numbers known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from made_grids import grid, learned, probed, watched
from scipy import stats

from diag.studies.train.outcomes import (
    POINTS,
    alpha_table,
    compensation,
    outcome_tables,
    probed_cells,
    training_curves,
)
from diag.studies.train.outcomes import gains as gained
from diag.studies.train.outcomes import outcomes as outcomes_of
from diag.studies.train.outcomes import trends as trends_of
from diag.studies.train.paired_gains import BASELINE, CONTROL, cleaned, pairs

NOTHING = pd.DataFrame()


def tables_of(results: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return outcome_tables(results, probed(results), learned(results), *watched(results))


def gains(results: pd.DataFrame) -> pd.DataFrame:
    return gained(pairs(cleaned(results)))


def trends(results: pd.DataFrame) -> pd.DataFrame:
    return trends_of(pairs(cleaned(results)))


def outcomes(results: pd.DataFrame) -> pd.DataFrame:
    return outcomes_of(cleaned(results), gains(results))


def sloped(slopes: list[float], patches: tuple[float, ...] = (16, 8, 4)) -> pd.DataFrame:
    """Accuracy of xsa − sa is slope · halvings, in points, for each seed."""
    results = grid(patches=patches, variants=("sa", "xsa"), seeds=len(slopes), noise=0.0, gains={})
    halvings = -np.log2(results["patch_size"] / patches[0])
    steep = np.array(slopes)[results["seed"]] / 100
    results["accuracy"] += np.where(results["variant"] == "xsa", steep * halvings, 0.0)
    return results


class TestGains:
    def test_it_is_scipys_paired_test(self) -> None:
        results = grid(seeds=5)
        part = results[results["patch_size"] == 8].pivot(index="seed", columns="variant", values="accuracy")
        found = gains(results).query("patch_size == 8 and variant == 'xsa' and outcome == 'accuracy'")
        for against in (BASELINE, CONTROL):
            expected = stats.ttest_rel(100 * part["xsa"], 100 * part[against]).confidence_interval(0.95)
            (row,) = found[found["against"] == against].to_dict("records")
            assert (row["ci_low"], row["ci_high"]) == pytest.approx(tuple(expected))
            assert (row["n"], row["seeds"], row["unit"]) == (5, "0, 1, 2, 3, 4", "points")

    def test_the_known_gain_is_found(self) -> None:
        found = gains(grid(seeds=40)).query("outcome == 'accuracy' and patch_size == 8")
        found = found.set_index(["variant", "against"])["mean"]
        assert found["xsa", BASELINE] == pytest.approx(2.0, abs=0.3)
        assert found["gated_xsa", CONTROL] == pytest.approx(1.0, abs=0.3)
        assert found[CONTROL, BASELINE] == pytest.approx(0.0, abs=0.3)

    def test_one_seed_has_no_interval(self) -> None:
        found = gains(grid(seeds=1))
        assert (found["n"] == 1).all()
        assert found[["ci_low", "ci_high", "sd"]].isna().all(axis=None)
        assert found["mean"].notna().all()

    def test_n_is_that_of_the_pairs(self) -> None:
        results = grid().query("not (variant == 'xsa' and patch_size == 4 and seed == 2)")
        found = gains(results).query("variant == 'xsa' and outcome == 'loss' and against == 'sa'")
        assert dict(zip(found["patch_size"], found["n"], strict=True)) == {16: 3, 8: 3, 4: 2}
        assert list(found["seeds"]) == ["0, 1, 2", "0, 1, 2", "0, 1"]


class TestTrends:
    def test_a_slope_per_halving(self) -> None:
        (row,) = trends(sloped([1.0, 2.0, 3.0])).query("outcome == 'accuracy'").to_dict("records")
        low, high = stats.t.interval(0.95, 2, loc=2.0, scale=1 / 3**0.5)
        assert (row["mean"], row["ci_low"], row["ci_high"]) == pytest.approx((2.0, low, high))
        assert (row["n"], row["patch_sizes"], row["against"]) == (3, "16, 8, 4", BASELINE)

    def test_it_is_scipys_least_squares(self) -> None:
        results = grid(patches=(32, 16, 8, 4), seeds=4)
        found = trends(results).query("variant == 'xsa' and outcome == 'loss' and against == 'sa'").iloc[0]
        wide = results.pivot(index=["seed", "patch_size"], columns="variant", values="loss")
        gain = (wide["xsa"] - wide["sa"]).unstack()
        slopes = [stats.linregress(-np.log2(gain.columns), row).slope for row in gain.to_numpy()]
        assert found["mean"] == pytest.approx(np.mean(slopes))
        assert found["sd"] == pytest.approx(np.std(slopes, ddof=1))

    def test_95_of_100_cover_no_trend(self) -> None:
        drawn = np.random.default_rng(0).normal(size=(400, 3, 3))  # of a made-up variant each
        grids, seeds, sizes = np.indices(drawn.shape)
        by_seed = pd.DataFrame(
            {
                "task": "crops",
                "patch_size": np.array([16.0, 8.0, 4.0])[sizes.ravel()],
                "variant": [f"xsa:{number}" for number in grids.ravel()],
                "against": BASELINE,
                "outcome": "accuracy",
                "unit": "points",
                "seed": seeds.ravel(),
                "difference": drawn.ravel(),
            }
        )
        found = trends_of(by_seed)
        assert len(found) == 400
        assert 0.92 < ((found["ci_low"] <= 0) & (found["ci_high"] >= 0)).mean() < 0.98

    def test_seeds_without_every_patch_size_are_left_out(self) -> None:
        results = sloped([1.0, 2.0, 30.0]).query("not (variant == 'xsa' and patch_size == 4 and seed == 2)")
        (row,) = trends(results).query("outcome == 'accuracy'").to_dict("records")
        assert (row["mean"], row["n"]) == (pytest.approx(1.5), 2)

    def test_no_seed_is_whole(self) -> None:
        results = sloped([1.0, 2.0])
        gone = (results["patch_size"] == 4 * (1 + results["seed"])) & (results["variant"] == "xsa")
        (row,) = trends(results[~gone]).query("outcome == 'accuracy'").to_dict("records")
        assert row["n"] == 0
        assert math.isnan(row["mean"])

    @pytest.mark.parametrize("patches", [(8,), (math.nan,)])
    def test_one_patch_size_has_none(self, patches: tuple[float, ...]) -> None:
        assert trends(grid(patches=patches)).empty


class TestInside:
    def test_compensation_is_paired(self) -> None:
        results = grid(seeds=4)
        layers = probed(results)
        found = compensation(probed_cells(results, layers))
        row = found.query(
            "patch_size == 8 and variant == 'xsa' and metric == 'value_similarity' and layer == 5"
        ).iloc[0]
        part = layers[(layers["metric"] == "value_similarity") & (layers["layer"] == 5)].set_index("model")
        ours = np.array([part.loc[f"p8-xsa-s{seed}", "mean"] for seed in range(4)])
        base = np.array([part.loc[f"p8-sa-s{seed}", "mean"] for seed in range(4)])
        expected = stats.ttest_rel(ours, base).confidence_interval(0.95)
        assert (row["baseline"], row["changed"]) == pytest.approx((base.mean(), ours.mean()))
        assert (row["ci_low"], row["ci_high"]) == pytest.approx(tuple(expected))
        assert len(found) == 3 * 3 * 5 * 6

    def test_means_over_layers(self) -> None:
        results = grid(seeds=4)
        cells = probed_cells(results, probed(results))
        per_layer, whole = compensation(cells), compensation(cells, over_layers=True)
        keys = ["patch_size", "variant", "metric"]
        merged = per_layer.groupby(keys)[["baseline", "changed", "mean"]].mean().reset_index()
        both = whole.merge(merged, on=keys)
        assert len(both) == len(whole) == 3 * 3 * 5
        np.testing.assert_allclose(both["mean_x"], both["mean_y"])
        assert "layer" not in whole

    def test_patch_tokens_are_taken_where_there_are_several(self) -> None:
        results = grid(seeds=1)
        layers = probed(results)
        other = layers.assign(tokens="cls", mean=99.0)
        pd.testing.assert_frame_equal(
            probed_cells(results, pd.concat([other, layers], ignore_index=True)),
            probed_cells(results, layers),
        )
        lone = probed_cells(results, other)
        assert (lone["value"] == 99).all()

    def test_cells_that_were_not_probed_are_left_out(self) -> None:
        results = grid()
        layers = probed(results).query("model != 'p8-sa-s1'")
        found = compensation(probed_cells(results, layers)).query("patch_size == 8")
        assert set(found["n"]) == {2}

    def test_alpha_is_the_mean_over_seeds(self) -> None:
        results = grid(variants=("sa", "gated_xsa"))
        alphas = learned(results)
        found = alpha_table(results, alphas).query("patch_size == 4 and layer == 3 and head == 1").iloc[0]
        cells = alphas[alphas["cell"].str.startswith("p4-")].query("layer == 3 and head == 1")["alpha"]
        low, high = stats.ttest_1samp(cells, 0.0).confidence_interval(0.95)
        assert (found["mean"], found["ci_low"], found["ci_high"]) == pytest.approx((cells.mean(), low, high))
        assert found["n"] == 3


class TestCurves:
    def test_the_loss_is_averaged_over_steps_and_then_over_seeds(self) -> None:
        results = grid(patches=(8,), variants=("sa",), seeds=2)
        log = pd.concat(
            [
                pd.DataFrame(
                    {"cell": f"p8-sa-s{seed}", "step": range(1, 241), "loss": np.arange(240.0) + seed}
                )
                for seed in (0, 1)
            ]
        )
        found = training_curves(results, NOTHING, log)
        assert len(found) == POINTS
        assert found["window"].unique() == [4]
        first = found.iloc[0]
        assert (first["step"], first["mean"], first["low"], first["high"]) == (4, 2.0, 1.5, 2.5)
        assert (found["n"] == 2).all()

    def test_the_monitor_is_averaged_over_layers(self) -> None:
        results = grid(patches=(8,), variants=("sa",), seeds=1)
        monitor = pd.DataFrame(
            {
                "cell": "p8-sa-s0",
                "step": 50,
                "layer": [0, 1, 2],
                "metric": "excess",
                "value": [0.1, 0.3, np.nan],
            }
        )
        (row,) = training_curves(results, monitor, NOTHING).to_dict("records")
        assert (row["metric"], row["step"], row["mean"]) == ("excess", 50, pytest.approx(0.2))


@pytest.fixture(scope="module")
def columns() -> dict[str, list[str]]:
    return {name: list(table) for name, table in tables_of(grid(seeds=2)).items()}


class TestAll:
    def test_a_row_per_variant_holds_what_the_tables_say(self) -> None:
        results = grid()
        table = outcomes(results).set_index(["patch_size", "variant"])
        row = table.loc[(8.0, "xsa")]
        part = results.query("patch_size == 8 and variant == 'xsa'")
        assert row["accuracy"] == pytest.approx(100 * part["accuracy"].mean())
        assert row["accuracy_sd"] == pytest.approx(100 * part["accuracy"].std())
        found = gains(results).query("patch_size == 8 and variant == 'xsa' and outcome == 'loss'")
        found = found.set_index("against")
        assert row["loss_gain_low"] == found.loc[BASELINE, "ci_low"]
        assert row["loss_over_control"] == found.loc[CONTROL, "mean"]
        assert (row["n"], row["lost"], row["parameters"]) == (3, 0, 700_000)
        assert np.isnan(table.loc[(8.0, "sa"), "loss_gain"])
        assert np.isnan(table.loc[(8.0, CONTROL), "loss_over_control"])

    def test_tasks_side_by_side_are_what_they_are_alone(self) -> None:
        crops, language = grid(), grid(task="language", patches=(math.nan,), drawn=4)
        both = outcomes(pd.concat([crops, language]))
        for alone in (crops, language):
            table = outcomes(alone)
            pd.testing.assert_frame_equal(
                both[both["task"] == table["task"].iloc[0]].reset_index(drop=True), table
            )

    @pytest.mark.parametrize(
        "results",
        [
            grid(seeds=1),
            grid(variants=("sa",)),
            grid(variants=("xsa", "gated_xsa")),
            grid(patches=(8,), seeds=1, variants=("sa", "xsa")),
            grid(task="language", patches=(math.nan,)),
            grid().query("seed == 0 or variant == 'sa'"),
        ],
        ids=["one seed", "baseline only", "no baseline", "smallest", "language", "unfinished"],
    )
    def test_every_grid_has_every_table(self, results: pd.DataFrame, columns: dict[str, list[str]]) -> None:
        for found in (tables_of(results), outcome_tables(results, *[NOTHING] * 4)):
            assert {name: list(table) for name, table in found.items()} == columns
            assert len(found["outcomes"])
