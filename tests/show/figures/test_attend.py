"""Figures of one target token: what is drawn from made-up tables, what is refused, bytes that repeat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_looks import LONG_NAME, look, text
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from diag.errors import UserError
from diag.show.figures.attend import PARTS, draw_attended, most_attended, similarity_maps, token_name
from diag.show.figures.strip import LONGEST, heat_strip, printable
from diag.show.figures.style import PAGE_WIDTH
from diag.show.figures.token_scales import TARGET, caption, scales, with_times_uniform
from diag.show.figures.write import save


def panels(figure: Figure, columns: int) -> list[list[Axes]]:
    """The axes of a figure row by row, without colour bars."""
    axes = [ax for ax in figure.axes if ax.get_xlabel() == ""]
    return [axes[start : start + columns] for start in range(0, len(axes), columns)]


def words(figure: Figure) -> list[str]:
    return [found.get_text() for found in figure.findobj(Text)]  # type: ignore[attr-defined]


def outlines(ax: Axes, colour: str) -> list[tuple[int, int]]:
    """(row, column) of the patches outlined in a colour."""
    return [
        (int(patch.get_y()), int(patch.get_x()))
        for patch in ax.patches
        if isinstance(patch, Rectangle) and not patch.get_fill() and patch.get_edgecolor() == to_rgba(colour)
    ]


GRIDS = {"coarse": (2, 3), "fine": (4, 6)}


def test_a_row_of_maps_per_model() -> None:
    tokens, _, pictures = look(GRIDS, prefix=("cls", "registers"))
    figure = similarity_maps(tokens, pictures)
    rows = panels(figure, 3)
    assert len(rows) == 2
    assert figure.get_figwidth() == PAGE_WIDTH
    assert len(figure.axes) == 2 * 3 + 2  # and the two colour bars
    for row, (model, (high, wide)) in zip(rows, GRIDS.items(), strict=True):
        part = tokens[tokens["model"] == model]
        patches = part[part["kind"] == "patch"]
        image, cosines, weights = (ax.get_images()[0] for ax in row)
        np.testing.assert_array_equal(image.get_array(), pictures[model])
        np.testing.assert_allclose(
            cosines.get_array(), patches["value_cosine"].to_numpy().reshape(high, wide)
        )
        times = patches["weight"].to_numpy().reshape(high, wide) * len(part)
        np.testing.assert_allclose(weights.get_array(), times)
        assert [outlines(ax, TARGET) for ax in row] == [[(1, 1)]] * 3
        assert [text.get_text() for text in row[1].texts] == ["cls", "reg"]
        box = row[0].get_position()
        inches = (box.height * figure.get_figheight(), box.width * figure.get_figwidth())
        assert inches[0] / inches[1] == pytest.approx(high / wide)


def test_maps_of_all_models_have_one_scale_centred_on_zero() -> None:
    tokens, _, pictures = look(GRIDS)
    rows = panels(similarity_maps(tokens, pictures), 3)
    for column in (1, 2):
        limits = {row[column].get_images()[0].get_clim() for row in rows}
        assert len(limits) == 1
    low, high = rows[0][1].get_images()[0].get_clim()
    others = tokens[~tokens["is_target"]]["value_cosine"]
    assert (low, high) == (-others.abs().max(), others.abs().max())  # not the target's own 1


def test_scales_hold_where_there_is_little_to_scale() -> None:
    tokens, _, _ = look({"one": (2, 2)})
    flat = tokens.assign(weight=1 / len(tokens), value_cosine=np.where(tokens["is_target"], 1.0, 0.0))
    found = scales(with_times_uniform(flat))
    assert (found["value_cosine"].vmax, found["times_uniform"].vmax) == (0.05, 2.0)
    alone = flat[flat["is_target"]].assign(weight=1.0)
    assert scales(with_times_uniform(alone))["value_cosine"].vmax == 1


def test_most_attended_outlines_and_lists_the_top() -> None:
    tokens, decomposition, pictures = look(GRIDS)
    figure = most_attended(tokens, decomposition, pictures, top=5)
    rows = panels(figure, 4)
    assert len(rows) == 2
    for row, model in zip(rows, GRIDS, strict=True):
        part = tokens[(tokens["model"] == model) & (tokens["rank"] <= 5)].sort_values("rank")
        patches = part[(part["kind"] == "patch") & ~part["is_target"]]
        named = {text.get_text() for text in row[0].texts if text.get_text().isdigit()}
        assert named == set(patches["rank"].astype(str))
        assert set(outlines(row[0], "#56B4E9")) == set(zip(patches["row"], patches["col"], strict=True))
        assert outlines(row[0], TARGET) == [(1, 1)]
        for ax, column in ((row[1], "weight"), (row[2], "value_cosine")):
            bars = [patch.get_width() for patch in ax.patches if isinstance(patch, Rectangle)]
            np.testing.assert_allclose(bars, part[column])
        names = [label.get_text() for label in row[1].get_yticklabels()]
        assert names == [f"{token_name(token)}  {token['rank']}" for _, token in part.iterrows()]
    assert rows[0][2].get_xlim() == rows[1][2].get_xlim()
    assert rows[0][3].get_xlim() == rows[1][3].get_xlim()


def test_wider_outlines_for_more_weight() -> None:
    tokens, decomposition, pictures = look({"fine": (4, 6)}, prefix=())
    (row,) = panels(most_attended(tokens, decomposition, pictures, top=6), 4)
    colour = to_rgba("#56B4E9")
    width = {
        (int(patch.get_y()), int(patch.get_x())): patch.get_linewidth()
        for patch in row[0].patches
        if patch.get_edgecolor() == colour
    }
    part = tokens[(tokens["rank"] <= 6) & ~tokens["is_target"]].sort_values("rank")
    drawn = [width[(row["row"], row["col"])] for _, row in part.iterrows()]
    assert drawn == sorted(drawn, reverse=True)
    assert drawn[0] > drawn[-1]


def test_the_split_is_that_of_the_head() -> None:
    for head, own in (("mean", 0.2), ("1", 0.3)):
        tokens, decomposition, pictures = look({"coarse": (2, 3)}, head=head)
        figure = most_attended(tokens, decomposition, pictures)
        ax = panels(figure, 4)[0][3]
        widths = [patch.get_width() for patch in ax.patches if isinstance(patch, Rectangle)]
        energy = (own - 0.05) ** 2
        np.testing.assert_allclose(widths, [own, -0.05, energy, 1 - energy])
        assert f"cos(yᵢ, vᵢ) = {own - 0.05:.2f} = {own:.2f} − 0.05" in [text.get_text() for text in ax.texts]
        assert ("mean over heads" if head == "mean" else "head 1") in caption(tokens)
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [*PARTS, "uniform null", "partner null"]
        nulls = [line.get_xdata()[0] for line in ax.get_lines()]  # type: ignore[index]
        assert nulls[:2] == [0.4, -0.1]


def test_a_null_that_is_not_defined_is_not_drawn() -> None:
    tokens, decomposition, pictures = look({"coarse": (2, 3)})
    figure = most_attended(tokens, decomposition.assign(cos_y_vpartner=np.nan), pictures)
    assert np.isfinite(panels(figure, 4)[0][3].get_xlim()).all()


def test_a_strip_shows_what_the_target_sees() -> None:
    table = text()
    figure = heat_strip(table)
    strip = figure.axes[0]
    shown = [label.get_text() for label in strip.texts]
    assert shown[:2] == ["lm", "target: token 19 “·word19” · sees 20 tokens, 10 later ones are hidden"]
    assert shown[2:] == [f"·word{i}" for i in range(20)]
    assert len(strip.patches) == 3 * 20
    assert len(figure.axes) == 3  # and two colour bars
    lines = {round(float(patch.get_y()), 4) for patch in strip.patches}
    assert len(lines) > 2  # wrapped
    right = max(patch.get_x() + patch.get_width() for patch in strip.patches)  # type: ignore[attr-defined]
    assert right <= strip.get_xlim()[1]


def test_a_strip_for_each_model_and_a_single_token() -> None:
    both = pd.concat([text(model="one"), text(12, seen=1, target=0, model="two")], ignore_index=True)
    axes = heat_strip(both).axes
    assert [ax.texts[0].get_text().split(" ·")[0] for ax in axes[:2]] == ["one", "two"]
    assert len(axes[1].patches) == 3


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (" the", "·the"),
        ("\n\n ", "↵↵·"),
        ("日本", "□□"),
        ("\x00", "□"),
        ("$x$ %_", "$x$·%_"),
        ("w" * 99, "w" * (LONGEST - 1) + "…"),
        ("", ""),
    ],
)
def test_tokens_are_written_with_signs_that_the_font_has(given: str, shown: str) -> None:
    assert printable(given) == shown


def test_every_figure_of_a_folder_has_its_rows() -> None:
    tokens, decomposition, pictures = look(GRIDS)
    drawn = draw_attended(tokens, decomposition, pictures, top=4)
    assert {stem: len(rows) for stem, (_, rows) in drawn.items()} == {
        "similarity-map": len(tokens),
        "most-attended": 8,
    }
    assert "times_uniform" in drawn["most-attended"][1]
    strips = draw_attended(text(), pd.DataFrame(), {})
    assert {stem: len(rows) for stem, (_, rows) in strips.items()} == {"strip": 20}


def test_captions_say_what_is_shown() -> None:
    tokens, decomposition, pictures = look(GRIDS)
    said = "photo · layer 3 · mean over heads · values as computed"
    said += " · one target in one input: an example, not a mean"
    for figure in (similarity_maps(tokens, pictures), most_attended(tokens, decomposition, pictures)):
        assert said in words(figure)
        assert "(b) fine" in words(figure)
        assert "4 × 6 patches, target (1, 1)" in words(figure)
    tokens.loc[tokens["model"] == "fine", "layer"] = 7
    assert "layers 3, 7" in caption(tokens)


def test_long_names_and_many_models_fit() -> None:
    grids = {f"{LONG_NAME}-{number}": (3, 3) for number in range(5)}
    tokens, decomposition, pictures = look(grids, prefix=("cls", *["registers"] * 8))
    for figure in (similarity_maps(tokens, pictures), most_attended(tokens, decomposition, pictures)):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        names = figure.findobj(
            lambda artist: isinstance(artist, Text) and artist.get_text().startswith("(a)")
        )
        assert names
        for name in names:
            assert name.get_window_extent(canvas.get_renderer()).x1 < figure.bbox.x1


def test_the_wrong_table_is_refused() -> None:
    with pytest.raises(UserError, match="holds no patches"):
        similarity_maps(text(), {})
    with pytest.raises(UserError, match="holds no patches"):
        most_attended(text(), pd.DataFrame(), {})
    with pytest.raises(UserError, match="holds no text"):
        heat_strip(look(GRIDS)[0])


def test_files_repeat_byte_by_byte(tmp_path: Path) -> None:
    written = []
    for turn in ("first", "second"):
        for drawn in (draw_attended(*look(GRIDS)), draw_attended(text(), pd.DataFrame(), {})):
            for stem, (figure, rows) in drawn.items():
                written += save(figure, rows, tmp_path / turn, stem)
    assert len(written) == 2 * 3 * 3
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    other = draw_attended(*look(GRIDS, seed=5))["similarity-map"]
    assert save(*other, tmp_path / "other", "x")[1].read_bytes() != written[1].read_bytes()
