"""Long names with all caveats: figures say each whole, cut names only, overlap nothing."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pandas as pd
import pytest
from made_looks import LONG_NAME, look, text
from made_runs import BIAS, made_run
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from diag.results.caveats import BY_DEFAULT, CAVEATS, COLUMNS, apart
from diag.results.collect import Collection, collect
from diag.show.figures.attend import draw_attended
from diag.show.figures.curves import layer_curves, model_comparison
from diag.show.figures.depth import depth_profiles
from diag.show.figures.entropy import entropy_over_depth
from diag.show.figures.heatmaps import head_heatmaps
from diag.show.figures.lengths import against
from diag.show.figures.scatter import trained_similarity
from diag.show.figures.sensitivity import layer_sensitivity
from diag.show.figures.style import style
from diag.show.figures.tables import LEAST, shorten

ALL = {
    "weights": "random",
    "positions": "interpolated",
    "patch_embedding": "resampled",
    "inputs": BY_DEFAULT,
}
SAID = [words for (column, value), words in CAVEATS.items() if ALL[column] == value]
CURVES = BIAS | {"value_similarity": [0.2, 0.3, 0.5], "entropy": [3.0, 2.5, 2.0]}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    root = tmp_path_factory.mktemp("three")
    return collect(
        made_run(root / name[-1], model=name, curves=CURVES, **ALL)
        for name in (f"{LONG_NAME}_a", f"{LONG_NAME}_b", "demo:c")
    )


@pytest.mark.parametrize("width", [*range(8, 140, 11)])
def test_a_name_is_cut_and_its_caveats_never(width: int) -> None:
    label = " · ".join([LONG_NAME, *SAID])
    short = shorten(label, width)
    assert apart(short)[1] == SAID
    assert len(short) <= max(width, LEAST + len(label) - len(LONG_NAME))
    name = apart(short)[0]
    assert len(name) >= min(LEAST, width)
    assert name[:3] == LONG_NAME[:3]
    assert name[-3:] == LONG_NAME[-3:]


def words(figure: Figure) -> list[Text]:
    """Everything that a figure says in words, laid out on its page; numbers of axes may lie beyond it."""
    FigureCanvasAgg(figure)
    with style():
        figure.draw_without_rendering()
    return [one for one in figure.findobj(Text) if re.search("[a-z]{3}", one.get_text())]


def first(table: pd.DataFrame, collection: Collection) -> pd.DataFrame:
    return table[table["label"] == collection.labels[0]]


def swept(collection: Collection) -> Figure:
    table = pd.DataFrame(
        {"intervention": "xsa", "strength": 1.0, "scope": "one", "layer": [0, 1], "head": -1}
        | {"effect": "loss_change", "mean": 0.1, "ci_low": 0.0, "ci_high": 0.2, "n": 3}
    )
    return layer_sensitivity(table, title=collection.labels[0], effects=["loss_change"])


def drawn_against(collection: Collection) -> Figure:
    rows = collection.layers[collection.layers["layer"] == 0]
    return against(rows.assign(line=rows["model"], against="n_tokens", at=rows["n_tokens"]))


def many_against(collection: Collection) -> Figure:
    """Points of many models, of which all but one have caveats."""
    rows = collection.layers[(collection.layers["layer"] == 0) & (collection.layers["model"] == "demo:c")]
    names = [f"timm:vit_base_patch16_{size}" for size in range(12)]
    table = pd.concat([rows.assign(model=name, at=at + 1) for at, name in enumerate(names)])
    table.loc[table["model"] == names[0], [*COLUMNS]] = "native"
    return against(table.assign(line="a line", against="n_tokens"))


def pairs(collection: Collection) -> Figure:
    rows = collection.layers[collection.layers["metric"] == "value_similarity"]
    sides = dict(zip(rows["model"].unique(), ("baseline", "XSA-trained", "baseline"), strict=True))
    return trained_similarity(rows.assign(pair="pair", side=rows["model"].map(sides), source="")[:6])


def seen(kind: str, **caveats: str) -> Figure:
    tokens, numbers, pictures = look({LONG_NAME: (3, 4), "demo:c": (2, 2)})
    return draw_attended(tokens.assign(**caveats), numbers.assign(**caveats), pictures)[kind][0]


LOOKED = {name: value for name, value in ALL.items() if name != "inputs"}
FIGURES: dict[str, tuple[Callable[[Collection], Figure], list[str]]] = {
    "curves": (lambda found: layer_curves(first(found.layers, found)), SAID),
    "curves of a run": (lambda found: layer_curves(first(found.layers, found).drop(columns="label")), SAID),
    "heads": (lambda found: head_heatmaps(first(found.heads, found)), SAID),
    "comparison": (lambda found: model_comparison(found.layers), SAID),
    "comparison of a run": (lambda found: model_comparison(found.layers.drop(columns="label")), SAID),
    "depth": (lambda found: depth_profiles(found.layers), SAID),
    "entropy": (lambda found: entropy_over_depth(found.layers), SAID),
    "lengths": (drawn_against, SAID),
    "lengths of many": (many_against, SAID),
    "pairs": (pairs, SAID),
    "sensitivity": (swept, SAID),
    "similarity-map": (lambda found: seen("similarity-map", **LOOKED), SAID[:-1]),
    "most-attended": (lambda found: seen("most-attended", **LOOKED), SAID[:-1]),
    "strip": (
        lambda found: draw_attended(
            text(model=LONG_NAME).assign(weights="without adapter"), pd.DataFrame(), {}
        )["strip"][0],
        ["adapter not loaded"],
    ),
}


@pytest.mark.parametrize("kind", FIGURES)
def test_a_figure_says_them_all_on_its_page(kind: str, three: Collection) -> None:
    draw, expected = FIGURES[kind]
    figure = draw(three)
    said = words(figure)
    for caveat in expected:
        assert any(caveat in one.get_text() for one in said), caveat
    width = figure.bbox.width
    for one in said:
        box = one.get_window_extent()
        assert box.x0 >= -1, one.get_text()
        assert box.x1 <= width + 1, one.get_text()


@pytest.mark.parametrize("draw", [depth_profiles, entropy_over_depth])
@pytest.mark.parametrize("panels", [1, 2, 3])
def test_titles_of_panels_overlap_neither_each_other_nor_what_is_above(
    draw: Callable[[pd.DataFrame], Figure], panels: int, three: Collection
) -> None:
    figure = draw(three.layers[three.layers["label"].isin(three.labels[:panels])])
    words(figure)
    axes = figure.subfigs[0].axes
    boxes = [ax._left_title.get_window_extent() for ax in axes]
    for left, right in itertools.pairwise(boxes):
        assert left.x1 < right.x0
    assert max(box.y1 for box in boxes) < figure.subfigs[0]._suptitle.get_window_extent().y0
    heights = [ax.get_window_extent().height / figure.dpi for ax in axes]
    assert min(heights) > 1.2  # the page grows, panels do not shrink


def test_the_columns_are_those_of_the_caveats() -> None:
    assert set(ALL) == set(COLUMNS)
