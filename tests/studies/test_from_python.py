"""`diag.compare`, `diag.report` and `diag.intervene`: runs in memory and in folders are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import diag
from diag.errors import UserError
from diag.results.collect import collect
from diag.studies.compare import compare as compared
from diag.studies.compare import screen

OPTIONS: dict[str, Any] = {"limit": 3}


@pytest.fixture(scope="module")
def runs() -> list[diag.Probe]:
    return [diag.probe(f"demo:vit-p{patch}", "demo", **OPTIONS) for patch in (16, 8)]


def test_runs_in_memory_compare_as_their_folders(runs: list[diag.Probe], tmp_path: Path) -> None:
    found = diag.compare(*runs)
    assert found.labels == ["demo:vit-p16", "demo:vit-p8"]
    assert repr(found) == "Comparison(demo:vit-p16; demo:vit-p8)"
    assert str(found) == screen(found)
    assert found.differences["paired"].all()
    bias = found.differences.set_index("quantity").loc["bias", "difference"]
    means = [run.layers.query("metric == 'cos_y_vself'")["mean"].mean() for run in runs]
    assert bias == pytest.approx(means[1] - means[0])
    folders = [run.save(tmp_path / name) for run, name in zip(runs, "ab", strict=True)]
    of_folders = compared(collect(folders))
    for name in ("profiles", "differences"):
        pd.testing.assert_frame_equal(getattr(found, name), getattr(of_folders, name), check_exact=True)
    mixed = diag.compare(str(folders[0]), runs[1])
    pd.testing.assert_frame_equal(mixed.differences, found.differences, check_exact=True)


def encoder(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def test_modules_are_paired_where_their_batches_are_the_same() -> None:
    batches = [torch.randn(2, 6, 16), torch.randn(1, 6, 16)]
    one, other = (diag.probe(encoder(i), batches, name=f"seed-{i}") for i in range(2))
    third = diag.probe(encoder(1), [batches[0] + 1, batches[1]], name="seed-1")
    assert diag.compare(one, other).differences["paired"].all()
    assert not diag.compare(one, third).differences["paired"].any()
    assert diag.compare(one, other).labels == ["seed-0", "seed-1"]


def test_texts_are_paired_where_they_are_cut_alike() -> None:
    text = ["def f(x): return x " * 40]
    plain, same, longer = (
        diag.probe("demo:lm", text, seq_len=length, metrics=["cos_y_vself"], name=name)
        for length, name in ((12, "a"), (12, "b"), (16, "c"))
    )
    assert diag.compare(plain, same).differences["paired"].all()
    assert not diag.compare(plain, longer).differences["paired"].any()


def test_a_report_of_runs_in_memory(runs: list[diag.Probe], tmp_path: Path) -> None:
    folder = runs[1].save(tmp_path / "run")
    found = diag.report(runs[0], folder, path=tmp_path / "page.html")
    assert (found.path, found.lines) == (tmp_path / "page.html", 2)
    assert "demo:vit-p16" in found.path.read_text(encoding="utf-8")
    with pytest.raises(UserError, match="exists and was not made by attnbias report"):
        diag.report(runs[0], path=folder / "layers.csv")


def test_a_sweep_is_that_of_the_command_line(
    attnbias: Callable[..., Any], undrawn: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"images": "demo", "scopes": "one", "layers": [0, 2], "limit": 2}
    found = diag.intervene("demo:vit-p16", "xsa", folder=tmp_path / "sweep", **options)
    assert set(found.sensitivity["layer"]) == {0, 2}
    told = attnbias(
        *("intervene", "-m", "demo:vit-p16", "--images", "demo", "--scope", "one", "--layers", "0,2"),
        *("--limit", "2", "-o", "other"),
    )
    assert told.code == 0
    ours, theirs = (pd.read_csv(tmp_path / name / "sensitivity.csv") for name in ("sweep", "other"))
    pd.testing.assert_frame_equal(ours, theirs)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "no run was given"),
        ([3], "a int is given where a run is due"),
        (["nowhere"], "'nowhere' is not a"),
    ],
)
def test_what_is_no_run_is_told(given: list[Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        diag.compare(*given)
    assert str(error.value).startswith(told)
    assert error.value.tip
