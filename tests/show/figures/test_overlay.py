"""Published values over measured curves, and lines of several runs: what is drawn where."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_runs import CURVES, made_run
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from diag.errors import UserError
from diag.results.collect import collect
from diag.show.figures.curves import layer_curves, model_comparison
from diag.show.figures.overlay import overlays
from diag.show.figures.style import style


def published(model: str = "gpt2", layers: int = 3, source: str = "a study") -> pd.DataFrame:
    rows = [
        (model, metric, layer, 0.1 + 0.2 * layer, 0.01, source)
        for metric in ("cos_y_vself", "value_similarity")
        for layer in range(layers)
    ]
    return pd.DataFrame(rows, columns=["model", "metric", "layer", "value", "uncertainty", "source"])


@pytest.fixture
def layers(tmp_path: Path) -> pd.DataFrame:
    return collect([made_run(tmp_path / "run")]).layers


def points(figure: Figure) -> dict[str, list[np.ndarray]]:
    """Published points by panel title, each `[point, (x, y)]`."""
    return {
        ax.get_title(loc="left"): [np.asarray(bar.lines[0].get_xydata()) for bar in ax.containers]
        for ax in figure.axes
        if ax.containers
    }


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for found in figure.legends for text in found.get_texts()]


def test_layer_curves_show_each_published_metric_once_as_hollow_grey_points(layers: pd.DataFrame) -> None:
    figure = layer_curves(layers, published())
    assert list(points(figure)) == ["(a) Alignment bias", "(c) Similarity between tokens"]
    np.testing.assert_allclose(points(figure)["(a) Alignment bias"][0], [[0, 0.1], [1, 0.3], [2, 0.5]])
    marks, _, bars = figure.axes[0].containers[0].lines
    assert marks.get_markerfacecolor() == "none"
    assert to_hex(marks.get_markeredgecolor()) == to_hex("0.45")
    assert marks.get_linestyle() == "None"
    np.testing.assert_allclose(bars[0].get_segments()[1], [[1, 0.29], [1, 0.31]])
    assert legend(figure) == ["published (a study)"]


def test_limits_hold_the_published_points(layers: pd.DataFrame) -> None:
    figure = layer_curves(layers, published(layers=8))
    assert figure.axes[0].get_xlim()[1] > 7
    assert figure.axes[0].get_ylim()[1] > 1.5
    assert layer_curves(layers).axes[0].get_xlim()[1] < 3


def test_depth_is_relative_to_the_last_published_layer(layers: pd.DataFrame) -> None:
    figure = model_comparison(layers, pd.concat([published(layers=5), published("gpt2-xl", 2)]))
    first, second = points(figure)["(a) Alignment bias"]
    np.testing.assert_allclose(first[:, 0], [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(second[:, 0], [0, 1])
    assert legend(figure)[-2:] == ["published gpt2 (a study)", "published gpt2-xl (a study)"]


def png_of(figure: Figure) -> bytes:
    file = io.BytesIO()
    with style():
        figure.savefig(file, format="png")
    return file.getvalue()


def test_nothing_published_changes_nothing(layers: pd.DataFrame) -> None:
    drawn = [layer_curves(layers), layer_curves(layers, published()[:0]), layer_curves(layers, published())]
    written = [png_of(figure) for figure in drawn]
    assert written[0] == written[1]
    assert written[0] != written[2]  # the comparison sees a difference where there is one
    assert points(model_comparison(layers, published()[:0])) == {}


def test_missing_uncertainty_and_values(layers: pd.DataFrame) -> None:
    table = published().assign(uncertainty=np.nan)
    table.loc[0, "value"] = np.nan
    assert len(points(layer_curves(layers, table))["(a) Alignment bias"][0]) == 2
    assert overlays(None, []) == []


def test_a_table_of_another_kind_is_refused(layers: pd.DataFrame) -> None:
    with pytest.raises(UserError, match="no column 'uncertainty' or 'source'") as caught:
        layer_curves(layers, published().drop(columns=["uncertainty", "source"]))
    assert "model,metric,layer" in str(caught.value.tip)


class TestLabels:
    def lengths(self, tmp_path: Path, model: str = "demo:lm") -> pd.DataFrame:
        text = {"tower": "text", "tokens": "all", "patch_size": None, "image_size": None, "model": model}
        return collect([made_run(tmp_path / f"{n}", n_tokens=n, **text) for n in (128, 32, 64)]).layers

    def test_one_model_at_three_lengths_is_three_lines_from_few_to_many_tokens(self, tmp_path: Path) -> None:
        figure = model_comparison(self.lengths(tmp_path))
        assert legend(figure) == [f"demo:lm · T = {n}" for n in (32, 64, 128)]
        lines = [line for line in figure.axes[0].get_lines() if line.get_gid() == "model"]
        lightness = [sum(line.get_color()[:3]) for line in lines]
        assert lightness == sorted(lightness)
        assert len(lines) == 3

    def test_without_labels_they_would_be_one_selection(self, tmp_path: Path) -> None:
        """A negative control."""
        with pytest.raises(UserError, match="more than one value"):
            model_comparison(self.lengths(tmp_path).drop(columns="label"))

    def test_layer_curves_refuse_several_labels(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="one label at a time"):
            layer_curves(self.lengths(tmp_path))

    def test_a_label_is_followed_by_the_number_of_tokens(self, tmp_path: Path) -> None:
        table = collect([made_run(tmp_path / "a"), made_run(tmp_path / "b", model="demo:b")]).layers
        assert legend(model_comparison(table)) == ["demo:vit-p8 (T = 65)", "demo:b (T = 65)"]

    def test_depth_is_relative_to_the_model_also_where_few_layers_were_measured(self, tmp_path: Path) -> None:
        table = collect([made_run(tmp_path / "a", curves=CURVES, entry={"layers": 5})]).layers
        line = next(x for x in model_comparison(table).axes[0].get_lines() if x.get_gid() == "model")
        np.testing.assert_allclose(line.get_xdata(), [0, 0.25, 0.5])
