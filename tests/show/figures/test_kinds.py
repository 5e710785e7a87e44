"""Figures of a writeup: depth, entropy, lengths and the post's two; lines, labels, limits, equal bytes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from diag.errors import UserError
from diag.results import published
from diag.show.figures.curves import layer_curves, model_comparison
from diag.show.figures.depth import depth_profiles
from diag.show.figures.entropy import bounds_of, entropy_over_depth
from diag.show.figures.heatmaps import head_heatmaps
from diag.show.figures.lengths import against
from diag.show.figures.page import page
from diag.show.figures.scatter import effect, trained_similarity
from diag.show.figures.style import PAPERS, on_paper, style
from diag.show.figures.write import save

METRICS = ("cos_y_vself", "value_similarity", "self_weight", "entropy", "entropy_p15")
BIAS = [0.6, 0.4, 0.2, 0.3, 0.5]


def layers(*labels: str, inputs: int = 14, bias: Sequence[float] = BIAS, **constants: object) -> pd.DataFrame:
    """A per-layer table of made-up lines; the bias is a U with its minimum at layer 2."""
    rows = []
    for label in labels or ("one",):
        for metric in METRICS:
            for layer, height in enumerate(bias):
                mean = height if metric == "cos_y_vself" else 0.1 + 0.02 * layer
                half = 0.05 if inputs > 1 else math.nan
                rows.append((label, label, metric, layer, mean, mean - half, mean + half, inputs))
    names = ["label", "model", "metric", "layer", "mean", "ci_low", "ci_high", "n"]
    fixed = {
        "tower": "text",
        "tokens": "all",
        "n_tokens": 64,
        "first_token": "excluded",
        "values": "bias_free",
    }
    return pd.DataFrame(rows, columns=names).assign(**{**fixed, **constants})


def points(*lines: str, at: tuple[float, ...] = (64, 128, 256), axis: str = "n_tokens") -> pd.DataFrame:
    """Means over layers of made-up lines against what varies."""
    rows = [
        (line, metric, axis, place, 0.3, 0.2, 0.4, 8)
        for line in lines or ("lm",)
        for metric in ("cos_y_vself", "excess")
        for place in at
    ]
    names = ["line", "metric", "against", "at", "mean", "ci_low", "ci_high", "n"]
    return pd.DataFrame(rows, columns=names).assign(model="lm", tower="text", tokens="all", n_tokens=64)


def overlay(label: str = "one", **values: float) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "label": label,
            "metric": "cos_y_vself",
            "layer": [0, 1, 6],
            "value": [0.61, 0.45, 0.9],
            "uncertainty": [0.001, 0.015, 0.001],
            "source": "somebody",
        }
    ).assign(**values)


def of(ax: Axes, group: str) -> list[Line2D]:
    return [line for line in ax.get_lines() if line.get_gid() == group]


def panels(figure: Figure) -> list[Axes]:
    return figure.subfigs[0].axes


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def caption(figure: Figure) -> str:
    return figure.subfigs[0].get_suptitle()


class TestDepth:
    def test_three_curves_and_the_minimum(self) -> None:
        figure = depth_profiles(layers())
        (ax,) = panels(figure)
        assert [line.get_label() for line in of(ax, "model")] == [
            "alignment bias cos(yᵢ, vᵢ)",
            "value similarity cos(vᵢ, vⱼ)",
            "self weight Aᵢᵢ",
        ]
        np.testing.assert_array_equal(of(ax, "model")[0].get_ydata(), BIAS)
        (ring,) = of(ax, "minimum")
        assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([2], [0.2])
        assert [text.get_text() for text in ax.texts] == ["min 0.200, layer 2"]
        assert legend(figure)[-1] == "minimum of the bias"
        assert ax.get_xlabel() == "layer"
        assert ax.get_title(loc="left") == "one (T = 64)"
        assert "T = 64 · t = 0 excluded · n = 14 inputs · values bias free" in caption(figure)
        assert len(ax.collections) >= 3  # a band for each curve

    def test_a_panel_per_line_with_the_same_limits(self) -> None:
        figure = depth_profiles(layers("a", "b", "c"))
        found = panels(figure)
        assert len(found) == 3
        assert len({ax.get_ylim() for ax in found}) == 1
        assert [ax.get_title(loc="left") for ax in found] == [f"({x}) {x} (T = 64)" for x in "abc"]
        assert len({ax.get_subplotspec().rowspan.start for ax in found}) == 1  # three in one row
        assert figure.get_size_inches()[0] == PAPERS["page"].width

    def test_published_points_are_open_marked_and_in_their_panel(self) -> None:
        figure = depth_profiles(layers("one", "two"), overlay("two"))
        first, second = panels(figure)
        assert of(first, "published") == []
        (theirs,) = of(second, "published")
        assert theirs.get_linestyle() == "None"
        assert theirs.get_markerfacecolor() == "none"
        assert theirs.get_markeredgecolor() == of(second, "model")[0].get_color()
        assert legend(figure)[-1] == "published"
        assert caption(figure).endswith("open points: published values, somebody")
        assert second.get_ylim()[1] > 0.9  # in view
        assert second.get_xlim()[1] > 6

    def test_no_word_of_published_where_nothing_is(self) -> None:
        for known in (None, overlay("elsewhere")):
            figure = depth_profiles(layers(), known)
            assert "published" not in [*legend(figure), caption(figure)]

    def test_other_metrics(self) -> None:
        figure = depth_profiles(layers(), metrics=("entropy", "self_weight"))
        assert legend(figure)[-1] == "minimum of entropy"

    def test_one_input_has_no_band(self) -> None:
        figure = depth_profiles(layers(inputs=1))
        assert "bands" not in caption(figure)

    def test_one_layer_has_no_minimum(self) -> None:
        table = layers()
        figure = depth_profiles(table[table["layer"] == 0])
        assert of(panels(figure)[0], "minimum") == []

    def test_two_values_for_one_layer_are_refused(self) -> None:
        with pytest.raises(UserError, match="more than one value of cos_y_vself in one layer"):
            depth_profiles(pd.concat([layers(), layers()]))

    def test_missing_metrics_are_named(self) -> None:
        with pytest.raises(UserError, match="nothing to draw: depth profiles"):
            depth_profiles(layers(), metrics=("no_such",))


class TestEntropy:
    def test_mean_percentile_and_both_bounds_of_a_causal_model(self) -> None:
        figure = entropy_over_depth(layers())
        (ax,) = panels(figure)
        assert [line.get_label() for line in of(ax, "model")] == [
            "mean over tokens",
            "15th percentile over tokens",
        ]
        bound, causal = (set(line.get_ydata()) for line in of(ax, "bound"))
        assert bound == {math.log(64)}
        (mean,) = causal
        assert mean == pytest.approx(np.log(np.arange(2, 65)).mean())
        assert ax.get_ylabel() == "entropy in nats"
        assert legend(figure)[2:] == [
            "bound ln T: uniform attention",
            "bound of the mean: token i sees i keys",
        ]

    def test_one_bound_where_every_token_sees_all(self) -> None:
        figure = entropy_over_depth(layers(first_token="included", tower="vision"))
        assert len(of(panels(figure)[0], "bound")) == 1
        assert len(legend(figure)) == 3

    def test_panels_share_limits_that_hold_every_bound(self) -> None:
        table = pd.concat([layers("a", n_tokens=16), layers("b", n_tokens=4096)])
        found = panels(entropy_over_depth(table))
        assert {ax.get_ylim()[0] for ax in found} == {0}
        assert {ax.get_ylim()[1] > math.log(4096) for ax in found} == {True}

    def test_bounds_follow_the_layers(self) -> None:
        table = layers(first_token="included")
        table.loc[table["layer"] == 3, "n_tokens"] = 7  # windows
        assert list(bounds_of(table)["bound"]) == [math.log(n) for n in (64, 64, 64, 7, 64)]

    def test_of_keys_that_are_others_than_the_queries_no_bound_is_known(self) -> None:
        cross = layers("a").assign(value_from="others")
        assert bounds_of(cross)[["bound", "causal"]].isna().all(axis=None)
        found = panels(entropy_over_depth(cross))
        assert not of(found[0], "bound")
        assert found[0].get_ylim()[1] == pytest.approx(
            1.06 * float(cross.loc[cross["metric"].str.startswith("entropy"), "mean"].max())
        )


class TestLengths:
    def test_a_panel_per_metric_a_line_per_model(self) -> None:
        figure = against(points("lm", "other"))
        found = panels(figure)
        assert [ax.get_title(loc="left") for ax in found] == [
            "(a) Alignment bias",
            "(b) Excess over partner null",
        ]
        assert [[line.get_label() for line in of(ax, "model")] for ax in found] == [["lm", "other"]] * 2
        assert legend(figure) == ["lm", "other"]
        assert figure.get_suptitle() == "Means over layers against sequence length T"
        assert {ax.get_xscale() for ax in found} == {"log"}

    def test_ticks_are_the_measured_places(self) -> None:
        figure = against(points())
        ax = panels(figure)[0]
        with style():
            figure.draw_without_rendering()
        assert list(ax.get_xticks()) == [64, 128, 256]
        assert [label.get_text() for label in ax.get_xticklabels()] == ["64", "128", "256"]
        assert len(ax.xaxis.get_minorticklocs()) == 0

    def test_many_places_are_thinned_and_the_last_is_kept(self) -> None:
        places = tuple(float(2**power) for power in range(20))
        ticks = list(panels(against(points(at=places)))[0].get_xticks())
        assert len(ticks) <= 7
        assert ticks[-1] == places[-1]

    def test_training_begins_at_step_0(self) -> None:
        ax = panels(against(points(at=(0, 1, 512, 143000), axis="step")))[0]
        assert ax.get_xscale() == "symlog"
        assert ax.get_xlabel() == "training step"

    def test_one_length_is_a_point_with_a_bar(self) -> None:
        ax = panels(against(points(at=(64,))))[0]
        assert len(of(ax, "model")) == 1
        assert ax.get_xscale() == "linear"

    def test_two_values_at_one_place_are_refused(self) -> None:
        with pytest.raises(UserError, match="'lm' has more than one cos_y_vself at n_tokens 64"):
            against(pd.concat([points(), points()]))

    def test_nothing_is_refused(self) -> None:
        with pytest.raises(UserError, match="nothing to draw against"):
            against(points().head(0))


class TestPublishedOnly:
    def test_the_effect(self) -> None:
        figure = effect(published.accuracy())
        (ax,) = panels(figure)
        found = of(ax, "published")
        assert len(found) == 4
        assert [line.get_markerfacecolor() == "none" for line in found] == [False, False, False, True]
        assert [text.get_text() for text in ax.texts] == [
            "CLIP ViT-B/32: −7.47",
            "CLIP ViT-B/16: −2.35",
            "CLIP ViT-B/14: +3.44",
            "CLIP ViT-B/14, training 2: +1.73",
        ]
        assert "published values" in caption(figure)
        assert "too few for a trend" in caption(figure)

    def test_trained_similarity(self) -> None:
        rows = [
            (pair, side, layer, 0.1 + 0.1 * layer, math.nan, math.nan, "somebody")
            for pair in ("B/32", "B/16", "B/14")
            for side in ("baseline", "XSA-trained")
            for layer in range(3)
        ]
        names = ["pair", "side", "layer", "mean", "ci_low", "ci_high", "source"]
        figure = trained_similarity(pd.DataFrame(rows, columns=names))
        found = panels(figure)
        assert [ax.get_title(loc="left") for ax in found] == ["(a) B/32", "(b) B/16", "(c) B/14"]
        assert [len(of(ax, "model")) for ax in found] == [2, 2, 2]
        assert len({ax.get_ylim() for ax in found}) == 1
        assert caption(figure) == "published values, somebody"
        assert legend(figure) == ["baseline", "XSA-trained"]

    def test_nothing_is_refused(self) -> None:
        with pytest.raises(UserError, match="no published effect"):
            effect(published.accuracy().head(0))
        with pytest.raises(UserError, match="no pair of models"):
            trained_similarity(pd.DataFrame({"pair": []}))


DRAWN = {
    "depth": lambda: depth_profiles(layers("a", "b"), overlay("b")),
    "entropy": lambda: entropy_over_depth(layers("a", "b", "c")),
    "lengths": lambda: against(points("a", "b")),
    "effect": lambda: effect(published.accuracy()),
}


LONG = {
    "many layers": lambda: layer_curves(layers("a-long-name-" * 8, bias=[0.3] * 112)),
    "heads": lambda: head_heatmaps(
        pd.concat([layers(bias=[0.3] * 48).assign(head=head) for head in range(40)])
    ),
    "comparison": lambda: model_comparison(layers(*"abcdefghi", bias=[0.3] * 40)),
}
COLUMNS = [(kind, "column") for kind in (*DRAWN, *LONG) if kind != "effect"]
COLUMNS += [(kind, "page") for kind in LONG]


@pytest.mark.parametrize("kind", DRAWN)
def test_the_same_bytes_twice(kind: str, tmp_path: Path) -> None:
    one, other = (save(DRAWN[kind](), layers(), tmp_path / folder, "x") for folder in ("one", "other"))
    for first, second in zip(one, other, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.suffix


@pytest.mark.parametrize(("kind", "width"), [*((kind, "page") for kind in DRAWN), *COLUMNS])
def test_everything_is_inside_the_page_and_no_two_ticks_overlap(kind: str, width: str) -> None:
    with on_paper(width):
        figure = (DRAWN | LONG)[kind]()
        assert figure.get_size_inches()[0] == PAPERS[width].width
        with style():
            figure.draw_without_rendering()
    titled = [text for ax in panels(figure) for text in (ax.title, ax._left_title)]
    named = [text for ax in panels(figure) for text in (ax.xaxis.label, ax.yaxis.label)]
    heads = [figure._suptitle, figure.subfigs[0]._suptitle]
    keys = [text for found in figure.legends for text in found.get_texts()]
    keys += [text for ax in panels(figure) if ax.get_legend() for text in ax.get_legend().get_texts()]
    for text in [*titled, *named, *heads, *keys]:
        box = text.get_window_extent()
        assert box.x0 >= -1, text.get_text()
        assert box.x1 <= figure.bbox.width + 1, text.get_text()
        assert box.y0 >= -1, text.get_text()
        assert box.y1 <= figure.bbox.height + 1, text.get_text()
    for axis in (axis for ax in panels(figure) for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        words = [word for tick in ticks for word in (tick.label1, tick.label2)]
        boxes = [word.get_window_extent() for word in words if word.get_visible() and word.get_text()]
        for one, next_one in itertools.pairwise(boxes):
            assert not one.overlaps(next_one)


def test_figures_for_a_column_are_in_eight_points() -> None:
    with on_paper("column"):
        figure = depth_profiles(layers("a"))
        with style():
            figure.draw_without_rendering()
    (ax,) = panels(figure)
    texts = [figure._suptitle, ax._left_title, ax.xaxis.label, *figure.legends[0].get_texts()]
    texts += ax.get_xticklabels() + ax.get_yticklabels()
    assert {text.get_fontsize() for text in texts} == {8}


@pytest.mark.parametrize(
    ("count", "columns", "shape"), [(4, 2, (2, 2)), (3, 3, (1, 3)), (1, 3, (1, 1)), (5, 3, (2, 3))]
)
def test_pages_have_as_many_columns_as_asked(count: int, columns: int, shape: tuple[int, int]) -> None:
    with style():
        _, axes = page(count, row_height=2, title="t", caption="c", columns=columns)
    assert axes[0].get_gridspec().get_geometry() == shape
    assert len(axes) == count
