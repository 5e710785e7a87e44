"""Does the baseline predict the gain: scipy's numbers, what patch size fakes, coverage of the interval."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from made_grids import grid, probed
from scipy import stats

from diag.studies.train.outcomes import probed_cells
from diag.studies.train.paired_gains import cleaned, pairs
from diag.studies.train.predicted import relation, relation_points


def related(
    *,
    strength: float = 0.0,
    shift: float = 0.0,
    seeds: int = 3,
    patches: tuple[float, ...] = (16, 8, 4),
    drawn: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Pairs and probes. Predictor and gain correlate by `strength` within patch sizes, each `shift` apart."""
    rng = np.random.default_rng(drawn)
    differences, values = [], []
    for seed in range(seeds):
        for place, patch in enumerate(patches):
            given, other = rng.normal(size=2)
            gain = strength * given + math.sqrt(1 - strength**2) * other
            case = {"task": "crops", "patch_size": patch, "seed": seed}
            names = {"variant": "xsa", "against": "sa", "outcome": "accuracy", "unit": "points"}
            differences.append({**case, **names, "difference": gain + shift * place})
            value = 0.4 + 0.01 * (given + shift * place)
            values.append({**case, "variant": "sa", "layer": 0, "metric": "value_similarity", "value": value})
    return pd.DataFrame(differences), pd.DataFrame(values)


def found(made: tuple[pd.DataFrame, pd.DataFrame]) -> pd.DataFrame:
    return relation(*made).set_index(["cells", "correlation"])


def test_it_is_scipys() -> None:
    made = related(strength=0.5, seeds=5)
    points = relation_points(*made)
    table = found(made)
    pearson, spearman = (
        function(points["value"], points["gain"]).statistic for function in (stats.pearsonr, stats.spearmanr)
    )
    assert table.loc[("all", "pearson"), "value"] == pytest.approx(pearson)
    assert table.loc[("all", "spearman"), "value"] == pytest.approx(spearman)
    left = points[["value", "gain"]] - points.groupby("patch_size")[["value", "gain"]].transform("mean")
    assert table.loc[("within patch sizes", "pearson"), "value"] == pytest.approx(
        stats.pearsonr(left["value"], left["gain"]).statistic
    )
    assert (table["n_cells"] == 15).all()
    assert (table["n_patch_sizes"] == 3).all()
    assert (table["n_seeds"] == 5).all()
    assert table["p"].isna().tolist() == [True, True, False, False]


def test_what_patch_size_fakes_is_gone_within() -> None:
    table = found(related(shift=20.0, seeds=6, drawn=1))
    assert table.loc[("all", "pearson"), "value"] > 0.98
    assert table.loc[("all", "pearson"), "ci_low"] > 0.9
    within = table.loc[("within patch sizes", "pearson")]
    assert abs(within["value"]) < 0.6
    assert within["ci_low"] < 0 < within["ci_high"]


def test_what_is_there_is_found_within() -> None:
    table = found(related(strength=0.95, shift=-20.0, seeds=8))
    within = table.loc[("within patch sizes", "spearman")]
    assert within["ci_low"] > 0.5
    assert within["p"] < 0.01


def test_the_interval_of_three_seeds_is_wide_enough_and_p_is_that_of_chance() -> None:
    rows = pd.concat(
        [relation(*related(drawn=drawn)).assign(drawn=drawn) for drawn in range(60)], ignore_index=True
    )
    rows = rows[(rows["cells"] == "within patch sizes") & (rows["correlation"] == "pearson")]
    assert ((rows["ci_low"] <= 0) & (rows["ci_high"] >= 0)).mean() > 0.9
    assert (rows["ci_high"] - rows["ci_low"] < 1).mean() < 0.3  # nine cells leave a correlation open
    assert (rows["p"] < 0.05).mean() < 0.15
    assert 0.35 < rows["p"].mean() < 0.65


def test_more_seeds_narrow_it() -> None:
    widths = []
    for seeds in (5, 40):
        row = found(related(strength=0.5, seeds=seeds)).loc[("within patch sizes", "pearson")]
        widths.append(row["ci_high"] - row["ci_low"])
    assert widths[1] < widths[0] / 2


@pytest.mark.parametrize(
    ("made", "known"),
    [
        (related(seeds=1), []),
        (related(seeds=1, patches=(32, 16, 8, 4)), ["all"]),
        (related(seeds=3, patches=(8,)), []),
        (related(seeds=4, patches=(math.nan,)), ["all", "within patch sizes"]),
        (related(seeds=2), ["all", "within patch sizes"]),
    ],
    ids=["three cells", "a cell per patch size", "one patch size", "language", "two seeds"],
)
def test_what_can_be_said(made: tuple[pd.DataFrame, pd.DataFrame], known: list[str]) -> None:
    table = relation(*made)
    assert list(table[table["value"].notna()]["cells"].unique()) == known
    few = table["n_seeds"].max() < 3
    assert table["ci_low"].notna().any() == (bool(known) and not few)


def test_a_predictor_that_does_not_vary_predicts_nothing() -> None:
    differences, values = related(seeds=4)
    table = relation(differences, values.assign(value=0.4))
    assert table[["value", "ci_low", "p"]].isna().all(axis=None)


def test_points_are_the_baselines_means_over_layers() -> None:
    results = grid()
    layers = probed(results)
    points = relation_points(pairs(cleaned(results)), probed_cells(results, layers))
    row = points.query("variant == 'gated_xsa' and patch_size == 8 and seed == 1 and predictor == 'excess'")
    row = row.iloc[0]
    own = layers[(layers["model"] == "p8-sa-s1") & (layers["metric"] == "excess")]["mean"].mean()
    assert row["value"] == pytest.approx(own)
    assert list(points["predictor"].unique()) == ["value_similarity", "excess", "cos_y_vself"]
    assert set(points["variant"]) == {"xsa", "gated_xsa", "random_direction"}
