"""`attnbias` as it is typed: what it prints where, what it writes, and how it ends."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from checkpoints import save_language_model
from commands import Ended
from safetensors.torch import load_file

import diag
from diag import cli
from diag.metrics.catalogue import RATIOS
from diag.metrics.default import METRICS
from diag.metrics.divergence import DIVERGENCE_METRICS
from diag.metrics.names import GROUPS
from diag.metrics.pattern_shape import SHAPE_METRICS
from diag.metrics.sink_events import SINK_METRICS
from diag.metrics.stream import STREAM_METRICS

Attnbias = Callable[..., Ended]

VIT = ("probe", "-m", "demo:vit-p16")
LM = ("probe", "-m", "demo:lm", "--texts", __file__, "--seq-len", 16)
FAST = ("--metrics", "cos_y_vself")

KEYS = ["model", "tower", "layer", "module", "tokens", "metric"]
STATISTICS = ["mean", "std", "ci_low", "ci_high", "n"]
CONSTANTS = ["n_tokens", "patch_size", "image_size", "positions", "patch_embedding", "weights", "inputs"]
CONSTANTS += ["attn_scope", "first_token"]
CONSTANTS += ["projection", "value_from", "row_sum", "mixer"]
CONSTANTS += ["values", "intervention", "dtype", "seed"]


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("not to be called")


def strict(text: str) -> Any:
    """JSON without NaN, which other languages do not read."""

    def not_json(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=not_json)


# --- the run folder


def test_the_folder_holds_what_was_promised(finished: tuple[Path, Ended]) -> None:
    folder, _ = finished
    top = {"layers.csv", "heads.parquet", "samples.parquet", "manifest.json", "plan.json", "figures"}
    assert set(os.listdir(folder)) == top
    assert not list(folder.rglob("*.tmp"))
    figures = {file.name for file in (folder / "figures").iterdir()}
    stems = {
        f"{kind}-demo-vit-p16-vision-{tokens}" for kind in ("curves", "heads") for tokens in ("patch", "cls")
    }
    assert figures == {f"{stem}.{suffix}" for stem in stems for suffix in ("pdf", "png", "csv")}
    assert (folder / "figures" / "curves-demo-vit-p16-vision-patch.pdf").read_bytes().startswith(b"%PDF")


def test_the_columns_of_the_tables(finished: tuple[Path, Ended]) -> None:
    folder, _ = finished
    layers = pd.read_csv(folder / "layers.csv")
    heads = pd.read_parquet(folder / "heads.parquet")
    samples = pd.read_parquet(folder / "samples.parquet")
    assert list(layers) == [*KEYS, *STATISTICS, *CONSTANTS]
    assert list(heads) == [*KEYS[:4], "head", *KEYS[4:], *STATISTICS, *CONSTANTS]
    assert {*KEYS, "head", "input", "input_index", "value", *CONSTANTS} <= set(samples)
    metrics, sets = {*METRICS, *RATIOS}, {"patch", "cls"}
    for table in (layers, heads, samples):
        assert set(table["metric"]) == metrics
        assert set(table["tokens"]) == sets
        assert set(table["layer"]) == set(range(6))
    assert len(layers) == len(metrics) * 2 * 6
    assert len(heads) == 3 * len(layers)
    assert len(samples) == 4 * len(heads)
    constants = layers.iloc[0]
    assert constants[["n_tokens", "patch_size", "image_size", "seed"]].tolist() == [17, 16, 64, 3]
    assert constants[["values", "intervention", "dtype"]].tolist() == ["as_computed", "none", "float32"]


def test_the_tables_follow_from_the_samples(finished: tuple[Path, Ended]) -> None:
    folder, _ = finished
    layers = pd.read_csv(folder / "layers.csv").set_index(["layer", "tokens", "metric"])
    samples = pd.read_parquet(folder / "samples.parquet")
    by = ["layer", "tokens", "metric", "input"]
    within = samples.groupby(by, observed=True)["value"].mean()
    for place in [(0, "patch", "cos_y_vself"), (5, "cls", "entropy"), (3, "patch", "value_similarity")]:
        np.testing.assert_allclose(layers.loc[place, "mean"], within[place].mean(), rtol=1e-8)
        np.testing.assert_allclose(layers.loc[place, "std"], within[place].std(ddof=1), rtol=1e-8)
        assert layers.loc[place, "ci_low"] < layers.loc[place, "mean"] < layers.loc[place, "ci_high"]
    ratio = within[2, "patch", "excess"].mean() / within[2, "patch", "cos_y_vself"].mean()
    specific = layers.loc[(2, "patch", "self_specific_fraction"), "mean"]
    np.testing.assert_allclose(specific, ratio, rtol=1e-8)


def test_the_manifest_says_what_was_done_and_is_written_last(finished: tuple[Path, Ended]) -> None:
    folder, _ = finished
    told = strict((folder / "manifest.json").read_text())
    assert told["status"] == "complete"
    assert told["command"].startswith("attnbias probe -m demo:vit-p16 --images demo --limit 4")
    assert told["plan"]["tokens"] == ["patch", "cls"]
    assert (told["plan"]["seed"], told["plan"]["dtype"], told["device"]) == (3, "float32", "cpu")
    assert told["inputs"]["vision"]["source"] == "demo"
    assert told["inputs"]["vision"]["count"] == 14
    assert len(told["inputs"]["vision"]["sha256"]) == 64
    (model,) = told["models"]
    assert (model["given"], model["resolved"], model["family"]) == ("demo:vit-p16", "demo:vit-p16", "demo")
    assert (model["tower"], model["layers"], model["inputs"]) == ("vision", 6, 4)
    assert len(model["weights_sha256"]) == 64
    assert "revision" in model
    assert model["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert told["environment"]["packages"]["torch"]
    assert told["seconds"] > 0
    assert told["started"].endswith("Z")
    assert (told["failed_models"], told["failed_inputs"]) == ({}, {})
    assert sorted(told["figures"]) == sorted(
        str(file.relative_to(folder)) for file in (folder / "figures").iterdir()
    )
    last = (folder / "manifest.json").stat().st_mtime_ns
    assert all(file.stat().st_mtime_ns <= last for file in folder.rglob("*") if file.is_file())


# --- what is printed where


def test_stdout_carries_the_table_and_stderr_the_rest(finished: tuple[Path, Ended]) -> None:
    folder, ended = finished
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "demo:vit-p16 · vision · patch tokens (T = 17) · n = 4 of demo ·"
    assert lines[1] == "  values as_computed"
    assert [line.split()[0] for line in lines[3:9]] == list("012345")
    first = pd.read_csv(folder / "layers.csv").iloc[0]
    assert lines[3].split()[1] == f"{first['mean']:.3f}"
    assert ended.lines == ["demo:vit-p16 → demo:vit-p16", f"run: {folder}"]


def test_json_is_one_document(attnbias: Attnbias) -> None:
    ended = attnbias(*LM, "--limit", 1, *FAST, "-o", "run", "--json")
    assert ended.code == 0
    found = strict(ended.out)
    assert set(found) == {"run", "manifest", "layers"}
    assert found["run"] == "run"
    assert found["manifest"] == strict(Path("run/manifest.json").read_text())
    table = pd.read_csv("run/layers.csv")
    assert [row["mean"] for row in found["layers"]] == pytest.approx(list(table["mean"]))
    assert {row["ci_low"] for row in found["layers"]} == {None}  # one input has no interval
    again = attnbias(*LM, "--limit", 1, *FAST, "-o", "run", "--json")
    assert again.out == ended.out


def test_quiet_prints_the_path_and_nothing_else(attnbias: Attnbias) -> None:
    ended = attnbias(*VIT, "--limit", 1, *FAST, "-o", "run", "-q")
    assert (ended.code, ended.out, ended.err) == (0, "run\n", "")


@pytest.mark.parametrize("flag", ["-o", "--output-path", "--output_path"])
def test_the_folder_can_be_spelt_three_ways(attnbias: Attnbias, flag: str) -> None:
    ended = attnbias(*VIT, "--limit", 1, *FAST, flag, "here")
    assert ended.code == 0
    assert Path("here/manifest.json").exists()
    assert ended.lines[-1] == "run: here"


def test_underscores_are_hyphens_in_every_option(attnbias: Attnbias) -> None:
    ended = attnbias(*VIT, "--batch_size", 2, "--random-init", "--dry_run")
    assert ended.code == 0


def test_without_a_folder_the_run_finds_its_own(attnbias: Attnbias) -> None:
    ended = attnbias(*VIT, "--limit", 1, *FAST, "-q")
    (folder,) = Path("runs").iterdir()
    assert ended.out == f"{folder}\n"
    assert folder.name.startswith("demo-vit-p16-")
    other = attnbias(*VIT, "--limit", 2, *FAST, "-q")
    assert other.out != ended.out
    assert attnbias(*VIT, "--limit", 1, *FAST, "-q", "--batch-size", 1).out == ended.out


def test_the_same_model_twice_is_one_model(attnbias: Attnbias) -> None:
    attnbias(*VIT, "-m", "demo:vit-p16", "--limit", 1, *FAST, "-o", "run")
    assert len(pd.read_csv("run/layers.csv")) == 6
    assert len(strict(Path("run/manifest.json").read_text())["models"]) == 1


# --- dry runs


def test_a_dry_run_writes_and_measures_nothing_and_predicts_memory(
    attnbias: Attnbias, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diag.run.run.load", refuse)
    monkeypatch.setattr("diag.measure.loop.measure", refuse)
    ended = attnbias(*VIT, "-m", "pythia-70m@step3000", "--limit", 7, "-o", "run", "--dry-run")
    assert (ended.code, ended.err) == (0, "")
    assert os.listdir() == []
    assert "model  demo:vit-p16 → demo:vit-p16" in ended.out
    assert "model  pythia-70m@step3000 → hf:EleutherAI/pythia-70m@step3000" in ended.out
    assert "input  vision: 14 images from 'demo', at most 7" in ended.out
    assert "memory demo:vit-p16 vision: " in ended.out
    assert "memory pythia-70m@step3000: not predicted: " in ended.out
    found = strict(attnbias(*VIT, "--images", "demo", "--dry-run", "--json").out)
    assert found["models"] == {"demo:vit-p16": "demo:vit-p16"}
    assert found["plan"]["images"] == "demo"


def test_a_dry_run_finds_the_mistakes_that_need_no_model(attnbias: Attnbias) -> None:
    for mistake in (("--metrics", "no"), ("--device", "cuda:77"), ("--images", "nowhere"), ("--limit", 0)):
        assert attnbias(*VIT, *mistake, "--dry-run").code == 2


# --- choosing


def test_layers_by_number_and_range(attnbias: Attnbias) -> None:
    assert attnbias(*VIT, "--limit", 1, *FAST, "-o", "run", "--layers", "-6,2-3,-3").code == 0
    table = pd.read_csv("run/layers.csv")
    assert list(table["layer"]) == [0, 2, 3]
    assert list(table["module"]) == ["blocks.0.attn", "blocks.2.attn", "blocks.3.attn"]


def test_layers_that_are_not_measured_are_named(attnbias: Attnbias) -> None:
    model = save_language_model(Path("hybrid"), "lfm2")
    given = ("probe", "-m", f"hf:{model}", "--texts", __file__, "--seq-len", 8, "--limit", 2, *FAST)
    ended = attnbias(*given, "--layers", "-2", "-o", "run")
    convolution = "no softmax attention (Lfm2ShortConv)"
    assert ended.code == 0, ended.err
    assert f"hf:hybrid: layers 0, 2: {convolution}" in ended.lines
    assert list(pd.read_csv("run/layers.csv")["layer"]) == [1]
    (entry,) = json.loads(Path("run/manifest.json").read_text())["models"]
    assert entry["layers"] == 3
    assert entry["skipped_layers"] == {"layers.0": convolution, "layers.2": convolution}
    assert entry["skipped_numbers"] == {"layers.0": 0, "layers.2": 2}
    assert attnbias("report", "run", "-o", "page.html").code == 0
    assert f"layers left out</dt><dd>layers 0, 2: {convolution}" in Path("page.html").read_text()
    refused = attnbias(*given, "--layers", "last", "-o", "other")
    assert refused.code == 2
    said = f"error: layer -1 is layer 2 ('layers.2'), which is not measured: {convolution}"
    assert refused.lines[-2:] == [said, "tip: layers that are measured: 1"]


def test_layers_that_pool_are_measured_and_told(attnbias: Attnbias) -> None:
    """By name: their rows are in the table, without what needs a value of one's own; compare says so, too."""
    sizes = {"depths": [1] * 4, "hidden_sizes": [16, 32, 40, 64], "num_attention_heads": [1, 2, 5, 8]}
    transformers.SegformerModel(transformers.SegformerConfig(**sizes)).save_pretrained("model")
    transformers.SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained("model")
    metrics = "cos_y_vself,entropy,attention_distance"
    given = ("-m", "hf:model", "--images", "demo", "--limit", 3, "--metrics", metrics)
    ended = attnbias("probe", *given, "-o", "run")
    assert ended.code == 0, ended.err
    assert "pooled keys or queries in layers 0-2: no v_i there" in ended.out
    table = pd.read_csv("run/layers.csv")
    assert table.groupby("layer")["value_from"].first().tolist() == ["pooled"] * 3 + ["own"]
    there = table.set_index(["metric", "layer"])["mean"].notna()
    assert there["cos_y_vself"].tolist() == [False] * 3 + [True]
    assert there["entropy"].all()
    assert there["attention_distance"].all()
    found = json.loads(Path("run/manifest.json").read_text())["models"][0]
    assert found["skipped_layers"] == {}
    assert [*found["meaning"]["values_from"].values()] == ["pooled"] * 3
    assert "In layers 0-2 keys are not the queries' own tokens" in attnbias("compare", "run", "-o", "c").err
    assert attnbias("report", "run", "-o", "report.html").code == 0


@pytest.mark.parametrize(("kind", "linear"), [("qwen3-next", [0, 2]), ("mamba", [0, 1]), ("rwkv", [0, 1])])
def test_layers_without_softmax_are_measured_and_told(
    attnbias: Attnbias, kind: str, linear: list[int]
) -> None:
    model = save_language_model(Path("model"), kind)
    given = ("-m", f"hf:{model}", "--texts", __file__, "--seq-len", 8, "--limit", 2)
    ended = attnbias("probe", *given, "--metrics", "cos_y_vself,entropy", "-o", "run")
    assert ended.code == 0, ended.err
    assert f"no softmax in layers {', '.join(map(str, linear)) if linear == [0, 2] else '0-1'}" in ended.out
    table = pd.read_csv("run/layers.csv")
    there = table[table["metric"] == "entropy"].set_index("layer")["mean"].notna()
    assert list(there.index[~there]) == linear
    assert table[table["metric"] == "cos_y_vself"]["mean"].notna().all()
    assert {*table[table["layer"].isin(linear)]["mixer"]} == {"linear"}
    assert table["mixer"].nunique() == (2 if linear == [0, 2] else 1)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("entropy", {"entropy"}),
        ("entropy,cos-y-vself, excess", {"entropy", "cos_y_vself", "excess"}),
        ("self_specific_fraction", {"self_specific_fraction", "excess", "cos_y_vself"}),
    ],
)
def test_metrics_by_name(attnbias: Attnbias, asked: str, found: set[str]) -> None:
    ended = attnbias(*VIT, "--limit", 2, "--metrics", asked, "-o", "run")
    assert ended.code == 0
    table = pd.read_csv("run/layers.csv")
    assert set(table["metric"]) == found
    assert table["mean"].notna().all()
    assert max(map(len, ended.out.splitlines())) <= 80


def test_token_sets_differ(attnbias: Attnbias) -> None:
    ended = attnbias(*VIT, "--limit", 2, *FAST, "--tokens", "patch,cls,all", "-o", "run")
    assert ended.code == 0
    table = pd.read_csv("run/layers.csv").pivot(index="layer", columns="tokens", values="mean")
    assert set(table) == {"patch", "cls", "all"}
    np.testing.assert_allclose((16 * table["patch"] + table["cls"]) / 17, table["all"], atol=1e-6)
    assert ended.out.count(" tokens (T = 17)") == 3


def test_activations_are_saved_for_the_first_inputs(attnbias: Attnbias) -> None:
    ended = attnbias(*LM, "--limit", 3, *FAST, "-o", "run", "--save-activations", 2)
    assert ended.code == 0
    files = sorted(Path("run/activations").rglob("*.safetensors"))
    assert len(files) == 2
    tensors = load_file(files[0])
    assert torch.allclose(
        tensors["layer.05.pattern"] @ tensors["layer.05.value"], tensors["layer.05.output"], atol=1e-5
    )


# --- interruptions

SLOWLY = """
import time
from diag import cli
from diag.run import finish
from diag.show import terminal

finish.draw = lambda *_: []
calls = []

def advance(self, inputs):
    calls.append(inputs)
    if len(calls) == 2:
        print("measuring the second shard", flush=True)
        time.sleep(60)

terminal.StderrListener.advance = advance
cli.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_that_can_be_resumed(attnbias: Attnbias, number: int, code: int) -> None:
    given = [*map(str, LM), *FAST, "--limit", "40", "--batch-size", "16", "-o", "run"]
    with subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(diag.__file__).parent.parent)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "measuring the second shard\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert out == ""
    assert err.splitlines()[-1] == "stopped after 1/3 shards; run the same command again to resume"
    assert "Traceback" not in err
    kept = sorted(file.name for file in Path("run/shards").iterdir() if file.name != ".lock")
    # what the tower is, and the one shard with what could not be read of it
    assert [Path(name).suffix for name in kept] == [".json", ".parquet", ".json"]
    assert attnbias(*given).code == 0
    assert attnbias(*given[:-1], "undisturbed").code == 0
    assert Path("run/layers.csv").read_bytes() == Path("undisturbed/layers.csv").read_bytes()
    pd.testing.assert_frame_equal(
        pd.read_parquet("run/samples.parquet"),
        pd.read_parquet("undisturbed/samples.parquet"),
        check_exact=True,
        check_categorical=False,
    )


def test_an_interruption_elsewhere_is_one_word(attnbias: Attnbias, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(query: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal should have come first")

    monkeypatch.setattr("diag.models.names.resolve.listing", stop)
    ended = attnbias("models")
    assert (ended.code, ended.err) == (143, "stopped\n")


# --- the smaller verbs


def test_env_is_what_a_bug_report_needs(attnbias: Attnbias) -> None:
    ended = attnbias("env")
    assert (ended.code, ended.err) == (0, "")
    told = dict(line.split(maxsplit=1) for line in ended.out.splitlines())
    assert told["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert told["threads"] == "1"
    assert told["devices"].startswith("cpu")
    found = strict(attnbias("env", "--json").out)
    assert found["packages"]["torch"] == told["torch"]
    assert found["devices"][0] == "cpu"


def test_models_are_listed_and_searched(attnbias: Attnbias) -> None:
    ended = attnbias("models")
    assert ended.code == 0
    heading, *lines = ended.out.splitlines()
    assert heading.split() == ["name", "resolves_to", "tokens", "licence", "note"]
    assert any(line.startswith("demo:vit-p16 ") for line in lines)
    found = strict(attnbias("models", "vit_small_patch16_224.dino", "--json").out)
    assert "timm:vit_small_patch16_224.dino" in {row["resolves_to"] for row in found}
    assert all("vit_small_patch16_224.dino" in row["resolves_to"] for row in found)


def test_a_model_without_patches_is_listed(attnbias: Attnbias) -> None:
    ended = attnbias("models", "RN50x64")  # a ResNet, whose configuration says that its patch size is null
    assert ended.code == 0
    assert any(line.startswith("RN50x64 ") for line in ended.out.splitlines())


def test_metrics_are_listed_with_their_definitions(attnbias: Attnbias) -> None:
    ended = attnbias("metrics")
    assert ended.code == 0
    heads = [line for line in ended.out.splitlines() if line and not line.startswith(" ")]
    groups = [line.removeprefix("--metrics ") for line in heads if line.startswith("--metrics ")]
    names = [line for line in heads if not line.startswith("--metrics ")]
    assert groups == list(GROUPS)
    assert names == [name for group in GROUPS.values() for name in group]
    assert {*METRICS, *RATIOS, *STREAM_METRICS, *SHAPE_METRICS, *SINK_METRICS, *DIVERGENCE_METRICS} <= {
        *names
    }
    assert max(map(len, ended.out.splitlines())) <= 80
    found = strict(attnbias("metrics", "--json").out)
    assert list(found) == names
    assert all(found.values())


def test_a_terminal_without_dashes_shows_what_it_can() -> None:
    screen = io.BytesIO()
    stdout = io.TextIOWrapper(screen, encoding="ascii")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "argv", ["attnbias", *VIT, "--dry-run"])
        patch.setattr(signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    stdout.flush()
    assert ended.value.code == 0
    assert screen.getvalue().startswith(b"model  demo:vit-p16 ? demo:vit-p16")


def test_version_and_help(attnbias: Attnbias) -> None:
    from diag.run.environment import version

    assert attnbias("--version") == Ended(0, f"{version()}\n", "")
    for arguments in ((), ("--help",), ("-h",)):
        ended = attnbias(*arguments)
        assert ended.code == 0
        assert "Usage: attnbias [OPTIONS] COMMAND" in ended.out
        assert {"probe", "models", "env", "metrics"} <= set(ended.out.split())
    ended = attnbias("probe", "--help")
    assert ended.code == 0
    assert "--output-path" in ended.out


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom diag import cli\nsys.argv = ['attnbias', 'probe', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    print(*sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(diag.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    loaded = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "typer" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "pandas", "matplotlib", "transformers", "timm", "PIL"})
