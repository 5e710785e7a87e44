"""CLIP training with changed attention, end to end: tiny shards, a tiny model, open_clip_train's own loop."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from clip_runs import CHANGED, CONFIG, ON_CPU, TINY, arguments, save_data
from commands import run_cli
from open_clip_train import main as open_clip_main
from open_clip_train import zero_shot

from diag.errors import UserError
from diag.models.checkpoint import read_variants
from diag.models.families.open_clip import open_clip_configs
from diag.studies.train.clip import train_clip
from diag.studies.train.clip_log import DivergedError, LossWatch
from diag.variants import variants_in

ROOT = Path(__file__).parents[3]

pytestmark = [
    # webdataset leaves the shards that it stops reading to the garbage collector
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <_io:pytest.PytestUnraisableExceptionWarning"),
    # open_clip_train pins what it reads from a CSV file, wherever it runs
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(open_clip.factory._MODEL_CONFIGS, TINY, CONFIG)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_data(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two runs, `sa` and `xsa`. Only to be read."""
    logs = tmp_path_factory.mktemp("logs")
    for name in ("sa", "xsa"):
        train_clip(arguments(data, logs, name, *validation(data)), attention=name)
    return logs


def validation(data: Path) -> tuple[str, ...]:
    return (
        "--val-data",
        str(data / "pairs.csv"),
        "--dataset-type",
        "csv",
        "--train-data",
        str(data / "pairs.csv"),
    )


def checkpoint(logs: Path, name: str, epoch: int = 1) -> Path:
    return logs / name / "checkpoints" / f"epoch_{epoch}.pt"


def weights(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["state_dict"]


def results(logs: Path, name: str) -> list[dict[str, float]]:
    lines = (logs / name / "checkpoints" / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in one if name in other and not torch.equal(one[name], other[name])]


# --- what is trained


@pytest.mark.parametrize("attention", ["sa", "xsa"])
def test_shards_are_trained_on_and_the_checkpoint_says_how(
    attention: str, data: Path, tmp_path: Path
) -> None:
    ended = run_cli("train-clip", "--attention", attention, "--", *arguments(data, tmp_path, "run"))
    assert ended.code == 0, ended.err
    assert "Train Epoch: 0 [32/32 (100%)]" in ended.err
    assert read_variants(checkpoint(tmp_path, "run")) == (CHANGED if attention == "xsa" else {})
    assert f"visual attention is {attention}" in (tmp_path / "run" / "out.log").read_text()


def test_the_baseline_is_what_open_clip_trains(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CSV file, whose order open_clip_train seeds; xsa, the negative control, ends elsewhere."""
    given = partial(arguments, data, tmp_path, shards=False)
    with monkeypatch.context() as quiet:
        quiet.setattr(open_clip_main, "setup_logging", lambda *given: None)
        open_clip_main.main(given("plain"))
    train_clip(given("sa"))
    train_clip(given("xsa"), attention="xsa")
    plain = weights(checkpoint(tmp_path, "plain"))
    assert not differing(plain, weights(checkpoint(tmp_path, "sa")))
    assert differing(plain, weights(checkpoint(tmp_path, "xsa")))


STILL = ("--lr", "0", "--dataset-type", "webdataset")
"""With a rate of 0 the weights at the end are those at the start."""


@pytest.fixture(scope="module")
def still(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """The baseline's first weights, and those of another seed."""
    logs = tmp_path_factory.mktemp("still")
    train_clip(arguments(data, logs, "sa", *STILL))
    train_clip(arguments(data, logs, "seed", *STILL, "--seed", "1"))
    return {name: weights(checkpoint(logs, name)) for name in ("sa", "seed")}


@pytest.mark.parametrize("attention", ["xsa", "gated_xsa", "gated=headwise", "random_direction"])
def test_variants_start_from_the_same_weights(
    attention: str, data: Path, still: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    train_clip(arguments(data, tmp_path, "other", *STILL), attention=attention, text_attention="xsa:1")
    plain, other = still["sa"], weights(checkpoint(tmp_path, "other"))
    assert not differing(plain, other)
    assert plain.keys() <= other.keys()
    own = {name for name in other if ".change." in name}
    assert other.keys() - plain.keys() == own
    assert bool(own) == (attention != "xsa")
    assert differing(plain, still["seed"])


def test_both_towers_can_be_changed(data: Path, tmp_path: Path) -> None:
    train_clip(arguments(data, tmp_path, "both"), attention="xsa:1", text_attention="gated_xsa=sigmoid")
    assert read_variants(checkpoint(tmp_path, "both")) == {
        "visual.transformer.resblocks.1.attn": "xsa",
        "transformer.resblocks.0.attn": "gated_xsa=sigmoid",
        "transformer.resblocks.1.attn": "gated_xsa=sigmoid",
    }


def test_attention_is_changed_before_the_model_is_compiled(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as torch.compile does, but run without a compiler, which takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    train_clip(arguments(data, tmp_path, "run", "--torchcompile"), attention="xsa")
    assert read_variants(checkpoint(tmp_path, "run")) == CHANGED
    assert weights(checkpoint(tmp_path, "run")).keys() == open_clip.create_model(TINY).state_dict().keys()


def test_a_teacher_is_left_as_it_is(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, models = open_clip_main.create_model_and_transforms, []

    def recorded(*given: Any, **settings: Any) -> Any:
        models.append(create(*given, **settings))
        return models[-1]

    monkeypatch.setattr(open_clip_main, "create_model_and_transforms", recorded)
    teacher = ("--distill-model", TINY, "--distill-pretrained", str(checkpoint(trained, "sa")))
    train_clip(arguments(data, tmp_path, "run", *teacher), attention="xsa")
    assert [variants_in(model) for model, *_ in models] == [CHANGED, {}]
    assert open_clip_main.create_model_and_transforms is recorded  # nothing stays wrapped


# --- its checkpoints


def test_open_clip_itself_loads_a_checkpoint(trained: Path) -> None:
    file = checkpoint(trained, "xsa")
    theirs = open_clip.create_model(TINY, pretrained=str(file)).state_dict()
    assert theirs.keys() == weights(checkpoint(trained, "sa")).keys()
    assert not differing(theirs, weights(file))


def test_a_checkpoint_is_probed_as_it_was_trained(
    trained: Path, tmp_path: Path, noise: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(open_clip_configs(), TINY, tmp_path / f"{TINY}.json")
    (tmp_path / f"{TINY}.json").write_text(json.dumps(CONFIG))
    tables = {}
    for name in ("sa", "xsa"):
        given = ("-m", f"open_clip:{TINY}", "--checkpoint", checkpoint(trained, name), "--images", noise)
        ended = run_cli("probe", *given, "--limit", 4, "-o", tmp_path / name)
        assert ended.code == 0, ended.err
        notes = str(json.loads((tmp_path / name / "manifest.json").read_text()))
        assert ("trained with xsa in 2 modules" in notes) == (name == "xsa")
        tables[name] = ended.out
    assert tables["sa"] != tables["xsa"]


def test_a_run_is_resumed_with_its_own_attention_only(data: Path, tmp_path: Path) -> None:
    train_clip(arguments(data, tmp_path, "run"), attention="xsa")
    again = arguments(data, tmp_path, "run", "--resume", "latest", "--epochs", "2")
    for attention in ("sa", "gated_xsa", "xsa:0"):
        with pytest.raises(UserError, match="was trained with xsa in 2 modules, this run has") as refused:
            train_clip(again, attention=attention)
        assert "--attention" in str(refused.value.tip)
    assert not checkpoint(tmp_path, "run", 2).exists()
    train_clip(again, attention="xsa")
    assert read_variants(checkpoint(tmp_path, "run", 2)) == CHANGED
    log = (tmp_path / "run" / "out.log").read_text()
    assert "resuming checkpoint" in log
    assert "Start epoch 1" in log


def test_an_older_checkpoint_is_compared_too(data: Path, trained: Path, tmp_path: Path) -> None:
    given = arguments(data, tmp_path, "run", "--resume", str(checkpoint(trained, "sa")))
    with pytest.raises(UserError, match="was trained with sa attention, this run has xsa in 2 modules"):
        train_clip(given, attention="xsa")


def test_a_checkpoint_is_evaluated_as_it_was_trained(data: Path, trained: Path, tmp_path: Path) -> None:
    """The validation loss that was logged while training comes again; under other attention it would not."""
    given = [
        "--model",
        TINY,
        "--pretrained",
        str(checkpoint(trained, "xsa")),
        "--val-data",
        str(data / "pairs.csv"),
    ]
    given += ["--device", "cpu", "--precision", "fp32", "--workers", "0", "--batch-size", "16"]
    train_clip([*given, "--logs", str(tmp_path), "--name", "eval"], attention="xsa")
    (then,), (now,) = results(trained, "xsa"), results(tmp_path, "eval")
    assert now["clip_val_loss"] == pytest.approx(then["clip_val_loss"], abs=1e-6)
    with pytest.raises(UserError, match="was trained with xsa"):
        train_clip([*given, "--logs", str(tmp_path), "--name", "other"])


def test_plain_weights_may_be_retrofitted(data: Path, trained: Path, tmp_path: Path) -> None:
    train_clip(
        arguments(data, tmp_path, "run", "--pretrained", str(checkpoint(trained, "sa"))), attention="xsa"
    )
    assert read_variants(checkpoint(tmp_path, "run")) == CHANGED


def test_zero_shot_accuracy_is_open_clips_own(
    data: Path, noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two classes instead of a thousand; a folder with other classes is refused."""
    for number, file in enumerate(sorted(noise.glob("*.png"))[:4]):
        (folder := tmp_path / "val" / f"n{number % 2}").mkdir(parents=True, exist_ok=True)
        (folder / file.name).write_bytes(file.read_bytes())
    given = arguments(data, tmp_path, "run", "--imagenet-val", str(tmp_path / "val"))
    with pytest.raises(UserError, match="has 2 class folders, ImageNet has 1000"):
        train_clip(given)
    monkeypatch.setattr(zero_shot, "IMAGENET_CLASSNAMES", ["cat", "dog"])
    monkeypatch.setattr(zero_shot, "accuracy", lambda output, target, topk: [float(len(target)), 0.0])
    train_clip(given, attention="xsa")
    (row,) = results(tmp_path, "run")
    assert row["imagenet-zeroshot-val-top1"] == 1.0


# --- what open_clip_train would not refuse


def test_a_loss_of_nan_ends_the_run(data: Path, tmp_path: Path) -> None:
    wild = arguments(data, tmp_path, "run", "--lr", "1e10", "--epochs", "20")
    ended = run_cli("train-clip", "--", *wild)
    assert ended.code == 1
    assert "error: the loss is no finite number any more (Train Epoch: " in ended.err
    assert ended.lines[-1].startswith("tip: lower --lr")
    assert not checkpoint(tmp_path, "run", 20).exists()


def line(loss: str) -> logging.LogRecord:
    text = f"Train Epoch: 3 [32/64 (50%)] Data (t): 0.1 Contrastive_loss: 9.9 (9.9) Loss: {loss} (nan)"
    return logging.makeLogRecord({"msg": text})


def test_one_batch_that_overflows_does_not() -> None:
    watch = LossWatch()
    for loss in ("2.81", "nan", "2.8", "inf"):
        watch.emit(line(loss))
        watch.emit(logging.makeLogRecord({"msg": "Start epoch 3"}))
    with pytest.raises(DivergedError, match=r"Train Epoch: 3 \[32/64 \(50%\)\]: inf"):
        watch.finish()
    watch.emit(line("2.8"))
    watch.finish()
    watch.emit(line("nan"))
    with pytest.raises(DivergedError, match="-inf"):
        watch.emit(line("-inf"))


def test_a_refusal_of_open_clip_train_is_an_error(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_clip_main, "main", lambda argv: -1)
    with pytest.raises(UserError, match="open_clip_train refused"):
        train_clip(arguments(data, tmp_path, "run"))


def test_a_tower_without_attention_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision = CONFIG["vision_cfg"] | {"layers": [1, 1, 1, 1], "width": 8}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, TINY, CONFIG | {"vision_cfg": vision})
    with pytest.raises(UserError, match="ModifiedResNet has no attention"):
        train_clip(arguments(data, tmp_path, "run"), attention="xsa")


def test_logging_is_left_as_it_was(data: Path, tmp_path: Path) -> None:
    logger = logging.getLogger("attnbias-test")
    before = (list(logging.root.handlers), logging.root.level, logger.level)
    train_clip(arguments(data, tmp_path, "run", "--debug"))
    assert (list(logging.root.handlers), logging.root.level, logger.level) == before


# --- many processes


DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a process per GPU needs two GPUs"),
        ],
    ),
]


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@pytest.mark.parametrize("device", DEVICES)
def test_two_processes_train_one_model(device: str, data: Path, tmp_path: Path) -> None:
    runner = tmp_path / "runner.py"
    runner.write_text(ON_CPU)
    given = arguments(data, tmp_path, "run", "--local-loss", "--gather-with-grad", "--device", device)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-addr", "127.0.0.1", "--master-port", str(free_port())),
            *(runner, data / f"{TINY}.json", "train-clip", "--attention", "xsa", "--", *given),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "total 2" in (tmp_path / "run" / "out.log").read_text()
    file = checkpoint(tmp_path, "run")
    assert next(iter(weights(file))).startswith("module.")
    assert read_variants(file) == CHANGED
    again = arguments(data, tmp_path, "run", "--resume", "latest", "--epochs", "2")
    train_clip(again, attention="xsa")  # one process goes on where two have begun
    assert read_variants(checkpoint(tmp_path, "run", 2)) == CHANGED
