"""Tables from samples: what is averaged over what, and files that are whole or absent."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from diag.errors import UserError
from diag.results import bootstrap
from diag.results import tables as records
from diag.results.bootstrap import drawn, summary
from diag.results.layer_values import LayerFacts, LayerValues
from diag.results.tables import STATISTICS, samples_frame, tables
from diag.results.writing import atomically, write, write_json

RATIOS = {"fraction": ("above", "below")}
FACTS = LayerFacts(17, "full", "included", "as captured", 1e-7)
KEYS = ["model", "tower", "layer", "module", "tokens", "metric"]


def frame(
    values: np.ndarray,
    *,
    metrics: Sequence[str] = ("above", "below"),
    token_sets: Sequence[str] = ("patch",),
    layer: int = 0,
    first_input: int = 0,
    ratios: dict[str, tuple[str, str]] = RATIOS,
    n_tokens: int = 17,
    attn_scope: str = "full",
    **constants: Any,
) -> pd.DataFrame:
    """Samples from `values[token set, metric, input, head]`."""
    ids = [f"image-{first_input + i}" for i in range(values.shape[2])]
    facts = replace(FACTS, n_tokens=n_tokens, attn_scope=attn_scope)
    measured = LayerValues(layer, f"blocks.{layer}", facts, token_sets, metrics, ids, first_input, values)
    fixed = {"model": "m", "tower": "vision", "patch_size": None, "values": "as_computed", "seed": 0}
    return samples_frame([measured], ratios, fixed | constants)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(1.0, 0.3, shape)


def pick(table: pd.DataFrame, metric: str, **where: Any) -> pd.Series:
    chosen = table[table["metric"] == metric]
    for name, value in where.items():
        chosen = chosen[chosen[name] == value]
    (row,) = chosen.to_dict("records")
    return pd.Series(row)


def ordered(table: pd.DataFrame) -> pd.DataFrame:
    by = [*KEYS, *(["head"] if "head" in table else [])]
    return table.sort_values(by, ignore_index=True)


# --- samples


def test_every_value_keeps_its_place() -> None:
    values = random(2, 2, 3, 4)
    table = frame(values, token_sets=("patch", "cls"), first_input=32)
    assert len(table) == 2 * 3 * 3 * 4  # the ratio is a third metric
    for s, token_set in enumerate(("patch", "cls")):
        for m, metric in enumerate(("above", "below")):
            for i in range(3):
                for head in range(4):
                    (row,) = table[
                        (table["tokens"] == token_set)
                        & (table["metric"] == metric)
                        & (table["input"] == f"image-{32 + i}")
                        & (table["input_index"] == 32 + i)
                        & (table["head"] == head)
                    ]["value"]
                    assert row == values[s, m, i, head]


def test_a_ratio_of_samples_is_per_head() -> None:
    values = random(1, 2, 3, 4)
    values[0, 1, 0, 0] = 0.0
    table = frame(values)
    got = table[table["metric"] == "fraction"]["value"].to_numpy().reshape(3, 4)
    assert np.isnan(got[0, 0])
    expected = values[0, 0] / np.where(values[0, 1] == 0, np.nan, values[0, 1])
    np.testing.assert_array_equal(got, expected)


def test_a_ratio_whose_parts_were_not_measured_is_left_out() -> None:
    table = frame(random(1, 1, 2, 2), metrics=("above",))
    assert set(table["metric"]) == {"above"}


def test_the_same_input_twice_stays_two_inputs() -> None:
    measured = LayerValues(0, "h.0", FACTS, ["all"], ["above"], ["a", "a"], 0, random(1, 1, 2, 1))
    table = samples_frame([measured], {}, {"model": "m", "tower": "text"})
    assert list(table["input"]) == ["a", "a"]
    assert tables(table, {}, seed=0)[0]["n"].tolist() == [2]


def test_a_frame_of_several_batches_is_that_of_each_one_under_the_other() -> None:
    """Also its types: texts that all batches share are categories."""

    def made(layer: int, first: int, inputs: int, heads: int = 3, **more: Any) -> LayerValues:
        ids = [f"image-{first + i}" for i in range(inputs)]
        facts = replace(FACTS, n_tokens=17 + layer, row_sum=1.0 + first)
        given = {"metrics": ["above", "below"], "values": random(2, 2, inputs, heads, seed=layer)} | more
        return LayerValues(layer, f"h.{layer}", facts, ["patch", "cls"], ids=ids, first_input=first, **given)

    stream = {"metrics": ["norm"], "values": random(2, 1, 2, 1), "of_heads": False}
    several = [made(0, 0, 2), made(1, 0, 2, heads=5), made(1, 0, 2, **stream), made(0, 2, 1), made(1, 2, 1)]
    fixed = {"model": "m", "patch_size": None, "image_size": 64, "seed": 0}
    for measured in (several, several[:1], several[::3], several[1:2] * 2):
        found = samples_frame(measured, RATIOS, fixed)
        parts = [samples_frame([one], RATIOS, fixed) for one in measured]
        pd.testing.assert_frame_equal(found, pd.concat(parts, ignore_index=True), check_exact=True)
    assert found["module"].dtype == "category"


# --- layers and heads


def test_a_layer_is_the_mean_over_heads_within_each_input_first() -> None:
    values = random(1, 2, 3, 2)
    values[0, 0, 0, 0] = np.nan  # of the first input only the second head counts
    layers, heads = tables(frame(values), RATIOS, seed=0)
    within = [values[0, 0, 0, 1], values[0, 0, 1].mean(), values[0, 0, 2].mean()]
    row = pick(layers, "above")
    assert row["mean"] == pytest.approx(np.mean(within), rel=1e-12)
    assert row["mean"] != pytest.approx(np.nanmean(values[0, 0]), rel=1e-6)
    assert row["std"] == pytest.approx(np.std(within, ddof=1), rel=1e-12)
    assert row["n"] == 3
    first = pick(heads, "above", head=0)
    assert first["n"] == 2
    assert first["mean"] == pytest.approx(values[0, 0, 1:, 0].mean(), rel=1e-12)
    assert first["std"] == pytest.approx(values[0, 0, 1:, 0].std(ddof=1), rel=1e-12)


def test_a_ratio_is_the_ratio_of_means_over_inputs() -> None:
    values = random(1, 2, 5, 3)
    layers, heads = tables(frame(values), RATIOS, seed=0)
    above, below = values[0].mean(axis=2)
    row = pick(layers, "fraction")
    assert row["mean"] == pytest.approx(above.mean() / below.mean(), rel=1e-12)
    assert row["mean"] != pytest.approx((above / below).mean(), rel=1e-6)
    assert row["n"] == 5
    assert np.isnan(row["std"])
    draws = np.random.default_rng(0).multinomial(5, np.full(5, 0.2), size=2000)
    low, high = np.percentile(draws @ above / (draws @ below), [2.5, 97.5])
    assert (row["ci_low"], row["ci_high"]) == (pytest.approx(low), pytest.approx(high))
    head = pick(heads, "fraction", head=2)
    assert head["mean"] == pytest.approx(values[0, 0, :, 2].mean() / values[0, 1, :, 2].mean(), rel=1e-12)


def test_an_input_whose_denominator_is_near_zero_does_not_outweigh_the_others() -> None:
    values = np.ones((1, 2, 6, 1))
    values[0, 0] = 0.5
    values[0, :, 3, 0] = (0.4, 1e-9)
    row = pick(tables(frame(values), RATIOS, seed=0)[0], "fraction")
    assert row["mean"] == pytest.approx(2.9 / 5)


def test_layers_may_differ_in_their_number_of_heads() -> None:
    few, many = random(1, 2, 4, 3), random(1, 2, 4, 5, seed=1)
    samples = pd.concat([frame(few), frame(many, layer=1)], ignore_index=True)
    layers, heads = tables(samples, RATIOS, seed=0)
    assert pick(layers, "above", layer=0)["mean"] == pytest.approx(few[0, 0].mean(), rel=1e-12)
    assert pick(layers, "above", layer=1)["mean"] == pytest.approx(many[0, 0].mean(), rel=1e-12)
    assert heads.groupby("layer")["head"].nunique().to_dict() == {0: 3, 1: 5}
    assert heads["n"].eq(4).all()


def test_the_columns_are_the_contract() -> None:
    layers, heads = tables(frame(random(1, 2, 3, 2)), RATIOS, seed=0)
    constants = ["n_tokens", "patch_size", "attn_scope", "first_token"]
    constants += ["projection", "value_from", "row_sum", "mixer", "values", "seed"]
    assert list(layers) == [*KEYS, *STATISTICS, *constants]
    assert list(heads) == [*KEYS[:4], "head", *KEYS[4:], *STATISTICS, *constants]
    assert len(layers) == 3
    assert len(heads) == 6
    assert layers["patch_size"].dtype == heads["patch_size"].dtype == float  # what a model does not have


def test_one_input_has_a_mean_and_nothing_else() -> None:
    layers, heads = tables(frame(random(1, 2, 1, 2)), RATIOS, seed=0)
    for table in (layers, heads):
        assert table["mean"].notna().all()
        assert table[["std", "ci_low", "ci_high"]].isna().all(axis=None)
        assert table["n"].eq(1).all()


@pytest.mark.parametrize("inputs", [1, 4])
def test_what_is_undefined_everywhere_stays_in_the_table(inputs: int) -> None:
    layers, heads = tables(frame(np.full((1, 2, inputs, 2), np.nan)), RATIOS, seed=0)
    for table in (layers, heads):
        assert table["n"].eq(0).all()
        assert table[["mean", "std", "ci_low", "ci_high"]].isna().all(axis=None)
    assert len(layers) == 3


def test_what_is_defined_for_one_of_many_inputs_has_no_interval() -> None:
    values = np.full((1, 2, 4, 1), np.nan)
    values[0, :, 2] = 0.5
    row = pick(tables(frame(values), RATIOS, seed=0)[0], "above")
    assert (row["mean"], row["n"]) == (0.5, 1)
    assert np.isnan([row["std"], row["ci_low"], row["ci_high"]]).all()


def test_tables_of_shards_put_together_are_those_of_the_whole() -> None:
    values = random(2, 2, 23, 3)
    values[:, :, 5, 1] = np.nan
    sets = ("patch", "cls")
    whole = tables(frame(values, token_sets=sets), RATIOS, seed=0)
    cuts = [(0, 16), (16, 20), (20, 23)]
    parts = [frame(values[:, :, a:b], token_sets=sets, first_input=a) for a, b in cuts]
    for order in (parts, parts[::-1]):
        merged = tables(pd.concat(order, ignore_index=True), RATIOS, seed=0)
        for one, other in zip(whole, merged, strict=True):
            pd.testing.assert_frame_equal(ordered(one), ordered(other), check_exact=True)


def test_tables_do_not_depend_on_the_order_of_rows() -> None:
    samples = pd.concat(
        [frame(random(1, 2, 9, 3)), frame(random(1, 2, 9, 3, seed=1), layer=1)], ignore_index=True
    )
    shuffled = samples.sample(frac=1, random_state=0, ignore_index=True)
    for one, other in zip(tables(samples, RATIOS, seed=7), tables(shuffled, RATIOS, seed=7), strict=True):
        pd.testing.assert_frame_equal(ordered(one), ordered(other), rtol=1e-12, atol=0)


def test_models_are_summarised_by_themselves() -> None:
    one, other = random(1, 2, 6, 2), random(1, 2, 9, 2, seed=1)
    alone = tables(frame(one), RATIOS, seed=0)[0]
    both = tables(pd.concat([frame(one), frame(other, model="b")], ignore_index=True), RATIOS, seed=0)[0]
    assert list(both["model"].unique()) == ["m", "b"]
    mine = both[both["model"] == "m"].reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, alone, check_exact=True)


def test_inputs_of_several_sizes_stay_one_row() -> None:
    small = frame(random(1, 2, 3, 2), n_tokens=9, attn_scope="full")
    large = frame(random(1, 2, 3, 2), n_tokens=36, attn_scope="window", first_input=16)
    other = frame(random(1, 2, 3, 2), n_tokens=4, attn_scope="full", layer=1)
    layers, heads = tables(pd.concat([small, large, other], ignore_index=True), RATIOS, seed=0)
    assert len(layers) == 6
    assert len(heads) == 12
    row = pick(layers, "above", layer=0)
    assert (row["n"], row["n_tokens"], row["attn_scope"]) == (6, 36, "window")
    row = pick(layers, "above", layer=1)
    assert (row["n"], row["n_tokens"], row["attn_scope"]) == (3, 4, "full")


def test_facts_that_follow_from_the_first_inputs_of_a_shard_leave_a_layer_one_row() -> None:
    one, other = (frame(random(1, 2, 3, 2), first_input=first) for first in (0, 3))
    other = other.assign(row_sum=1.002, projection=pd.Categorical(["modified"] * len(other)))
    layers, _ = tables(pd.concat([one, other], ignore_index=True), RATIOS, seed=0)
    row = pick(layers, "above", layer=0)
    assert (row["n"], row["row_sum"], row["projection"], row["value_from"]) == (6, 1.002, "modified", "own")


def test_constants_of_several_models_fit_into_one_parquet_column(tmp_path: Path) -> None:
    values = random(1, 2, 2, 2)
    parts = [
        frame(values, image_size=64, patch_size=16),
        frame(values, image_size="native", model="b", patch_size=14),
        frame(values, image_size=None, model="c"),
    ]
    samples = records.one_kind(pd.concat(parts, ignore_index=True))
    write(samples, tmp_path / "samples.parquet")
    back = pd.read_parquet(tmp_path / "samples.parquet")
    sizes = back.groupby("model", observed=True)["image_size"].agg(lambda sizes: sizes.iloc[0])
    assert (sizes["m"], sizes["b"]) == ("64", "native")
    assert pd.isna(sizes["c"])
    assert pd.api.types.is_numeric_dtype(pd.to_numeric(back["patch_size"]))
    assert len(tables(back, RATIOS, seed=0)[0]) == 9


# --- intervals


def test_inputs_are_drawn_once_for_all_tables_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = []
    monkeypatch.setattr(bootstrap, "drawn", lambda *given: draws.append(given) or drawn(*given))
    samples = [frame(random(1, 2, 5, 2)), frame(random(1, 2, 5, 3), model="b")]
    tables(pd.concat(samples, ignore_index=True), RATIOS, seed=3)
    assert draws == [(5, 3, bootstrap.RESAMPLES)]


def test_the_interval_is_the_same_for_a_seed_and_another_for_another() -> None:
    values = random(12, 5)
    one = summary(values, seed=1)
    pd.testing.assert_frame_equal(one, summary(values, seed=1), check_exact=True)
    other = summary(values, seed=2)
    assert (one["ci_low"] != other["ci_low"]).all()
    pd.testing.assert_frame_equal(one[["mean", "std", "n"]], other[["mean", "std", "n"]], check_exact=True)


def test_an_interval_does_not_depend_on_the_other_cells() -> None:
    values = random(12, 5)
    together = summary(values, seed=1)
    alone = pd.concat([summary(values[:, [i]], seed=1) for i in range(5)], ignore_index=True)
    pd.testing.assert_frame_equal(together, alone, rtol=1e-12)


def test_the_interval_covers_the_mean_nineteen_times_out_of_twenty() -> None:
    samples = np.random.default_rng(0).normal(2.0, 3.0, (40, 3000))
    found = summary(samples, seed=0)
    covered = ((found["ci_low"] <= 2.0) & (found["ci_high"] >= 2.0)).mean()
    assert 0.92 <= covered <= 0.965  # the percentile interval is a little narrow at n = 40
    width = (found["ci_high"] - found["ci_low"]).mean()
    assert width == pytest.approx(2 * 1.96 * 3.0 / 40**0.5, rel=0.05)


def test_an_interval_keeps_the_digits_of_a_small_spread() -> None:
    values = 1e6 + np.random.default_rng(0).normal(0, 1e-4, (30, 1))
    row = summary(values, seed=0).iloc[0]
    assert row["ci_low"] < row["mean"] < row["ci_high"]
    assert row["ci_high"] - row["ci_low"] == pytest.approx(4 * row["std"] / 30**0.5, rel=0.2)


def test_equal_inputs_have_an_interval_of_no_width() -> None:
    row = summary(np.full((6, 1), 0.25), seed=0).iloc[0]
    assert row.tolist() == [0.25, 0.0, 0.25, 0.25, 6]


def test_many_cells_are_the_same_as_few() -> None:
    values = random(5, 4100)
    found = summary(values, seed=0, resamples=50)
    last = summary(values[:, -3:], seed=0, resamples=50)
    pd.testing.assert_frame_equal(found.tail(3).reset_index(drop=True), last, rtol=1e-12)


# --- files


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_tables_come_back(tmp_path: Path, suffix: str) -> None:
    layers, _ = tables(frame(random(1, 2, 3, 2)), RATIOS, seed=0)
    file = tmp_path / "new" / f"layers{suffix}"
    write(layers, file)
    read = {".csv": pd.read_csv, ".parquet": pd.read_parquet, ".json": pd.read_json}[suffix]
    back = read(file)
    assert list(back) == list(layers)
    np.testing.assert_allclose(back["mean"], layers["mean"], rtol=1e-8)
    assert os.listdir(tmp_path / "new") == [file.name]


def test_unknown_formats_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write 'layers.xlsx'") as caught:
        write(pd.DataFrame(), tmp_path / "layers.xlsx")
    assert caught.value.tip == "known formats: '.csv', '.parquet', '.json', '.tex' or '.md'"


def full_disk(path: Path) -> None:
    path.write_text("half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def interrupted(path: Path) -> None:
    path.write_text("half")
    raise KeyboardInterrupt


def test_a_full_disk_leaves_the_old_file_and_no_half_one(tmp_path: Path) -> None:
    file = tmp_path / "layers.csv"
    file.write_text("old")
    with pytest.raises(UserError, match=r"layers\.csv': No space left on device") as caught:
        atomically(file, full_disk)
    assert "-o" in str(caught.value.tip)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["layers.csv"]


def test_an_interruption_leaves_no_half_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        atomically(tmp_path / "layers.csv", interrupted)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_json({}, tmp_path / "file" / "plan.json")


@pytest.mark.parametrize("read", ["read_layers", "read_heads", "read_samples", "read_manifest"])
def test_an_unfinished_run_is_not_read(tmp_path: Path, read: str) -> None:
    (tmp_path / "layers.csv").write_text("model\n")
    with pytest.raises(UserError, match="is not a finished run"):
        getattr(records, read)(tmp_path)
