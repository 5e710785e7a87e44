"""What `diag.probe` hands out: kept and read again, in one line, and token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import diag
from diag.errors import UserError
from diag.results.collect import collect

TABLES = ("layers", "heads", "samples")
TEXTS = ["def f(x): return x " * 20]


def own() -> diag.Probe:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    return diag.probe(model, [torch.randn(3, 7, 16)], metrics=["cos_y_vself", "entropy", "row_sum"])


WAYS: dict[str, Callable[[], diag.Probe]] = {
    "a name": lambda: diag.probe("demo:vit-p16", "demo", limit=2, tokens=["patch", "cls"]),
    "texts": lambda: diag.probe("demo:lm", TEXTS, seq_len=12, metrics=["self_specific_fraction", "sinks"]),
    "a module": lambda: own(),
    "tokens": lambda: diag.probe("demo:lm", TEXTS, seq_len=12, metrics=["entropy"], per_token=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_saved_is_read_number_for_number(way: str, tmp_path: Path) -> None:
    run = WAYS[way]()
    folder = run.save(tmp_path / "run")
    found = diag.Probe.load(folder)
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(found, name), getattr(run, name), check_exact=True)
    for name in ("failed", "skipped", "meaning", "depths", "manifest"):
        assert getattr(found, name) == getattr(run, name)
    assert (found.tokens is None) == (run.tokens is None) == (way != "tokens")
    if run.tokens is not None:
        pd.testing.assert_frame_equal(found.tokens, run.tokens, check_exact=True)
    assert repr(found) == repr(run)
    collection = collect([folder])  # as a run folder of the command line
    assert not collection.problems
    assert not collection.notes
    again = run.save(folder)
    assert again == folder
    (folder / "layers.csv").write_text("changed")
    np.testing.assert_array_equal(diag.Probe.load(folder).layers["mean"], run.layers["mean"])


def test_a_run_of_the_command_line_is_read_too(attnbias: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    attnbias(
        "probe", "-m", "demo:vit-p16", "--images", "demo", "--limit", "2", "-o", folder, "--figures", "none"
    )
    found, run = diag.Probe.load(folder), diag.probe("demo:vit-p16", "demo", limit=2)
    columns = ["layer", "metric", "mean", "ci_low", "n"]
    pd.testing.assert_frame_equal(found.layers[columns], run.layers[columns], atol=1e-12)
    assert (found.depths, found.skipped, found.failed) == (run.depths, run.skipped, run.failed)


def test_a_folder_with_anything_else_is_left_alone(tmp_path: Path) -> None:
    run = own()
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no saved Probe"):
        run.save(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        run.save(tmp_path / "mine.txt")
    with pytest.raises(UserError, match="is not a finished run"):
        diag.Probe.load(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_one_line_says_what_it_is() -> None:
    assert repr(own()) == "Probe(TransformerEncoder module, all: 2 layers, 3 metrics, n = 3)"
    part = diag.probe("demo:vit-p16", "demo", limit=1, layers=2, metrics="entropy", tokens=["cls", "all"])
    assert repr(part) == "Probe(demo:vit-p16 vision, cls+all: 1 of 6 layers, 1 metric, n = 1)"
    (call,) = diag.capture("demo:lm", TEXTS, seq_len=12, limit=2, layers=1)
    name, size = call.module, f"{call.heads} heads × 12 tokens × {call.output.shape[-1]}"
    assert repr(call) == f"AttentionCall(layer 1 '{name}': 2 × {size}, causal, float32 on cpu)"


def test_tokens_average_to_what_their_input_has() -> None:
    options: dict[str, Any] = {"metrics": ["cos_y_vself", "entropy", "value_similarity"]}
    options |= {"tokens": ["patch", "cls"], "limit": 3, "batch_size": 2}
    run = diag.probe("demo:vit-p16", "demo", per_token=True, **options)
    assert run.tokens is not None
    assert set(run.tokens["metric"]) == {"cos_y_vself", "entropy"}  # the other is of all tokens together
    keys = ["layer", "tokens", "metric", "input", "head"]
    each = run.tokens.astype(dict.fromkeys(("tokens", "metric", "input"), str)).groupby(keys)["value"]
    wanted = run.samples.astype(dict.fromkeys(("tokens", "metric", "input"), str)).set_index(keys)["value"]
    found = each.mean()
    assert len(found) == len(wanted) * 2 // 3
    np.testing.assert_allclose(found, wanted.loc[found.index], atol=1e-6)
    places = run.tokens.groupby("tokens", observed=True)["token"].agg(["min", "max", "nunique"])
    assert places.loc["cls"].tolist() == [0, 0, 1]
    assert places.loc["patch"].tolist() == [1, 16, 16]
    plain = diag.probe("demo:vit-p16", "demo", **options)
    pd.testing.assert_frame_equal(plain.layers, run.layers, check_exact=True)
    call = diag.capture("demo:vit-p16", "demo", limit=3, layers=4)[0]
    theirs = diag.metrics_of(call, metrics="entropy", per="token")
    ours = run.tokens.query("layer == 4 and metric == 'entropy'").sort_values(["input", "head", "token"])
    number = {name: place for place, name in enumerate(run.samples["input"].unique())}
    ours = ours.assign(input=ours["input"].astype(str).map(number))
    ours = ours.set_index(["input", "head", "token"])["value"].sort_index()
    theirs = theirs.set_index(["input", "head", "token"])["value"].sort_index()
    np.testing.assert_allclose(ours, theirs.loc[ours.index], atol=1e-6)


class Halves(nn.Module):
    """Attention over each half of its tokens, in two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        def attended(x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

        return torch.cat([attended(half) for half in x.chunk(2, 1)], 1)


def test_tokens_of_windows_are_counted_on() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 10, 16)
    run = diag.probe(Halves().eval(), [x], metrics=["entropy"], per_token=True)
    assert run.tokens is not None
    for _, part in run.tokens.groupby(["input", "head"], observed=True):
        assert part["token"].tolist() == list(range(10))
