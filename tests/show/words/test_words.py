"""Words: what is said follows from the numbers, and nothing is claimed that they do not show."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import CURVES, Make, made_run

from diag.results.caveats import BY_DEFAULT
from diag.results.collect import Collection, collect
from diag.results.profiles import differences, profiles
from diag.show.words import comparison, control, summary, uncontrolled
from diag.show.words.phrases import Found, listed, percent, share, widening

DEEP = {"cos_y_vself": [0.6, 0.3, 0.5], "cos_y_vpartner": [0.6, 0.3, 0.5], "cos_y_vuniform": [0.7, 0.4, 0.6]}
GEOMETRY = CURVES | DEEP | {"excess": [0.0, 0.0, 0.0]}
"""A bias that is its partner null, and below its uniform null."""


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda name="run", **given: made_run(tmp_path / name, **given)


def said(collection: Collection, **given: Any) -> str:
    return "\n".join(comparison(collection, profiles(collection.samples), **given))


def told(collection: Collection) -> str:
    return "\n".join(summary(collection, profiles(collection.samples), collection.labels[0]))


HYBRID = {name: curve[:2] for name, curve in CURVES.items()}
"""Of layers 3 and 7 of eight."""


class TestLayersThatAreNotMeasured:
    def test_they_are_told(self, make: Make) -> None:
        found = collect([make(curves=HYBRID, numbers=[3, 7], entry={"layers": 8})])
        text = told(found)
        assert "In layer 3, where it is strongest," in text
        assert "0.600 in layer 3, 0.500 in layer 7; last − first" in text
        assert "From layer 3 to 7 the similarity" in text
        last = "Of the model's 8 layers, 2 are measured (layers 3, 7): all of this is of them."
        assert text.splitlines()[-1] == last
        assert "are measured" not in told(collect([make("whole")]))

    def test_lines_of_other_layers_are_told_apart(self, make: Make) -> None:
        hybrid = make("hybrid", model="demo:a", curves=HYBRID, numbers=[3, 7], entry={"layers": 8})
        found = collect([hybrid, make("whole", model="demo:b")])
        text = said(found)
        told = "Not all layers are measured, and means are over those that are: demo:a, 2 of 8."
        assert told in text
        bias = profiles(found.samples).query("label == 'demo:a' and metric == 'cos_y_vself'")
        depths = bias.set_index("quantity")["relative_depth"]
        assert [depths["first"], depths["last"]] == pytest.approx([3 / 7, 1])


class TestSummary:
    def test_says_precisely_what_the_nulls_reach(self, make: Make) -> None:
        lines = told(
            collect([make(noise=1e-4, curves=CURVES | {"removed_energy": [0.4, 0.3, 0.2]})])
        ).splitlines()
        assert lines[0] == (
            "In layer 0, where it is strongest, the bias is 0.600 (95 % interval 0.600 to 0.600, n = 8): "
            "the mean cosine between what attention returns to a token and that token's own value; 40 % of "
            "the energy of what it returns lies along that value."
        )
        assert lines[1] == "Uniform attention over the same values would give 0.200 of the 0.600 (33 %)."
        assert lines[2] == (
            "Compared with another token's value instead of its own, the cosine is 0.300; the excess of "
            "0.300 (0.300 to 0.300) is above 0."
        )
        assert lines[3].startswith(
            "0.060 of the 0.600 (10 %) is the token attending to itself; the rest is other"
        )
        assert lines[5].startswith(
            "The bias falls with depth, in 100 % of resamples: 0.600 in layer 0, 0.400 in"
        )
        assert lines[7] == (
            "From layer 0 to 2 the similarity of values changes by a factor of 2.50 (2.50 to 2.50); after "
            "layer 0 it stays above its lowest value."
        )

    def test_geometry_is_not_sold_as_bias(self, make: Make) -> None:
        text = told(collect([make(curves=GEOMETRY)]))
        assert "would give 0.7" in text
        assert "that is there" in text
        assert "is not distinguishable from 0" in text
        assert "falls and rises again (U)" in text
        assert "lowest 0.3" in text
        assert "in layer 1 (relative depth 0.50)" in text
        assert "above 0" not in text.splitlines()[2]

    def test_an_undecided_shape_is_said_to_be_undecided(self, make: Make) -> None:
        text = told(collect([make(noise=0.3)]))
        assert re.search(
            r"shape of the bias over depth is not decided by these data "
            r"\(\d+ % of resamples look [\w ]+, but [^)]+\): 0\.6",
            text,
        )

    def test_a_shape_that_most_resamples_have_is_undecided_for_a_reason(self, make: Make) -> None:
        text = told(collect([make(noise=0.15, curves=CURVES | {"cos_y_vself": [0.6, 0.4, 0.55]})]))
        assert re.search(
            r"\d\d % of resamples look like a U, but the dip may be noise, judged over all pairs of layers "
            r"at once\):",
            text,
        )

    def test_one_input(self, make: Make) -> None:
        text = told(collect([make(n=1)]))
        assert "(one input, no interval)" in text
        assert "inputs are too few" in text
        assert "Too few inputs to name its shape" in text
        assert "nan" not in text
        assert "above 0" not in text

    def test_few_inputs_are_not_judged(self, make: Make) -> None:
        text = told(collect([make(n=3)]))
        assert "above 0" not in text
        assert "inputs are too few" in text

    @pytest.mark.parametrize("metric", ["cos_y_vself", "value_similarity", "cos_y_vuniform", "self_part"])
    def test_what_was_not_measured_is_left_out(self, make: Make, metric: str) -> None:
        text = told(collect([make(curves={metric: CURVES[metric]})]))
        assert "nan" not in text
        if metric == "value_similarity":
            assert text.startswith("The similarity of values rises")
        if metric in ("cos_y_vuniform", "self_part"):
            assert text == "The alignment bias was not measured here."

    def test_a_negative_bias(self, make: Make) -> None:
        negative = {name: [-value for value in curve] for name, curve in CURVES.items()}
        text = told(collect([make(curves=negative)]))
        assert "the bias is -0.40" in text
        assert "%)" not in text.splitlines()[1]

    def test_one_layer(self, make: Make) -> None:
        text = told(collect([make(curves={name: curve[:1] for name, curve in CURVES.items()})]))
        assert text.startswith("In layer 0 the bias is 0.6")
        assert "with depth" not in text


class TestComparison:
    def pair(self, make: Make, below: float = 0.1, noise: float = 0.01, **given: Any) -> Collection:
        lower = CURVES | {"cos_y_vself": [value - below for value in CURVES["cos_y_vself"]]}
        return collect(
            [make("a", model="demo:a", noise=noise), make("b", model="demo:b", curves=lower, **given)]
        )

    def test_the_strongest_and_the_next(self, make: Make) -> None:
        text = said(self.pair(make))
        assert text.startswith("Strongest mean bias: demo:a, 0.5")
        assert "it is the strongest in 100 % of resamples" in text
        assert "With n = 8, intervals are somewhat too narrow; what follows allows for that." in text
        assert re.search(
            r"The next, demo:b, is 0\.1\d\d lower \(.*, paired by input\): distinguishable\.", text
        )
        assert "It is more than both nulls: another token's value gives" in text
        assert "Of the other lines, demo:b is shown to be more than both." in text
        assert re.search(r"\d+ % \(\d+ % to \d+ %\) of it is the token attending to itself", text)

    def test_a_difference_within_its_interval_is_not_distinguishable(self, make: Make) -> None:
        text = said(self.pair(make, below=0.001, noise=0.05))
        assert "paired by input): not distinguishable." in text

    def test_other_inputs_are_not_paired(self, make: Make) -> None:
        text = said(self.pair(make, sha256="others"))
        assert "not paired): distinguishable." in text
        assert "Not a controlled comparison: inputs differ" in text

    def test_nulls_that_reach_the_bias(self, make: Make) -> None:
        text = said(collect([make("a", model="demo:a", curves=GEOMETRY), make("b", model="demo:b")]))
        assert "more than both nulls" in text.splitlines()[1]  # demo:b is the stronger one here
        alone = said(collect([make("c", model="demo:a", curves=GEOMETRY)]))
        assert "It is not shown to be more than either null" in alone
        assert "not distinguishable from 0" in alone
        assert "below 0" in alone

    def test_one_null_of_two(self, make: Make) -> None:
        one = CURVES | {"cos_y_vuniform": [0.9, 0.9, 0.9]}
        assert "more than one null, but not shown to be more than the other" in said(
            collect([make(curves=one)])
        )

    def test_without_nulls_the_question_stays_open(self, make: Make) -> None:
        text = said(collect([make(curves={"cos_y_vself": CURVES["cos_y_vself"]})]))
        assert "Its nulls were not measured, so whether it is more than geometry is open." in text

    def test_with_one_null(self, make: Make) -> None:
        only = {name: CURVES[name] for name in ("cos_y_vself", "cos_y_vpartner")}
        assert "It is more than the one null that was measured" in said(collect([make(curves=only)]))

    @pytest.mark.parametrize(
        ("n", "words"), [(1, "one input does not tell"), (3, "not judged: 3 inputs are too few")]
    )
    def test_few_inputs_claim_nothing(self, make: Make, n: int, words: str) -> None:
        collection = collect(
            [make("a", model="demo:a", n=n), make("b", model="demo:b", n=n, curves=GEOMETRY)]
        )
        text = said(collection)
        assert words in text
        assert "nan" not in text
        assert "above 0" not in text
        assert "is more than" not in text
        assert "distinguishable" not in text

    def test_no_bias_at_all(self, make: Make) -> None:
        assert said(collect([make(curves={"self_weight": [0.1, 0.2]})])) == (
            "The alignment bias was measured in none of the lines."
        )

    def test_an_order_is_followed_from_coarse_to_fine(self, make: Make) -> None:
        sizes = {"demo:vit-p4": 4, "demo:vit-p16": 16, "demo:vit-p8": 8}
        folders = [make(str(size), model=model, patch_size=size) for model, size in sizes.items()]
        text = said(collect(folders))
        assert "Along patch size 16, 8, 4 the mean bias is" in text
        assert "not distinguishable from 0." in text
        # nothing to follow where other things differ as well
        others = [make(f"{size}-x", model=f"demo:{size}", patch_size=size) for size in (4, 8, 16)]
        assert "Along" not in said(collect(others))

    def test_known_differences_are_used_whichever_way_round(self, make: Make) -> None:
        collection = self.pair(make)
        table = differences(collection.samples, pairs=[("demo:b", "demo:a")])
        turned = said(collection, known=table)
        assert (
            turned.splitlines()[0].split(" lower ")[0] == said(collection).splitlines()[0].split(" lower ")[0]
        )
        assert "distinguishable" in turned
        strange = table.assign(difference=0.7, ci_low=0.6, ci_high=0.8)
        assert "is 0.700 lower (0.600 to 0.800" in said(collection, known=strange)
        assert said(collection, known=table.iloc[:0]) == said(collection)


class TestControl:
    @pytest.mark.parametrize(
        ("one", "other", "reasons"),
        [
            ({}, {"n_tokens": 17, "patch_size": 16}, []),
            ({}, {"tokens": "cls"}, ["token sets differ"]),
            ({}, {"sha256": "others"}, ["inputs differ"]),
            ({"dtype": "bfloat16"}, {"tokens": "cls"}, ["token sets and dtypes differ"]),
            ({}, {"model": "demo:vit-p16", "patch_size": 16}, ["patch size and weights differ at once"]),
            ({}, {"model": "demo:lm"}, ["architectures differ (ViT, GPT-2)"]),
            (
                {},
                {"model": "timm:vit_x"},
                ["families differ (demo, timm)", "architectures differ (ViT, vit_x)"],
            ),
            (
                {},
                {"model": "demo:lm", "entry": {"layers": 12}, "heads": 4},
                ["architectures differ (ViT with 3 layers and 2 heads, GPT-2 with 12 layers and 4 heads)"],
            ),
            ({}, {"model": "demo:grid-p8-xsa"}, ["architectures differ (ViT, ViT with xsa)"]),
            ({}, {"model": "demo:grid-p8-sa"}, []),
            ({}, {"model": "demo:vit-p8,img_size=96", "image_size": 96, "n_tokens": 145}, []),
            ({}, {"patch_size": 16, "image_size": 96}, ["patch size and image size differ at once"]),
        ],
    )
    def test_reasons(
        self, make: Make, one: dict[str, Any], other: dict[str, Any], reasons: list[str]
    ) -> None:
        found = uncontrolled(collect([make("one", **one), make("other", **other)]))
        assert found == reasons

    def test_only_the_length_differs(self, make: Make) -> None:
        text = {"tower": "text", "tokens": "all", "patch_size": None, "image_size": None, "model": "demo:lm"}
        lines = [make(str(length), n_tokens=length, **text) for length in (64, 128)]
        assert said(collect(lines)).splitlines()[-1] == (
            "Of patch size, image size, T and weights only T differs; windows of another length are other "
            "stretches of the text."
        )
        assert uncontrolled(collect(lines), in_series=True) == ["T differs as well"]

    def test_a_series_says_what_it_controls(self, make: Make) -> None:
        collection = collect([make("a", model="timm:a"), make("b", model="timm:b", patch_size=16)])
        assert said(collection, control="Same recipe.").splitlines()[-1] == "Controlled series: Same recipe."
        assert "Not a controlled comparison: architectures differ" in said(collection)
        mixed = collect([make("c", model="timm:a"), make("d", model="timm:b", sha256="others")])
        assert (
            said(mixed, control="Same recipe.").splitlines()[-1]
            == "Not a controlled comparison: inputs differ."
        )

    def test_one_name_that_stands_for_other_weights(self, make: Make) -> None:
        folders = [make("a", entry={"weights_sha256": "1"}), make("b", entry={"weights_sha256": "2"})]
        text = said(collect(folders))
        assert "only weights differ." in text

    def test_random_weights_are_said_to_be_random(self, make: Make) -> None:
        random = {"weights": "random"}
        drawn = make("drawn", model="timm:a", entry=random)
        text = said(collect([drawn, make("learned", model="timm:b", curves=GEOMETRY)]))
        assert "Strongest mean bias: timm:a · random weights, " in text
        assert text.splitlines()[-1] == (
            "Random weights, nothing was learned: timm:a. Such numbers show the architecture alone."
        )
        alone = collect([drawn])
        assert told(alone).splitlines()[-1].startswith("The weights are random, nothing was learned")
        assert "nothing was learned: all lines." in said(collect([drawn, make("c", entry=random)]))
        assert "andom" not in said(collect([make("d"), make("e", model="timm:b")]))

    def test_other_caveats_are_said_with_the_lines_that_have_them(self, make: Make) -> None:
        first = make("a", model="timm:a", weights="without adapter", inputs=BY_DEFAULT)
        text = said(collect([first, make("b", model="timm:b", weights="loaded", inputs=BY_DEFAULT)]))
        assert text.splitlines()[-1] == "To be known: adapter not loaded (timm:a), demo inputs (all lines)."
        assert "To be known" not in said(collect([make("c"), make("d", model="timm:b")]))

    def test_sizes_that_a_model_was_not_trained_on(self, make: Make) -> None:
        note = {
            "notes": ["position embeddings interpolated from 8×8 to 12×12: off the training distribution"]
        }
        large = make("large", model="demo:vit-p8,img_size=96", image_size=96, entry=note)
        assert said(collect([make("small"), large])).splitlines()[-1] == (
            "Off the training distribution, because fitted to another size: demo:vit-p8,img_size=96."
        )

    @pytest.mark.parametrize(
        ("resolved", "name"),
        [
            ("timm:vit_small_patch32_224.augreg_in21k", "vit_small_patch"),
            ("timm:flexivit_base.300ep_in21k,patch_size=24", "flexivit_base"),
            ("open_clip:ViT-B-32/datacomp_xl_s13b_b90k", "ViT-B"),
            ("open_clip:ViT-L-14/datacomp_xl_s13b_b90k", "ViT-L"),
            ("open_clip:hf-hub:UCSC-VLAA/openvision-vit-small-patch16-224", "openvision-vit-small-patch"),
            ("hf:EleutherAI/pythia-160m@step3000", "EleutherAI/pythia-160m"),
            ("demo:vit-p16", "ViT"),
            ("demo:grid-p16-sa", "ViT"),
            ("demo:no-such", "no-such"),
        ],
    )
    def test_architecture(self, resolved: str, name: str) -> None:
        assert control.architecture(resolved) == name

    def test_examples(self) -> None:
        failed, tried = doctest.testmod(control)
        assert tried > 0
        assert failed == 0


def test_phrases() -> None:
    assert [percent(value) for value in (0.0, 0.001, 0.5, 0.9996, 1.0)] == [
        "0%",
        "<1%",
        "50%",
        ">99%",
        "100%",
    ]
    assert share(0.184) == "18 %"
    assert [listed(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]
    assert Found(0.1, 0.0, 0.2, 20).judged() == "not distinguishable from 0"
    assert Found(0.1, 0.05, 0.2, 20).judged() == "above 0"
    assert Found(0.1, 0.05, 0.2, 20).judged("clear") == "clear"
    assert Found(0.1, 0.005, 0.2, 14).judged() == "too close to 0 to call with n = 14"
    assert Found(0.1, 0.005, 0.2, 400).judged() == "above 0"
    assert Found(0.1, 0.05, 0.2, 4).judged() == "not judged: 4 inputs are too few"
    assert Found(-0.1, -0.2, -0.05, 20).judged() == "below 0"


def test_few_inputs_are_allowed_for() -> None:
    """2,000 studies of 8 inputs without an effect: one in twenty is called one, more by intervals alone."""
    n, rng = 8, np.random.default_rng(0)
    weights = np.random.default_rng(1).multinomial(n, np.full(n, 1 / n), size=1000) / n
    called = outside = 0
    for _ in range(2000):
        values = rng.normal(size=n)
        low, high = np.percentile(weights @ values, [2.5, 97.5])
        found = Found(float(values.mean()), float(low), float(high), n)
        called += found.above or found.below
        outside += low > 0 or high < 0
    assert called / 2000 < 0.07
    assert outside / 2000 > 0.09


def test_widening() -> None:
    """Of the normal's quantile to the t distribution's: 2.365 at 7 degrees of freedom, 2.093 at 19."""
    for n, quantile in ((8, 2.365), (20, 2.093)):
        assert widening(n) == pytest.approx(quantile / 1.96 * (n / (n - 1)) ** 0.5, rel=0.03)


class TestProjectionsWithoutTheirControl:
    @pytest.mark.parametrize(
        ("changes", "control"),
        [("xsa", "matched_direction"), ("gated_xsa=0.3:1", "matched_direction=0.3:1")],
    )
    def test_are_named_with_what_to_type(self, make: Make, changes: str, control: str) -> None:
        runs = [make("none"), make("changed", intervention=changes)]
        words = said(collect(runs))
        assert f"A projection without its control: demo:vit-p8 · {changes.replace('_', ' ')}." in words
        assert words.endswith(f"--intervene {control}.")
        beside = said(collect([*runs, make("control", intervention=control)]))
        assert "without its control" not in beside

    def test_a_fixed_random_direction_is_none(self, make: Make) -> None:
        runs = [make("changed", intervention="xsa"), make("random", intervention="random_direction")]
        assert "without its control: demo:vit-p8 · xsa." in said(collect(runs))

    def test_what_is_no_projection_needs_none(self, make: Make) -> None:
        words = said(collect([make("none"), make("changed", intervention="uniform mask_self:3")]))
        assert "without its control" not in words
