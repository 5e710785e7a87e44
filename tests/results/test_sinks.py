"""Sink events of made-up samples: counts per input, places and whether sinks stay, and the sentences."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from diag.results.published import sinks
from diag.results.sinks import events_per_input, places
from diag.show.words.sinks import sink_sentences

LINE = {"model": "m", "tower": "vision", "tokens": "patch"}
CLASSES = ("sink_no_op", "sink_broadcast", "sink_unclassified")


def rows(layer: int, head: int, of_input: int, kind: str | None, place: int = 0) -> list[dict[str, object]]:
    """The samples of one head and input with an event of a class, or without one."""
    numbers = {"sink_event": float(kind is not None)} | {name: float(name == kind) for name in CLASSES}
    numbers |= {"sink_index": place if kind else np.nan, "sink_row": place // 4 if kind else np.nan}
    numbers |= {"sink_column": place % 4 if kind else np.nan, "sink_on_image": 1.0 if kind else np.nan}
    front = LINE | {"layer": layer, "head": head, "input_index": of_input}
    return [front | {"metric": metric, "value": value} for metric, value in numbers.items()]


@pytest.fixture
def samples() -> pd.DataFrame:
    """Two heads in layers 0 and 1 on four inputs."""
    found = []
    for of_input in range(4):
        found += rows(0, 0, of_input, "sink_unclassified", of_input)
        found += rows(0, 1, of_input, None)
        found += rows(1, 0, of_input, "sink_no_op", 6 if of_input else 9)
        found += rows(1, 1, of_input, "sink_broadcast" if of_input < 2 else None, 3)
    return pd.DataFrame(found)


def test_events_are_counted_per_input_and_the_first_block_apart(samples: pd.DataFrame) -> None:
    table = events_per_input(samples).set_index(["layers", "counted"])
    assert table.loc[("others", "all"), "mean"] == 1.5
    assert table.loc[("others", "no-op"), "mean"] == 1
    assert table.loc[("others", "broadcast"), "mean"] == 0.5
    assert table.loc[("0", "all"), "mean"] == table.loc[("0", "unclassified"), "mean"] == 1
    assert (table["heads"] == 2).all()
    assert (table["n"] == 4).all()
    low, high = table.loc[("others", "broadcast"), ["ci_low", "ci_high"]]
    assert low < 0.5 < high


def test_places_say_whether_a_sink_stays(samples: pd.DataFrame) -> None:
    table = places(samples).set_index(["layer", "head"])
    assert list(table.index) == [(0, 0), (1, 0), (1, 1)]
    assert table.loc[(0, 0), "share"] == 0.25
    assert table.loc[(1, 0), ["index", "row", "column", "kind"]].tolist() == [6, 1, 2, "image"]
    assert table.loc[(1, 0), "share"] == 0.75
    assert table.loc[(1, 1), ["inputs", "events", "share"]].tolist() == [4, 2, 1]


def test_sentences(samples: pd.DataFrame) -> None:
    ((line, said),) = sink_sentences(samples).items()
    assert line == "m, vision tower, patch tokens"
    assert said[0].startswith("after layer 0 75.0 % of the heads have a sink event, 1.50 [")
    assert "1.00 [1.00, 1.00] no-op, 0.50 [" in said[0]
    assert "in layer 0 50.0 % of the heads have a sink event, 1.00 [1.00, 1.00] per input" in said[0]
    assert "60 % of the sinks are at their head's most frequent place (100 % image)" in said[1]


def test_classes_that_are_not_known_are_said_to_be(samples: pd.DataFrame) -> None:
    unknown = samples.assign(value=samples["value"].mask(samples["metric"].isin(CLASSES)))
    ((_, said),) = sink_sentences(unknown).items()
    assert "what they do is not known, as W_O is not" in said[0]


def test_nothing_is_said_without_sink_events(samples: pd.DataFrame) -> None:
    others = samples.assign(metric="cos_y_vself")
    assert events_per_input(others).empty
    assert places(others).empty
    assert not sink_sentences(others)


def test_published_sinks() -> None:
    table = sinks()
    assert len(table) == 4
    gated = table[table["model"] == "LeJEPA ViT-L gated"].iloc[0]
    assert (gated["broadcast"], gated["no_op"], gated["images"]) == (3.80, 0, 1984)
    assert set(table["source"]) == {"arXiv 2606.08105"}
