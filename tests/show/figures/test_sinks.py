"""The figure of sink events: columns stacked by class, the interval of all events, unknown classes."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from diag.errors import UserError
from diag.show.figures.panels import SINK_CLASSES
from diag.show.figures.sinks import sink_events

SHARES = {
    "sink_no_op": [0.0, 0.1, 0.3],
    "sink_broadcast": [0.0, 0.2, 0.0],
    "sink_unclassified": [0.1, 0.0, 0.1],
}


def layers(*labels: str, known: bool = True) -> pd.DataFrame:
    numbers = SHARES if known else {name: [math.nan] * 3 for name in SHARES}
    rows = [
        (label, label, metric, layer, mean, mean - 0.02, mean + 0.02, 8)
        for label in labels or ("one",)
        for metric, means in {"sink_event": np.sum(list(SHARES.values()), 0).tolist(), **numbers}.items()
        for layer, mean in enumerate(means)
    ]
    names = ["label", "model", "metric", "layer", "mean", "ci_low", "ci_high", "n"]
    return pd.DataFrame(rows, columns=names).assign(tower="vision", tokens="patch", n_tokens=65)


def columns(ax: Axes, name: str) -> list[tuple[float, float]]:
    """Bottom and height of a class's columns."""
    return [
        (bar.get_y(), bar.get_height()) for part in ax.containers for bar in part if bar.get_gid() == name
    ]


def test_columns_are_stacked_up_to_all_events() -> None:
    ax = sink_events(layers()).axes[0]
    for name in SINK_CLASSES:
        np.testing.assert_allclose([height for _, height in columns(ax, name)], SHARES[name])
    bottoms = [bottom for bottom, _ in columns(ax, "sink_unclassified")]
    np.testing.assert_allclose(bottoms, [0, 0.3, 0.3])
    assert not columns(ax, "rest")
    ends = ax.collections[0].get_segments()  # type: ignore[attr-defined]
    np.testing.assert_allclose([end[:, 1].mean() for end in ends], [0.1, 0.3, 0.4])


def test_events_of_no_known_class_are_open_columns() -> None:
    figure = sink_events(layers(known=False))
    np.testing.assert_allclose([height for _, height in columns(figure.axes[0], "rest")], [0.1, 0.3, 0.4])
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "class not known"


def test_a_panel_per_line() -> None:
    figure = sink_events(layers("a", "b"))
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["(a) a (T = 65)", "(b) b (T = 65)"]
    assert len({ax.get_ylim() for ax in figure.axes}) == 1


def test_a_table_without_events_is_told() -> None:
    with pytest.raises(UserError, match="nothing to draw: figures of sink events need other metrics"):
        sink_events(layers().assign(metric="entropy"))
