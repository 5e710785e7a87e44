"""A readout from the command line: what is in its folder, and what it refuses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commands import run_cli

from diag.inputs.images import images
from diag.measure.batch_readings import Incidents
from diag.measure.batch_size import BatchSize
from diag.models import load
from diag.models.names.resolve import parse
from diag.studies.readout.features import features_of
from diag.studies.readout.run import open_readout

MODEL = ("-m", "demo:vit-p16", "--layers", "0,5")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readout") / "out"
    ended = run_cli("readout", *MODEL, "--images", "demo-crops", "--limit", 56, "--folds", 3, "-o", folder)
    assert ended.code == 0, ended.err
    assert ended.out.startswith("demo:vit-p16 · 14 classes · n = 56 images · largest class 0.071\n")
    assert "attentive: best in layer" in ended.out
    assert "2 layers: too few to say whether excess goes with it." in ended.out
    return folder


def test_what_is_in_the_folder(done: Path) -> None:
    found = open_readout(done)
    assert found.manifest["chance"] == pytest.approx(1 / 14)
    assert {path.name for path in done.iterdir()} == {
        *("plan.json", "manifest.json", "samples.parquet", "readout.csv", "relations.csv", "figures"),
    }
    samples = pd.read_parquet(done / "samples.parquet")
    assert samples["input"].nunique() == 56
    rows = found.readout[(found.readout["readout"] == "mean") & (found.readout["measure"] == "accuracy")]
    right = samples[(samples["readout"] == "mean") & (samples["measure"] == "accuracy")]
    np.testing.assert_allclose(rows.set_index("layer")["mean"], right.groupby("layer")["value"].mean())
    assert set(found.readout["readout"]) == {"mean", "cls", "attentive"}
    last = rows[rows["layer"] == 5]["mean"].item()
    assert last > 3 / 14  # it was trained on these photographs


def test_features_are_the_stream_after_the_block(tmp_path: Path) -> None:
    """What is read of a layer is what its block returns, of the same crops; the last batch is smaller."""
    model = load(parse("demo:vit-p16"), device=torch.device("cpu"), dtype=torch.float32)
    tower = model.tower("vision")
    samples = list(itertools.islice(tower.samples(images("demo-crops"), None), 3))
    states = []
    handle = model.module.blocks[5].register_forward_hook(lambda *args: states.append(args[2]))  # type: ignore[union-attr,index]
    with torch.inference_mode():
        tower.forward(tower.encode(samples))
    handle.remove()
    found = features_of(
        model,
        tower,
        samples,
        [layer for layer in tower.layers if layer.index == 5],
        tmp_path / "features",
        batch_size=BatchSize(2),
        incidents=Incidents(),
        advance=lambda inputs: None,
    )
    assert found.ids == [sample.id for sample in samples]
    np.testing.assert_allclose(found.cls[5], states[0][:, 0], atol=1e-5)
    np.testing.assert_allclose(found.tokens[5], states[0][:, 1:], atol=1e-5)


def test_the_same_again_is_read(done: Path) -> None:
    words = ("readout", *MODEL, "--images", "demo-crops", "--limit", 56, "--folds", 3, "-o", done)
    before = (done / "manifest.json").stat().st_mtime_ns
    document = json.loads(run_cli(*words, "--json").out)
    assert {*document} == {"folder", "manifest", "readout", "relations"}
    assert (done / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--images", "demo"), "a readout needs images whose class is known"),
        (
            ("--images", "demo-crops", "--limit", 28),
            "class 'astronaut' has 2 images, and every one of 5 parts",
        ),
        (("--images", "demo-crops", "--folds", 2), "--folds is at least 3"),
    ],
)
def test_what_is_refused(given: tuple[object, ...], said: str, tmp_path: Path) -> None:
    ended = run_cli("readout", *MODEL, *given, "-o", tmp_path / "out")
    assert ended.code == 2, ended.err
    assert said in ended.err
