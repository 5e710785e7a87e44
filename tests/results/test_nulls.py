"""What is left of the bias after each null: numbers, paired intervals, and what was not measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_runs import CURVES, made_run

from diag.metrics.catalogue import CATALOGUE
from diag.results.collect import Collection, collect
from diag.results.nulls import NULLS, for_people, left_after, missing_nulls
from diag.show.words.nulls import null_sentences, verdicts

FURTHER = {
    "cos_y_vnear": [0.4, 0.4, 0.4],
    "excess_over_near": [0.2, 0.1, 0.0],
    "cos_y_vself_untrained": [0.8, 0.8, 0.8],
    "excess_over_untrained": [-0.2, -0.3, -0.4],
}


def one(folder: Path, **given: object) -> Collection:
    return collect([made_run(folder, **given)])  # type: ignore[arg-type]


def test_left_is_bias_minus_null_input_by_input(tmp_path: Path) -> None:
    collection = one(tmp_path / "run", curves=CURVES | FURTHER, noise=0.05)
    table = left_after(collection.samples).set_index("null")
    assert list(table.index) == [null.name for null in NULLS]
    wide = collection.samples.pivot_table(index=["input", "layer"], columns="metric", values="value")
    for null in NULLS[:3]:
        own = wide[null.excess] if null.excess in wide else wide["cos_y_vself"] - wide[null.metric]
        row, per_input = table.loc[null.name], own.groupby("input").mean()
        assert row["left"] == pytest.approx(per_input.mean())
        assert row["value"] == pytest.approx(wide[null.metric].mean())
        assert row["bias"] == pytest.approx(row["left"] + row["value"])
        assert row["share_left"] == pytest.approx(row["left"] / row["bias"])
        draws = np.random.default_rng(1).choice(per_input, (4000, len(per_input))).mean(1)
        np.testing.assert_allclose(
            row[["ci_low", "ci_high"]].astype(float), np.percentile(draws, [2.5, 97.5]), atol=4e-3
        )
        assert row["n"] == 8
    # the control: taken apart, bias and null would be wider than their paired difference
    spread = (
        wide["cos_y_vself"].groupby("input").mean().std()
        + wide["cos_y_vuniform"].groupby("input").mean().std()
    )
    paired = table.loc["uniform", "ci_high"] - table.loc["uniform", "ci_low"]
    assert paired < 4 * spread / 8**0.5


def test_a_null_may_exceed_the_bias_and_what_was_not_measured_is_named(tmp_path: Path) -> None:
    collection = one(tmp_path / "run", curves=CURVES | FURTHER)
    table = left_after(collection.samples)
    said = dict(zip(table["null"], verdicts(table), strict=True))
    assert said == {
        "partner": "above 0",
        "uniform": "above 0",
        "neighbourhood": "above 0",
        "across inputs": "not measured",
        "across groups": "not measured",
        "untrained": "below 0",
    }
    first, last = null_sentences(table)
    assert first.startswith("Left of the bias of demo:vit-p8: +0.200 (")
    assert "after another token's value, above 0, 40 % of it" in first
    assert "-0.300 (" in first
    assert first.endswith("after untrained weights, below 0.")
    assert "not measured" not in first
    assert last == (
        "Nulls that were not measured: across inputs and across groups (--metrics default,nulls)."
    )
    assert [null.name for null in missing_nulls(table)["demo:vit-p8"]] == ["across inputs", "across groups"]


def test_lines_that_lack_other_nulls_are_told_apart(tmp_path: Path) -> None:
    runs = [
        made_run(tmp_path / "one", model="demo:vit-p16", curves=CURVES | FURTHER),
        made_run(tmp_path / "two"),
    ]
    said = null_sentences(left_after(collect(runs).samples))
    assert len(said) == 3
    assert said[-1].startswith(
        "Nulls that were not measured: demo:vit-p16: across inputs and across groups ("
    )
    assert said[-1].endswith("untrained (--null untrained).")


def test_what_has_no_value_is_undefined_and_a_line_without_a_bias_is_left_out(tmp_path: Path) -> None:
    nowhere = [np.nan] * 3
    curves = CURVES | {"cos_y_vother_group": nowhere, "excess_over_other_group": nowhere}
    table = left_after(one(tmp_path / "one", curves=curves).samples)
    assert table.set_index("null").loc["across groups", "state"] == "undefined"
    without = one(tmp_path / "two", curves={"value_similarity": [0.1, 0.2]})
    assert left_after(without.samples).empty
    assert null_sentences(left_after(without.samples)) == []


@pytest.mark.parametrize(
    ("n", "verdict"), [(1, "not judged: 1 inputs are too few"), (3, "not judged: 3 inputs")]
)
def test_few_inputs_are_not_judged(n: int, verdict: str, tmp_path: Path) -> None:
    table = left_after(one(tmp_path / "run", n=n).samples)
    assert verdicts(table)[0].startswith(verdict)
    assert table["ci_low"].isna().all() == (n == 1)


def test_the_table_for_people(tmp_path: Path) -> None:
    table = left_after(one(tmp_path / "run").samples)
    shown = for_people(table, verdicts(table))
    assert list(shown) == [
        "model",
        "null",
        "bias",
        "null value",
        "left",
        "95 % interval",
        "share left",
        "verdict",
    ]
    assert shown["share left"].tolist()[:2] == ["40%", "60%"]
    assert shown["verdict"].tolist()[2:] == ["not measured"] * 4


def test_every_null_has_its_lines_in_the_catalogue() -> None:
    """The uniform null's excess is made for comparisons only."""
    known = {name for null in NULLS for name in (null.metric, null.excess)} - {"excess_over_uniform"}
    assert known <= CATALOGUE.keys()
    assert all(CATALOGUE[null.metric].line.colour for null in NULLS)
