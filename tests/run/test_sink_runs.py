"""Runs that measured sink events: the table of places, the figure, what is said of W_O, what is published."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from diag.metrics import sink_events
from diag.results.hashes import sha256_of
from diag.results.left_out import emptied
from diag.run.plan import ProbePlan
from diag.run.run import run_probe
from diag.studies.compare import published_for


@pytest.mark.parametrize(("least", "events"), [(0.0, True), (1.1, False)])
def test_a_run_holds_where_sinks_are(
    least: float, events: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where any weight is enough, every head has an event in every input; where none is, no head has."""
    monkeypatch.setattr(sink_events, "LEAST_WEIGHT", least)
    plan = ProbePlan(
        models=("demo:vit-p16",),
        images="demo",
        limit=2,
        metrics=("sink_events",),
        figures="png",
        device="cpu",
    )
    folder = run_probe(plan, tmp_path / "run").folder
    assert (folder / "figures" / "sinks-demo-vit-p16-vision-patch.png").is_file()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert ("sink_places.csv" in manifest["tables"]) == (folder / "sink_places.csv").is_file() == events
    if events:
        places = pd.read_csv(folder / "sink_places.csv")
        heads = pd.read_parquet(folder / "heads.parquet")
        assert len(places) == len(heads[heads["metric"] == "sink_event"])
        assert (places["events"] == 2).all()
        assert set(places["share"]) <= {0.5, 1.0}
        assert manifest["tables"]["sink_places.csv"] == sha256_of(folder / "sink_places.csv")


def test_layers_without_a_known_projection_are_said() -> None:
    assert emptied([], []) == []
    assert emptied([], ["a.0", "a.1"]) == [
        "what sinks do (no-op, broadcast) is empty where the output projection is not known, or does not "
        "read the heads' outputs as they are: a.0 and 1 more"
    ]


@pytest.mark.parametrize(("metric", "count"), [("sink_event", 4), ("entropy", 0)])
def test_published_sinks_are_said_beside_runs_that_measured_them(metric: str, count: int) -> None:
    layers = pd.DataFrame({"label": ["m"], "model": ["m"], "metric": [metric]})
    collection: Any = SimpleNamespace(layers=layers)
    _, notes = published_for(collection)
    published = [note for note in notes if note.startswith("published (arXiv 2606.08105)")]
    assert len(published) == count
    if count:
        assert "LeJEPA ViT-L gated: 3.80 broadcast and 0.00 no-op events per image" in published[1]
