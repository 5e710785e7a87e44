"""Figures: what is drawn from made-up tables, what is refused, and that files repeat byte by byte."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.text import Text

from diag.errors import UserError
from diag.metrics.catalogue import CATALOGUE
from diag.results.writing import file_stem
from diag.show.figures import FIGURES, draw_run
from diag.show.figures.curves import layer_curves, model_comparison
from diag.show.figures.heatmaps import head_heatmaps
from diag.show.figures.panels import COMPARISON_METRICS, CURVE_METRICS, HEAD_METRICS
from diag.show.figures.style import OKABE_ITO, PAGE_WIDTH, STYLE_SHEET, ordered_colours, style
from diag.show.figures.tables import caption, check_columns, shorten, span
from diag.show.figures.write import save

Saved = tuple[Figure, pd.DataFrame, Path]

METRICS = tuple(dict.fromkeys((*CURVE_METRICS, *COMPARISON_METRICS, *HEAD_METRICS, "entropy")))
LONG_NAME = (
    "hf:/data/checkpoints/experiments/a-rather-long-name-of-a-model/continued/step-00120000-of-00200000"
)


def made_up(
    *,
    model: str = "vit-p8",
    layers: int = 6,
    heads: int | Sequence[int] = 4,
    tower: str = "vision",
    tokens: str = "patch",
    patch_size: int | None = 8,
    inputs: int = 14,
    seed: int = 0,
    **constants: object,
) -> pd.DataFrame:
    """A heads table with every metric, in the columns of a run."""
    generator = np.random.default_rng(seed)
    counts = [heads] * layers if isinstance(heads, int) else heads
    rows = []
    for metric in METRICS:
        for layer in range(layers):
            for head in range(counts[layer]):
                mean = float(generator.uniform(-0.1 if metric == "excess" else 0.05, 0.6))
                half = 0.02 if inputs > 1 else np.nan
                rows.append((layer, head, metric, mean, 0.04, mean - half, mean + half, inputs))
    table = pd.DataFrame(rows, columns=["layer", "head", "metric", "mean", "std", "ci_low", "ci_high", "n"])
    fixed = {
        "model": model,
        "tower": tower,
        "module": "blocks.attn",
        "tokens": tokens,
        "n_tokens": 64,
        "patch_size": patch_size,
        "image_size": 64,
        "values": "as_computed",
        "intervention": "none",
        "first_token": "included",
        "attn_scope": "full",
        "dtype": "float32",
        "seed": 0,
    }
    return table.assign(**{**fixed, **constants})


def layer_table(**given: object) -> pd.DataFrame:
    return made_up(heads=1, **given).drop(columns="head")


def model_lines(ax: Axes) -> list[Line2D]:
    return [line for line in ax.get_lines() if line.get_gid() == "model"]


def labels(ax: Axes) -> list[str]:
    return [line.get_label() for line in model_lines(ax)]


def bands(ax: Axes) -> list[PolyCollection]:
    return [part for part in ax.collections if isinstance(part, PolyCollection)]


def titles(figure: Figure) -> list[str]:
    return [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")]


def caption_of(figure: Figure) -> str:
    return figure.subfigs[0].get_suptitle()


class TestLayerCurves:
    def test_four_panels_with_every_metric_once_per_panel(self) -> None:
        figure = layer_curves(layer_table())
        assert titles(figure) == [
            "(a) Alignment bias",
            "(b) Where it comes from",
            "(c) Similarity between tokens",
            "(d) Where attention goes",
        ]
        assert [len(model_lines(ax)) for ax in figure.axes] == [3, 3, 5, 3]
        assert [len(bands(ax)) for ax in figure.axes] == [3, 3, 5, 3]
        assert figure.get_size_inches()[0] == PAGE_WIDTH

    def test_lines_hold_the_means_and_bands_the_intervals(self) -> None:
        table = layer_table()
        bias = table[table["metric"] == "cos_y_vself"]
        ax = layer_curves(table.sample(frac=1, random_state=1)).axes[0]  # rows in any order
        line = model_lines(ax)[0]
        np.testing.assert_array_equal(line.get_xdata(), bias["layer"])
        np.testing.assert_array_equal(line.get_ydata(), bias["mean"])
        corners = bands(ax)[0].get_paths()[0].vertices
        assert corners[:, 1].min() == pytest.approx(bias["ci_low"].min())
        assert corners[:, 1].max() == pytest.approx(bias["ci_high"].max())

    def test_nulls_are_dashed_and_dotted(self) -> None:
        bias, partner, uniform = model_lines(layer_curves(layer_table()).axes[0])
        assert [line.get_linestyle() for line in (bias, partner, uniform)] == ["-", "--", ":"]
        assert bias.get_color() == OKABE_ITO["blue"]
        assert partner.get_color() == uniform.get_color() == OKABE_ITO["black"]

    def test_cosines_share_limits_that_hold_everything(self) -> None:
        table = layer_table()
        figure = layer_curves(table)
        low, high = figure.axes[0].get_ylim()
        assert figure.axes[1].get_ylim() == figure.axes[2].get_ylim() == (low, high)
        assert low < 0 < table["ci_high"].max() < high
        assert figure.axes[3].get_ylim() == (-0.02, 1.02)

    def test_caption_says_what_was_measured(self) -> None:
        figure = layer_curves(layer_table(model="gpt2", tower="text", tokens="all", first_token="excluded"))
        assert figure.get_suptitle() == "gpt2"
        assert caption_of(figure).replace("\n", " · ") == (
            "text tower · all tokens · T = 64 · t = 0 excluded · n = 14 inputs · values as computed"
            " · bands: 95 % bootstrap interval over inputs"
        )

    def test_one_input_has_no_band_and_claims_none(self) -> None:
        figure = layer_curves(layer_table(inputs=1))
        assert [len(model_lines(ax)) for ax in figure.axes] == [3, 3, 5, 3]
        assert not any(bands(ax) for ax in figure.axes)
        assert "n = 1 input ·" in caption_of(figure)
        assert "bootstrap" not in caption_of(figure)

    def test_intervals_may_be_missing_in_some_rows(self) -> None:
        table = layer_table()
        table.loc[table["layer"] == 2, ["ci_low", "ci_high"]] = np.nan
        figure = layer_curves(table)
        assert np.isfinite(figure.axes[0].get_ylim()).all()
        assert bands(figure.axes[0])[0].get_paths()  # the band is interrupted, not gone

    def test_one_layer_is_a_point_with_a_bar(self) -> None:
        table = layer_table(layers=1)
        figure = layer_curves(table)
        ax = figure.axes[0]
        row = table[table["metric"] == "cos_y_vself"].iloc[0]
        assert not bands(ax)
        np.testing.assert_allclose(
            ax.collections[0].get_segments()[0], [(0, row["ci_low"]), (0, row["ci_high"])]
        )
        assert len({line.get_marker() for line in model_lines(ax)}) == 3
        low, high = ax.get_xlim()
        assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [0]

    def test_layers_that_were_left_out_leave_whole_numbers_on_the_axis(self) -> None:
        table = layer_table(layers=12)
        ax = layer_curves(table[table["layer"].isin([3, 4, 5])]).axes[0]
        assert all(float(tick).is_integer() for tick in ax.get_xticks())
        assert list(model_lines(ax)[0].get_xdata()) == [3, 4, 5]

    def test_a_line_breaks_where_layers_are_not_measured(self) -> None:
        """Layers 0, 1, 4 and 7 of 9: the axis is the model's, and nothing passes for what lies between."""
        table = layer_table(layers=8).assign(layer_count=9)
        table = table[table["layer"].isin([0, 1, 4, 7])]
        figure = layer_curves(table)
        ax = figure.axes[0]
        bias = table[table["metric"] == "cos_y_vself"]
        (drawn, *_) = model_lines(ax)
        np.testing.assert_array_equal(drawn.get_xdata(), [0, 1, 1, 4, 4, 7])
        there = np.isfinite(np.asarray(drawn.get_ydata(), float))
        assert list(there) == [True, True, False, True, False, True]
        np.testing.assert_allclose(np.asarray(drawn.get_ydata())[there], bias["mean"])
        assert all(line.get_marker() not in ("", "None") for line in model_lines(ax))
        between = [line for line in ax.get_lines() if line.get_gid() == "between"]
        assert [line.get_linestyle() for line in between] == [":"] * len(model_lines(ax))
        assert not any(str(label).startswith("_") for label in ax.get_legend_handles_labels()[1])
        # a band over neighbours, bars where a layer is alone
        assert len(bands(ax)) == len(model_lines(ax))
        bars = [
            segment
            for part in ax.collections
            if isinstance(part, LineCollection)
            for segment in part.get_segments()
        ]
        assert sorted(segment[0][0] for segment in bars) == [*[4] * len(between), *[7] * len(between)]
        low, high = ax.get_xlim()
        assert low < 0
        assert 8 < high < 9
        assert "dotted: over layers that are not measured" in caption_of(figure).replace("\n", " · ")
        assert "dotted" not in caption_of(layer_curves(layer_table()))

    def test_metrics_that_were_not_measured_are_left_out(self) -> None:
        table = layer_table()
        figure = layer_curves(table[table["metric"].isin(["cos_y_vself", "self_weight"])])
        assert titles(figure) == [
            "(a) Alignment bias",
            "(b) Where it comes from",
            "(c) Where attention goes",
        ]
        assert [len(model_lines(ax)) for ax in figure.axes] == [1, 1, 1]
        alone = layer_curves(table[table["metric"] == "first_weight"])
        assert [labels(ax) for ax in alone.axes] == [["weight on first token"]]

    def test_a_metric_that_is_nan_throughout_counts_as_missing(self) -> None:
        table = layer_table()
        table.loc[table["metric"] == "first_weight", "mean"] = np.nan
        assert labels(layer_curves(table).axes[3]) == ["self weight", "entropy / maximum"]

    def test_nothing_to_draw_names_the_metrics_needed(self) -> None:
        table = layer_table()
        with pytest.raises(UserError) as caught:
            layer_curves(table[table["metric"] == "entropy"])
        assert str(caught.value) == (
            "nothing to draw: layer curves need other metrics than the table holds (only entropy)"
        )
        assert caught.value.tip == f"measure at least one of: --metrics {','.join(CURVE_METRICS)}"

    @pytest.mark.parametrize(
        ("column", "value"), [("model", "vit-p4"), ("tokens", "cls"), ("values", "bias_free")]
    )
    def test_several_selections_are_refused(self, column: str, value: str) -> None:
        both = pd.concat([layer_table(), layer_table(**{column: value})])
        first = both[column].iloc[0]
        with pytest.raises(UserError) as caught:
            layer_curves(both)
        assert str(caught.value) == (
            f"layer curves show one {column} at a time, but the table holds 2: {first}, {value}"
        )
        assert caught.value.tip == f"choose one: table[table['{column}'] == '{first}']"

    def test_a_repeated_row_is_refused(self) -> None:
        with pytest.raises(UserError, match="more than one value of cos_y_vself at layer 0"):
            layer_curves(pd.concat([layer_table(), layer_table()]))

    def test_a_missing_column_is_named(self) -> None:
        with pytest.raises(UserError, match="no column 'ci_low' or 'ci_high'"):
            layer_curves(layer_table().drop(columns=["ci_low", "ci_high"]))

    def test_columns_of_categories_and_objects_are_fine(self) -> None:
        table = layer_table(inputs=1).astype({"model": "category", "metric": "category"})
        table["ci_low"] = table["ci_high"] = pd.Series([None] * len(table), dtype=object, index=table.index)
        assert len(model_lines(layer_curves(table).axes[0])) == 3


def test_both_nulls_are_told_apart_without_colour() -> None:
    looks = [CATALOGUE[name].line for name in ("cos_y_vself", "cos_y_vpartner", "cos_y_vuniform")]
    for part in ("dashes", "marker"):
        assert len({getattr(look, part) for look in looks} - {""}) == 3


class TestModelComparison:
    def test_one_line_per_model_over_relative_depth(self) -> None:
        sizes = {"small": 4, "large": 12}
        table = pd.concat([layer_table(model=m, layers=n, patch_size=None) for m, n in sizes.items()])
        figure = model_comparison(table)
        assert titles(figure) == [
            "(a) Alignment bias",
            "(b) Excess over partner null",
            "(c) Value similarity",
            "(d) Self weight / uniform weight",
        ]
        for ax in figure.axes:
            small, large = model_lines(ax)
            np.testing.assert_allclose(small.get_xdata(), np.arange(4) / 3)
            np.testing.assert_allclose(large.get_xdata(), np.arange(12) / 11)
            assert [small.get_color(), large.get_color()] == [OKABE_ITO["blue"], OKABE_ITO["vermillion"]]
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["small (T = 64)", "large (T = 64)"]

    @pytest.mark.parametrize("count", [5, 6])
    def test_above_five_lines_no_bands_are_drawn_and_the_caption_says_so(self, count: int) -> None:
        table = pd.concat([layer_table(model=f"m{place}", patch_size=None) for place in range(count)])
        figure = model_comparison(table)
        bands = sum(isinstance(found, PolyCollection) for found in figure.axes[0].collections)
        assert bands == (count if count == 5 else 0)
        texts = [found.get_text() for found in figure.findobj(Text)]
        assert any("intervals in the CSV" in text for text in texts) == (count > 5)

    def test_depth_is_relative_to_the_last_layer_of_the_model(self) -> None:
        hybrid = layer_table(model="hybrid", layers=8).query("layer in [3, 6]").assign(layer_count=9)
        whole = layer_table(model="whole", layers=4).assign(layer_count=4)
        figure = model_comparison(pd.concat([hybrid, whole]))
        first, second = model_lines(figure.axes[0])
        np.testing.assert_allclose(first.get_xdata(), [3 / 8, 3 / 8, 6 / 8])
        np.testing.assert_allclose(second.get_xdata(), np.arange(4) / 3)
        assert "dotted: over layers" in caption_of(figure).replace("\n", " · ")

    def test_patch_sizes_go_from_dark_to_light(self) -> None:
        sizes = [8, 32, 16]
        table = pd.concat([layer_table(model=f"vit-p{size}", patch_size=size) for size in sizes])
        lines = model_lines(model_comparison(table).axes[0])
        assert [line.get_label()[:7] for line in lines] == ["vit-p32", "vit-p16", "vit-p8 "]
        lightness = [np.dot(line.get_color(), (0.2126, 0.7152, 0.0722)) for line in lines]
        assert lightness == sorted(lightness)
        assert lightness[-1] - lightness[0] > 0.4
        assert len({line.get_marker() for line in lines}) == 3

    def test_a_patch_size_that_occurs_twice_is_no_order(self) -> None:
        table = pd.concat(
            [layer_table(model=f"{family}{size}", patch_size=size) for family in "ab" for size in (16, 8)]
        )
        colours = [to_hex(line.get_color()).upper() for line in model_lines(model_comparison(table).axes[0])]
        assert colours == list(OKABE_ITO.values())[:4]

    def test_a_model_without_patches_stands_apart_from_the_map(self) -> None:
        table = pd.concat(
            [
                layer_table(model="words", patch_size=None, tower="text", tokens="all"),
                layer_table(model="p16", patch_size=16),
                layer_table(model="p8", patch_size=8),
            ]
        )
        lines = model_lines(model_comparison(table).axes[0])
        assert [line.get_label().split()[0] for line in lines] == ["p16", "p8", "words"]
        assert [line.get_linestyle() for line in lines] == ["-", "-", "--"]
        assert lines[2].get_color() == OKABE_ITO["vermillion"]

    def test_one_model_measured_in_two_ways_gives_two_labels(self) -> None:
        table = pd.concat([layer_table(values=values) for values in ("as_computed", "bias_free")])
        assert labels(model_comparison(table).axes[0]) == [
            "vit-p8 · values as_computed (T = 64)",
            "vit-p8 · values bias_free (T = 64)",
        ]

    def test_names_that_shorten_alike_are_numbered(self) -> None:
        names = ["a" * 50 + middle + "z" * 50 for middle in "xy"]
        table = pd.concat([layer_table(model=name, patch_size=None) for name in names])
        first, second = labels(model_comparison(table).axes[0])
        assert first != second
        assert first.endswith("#1")
        assert second.endswith("#2")

    def test_many_models_stay_distinct(self) -> None:
        table = pd.concat([layer_table(model=f"m{i}", patch_size=None, seed=i) for i in range(20)])
        lines = model_lines(model_comparison(table).axes[0])
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 20

    def test_plain_self_weight_where_a_model_lacks_the_ratio(self) -> None:
        table = pd.concat([layer_table(model=name) for name in ("one", "two")])
        lacks = (table["model"] == "two") & (table["metric"] == "self_weight_ratio")
        assert titles(model_comparison(table[~lacks]))[-1] == "(d) Self weight"

    def test_one_layer_and_one_input(self) -> None:
        table = pd.concat([layer_table(model="one", layers=1, inputs=1), layer_table(model="two", inputs=1)])
        figure = model_comparison(table)
        assert list(model_lines(figure.axes[0])[0].get_xdata()) == [0]
        assert "bootstrap" not in caption_of(figure)

    def test_nothing_to_draw(self) -> None:
        table = layer_table()
        with pytest.raises(UserError, match="comparisons need other metrics") as caught:
            model_comparison(table[table["metric"] == "context_part"])
        assert caught.value.tip is not None
        assert "cos_y_vself" in caught.value.tip


class TestHeadHeatmaps:
    def test_four_maps_hold_the_means(self) -> None:
        table = made_up(layers=3, heads=5)
        figure = head_heatmaps(table.sample(frac=1, random_state=2))
        panels = [ax for ax in figure.axes if ax.get_title(loc="left")]
        assert [ax.get_xlabel() for ax in panels] == ["head"] * 4
        assert len(figure.axes) == 8  # each with its colour bar
        for ax, metric in zip(panels, HEAD_METRICS, strict=True):
            (image,) = ax.get_images()
            expected = table[table["metric"] == metric].pivot(index="layer", columns="head", values="mean")
            np.testing.assert_array_equal(np.asarray(image.get_array()), expected)
            assert image.get_interpolation() == "none"
            assert image.get_extent() == [-0.5, 4.5, 2.5, -0.5]

    def test_excess_is_centred_and_cosines_share_their_range(self) -> None:
        table = made_up()
        bias, excess, weight, similarity = (
            ax.get_images()[0]
            for ax in head_heatmaps(table).axes
            if ax.get_images() and ax.get_title(loc="left")
        )
        reach = table.loc[table["metric"] == "excess", "mean"].abs().max()
        assert excess.get_clim() == (-reach, reach)
        assert excess.get_cmap().name == "RdBu_r"
        assert bias.get_clim() == similarity.get_clim()
        assert weight.get_clim() == (0, table.loc[table["metric"] == "self_weight", "mean"].max())

    def test_ragged_heads_are_blank(self) -> None:
        counts = [2, 5, 3]
        figure = head_heatmaps(made_up(layers=3, heads=counts))
        field = figure.axes[0].get_images()[0].get_array()
        assert field.shape == (3, 5)
        assert [5 - int(row.mask.sum()) for row in field] == counts
        assert figure.axes[0].get_images()[0].get_cmap().get_bad()[3] == 0  # shows the hatched ground
        assert figure.axes[0].patch.get_hatch()
        assert caption_of(figure).endswith("hatched: no such head, or not measured")
        assert "hatched" not in caption_of(head_heatmaps(made_up()))

    def test_a_layer_that_was_not_measured_keeps_its_place(self) -> None:
        table = made_up(layers=6)
        image = head_heatmaps(table[table["layer"].isin([2, 5])]).axes[0].get_images()[0]
        assert image.get_extent() == [-0.5, 3.5, 5.5, 1.5]
        assert image.get_array().mask.all(axis=1).tolist() == [False, True, True, False]

    def test_fewer_metrics_and_equal_values(self) -> None:
        table = made_up(layers=1, heads=1).assign(mean=0.0)
        figure = head_heatmaps(table[table["metric"].isin(["excess", "self_weight"])])
        assert titles(figure) == ["(a) Excess over partner null", "(b) Self weight Aᵢᵢ"]
        ranges = [image.get_clim() for ax in figure.axes for image in ax.get_images()]
        assert len(ranges) == 2
        assert all(low < high for low, high in ranges)

    def test_errors(self) -> None:
        with pytest.raises(UserError, match="no column 'head'"):
            head_heatmaps(layer_table())
        with pytest.raises(UserError, match="head heatmaps show one model at a time"):
            head_heatmaps(pd.concat([made_up(), made_up(model="other")]))
        with pytest.raises(UserError, match="more than one value of cos_y_vself at layer 0, head 0"):
            head_heatmaps(pd.concat([made_up(), made_up()]))
        with pytest.raises(UserError, match="head heatmaps need other metrics"):
            head_heatmaps(made_up().query("metric == 'entropy'"))


class TestLayout:
    """Nothing is clipped and no text lies over another panel. Measured, not compared with pictures."""

    @pytest.mark.parametrize("layers", [1, 6, 12, 36])
    def test_curves(self, layers: int) -> None:
        conditions = {"first_token": "excluded", "intervention": "random_direction:0-35", "n_tokens": 65536}
        figure = layer_curves(layer_table(layers=layers, model=LONG_NAME, **conditions))
        self.check(figure)
        for ax in figure.axes:
            box = ax.get_legend().get_window_extent()
            assert box.y0 >= ax.get_window_extent().y1  # above the lines
            assert box.x1 <= ax.get_window_extent().x1 + 1
            assert box.y1 <= ax._left_title.get_window_extent().y0 + 1  # below the title

    def test_a_single_panel(self) -> None:
        table = made_up(model=LONG_NAME, first_token="excluded", heads=3)
        one = table[table["metric"] == "self_weight"]
        self.check(layer_curves(one[one["head"] == 0].drop(columns="head")))
        self.check(head_heatmaps(one))

    @pytest.mark.parametrize("names", [["a"], ["a", "b", "c"], [LONG_NAME + end for end in "abc"]])
    def test_comparison(self, names: list[str]) -> None:
        self.check(model_comparison(pd.concat([layer_table(model=n, patch_size=None) for n in names])))

    @pytest.mark.parametrize("layers", [1, 12, 36])
    def test_heads(self, layers: int) -> None:
        self.check(head_heatmaps(made_up(layers=layers, heads=[32, *[16] * (layers - 1)], model=LONG_NAME)))

    @staticmethod
    def check(figure: Figure) -> None:
        with style():
            figure.draw_without_rendering()
        width, height = figure.bbox.size
        texts = [figure._suptitle, figure.subfigs[0]._suptitle, *figure.legends]
        panels = [ax for ax in figure.axes if ax.get_title(loc="left")]
        boxes = [item.get_tightbbox() for item in (*texts, *panels)]
        for box in boxes:
            assert box.x0 >= -1, box
            assert box.y0 >= -1, box
            assert box.x1 <= width + 1, box
            assert box.y1 <= height + 1, box
        for one, other in combinations(boxes, 2):
            across = min(one.x1, other.x1) - max(one.x0, other.x0)
            along = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert min(across, along) < 1, (one, other)
        assert min(ax.get_window_extent().width for ax in panels) > 0.33 * width


class TestDrawRun:
    def test_every_figure_with_its_rows(self) -> None:
        heads = pd.concat([made_up(), made_up(model="vit-p4", patch_size=4)])
        layers = pd.concat([layer_table(), layer_table(model="vit-p4", patch_size=4)])
        drawn = draw_run(layers, heads)
        assert list(drawn) == [
            "curves-vit-p8-vision-patch",
            "curves-vit-p4-vision-patch",
            "heads-vit-p8-vision-patch",
            "heads-vit-p4-vision-patch",
            "comparison",
        ]
        assert all(isinstance(figure, Figure) for figure, _ in drawn.values())
        assert set(drawn["curves-vit-p8-vision-patch"][1]["metric"]) == set(CURVE_METRICS)
        assert set(drawn["heads-vit-p4-vision-patch"][1]["model"]) == {"vit-p4"}
        assert set(drawn["comparison"][1]["model"]) == {"vit-p8", "vit-p4"}

    def test_one_model_is_not_compared(self) -> None:
        assert list(draw_run(layer_table(), made_up())) == [
            "curves-vit-p8-vision-patch",
            "heads-vit-p8-vision-patch",
        ]

    def test_figures_without_their_metrics_are_left_out(self) -> None:
        layers, heads = layer_table(), made_up()
        only = layers["metric"] == "context_part"
        assert list(draw_run(layers[only], heads[heads["metric"] == "context_part"])) == [
            "curves-vit-p8-vision-patch"
        ]
        assert draw_run(layers.query("metric == 'entropy'"), heads.query("metric == 'entropy'")) == {}

    def test_conditions_that_differ_are_in_the_stem(self) -> None:
        layers = pd.concat([layer_table(), layer_table(intervention="xsa:0-5")])
        stems = list(draw_run(layers, made_up().head(0)))
        assert stems == ["curves-vit-p8-vision-patch-none", "curves-vit-p8-vision-patch-xsa-0-5"]

    def test_stems_never_collide(self) -> None:
        layers = pd.concat([layer_table(model=name) for name in ("A/b", "a:b")])
        assert list(draw_run(layers, made_up().head(0))) == [
            "curves-A-b-vision-patch",
            "curves-a-b-vision-patch-2",
            "comparison",
        ]

    def test_comparison_of_models_with_several_token_sets(self) -> None:
        layers = pd.concat(
            [layer_table(model=name, tokens=tokens) for name in ("one", "two") for tokens in ("patch", "cls")]
        )
        stems = [stem for stem in draw_run(layers, made_up().head(0)) if stem.startswith("comparison")]
        assert stems == ["comparison-vision-patch", "comparison-vision-cls"]

    def test_models_with_nothing_in_common_are_compared_all_the_same(self) -> None:
        layers = pd.concat(
            [
                layer_table(model="eye"),
                layer_table(model="eye", tokens="cls"),
                layer_table(model="ear", tower="text", tokens="all"),
            ]
        )
        drawn = draw_run(layers, made_up().head(0))
        assert len(model_lines(drawn["comparison"][0].axes[0])) == 3

    @pytest.mark.parametrize(
        ("words", "stem"),
        [
            (
                ["curves", "open_clip:ViT-B-16/datacomp", "vision"],
                "curves-open_clip-ViT-B-16-datacomp-vision",
            ),
            (["curves", "../../etc/passwd"], "curves-..-..-etc-passwd"),
            (["heads", 'a\\b*c?"<d>|e f\n'], "heads-a-b-c-d-e-f"),
            (["heads", "模型"], "heads"),
        ],
    )
    def test_stems_are_safe_file_names(self, words: list[str], stem: str) -> None:
        assert file_stem(*words) == stem

    def test_long_stems_keep_both_ends(self) -> None:
        stem = file_stem("curves", "x" * 300, "vision", "patch")
        assert len(stem) == 120
        assert stem.startswith("curves-x")
        assert stem.endswith("x-vision-patch")

    def test_the_list_of_figures(self) -> None:
        assert {kind: drawing.table for kind, drawing in FIGURES.items()} == {
            "curves": "layers",
            "nulls": "layers",
            "heads": "heads",
            "sinks": "layers",
            "ledger": "layers",
            "comparison": "layers",
        }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A figure, its rows, and the folder that holds it as `a`. Only to be read."""
    table, folder = layer_table(), tmp_path_factory.mktemp("saved")
    figure = layer_curves(table)
    save(figure, table, folder, "a")
    return figure, table, folder


class TestSave:
    def test_the_same_bytes_in_two_folders(self, tmp_path: Path) -> None:
        for folder in ("first", "second"):
            for stem, (figure, data) in draw_run(layer_table(), made_up(heads=[4, 2, 4, 4, 1, 3])).items():
                written = save(figure, data, tmp_path / folder / "figures", stem)
                assert [path.name for path in written] == [f"{stem}.pdf", f"{stem}.png", f"{stem}.csv"]
        first, second = (sorted((tmp_path / folder).rglob("*.*")) for folder in ("first", "second"))
        assert [path.name for path in first] == [path.name for path in second]
        assert len(first) == 6  # and no temporary file is left
        for one, other in zip(first, second, strict=True):
            assert one.read_bytes() == other.read_bytes(), one.name

    def test_saving_one_figure_again_changes_nothing(self, saved: Saved, tmp_path: Path) -> None:
        figure, table, folder = saved
        for path in save(figure, table, tmp_path, "a"):
            assert path.read_bytes() == (folder / path.name).read_bytes(), path.name

    @pytest.mark.parametrize("endings", [("pdf", "png"), ("png",), ()])
    def test_a_layout_is_solved_once_and_drawn_once_per_picture(
        self, endings: tuple[str, ...], saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, table, folder = saved
        done: list[str] = []

        def counted(kind: type, name: str) -> None:
            real = getattr(kind, name)
            monkeypatch.setattr(kind, name, lambda *given: (done.append(name), real(*given))[1])

        counted(Figure, "draw")
        counted(ConstrainedLayoutEngine, "execute")
        written = save(layer_curves(table), table, tmp_path, "a", endings)
        assert [path.name for path in written] == [f"a.{ending}" for ending in (*endings, "csv")]
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)
        assert done == ["execute", *["draw"] * len(endings)]
        for path in written:  # whichever else is written
            assert path.read_bytes() == (folder / path.name).read_bytes(), path.name

    def test_nothing_of_time_machine_or_user_is_in_the_files(
        self, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, table, folder = saved
        pdf, png = folder / "a.pdf", folder / "a.png"
        assert b"CreationDate" not in pdf.read_bytes()
        assert b"ModDate" not in pdf.read_bytes()
        assert b"/Type3" not in pdf.read_bytes().replace(b" ", b"")  # TrueType, as publishers ask
        assert b"Software" not in png.read_bytes()
        monkeypatch.setitem(matplotlib.rcParams, "font.family", ["serif"])
        monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "red")
        other, *_ = save(layer_curves(table), table, tmp_path, "b")
        assert other.read_bytes() == pdf.read_bytes()

    def test_the_csv_gives_the_data_back(self, saved: Saved) -> None:
        _, table, folder = saved
        back = pd.read_csv(folder / "a.csv", keep_default_na=False)
        pd.testing.assert_frame_equal(back, table, check_dtype=False)

    def test_a_failed_write_leaves_the_old_file_and_nothing_else(self, saved: Saved, tmp_path: Path) -> None:
        class Broken(pd.DataFrame):
            def to_csv(self, path: Path, **_: object) -> None:
                path.write_text("half")
                raise OSError(28, "No space left on device")

        figure, table, folder = saved
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        before = (tmp_path / "a.csv").read_bytes()
        with pytest.raises(OSError, match="No space left"):
            save(figure, Broken(table), tmp_path, "a")
        assert (tmp_path / "a.csv").read_bytes() == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.pdf", "a.png"]


class TestStyleAndText:
    def test_the_style_ends_with_its_block(self) -> None:
        before = dict(matplotlib.rcParams)
        with style():
            assert matplotlib.rcParams["pdf.fonttype"] == 42
            assert matplotlib.rcParams["svg.hashsalt"] == "attnbias"
            assert matplotlib.rcParams["text.usetex"] is False
        assert dict(matplotlib.rcParams) == before
        assert STYLE_SHEET.is_file()

    def test_names_are_shown_as_they_are(self) -> None:
        figure = layer_curves(layer_table(model="a $x_1$ model_$"))
        with style():
            figure.draw_without_rendering()
        assert figure.get_suptitle() == "a $x_1$ model_$"
        assert not figure._suptitle.get_parse_math()

    def test_ordered_colours(self) -> None:
        assert len(ordered_colours(1)) == 1
        assert len(set(ordered_colours(6))) == 6

    @pytest.mark.parametrize("width", [10, 11, 60])
    def test_shorten(self, width: int) -> None:
        short = shorten(LONG_NAME, width)
        assert len(short) == width
        assert short[:4] == LONG_NAME[:4]
        assert short[-4:] == LONG_NAME[-4:]
        assert shorten("gpt2", width) == "gpt2"

    def test_whole_numbers_are_whole_whatever_their_size(self) -> None:
        assert span(pd.Series([1_048_576.0, None, 4096.0])) == "4096–1048576"
        assert span(pd.Series([224, 224])) == "224"
        assert span(pd.Series([None], dtype=float)) == ""

    def test_caption_gives_ranges_and_leaves_out_what_differs(self) -> None:
        rows = check_columns(pd.concat([layer_table(n_tokens=49), layer_table(n_tokens=256, tower="text")]))
        assert caption(rows, bands="bands") == (
            "patch tokens · T = 49–256 · n = 14 inputs · values as computed · bands"
        )
        assert all(len(line) <= 40 for line in caption(rows, bands="bands", width=40).splitlines())


def test_neither_torch_nor_pyplot_is_loaded() -> None:
    program = """
import sys
import diag.show.figures
assert "pandas" not in sys.modules and "matplotlib" not in sys.modules, "heavy before anything is drawn"
import diag.show.figures.curves, diag.show.figures.heatmaps, diag.show.figures.write
assert "torch" not in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=root)
