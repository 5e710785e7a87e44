"""Arguments of open_clip_train: files of them, and what is refused before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import yaml
from clip_runs import CONFIG, TINY, arguments, save_data

from diag.errors import UserError
from diag.studies.train.clip_arguments import known_flags, open_clip_train, read_arguments

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("clip-cc12m-*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    open_clip_train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(open_clip.factory._MODEL_CONFIGS, TINY, CONFIG)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_data(tmp_path_factory.mktemp("pairs"))


def config(folder: Path, **settings: object) -> Path:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({key.replace("_", "-"): value for key, value in settings.items()}))
    return file


# --- files


def test_a_file_holds_flags_and_the_command_line_goes_over_them(data: Path, tmp_path: Path) -> None:
    file = config(
        tmp_path,
        epochs=3,
        lr=0.01,
        local_loss=True,
        torchcompile=False,
        cache_dir=None,
        image_mean=[0.1, 0.2, 0.3],
        aug_cfg={"scale": "(0.5, 1.0)"},
    )
    argv, given = read_arguments(arguments(data, tmp_path, "run", "--epochs", "2"), file, "sa")
    assert (given.epochs, given.lr, given.local_loss, given.torchcompile) == (2, 1e-3, True, False)
    assert given.image_mean == [0.1, 0.2, 0.3]
    assert given.aug_cfg == {"scale": (0.5, 1.0)}
    assert "--cache-dir" not in argv


@pytest.mark.parametrize(
    ("processes", "more", "each"), [(1, (), 32), (4, (), 8), (4, ("--accum-freq", "2"), 4)]
)
def test_the_whole_batch_is_divided(
    processes: int,
    more: tuple[str, ...],
    each: int,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    file = config(tmp_path, global_batch_size=32)
    given = [word for word in arguments(data, tmp_path, "run", *more) if word not in ("--batch-size", "16")]
    assert read_arguments(given, file, "sa")[1].batch_size == each
    assert read_arguments([*given, "--batch-size=5"], file, "sa")[1].batch_size == 5
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(UserError, match="cannot be divided by 5 processes"):
        read_arguments([*given, "--workers", "0"], file, "sa")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epoch: 3", "has no flag 'epoch'"),
        ("- epochs", "holds no flags"),
        ("epochs: [", "line 1: expected the node content"),
        ("epochs: many", "invalid int value: 'many'"),
    ],
)
def test_a_file_that_says_something_else(text: str, said: str, tmp_path: Path) -> None:
    (file := tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        read_arguments([], file, "sa")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read flags .*: No such file"):
        read_arguments([], tmp_path / "run.yaml", "sa")


def test_the_shipped_files_differ_in_the_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = {file.stem: yaml.safe_load(file.read_text()) for file in CONFIGS}
    models = {name: settings.pop("model") for name, settings in read.items()}
    assert models == {f"clip-cc12m-b{size}": f"ViT-B-{size}" for size in (14, 16, 32)}
    first, *others = read.values()
    assert all(other == first for other in others)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.chdir(tmp_path)
    for file, model in zip(CONFIGS, models.values(), strict=True):
        with pytest.raises(
            UserError, match=r"2176 of 2176 shards are not there: cc12m/cc12m-train-0000\.tar"
        ):
            read_arguments([], file, "xsa")
        assert open_clip.get_model_config(model) is not None
        argv, given = read_arguments(["--dataset-type", "synthetic", "--train-data="], file, "xsa:0-5")
        assert (given.model, given.batch_size, given.name) == (model, 256, f"{model}-xsa-0-5-seed0")
        assert argv[-1] == given.name


# --- what is refused


@pytest.mark.parametrize(
    ("more", "said", "tip"),
    [
        (("--train-dota", "x"), "unrecognized arguments: --train-dota", "'--train-data'"),
        (("--epochs", "x"), "argument --epochs: invalid int value", "--help"),
        (("--model", "ViT-B-15"), "no model 'ViT-B-15'", "'ViT-B-16'"),
        (("--train-data", "no/{0000..0005}.tar"), "6 of 6 shards are not there: no/0000.tar", "in quotes"),
        (("--train-data", "no.csv"), "'no.csv' does not exist", "CSV"),
        (("--val-data", "no/0.tar", "--val-num-samples", "3"), "--val-data: 1 of 1 shards", "in quotes"),
        (("--workers", "3"), "2 shards are too few for 3 readers", "--dataset-resampled"),
        (("--imagenet-val", "no"), "has 0 class folders, ImageNet has 1000", "WordNet"),
        (("--resume", "no.pt"), "--resume 'no.pt' does not exist", "latest"),
    ],
)
def test_what_would_be_found_out_late(
    more: tuple[str, ...], said: str, tip: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        read_arguments(arguments(data, tmp_path, "run", *more), None, "sa")
    assert said in str(refused.value)
    assert tip in str(refused.value.tip)
    assert not (tmp_path / "run").exists()


# open_clip_train leaves the file that it reads to the garbage collector
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io:pytest.PytestUnraisableExceptionWarning")
def test_no_number_of_samples(data: Path, tmp_path: Path) -> None:
    given = ["--model", TINY, "--workers", "1", "--train-data", f"{data}/{{0000..0001}}.tar"]
    with pytest.raises(UserError, match="number of training samples is not known"):
        read_arguments(given, None, "sa")
    (folder := tmp_path / "counted").mkdir()
    for shard in ("0000.tar", "0001.tar"):
        (folder / shard).symlink_to(data / shard)
    (folder / "sizes.json").write_text('{"0000.tar": 16, "0001.tar": 16}')
    read_arguments([*given[:-1], f"{folder}/{{0000..0001}}.tar"], None, "sa")


def test_nothing_to_do() -> None:
    with pytest.raises(UserError, match="nothing to train or evaluate on"):
        read_arguments(["--model", TINY], None, "sa")


def test_several_sources_and_urls_are_left_to_open_clip(data: Path, tmp_path: Path) -> None:
    both = f"{data}/0000.tar::{data}/0001.tar"
    read_arguments(arguments(data, tmp_path, "run", "--train-data", both, "--dataset-resampled"), None, "sa")
    read_arguments(arguments(data, tmp_path, "run", "--train-data", "pipe:cat {0..5}.tar"), None, "sa")
    with pytest.raises(UserError, match="1 of 2 shards"):
        read_arguments(
            arguments(data, tmp_path, "run", "--train-data", f"{data}/0000.tar::no.tar"), None, "sa"
        )


def test_a_run_that_exists(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    given = arguments(data, tmp_path, "run")
    read_arguments(given, None, "sa")
    (tmp_path / "run" / "out.log").touch()
    with pytest.raises(UserError, match="exists") as refused:
        read_arguments(given, None, "sa")
    assert "--resume latest" in str(refused.value.tip)
    read_arguments([*given, "--resume", "latest"], None, "sa")
    (tmp_path / "run" / "out-3").touch()
    read_arguments([*given, "--log-local"], None, "sa")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError, match="exists"):
        read_arguments([*given, "--log-local"], None, "sa")


def test_names_are_the_same_in_every_process(data: Path, tmp_path: Path) -> None:
    given = arguments(data, tmp_path, "run")
    del given[given.index("--name") :]
    for label, name in (("gated_xsa=sigmoid:0,1", "gated_xsa-sigmoid-0-1"), ("sa", "sa")):
        assert read_arguments([*given, "--seed", "4"], None, label)[1].name == f"{TINY}-{name}-seed4"
    assert read_arguments(["--model", TINY, "--imagenet-v2", "x"], None, "sa")[1].name is None


def test_flags_are_read_from_the_program() -> None:
    assert {"--train-data", "--imagenet-val", "--local-loss"} <= set(known_flags())
