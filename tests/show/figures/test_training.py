"""Figures of a grid of trained cells: what stands where, what an unfinished grid lacks, equal bytes."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_grids import grid, learned, probed, watched
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from diag.errors import UserError
from diag.show.figures.gain import gain_against_baseline, gain_by_patch
from diag.show.figures.heatmaps import alpha_maps
from diag.show.figures.style import OKABE_ITO, PAGE_WIDTH
from diag.show.figures.training import outcome_figures
from diag.show.figures.training_curves import compensation_over_layers, curves_over_steps
from diag.show.figures.variants import styles_of
from diag.show.figures.write import save
from diag.studies.train.outcomes import outcome_tables

Tables = dict[str, pd.DataFrame]
NOTHING = pd.DataFrame()


def tables_of(results: pd.DataFrame) -> Tables:
    return outcome_tables(results, probed(results), learned(results), *watched(results))


@pytest.fixture(scope="module")
def tables() -> Tables:
    return tables_of(grid())


@pytest.fixture(scope="module")
def language() -> Tables:
    return tables_of(grid(task="language", patches=(math.nan,), variants=("sa", "xsa", "gated_xsa")))


def panels(figure: Figure) -> list[Axes]:
    return [ax for ax in figure.subfigs[0].axes if ax.get_label() != "<colorbar>"]


def caption(figure: Figure) -> str:
    return figure.subfigs[0].get_suptitle()


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def of(ax: Axes, group: str) -> list[Line2D]:
    return [line for line in ax.get_lines() if line.get_gid() == group]


class TestLooks:
    def test_baseline_and_control_are_fixed_and_others_told_apart(self) -> None:
        names = ["xsa", "random_direction:0-2", "sa", "gated_xsa", "gated", "cb", "cb_s", "gated_xsa=sigmoid"]
        found = styles_of(names)
        assert found["sa"].colour == OKABE_ITO["blue"]
        assert (found["random_direction:0-2"].colour, found["random_direction:0-2"].dashes) == (
            "#000000",
            "--",
        )
        controls = ("random_direction", "matched_direction")
        found |= styles_of([*controls, *names])
        assert len(set(found.values())) == len({*names, *controls})
        assert all(found[name].colour == "#000000" and found[name].dashes != "-" for name in controls)
        assert styles_of(["sa", *names])["xsa"] == found["xsa"]


class TestGain:
    def test_means_intervals_and_seeds_are_those_of_the_tables(self, tables: Tables) -> None:
        figure = gain_by_patch(tables["gains"], tables["gains-by-seed"])
        accuracy, loss = panels(figure)
        rows = tables["gains"].query("against == 'sa' and outcome == 'accuracy'")
        drawn = sorted(float(line.get_ydata()[0]) for line in of(accuracy, "mean"))
        np.testing.assert_allclose(drawn, sorted(rows["mean"]))
        bars = [bar.get_segments()[0][:, 1] for bar in accuracy.collections]
        np.testing.assert_allclose(sorted(bar[0] for bar in bars), sorted(rows["ci_low"]))
        dots = np.concatenate([line.get_ydata() for line in of(accuracy, "seed")])
        seeds = tables["gains-by-seed"].query("against == 'sa' and outcome == 'accuracy'")
        np.testing.assert_allclose(sorted(dots), sorted(seeds["difference"]))
        assert [label.get_text() for label in accuracy.get_xticklabels()] == [
            "patch 16",
            "patch 8",
            "patch 4",
        ]
        assert legend(figure) == ["xsa", "gated_xsa", "random_direction"]
        assert "crops · n = 3 seeds" in caption(figure)
        assert loss.get_title(loc="left") == "(b) loss, below 0: better"
        assert figure.get_size_inches()[0] == PAGE_WIDTH

    def test_seeds_stand_beside_their_mean_and_no_variant_in_anothers_place(self, tables: Tables) -> None:
        (ax, _) = panels(gain_by_patch(tables["gains"], tables["gains-by-seed"]))
        places = sorted(
            (min(*seed.get_xdata(), *mean.get_xdata()), max(*seed.get_xdata(), *mean.get_xdata()))
            for seed, mean in zip(of(ax, "seed"), of(ax, "mean"), strict=True)
        )
        assert len(places) == 9
        for (_, right), (left, _) in itertools.pairwise(places):
            assert right < left

    def test_language_and_one_seed(self, language: Tables) -> None:
        (ax,) = panels(gain_by_patch(language["gains"], language["gains-by-seed"]))
        assert ax.get_title(loc="left") == "loss, below 0: better"
        assert [label.get_text() for label in ax.get_xticklabels()] == ["language"]
        single = tables_of(grid(seeds=1, patches=(8,)))
        figure = gain_by_patch(single["gains"], single["gains-by-seed"])
        assert "n = 1 seed ·" in caption(figure)
        figure.draw_without_rendering()

    def test_there_is_nothing_without_a_baseline(self) -> None:
        alone = tables_of(grid(variants=("xsa", "random_direction")))
        with pytest.raises(UserError, match="no gain to draw"):
            gain_by_patch(alone["gains"], alone["gains-by-seed"])


class TestRelation:
    def test_a_panel_per_variant_and_predictor_with_its_numbers(self, tables: Tables) -> None:
        figure = gain_against_baseline(tables["relation-points"], tables["relations"], outcome="accuracy")
        found = panels(figure)
        assert len(found) == 3 * 2
        assert "9 pairs of cells, 3 seeds, 3 patch sizes" in caption(figure)
        assert "patch size moves both sides" in caption(figure)
        assert legend(figure) == ["patch 16", "patch 8", "patch 4"]
        row = (
            tables["relations"]
            .query(
                "variant == 'xsa' and outcome == 'accuracy' and predictor == 'value_similarity'"
                " and correlation == 'pearson'"
            )
            .set_index("cells")["value"]
        )
        title = found[0].get_title(loc="left").replace("\N{MINUS SIGN}", "-")
        assert title.startswith(f"(a) xsa\nall: r = {row['all']:.2f} [")
        assert f"\nwithin sizes: r = {row['within patch sizes']:.2f} [" in title
        points = tables["relation-points"].query(
            "variant == 'xsa' and outcome == 'accuracy' and predictor == 'value_similarity'"
        )
        lines = [line for line in found[0].get_lines() if line.get_linestyle() == "None"]
        np.testing.assert_allclose(
            sorted(np.concatenate([line.get_xdata() for line in lines])), sorted(points["value"])
        )

    def test_without_patch_sizes_there_is_no_within(self, language: Tables) -> None:
        figure = gain_against_baseline(language["relation-points"], language["relations"], outcome="loss")
        assert "patch" not in caption(figure)
        assert panels(figure)[0].get_title(loc="left") == "(a) xsa\nall: too few cells for an r"
        with pytest.raises(UserError, match="no pair of cells"):
            gain_against_baseline(language["relation-points"], language["relations"], outcome="accuracy")


class TestCompensation:
    def test_lines_bands_and_markers(self, tables: Tables) -> None:
        figure = compensation_over_layers(tables["compensation"], metric="value_similarity")
        found = panels(figure)
        assert [ax.get_title(loc="left") for ax in found] == ["(a) patch 16", "(b) patch 8", "(c) patch 4"]
        assert len({ax.get_ylim() for ax in found}) == 1
        rows = tables["compensation"].query(
            "patch_size == 8 and variant == 'xsa' and metric == 'value_similarity'"
        )
        by = {line.get_label(): line for line in of(found[1], "model")}
        np.testing.assert_allclose(by["sa"].get_ydata(), rows["baseline"])
        np.testing.assert_allclose(by["xsa"].get_ydata(), rows["changed"])
        filled = [
            len(line.get_xdata())
            for line in found[1].get_lines()
            if line.get_linestyle() == "None" and line.get_markerfacecolor() == by["xsa"].get_color()
        ]
        assert sum(filled) == ((rows["ci_low"] > 0) | (rows["ci_high"] < 0)).sum() > 0
        assert legend(figure) == ["sa", "xsa", "gated_xsa", "random_direction"]

    def test_one_seed_has_no_band_and_no_filled_marker(self) -> None:
        single = tables_of(grid(seeds=1, patches=(8,), variants=("sa", "xsa")))
        (ax,) = panels(compensation_over_layers(single["compensation"], metric="value_similarity"))
        assert len(ax.collections) == 0
        markers = [line for line in ax.get_lines() if line.get_linestyle() == "None"]
        assert [len(line.get_xdata()) for line in markers] == [0, 6]
        with pytest.raises(UserError, match="no trained pair"):
            compensation_over_layers(single["compensation"], metric="nothing")


class TestAlphas:
    def test_one_range_around_0(self, tables: Tables) -> None:
        figure = alpha_maps(tables["alpha"])
        images = [ax.images[0] for ax in panels(figure)]
        assert len(images) == 3
        low, high = images[0].get_clim()
        assert low == -high
        assert high == pytest.approx(tables["alpha"]["mean"].abs().max())
        assert len({image.get_clim() for image in images}) == 1
        part = tables["alpha"].query("patch_size == 16").pivot(index="layer", columns="head", values="mean")
        np.testing.assert_allclose(images[0].get_array(), part.to_numpy())

    def test_two_forms_on_some_layers(self) -> None:
        results = grid(seeds=2, variants=("sa", "gated_xsa", "gated_xsa=sigmoid:2-5"))
        alphas = learned(results)
        some = ~(alphas["cell"].str.contains("sigmoid") & (alphas["layer"] < 2))
        table = outcome_tables(results, NOTHING, alphas[some], NOTHING, NOTHING)["alpha"]
        found = panels(alpha_maps(table))
        assert len(found) == 6
        assert found[3].get_title(loc="left") == "(d) patch 16\ngated_xsa=sigmoid:2-5"
        assert np.isnan(np.ma.filled(found[3].images[0].get_array(), np.nan)[:2]).all()
        with pytest.raises(UserError, match="no learned α"):
            alpha_maps(table.head(0))


class TestCurves:
    def test_a_panel_per_metric_and_a_line_per_variant(self, tables: Tables) -> None:
        rows = tables["curves"].query("patch_size == 8")
        figure = curves_over_steps(rows)
        found = panels(figure)
        assert len(found) == 6
        assert found[0].get_title(loc="left") == "(a) Training loss"
        assert [line.get_label() for line in of(found[3], "model")] == legend(figure)
        xsa = rows.query("variant == 'xsa' and metric == 'value_similarity'")
        np.testing.assert_allclose(of(found[3], "model")[1].get_ydata(), xsa["mean"])
        assert "loss: means of 10 steps" in caption(figure)

    def test_without_a_monitor_only_the_loss(self, language: Tables) -> None:
        rows = language["curves"].query("metric == 'loss'")
        assert len(panels(curves_over_steps(rows))) == 1
        with pytest.raises(UserError, match="no curve"):
            curves_over_steps(rows.head(0))


class TestAll:
    def test_every_figure_has_a_stem_and_its_rows(self, tables: Tables) -> None:
        drawn = outcome_figures(tables)
        assert list(drawn) == [
            "gain-crops",
            "gain-against-baseline-crops-accuracy",
            "gain-against-baseline-crops-loss",
            "compensation-crops-value_similarity",
            "compensation-crops-cos_y_vself",
            "compensation-crops-excess",
            "alpha-crops",
            "steps-crops-p16",
            "steps-crops-p8",
            "steps-crops-p4",
        ]
        assert all(len(rows) for _, rows in drawn.values())
        rows = drawn["gain-crops"][1]
        assert {"seed", "difference", "mean", "ci_low"} <= set(rows)
        assert set(rows["against"]) == {"sa"}

    def test_tasks_have_figures_of_their_own(self, language: Tables) -> None:
        small = outcome_tables(grid(seeds=1, patches=(8,), variants=("sa", "xsa")), *[NOTHING] * 4)
        both = {
            # an empty table would change the types of the other's columns
            name: pd.concat([part for part in (small[name], table) if len(part)] or [table])
            for name, table in language.items()
        }
        drawn = outcome_figures(both)
        assert list(drawn)[:2] == ["gain-crops", "gain-language"]
        assert "steps-language" in drawn
        assert "gain-against-baseline-language-accuracy" not in drawn
        assert set(drawn["gain-language"][1]["task"]) == {"language"}

    def test_what_is_missing_is_not_drawn(self) -> None:
        results = grid(seeds=1, patches=(8,))
        bare = outcome_figures(outcome_tables(results, *[NOTHING] * 4))
        assert list(bare) == ["gain-crops"]
        lone = outcome_figures(tables_of(grid(seeds=1, variants=("sa",), patches=(8,))))
        assert list(lone) == ["steps-crops-p8"]
        assert outcome_figures(outcome_tables(results.head(0), *[NOTHING] * 4)) == {}

    def test_an_unfinished_grid_is_drawn(self) -> None:
        results = grid(seeds=2, patches=(16, 8)).query("seed == 0 or (patch_size == 16 and variant != 'xsa')")
        for figure, _ in outcome_figures(tables_of(results)).values():
            figure.draw_without_rendering()  # where warnings come from

    def test_the_same_tables_give_the_same_bytes(self, tables: Tables, tmp_path: Path) -> None:
        for folder in ("one", "two"):
            figure = gain_by_patch(tables["gains"], tables["gains-by-seed"])
            save(figure, tables["gains"], tmp_path / folder, "gain")
            save(alpha_maps(tables["alpha"]), tables["alpha"], tmp_path / folder, "alpha")
        files = sorted((tmp_path / "one").iterdir())
        assert len(files) == 6
        for file in files:
            assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
