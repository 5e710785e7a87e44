"""Profiles: hand-made curves have the numbers and names they should; intervals cover; lines pair rightly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import Ended

from diag.errors import UserError
from diag.results.collect import collect
from diag.results.profiles import DIFFERENCES, METRICS, differences, missing, profiles, strongest
from diag.results.profiles.curve_shape import DOUBTS, onset_of, shape_of
from diag.results.profiles.curves import Drawn, curves_of, interval, minus, over

FALLING = [0.6, 0.55, 0.5, 0.4, 0.3, 0.25]
RISING = FALLING[::-1]
VALLEY = [0.6, 0.5, 0.3, 0.35, 0.45, 0.5]
HILL = [0.3, 0.4, 0.6, 0.55, 0.4, 0.35]
WAVE = [0.4, 0.2, 0.4, 0.6, 0.4, 0.4]
FLAT = [0.4, 0.402, 0.399, 0.401, 0.4, 0.4]


def samples(
    curves: dict[str, object],
    *,
    label: str = "m",
    n: int = 40,
    noise: float = 0.01,
    offset: float = 0.1,
    seed: int = 0,
    source: str = "photos",
    layer_count: int | None = None,
    names: list[str] | None = None,
) -> pd.DataFrame:
    """One line: each metric's curve, plus an offset per input and noise per input and layer."""
    rng = np.random.default_rng(seed)
    shift = rng.normal(0, offset, n)
    shift -= shift.mean()
    rows = []
    for metric, curve in curves.items():
        values = np.asarray(curve, float) + shift[:, None] + rng.normal(0, noise, (n, len(curve)))  # type: ignore[arg-type]
        for index in range(n):
            name = names[index] if names else f"{index:03d}.jpg"
            rows += [(metric, name, index, layer, value) for layer, value in enumerate(values[index])]
    table = pd.DataFrame(rows, columns=["metric", "input", "input_index", "layer", "value"])
    constants = {"label": label, "model": label, "tower": "vision", "tokens": "patch", "source": source}
    table = table.assign(**constants)
    return table if layer_count is None else table.assign(layer_count=layer_count)


def numbers(table: pd.DataFrame, metric: str, quantity: str) -> pd.Series:
    return table.set_index(["metric", "quantity"]).loc[(metric, quantity)]


def drawn(
    curve: list[float], *, n: int = 30, noise: float = 0.01, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and resamples of a noisy curve."""
    line = samples({"cos_y_vself": curve}, n=n, noise=noise, seed=seed)
    found = curves_of([line], ["cos_y_vself"], 0)[0]["cos_y_vself"]
    return found.mean, found.draws


class TestShape:
    @pytest.mark.parametrize(
        ("curve", "word"),
        [
            (FALLING, "falling"),
            (RISING, "rising"),
            (VALLEY, "U"),
            (HILL, "inverted U"),
            (WAVE, "mixed"),
            (FLAT, "flat"),
            (FALLING[:2], "falling"),
            ([0.5, 0.3, 0.5], "U"),
        ],
    )
    @pytest.mark.parametrize("noise", [0.0, 0.01])
    def test_of_a_clear_curve(self, curve: list[float], word: str, noise: float) -> None:
        found = shape_of(*drawn(curve, noise=noise), smallest=0.02, n=30)
        assert (found.word, found.likeliest) == (word, word)
        assert found.share > 0.9
        assert found.share == found.likeliest_share

    def test_is_unclear_within_noise(self) -> None:
        found = shape_of(*drawn(FLAT, noise=0.2, n=12), smallest=0.02, n=12)
        assert found.word == "unclear"
        assert np.isnan(found.share)
        assert found.likeliest in ("falling", "rising", "U", "inverted U", "mixed")
        assert found.doubt == "no shape has most resamples"

    def test_a_small_turn_is_none(self) -> None:
        assert shape_of(*drawn([0.5, 0.39, 0.40]), smallest=0.02, n=30).word == "falling"
        assert shape_of(*drawn([0.5, 0.36, 0.40]), smallest=0.02, n=30).word == "U"

    def test_a_likely_but_unproved_turn_is_unclear(self) -> None:
        found = shape_of(*drawn([0.6, 0.3, 0.35], noise=0.12, seed=2), smallest=0.02, n=30)
        assert (found.word, found.likeliest, found.doubt) == ("unclear", "U", "the dip may be noise")

    def test_most_resamples_do_not_show_a_shape_and_the_reason_is_said(self) -> None:
        """Nearly every resample has the dip, but over so many pairs of layers one may have it by noise."""
        found = shape_of(*drawn([0.6, *[0.52] * 8, 0.45, 0.6], noise=0.15, seed=4), smallest=0.02, n=30)
        assert found.word == "unclear"
        assert found.likeliest_share > 0.95
        assert found.doubt == DOUBTS[found.likeliest]

    def test_a_mean_that_looks_otherwise_than_its_resamples(self) -> None:
        """Its end is just too high for falling, and in most resamples just low enough."""
        mean = np.array([0.5, 0.485])
        draws = mean + np.array([0.0, -0.01]) * (np.arange(100)[:, None] < 90)
        found = shape_of(mean, draws, smallest=0.02, n=30)
        assert (found.word, found.likeliest, found.likeliest_share) == ("unclear", "falling", 0.9)
        assert found.doubt == "the curve itself counts as flat"

    @pytest.mark.parametrize("n", [1, 4])
    def test_few_inputs_decide_nothing(self, n: int) -> None:
        found = shape_of(*drawn(FALLING, n=n, noise=0.0), smallest=0.02, n=n)
        assert (found.word, found.likeliest) == ("unclear", "unclear")
        assert found.doubt == f"n = {n} is too few"

    @pytest.mark.parametrize("n", [6, 20])
    def test_noise_is_seldom_given_a_shape_whichever_layers_stand_out(self, n: int) -> None:
        """Of 200 flat curves of 12 layers, at most about one in twenty may be called anything else."""
        weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=500) / n
        rng = np.random.default_rng(1)
        called = onsets = 0
        for _ in range(200):
            values = 0.4 + rng.normal(0, 0.1, (n, 1)) + rng.normal(0, 0.1, (n, 12))
            given = values.mean(0), weights @ values
            called += shape_of(*given, smallest=0.02, n=n).word not in ("unclear", "flat")
            onsets += not np.isnan(onset_of(*given, smallest=0.02, n=n)[0])
        assert called <= 16
        assert onsets <= 16


class TestOnset:
    @pytest.mark.parametrize("knee", [0, 3, 6])
    def test_is_the_last_layer_before_the_growth(self, knee: int) -> None:
        curve = [0.15] * (knee + 1) + [0.15 + 0.05 * step for step in range(1, 6)]
        place, places = onset_of(*drawn(curve), smallest=0.02, n=30)
        assert place == knee
        assert np.mean(places == knee) > 0.9

    def test_of_the_published_vision_post(self) -> None:
        """CLIP B/14, digitised: "value similarity grows from layer 5 on, ×2.85"."""
        curve = [0.172, 0.176, 0.163, 0.141, 0.139, 0.149, 0.186, 0.226, 0.268, 0.302, 0.346, 0.424]
        assert onset_of(*drawn(curve, noise=0.005), smallest=0.02, n=30)[0] == 5

    @pytest.mark.parametrize("curve", [FALLING, FLAT, [0.4, 0.3, 0.5, 0.3]])
    def test_is_none_where_the_end_is_no_higher(self, curve: list[float]) -> None:
        assert np.isnan(onset_of(*drawn(curve), smallest=0.02, n=30)[0])


class TestProfiles:
    def test_numbers_of_a_valley(self) -> None:
        found = profiles(samples({"cos_y_vself": VALLEY}, noise=0.0))
        expected = {"first": (0, 0.6), "minimum": (2, 0.3), "maximum": (0, 0.6), "last": (5, 0.5)}
        for quantity, (layer, value) in expected.items():
            row = numbers(found, "cos_y_vself", quantity)
            assert (row["layer"], row["value"]) == (layer, pytest.approx(value))
            assert row["relative_depth"] == pytest.approx(layer / 5)
            assert row["ci_low"] < value < row["ci_high"]
            assert row["n"] == 40
        # the inputs' offsets cancel within the curve
        rise = numbers(found, "cos_y_vself", "last_minus_first")
        assert rise[["value", "ci_low", "ci_high"]].tolist() == pytest.approx([-0.1] * 3)
        assert numbers(found, "cos_y_vself", "mean")["value"] == pytest.approx(np.mean(VALLEY))
        assert numbers(found, "cos_y_vself", "shape")["word"] == "U"

    def test_growth_is_exact_between_chosen_layers(self) -> None:
        curve = [0.1, 0.1, 0.12, 0.149, 0.2, 0.3, 0.42465]
        line = samples({"value_similarity": curve}, noise=0.0, offset=0.0)
        row = numbers(profiles(line, growth=(3, 6)), "value_similarity", "growth")
        assert row["value"] == pytest.approx(2.85)
        assert (row["word"], row["layer"]) == ("layer 3 to 6", 6)
        assert row[["ci_low", "ci_high"]].tolist() == pytest.approx([row["value"]] * 2)
        whole = numbers(profiles(line), "value_similarity", "growth")
        assert (whole["value"], whole["word"]) == (pytest.approx(4.2465), "layer 0 to 6")
        late = numbers(profiles(line, growth=(5, 11)), "value_similarity", "growth")
        assert np.isnan(late["value"])
        assert late["word"] == "layer 5 to 11: layer 11 was not measured"

    def test_growth_from_about_zero_is_none(self) -> None:
        row = numbers(
            profiles(samples({"value_similarity": [0.0, 0.3]}, noise=0.05)), "value_similarity", "growth"
        )
        assert np.isnan(row["value"])
        assert "not clearly above 0" in row["word"]

    def test_excess_over_nulls_and_shares_are_of_means(self) -> None:
        curves = {"cos_y_vself": [0.5, 0.3], "cos_y_vpartner": [0.4, 0.3], "cos_y_vuniform": [0.6, 0.6]}
        curves["self_part"] = [0.05, 0.03]
        found = profiles(samples(curves, noise=0.0, offset=0.0))
        assert numbers(found, "excess", "mean")["value"] == pytest.approx(0.05)
        assert numbers(found, "excess_over_uniform", "mean")["value"] == pytest.approx(-0.2)
        assert numbers(found, "self_part", "share")["value"] == pytest.approx(0.1)
        assert numbers(found, "cos_y_vuniform", "share")["value"] == pytest.approx(1.5)

    def test_a_share_of_no_bias_is_none(self) -> None:
        curves = {"cos_y_vself": [-0.01, 0.01], "self_part": [0.05, 0.03]}
        row = numbers(profiles(samples(curves, noise=0.05)), "self_part", "share")
        assert np.isnan(row["value"])
        assert "no ratio" in row["word"]

    def test_depth_is_relative_to_the_model_not_to_what_was_measured(self) -> None:
        line = samples({"cos_y_vself": FALLING}, noise=0.0, layer_count=11)
        assert numbers(profiles(line), "cos_y_vself", "minimum")["relative_depth"] == pytest.approx(0.5)
        some = line[line["layer"].isin([2, 4])]
        row = numbers(profiles(some), "cos_y_vself", "first")
        assert (row["layer"], row["relative_depth"]) == (2, 0.2)

    def test_one_layer(self) -> None:
        found = profiles(samples({"cos_y_vself": [0.4], "value_similarity": [0.3]}))
        assert numbers(found, "cos_y_vself", "minimum")[["layer", "relative_depth"]].tolist() == [0, 0]
        assert np.isnan(numbers(found, "cos_y_vself", "last_minus_first")["value"])
        assert numbers(found, "cos_y_vself", "shape")["word"] == "unclear: one layer has none"
        assert np.isnan(numbers(found, "value_similarity", "onset")["value"])
        assert numbers(found, "cos_y_vself", "mean")["ci_low"] < 0.4

    def test_one_input_has_no_intervals(self) -> None:
        found = profiles(samples({"cos_y_vself": FALLING, "self_part": FALLING}, n=1))
        assert found[["ci_low", "ci_high"]].isna().all(axis=None)
        assert (found["n"] == 1).all()
        assert numbers(found, "cos_y_vself", "shape")["word"] == "unclear: n = 1 is too few"
        assert numbers(found, "self_part", "share")["value"] > 0

    def test_missing_values_leave_out_their_input(self) -> None:
        line = samples({"cos_y_vself": FALLING}, noise=0.0)
        lost = line.assign(value=line["value"].where((line["input_index"] != 3) | (line["layer"] != 0)))
        row = numbers(profiles(lost), "cos_y_vself", "first")
        own = line[(line["layer"] == 0) & (line["input_index"] != 3)]["value"]
        assert row["value"] == pytest.approx(own.mean())
        none = line.assign(value=line["value"].where(line["layer"] != 0))
        assert numbers(profiles(none), "cos_y_vself", "first")["layer"] == 1

    def test_what_was_not_measured_is_said_and_the_rest_goes_on(self) -> None:
        line = samples({"value_similarity": FALLING})
        assert set(profiles(line)["metric"]) == {"value_similarity"}
        assert missing(line) == {"m": tuple(name for name in METRICS if name != "value_similarity")}
        assert missing(samples(dict.fromkeys(METRICS, FLAT))) == {}

    def test_a_table_of_another_kind_is_refused(self) -> None:
        with pytest.raises(UserError, match="no column 'label' or 'input_index'") as caught:
            profiles(samples({"cos_y_vself": FLAT}).drop(columns=["label", "input_index"]))
        assert caught.value.tip is not None
        assert "Collection.samples" in caught.value.tip

    def test_self_weight_is_judged_relative_to_its_size(self) -> None:
        falling = [0.004, 0.0035, 0.003, 0.0025]
        found = profiles(samples({"self_weight": falling}, noise=1e-4, offset=1e-4))
        assert numbers(found, "self_weight", "shape")["word"] == "falling"

    def test_intervals_of_single_layers_are_those_of_the_run_folder(
        self, finished: tuple[Path, Ended]
    ) -> None:
        collection = collect([finished[0]])
        found = profiles(collection.samples, seed=3)
        single = found[found["quantity"].isin(["first", "minimum", "last"]) & found["metric"].isin(METRICS)]
        both = single.merge(collection.layers, on=["label", "metric", "layer"], suffixes=("", "_folder"))
        assert len(both) == len(single) > 12
        assert set(both["label"]) == set(collection.labels)
        for ours, theirs in (("value", "mean"), ("ci_low", "ci_low_folder"), ("ci_high", "ci_high_folder")):
            np.testing.assert_allclose(both[ours], both[theirs], atol=1e-8)
        assert (both["n"] == both["n_folder"]).all()


class TestDifferences:
    def two(
        self, *, noise: float = 0.01, source: str = "photos", n: int = 30, **given: object
    ) -> pd.DataFrame:
        """Two lines of one set of inputs, whose offsets are far larger than what tells the lines apart."""
        one = samples({"cos_y_vself": [0.5, 0.4]}, label="a", noise=noise, n=n)
        other = samples({"cos_y_vself": [0.47, 0.39]}, label="b", noise=noise, n=n, source=source, **given)  # type: ignore[arg-type]
        return pd.concat([one, other], ignore_index=True)

    def test_paired_inputs_cancel(self) -> None:
        paired = differences(self.two()).set_index("quantity").loc["bias"]
        apart = differences(self.two(source="others")).set_index("quantity").loc["bias"]
        assert paired["difference"] == pytest.approx(-0.02, abs=0.005)
        assert (paired["paired"], paired["n_shared"]) == (True, 30)
        assert (apart["paired"], apart["n_shared"]) == (False, 0)
        assert apart["ci_high"] > 0 > paired["ci_high"]
        width = [row["ci_high"] - row["ci_low"] for row in (paired, apart)]
        assert width[1] > 5 * width[0]

    def test_the_order_of_inputs_does_not_matter(self) -> None:
        table = self.two()
        turned = table.assign(
            input_index=table["input_index"].where(table["label"] == "a", 29 - table["input_index"])
        )
        pd.testing.assert_frame_equal(differences(turned), differences(table))

    def test_inputs_in_part_the_same(self) -> None:
        table = self.two()
        fewer = table[(table["label"] == "a") | (table["input_index"] >= 10)]
        row = differences(fewer).set_index("quantity").loc["bias"]
        assert (row["paired"], row["n_shared"], row["n_a"], row["n_b"]) == (False, 20, 30, 20)
        means = fewer.groupby("label")["value"].mean()
        assert row["difference"] == pytest.approx(means["b"] - means["a"])
        assert row["ci_low"] < row["difference"] < row["ci_high"]

    def test_equal_ids_of_other_sources_are_other_inputs(self) -> None:
        """Two folders may both hold 001.jpg; a negative control of pairing."""
        assert not differences(self.two(source="elsewhere"))["paired"].any()

    def test_every_quantity(self) -> None:
        curves = {name: [0.5, 0.4] for name in METRICS}
        table = pd.concat([samples(curves, label=label) for label in "ab"], ignore_index=True)
        assert differences(table)["quantity"].tolist() == list(DIFFERENCES)
        lacking = table[(table["label"] == "a") | (table["metric"] == "cos_y_vself")]
        assert differences(lacking)["quantity"].tolist() == ["bias", "bias_last_minus_first"]

    @pytest.mark.parametrize(("count", "pairs"), [(1, 0), (3, 3), (6, 15), (8, 7)])
    def test_pairs(self, count: int, pairs: int) -> None:
        lines = [samples({"cos_y_vself": FLAT}, label=f"m{i}", n=6, seed=i) for i in range(count)]
        found = differences(pd.concat(lines, ignore_index=True))
        assert len(found[["a", "b"]].drop_duplicates()) == pairs
        assert all(int(a[1:]) < int(b[1:]) for a, b in zip(found["a"], found["b"], strict=True))
        if count == 8:
            assert set(found["a"]) == {"m0"}
        chosen = differences(pd.concat(lines), pairs=[(f"m{count - 1}", "m0")])
        assert set(chosen["a"]) == {f"m{count - 1}"}

    def test_one_input(self) -> None:
        row = differences(self.two(n=1)).iloc[0]
        assert np.isnan(row["ci_low"])
        assert row["n_a"] == 1

    def test_strongest(self) -> None:
        found = strongest(self.two())
        assert found.index.tolist() == ["a", "b"]
        assert found["a"] > 0.99
        unsure = strongest(self.two(source="others"))
        assert 0.5 < unsure["a"] < 0.97
        assert strongest(self.two(n=1)).isna().all()
        assert strongest(samples({"self_weight": FLAT})).empty


def test_intervals_cover_what_they_should() -> None:
    """400 simulated studies of 40 inputs: 95 % intervals hold the truth in 92 to 97 %, paired or not."""
    rng = np.random.default_rng(7)
    studies, n = 400, 40
    # skewed, as cosines of few images are; every study is a metric of its own, [study, input, layer]
    shift = 0.1 * (rng.gamma(4, 0.5, (studies, n, 1)) - 2)
    one = np.array([0.5, 0.4, 0.35]) + shift + rng.normal(0, 0.05, (studies, n, 3))
    two = np.array([0.45, 0.4, 0.3]) + shift + rng.normal(0, 0.05, (studies, n, 3))
    own = 0.2 * one + rng.normal(0, 0.02, (studies, n, 3))
    fresh = 0.1 * (rng.gamma(4, 0.5, (studies, n, 1)) - 2)
    other = np.array([0.45, 0.4, 0.3]) + fresh + rng.normal(0, 0.05, (studies, n, 3))

    def line(values: np.ndarray, label: str, source: str) -> pd.DataFrame:
        place = np.indices(values.shape).reshape(3, -1)
        table = pd.DataFrame({"metric": place[0].astype(str), "input": place[1].astype(str)})
        table = table.assign(input_index=place[1], layer=place[2], value=values.ravel())
        return table.assign(label=label, source=source)

    names = [str(study) for study in range(studies)]
    lines = [line(one, "a", "x"), line(two, "b", "x"), line(own, "own", "x"), line(other, "c", "y")]
    a, b, part, c = curves_of(lines, names, 0)

    def covered(truth: float, number: Callable[[str], Drawn | None]) -> float:
        ends = [interval(found[1]) for name in names if (found := number(name)) is not None]
        assert len(ends) == studies
        return float(np.mean([low <= truth <= high for low, high in ends]))

    rates = {
        "mean": covered(1.25 / 3, lambda name: a[name].over_layers()),
        "last - first": covered(-0.15, lambda name: minus(a[name].at(-1), a[name].at(0))),
        "share": covered(0.2, lambda name: over(part[name].over_layers(), a[name].over_layers())),
        "paired": covered(0.1 / 3, lambda name: minus(a[name].over_layers(), b[name].over_layers())),
        "unpaired": covered(0.1 / 3, lambda name: minus(a[name].over_layers(), c[name].over_layers())),
    }
    assert all(0.92 <= rate <= 0.97 for rate in rates.values()), rates
