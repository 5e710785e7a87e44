"""The figure of the ledger: whose bars lie where, what is left out, and who draws it."""

from __future__ import annotations

import pandas as pd
import pytest
from matplotlib.figure import Figure

from diag.errors import UserError
from diag.metrics.catalogue import LEDGER_CLASSES
from diag.show.figures import draw_run
from diag.show.figures.ledger import ledger_over_depth, pieces, totals
from diag.show.figures.panels import LEDGER_COLOURS
from diag.show.figures.style import OKABE_ITO

SHARES = {"self": [0.1, 0.2], "sink": [0.7, -0.1], "registers": [0.4, 0.0], "rest": [-0.2, 0.9]}


def ledger(of: str = "output", model: str = "vit", **constants: object) -> pd.DataFrame:
    """A per-layer table of two layers, with a class of which the model has no key."""
    known = SHARES | {"text": [float("nan")] * 2}
    rows = [
        (model, f"{of}_from_{name}", layer, mean, mean - 0.01, mean + 0.01, 9)
        for name, shares in known.items()
        for layer, mean in enumerate(shares)
    ]
    table = pd.DataFrame(rows, columns=["model", "metric", "layer", "mean", "ci_low", "ci_high", "n"])
    return table.assign(**{"tower": "vision", "tokens": "patch", "n_tokens": 50, **constants})


def bars(figure: Figure, panel: int = 0) -> dict[str, list[tuple[float, float]]]:
    """Class -> (from, to) of its bars, of a figure's panel."""
    (body,) = figure.subfigs
    found = {}
    for container in body.axes[panel].containers:
        found[container[0].get_gid()] = [
            (round(bar.get_y(), 6), round(bar.get_y() + bar.get_height(), 6)) for bar in container
        ]
    return found


def test_shares_are_stacked_on_the_side_of_their_sign() -> None:
    figure = ledger_over_depth(pd.concat([ledger(), ledger("bias")]))
    expected = {
        "self": [(0, 0.1), (0, 0.2)],
        "sink": [(0.1, 0.8), (0, -0.1)],
        "registers": [(0.8, 1.2), (0.2, 0.2)],
        "rest": [(0, -0.2), (0.2, 1.1)],
    }
    assert bars(figure) == bars(figure, 1) == expected
    assert totals(pieces(ledger(), "output")) == pytest.approx({0: 1.0, 1: 1.0})


def test_the_legend_names_what_is_there_in_order_and_the_caption_says_n() -> None:
    figure = ledger_over_depth(ledger())
    (legend,) = figure.legends
    words = [text.get_text() for text in legend.get_texts()]
    assert words == [LEDGER_CLASSES[name] for name in SHARES]
    (body,) = figure.subfigs
    assert len(body.axes) == 1
    assert "n = 9 inputs" in body.get_suptitle()


def test_every_class_has_a_colour_and_no_two_of_one_model_share_it() -> None:
    assert LEDGER_COLOURS.keys() == LEDGER_CLASSES.keys()
    for beside in ("prefix", "text"):
        colours = [colour for name, colour in LEDGER_COLOURS.items() if name != beside]
        assert len(set(colours)) == len(colours)
    assert all(colour in OKABE_ITO or colour.startswith("#") for colour in LEDGER_COLOURS.values())


def test_a_run_draws_it_where_it_was_measured() -> None:
    table = pd.concat([ledger(), ledger(tokens="cls")])
    assert sorted(draw_run(table, table.iloc[:0].assign(head=0))) == [
        "ledger-vit-vision-cls",
        "ledger-vit-vision-patch",
    ]
    others = table.assign(metric="entropy")
    assert not draw_run(others, others.iloc[:0].assign(head=0))


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to draw: figures of the ledger need other metrics"):
        ledger_over_depth(ledger().assign(metric="entropy"))
    with pytest.raises(UserError, match="show one tokens at a time"):
        ledger_over_depth(pd.concat([ledger(), ledger(tokens="cls")]))
