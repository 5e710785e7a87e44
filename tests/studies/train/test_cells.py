"""Cells: paired starts, the same data, resumed equals uninterrupted, rerun equals run."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from diag.errors import UserError
from diag.models import load
from diag.models.names.resolve import parse as parse_name
from diag.studies.train.cells import Cell, card_of, cells_of, train_cell
from diag.studies.train.fit import Training, optimiser_of, rate_at
from diag.studies.train.labelled import classes_of
from diag.studies.train.plan import Recipe, TrainPlan, read_plan
from diag.studies.train.tasks import task_of
from diag.variants import apply, parse

Once = Callable[[TrainPlan, Cell], Path]

CPU = torch.device("cpu")
RECIPE: dict[str, Any] = {"steps": 6, "batch_size": 4, "learning_rate": 1e-3, "warmup": 2, "held_out": 14}
VIT = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}
GPT2 = {"vocab_size": 300, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3}


def plan_of(task: str = "crops", **changes: Any) -> TrainPlan:
    given: dict[str, Any] = {
        "title": "t",
        "task": task,
        "seeds": (0,),
        "variants": ("sa", "xsa", "gated_xsa"),
    }
    given |= {"model": GPT2} if task == "language" else {"model": VIT, "patch_sizes": (16,)}
    given |= {"recipe": RECIPE, "monitor_every": 3}
    return TrainPlan(**{**given, **changes})


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labelled")
    for part in ("train", "validation"):
        for number, name in enumerate(("blue", "red", "yellow")):
            for place in range(4):
                file = root / part / name / f"{place}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40 + place, 36), (80 * number, 40 * place, 90)).save(file)
    return root


@pytest.fixture(params=["crops", "language", "images"])
def plan(request: pytest.FixtureRequest, labelled: Path) -> TrainPlan:
    data = {"train": str(labelled / "train"), "validation": str(labelled / "validation")}
    return plan_of(request.param, **(data if request.param == "images" else {}))


@pytest.fixture(scope="module")
def packed(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in two tars each, their classes in `.cls` members."""
    root = tmp_path_factory.mktemp("packed")
    for part in ("train", "validation"):
        for number in range(2):
            with tarfile.open(root / f"{part}-{number}.tar", "w") as tar:
                for file in sorted((labelled / part).rglob("*.png"))[number::2]:
                    stem = f"{file.parent.name}-{file.stem}"
                    for suffix, content in (("png", file.read_bytes()), ("cls", file.parent.name.encode())):
                        member = tarfile.TarInfo(f"{stem}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    return root


def trained(plan: TrainPlan, cell: Cell, folder: Path, **options: Any) -> dict[str, Any]:
    train_cell(plan, cell, task_of(plan), folder, device=CPU, **options)
    return card_of(folder)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """`once(plan, cell)` is the folder of a trained cell, which several tests read. Only to be read."""
    folders: dict[tuple[str, Cell], Path] = {}

    def folder_of(plan: TrainPlan, cell: Cell) -> Path:
        if (plan.key, cell) not in folders:
            folders[plan.key, cell] = tmp_path_factory.mktemp(cell.name)
            trained(plan, cell, folders[plan.key, cell])
        return folders[plan.key, cell]

    return folder_of


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_cell_can_be_run_again(plan: TrainPlan, once: Once, tmp_path: Path) -> None:
    cell = cells_of(plan)[2]
    folders = [once(plan, cell), tmp_path / "again"]
    cards = [card_of(folders[0]), trained(plan, cell, folders[1])]
    logs = [(folder / "log.csv").read_text() for folder in folders]
    assert logs[0] == logs[1]
    assert same(*map(weights, folders))
    assert cards[0]["sha256"] == cards[1]["sha256"] != cards[0]["initial_sha256"]
    other = trained(plan, Cell(cell.task, cell.patch_size, cell.variant, 1), tmp_path / "c")
    assert (tmp_path / "c" / "log.csv").read_text() != logs[0]
    assert other["initial_sha256"] != cards[0]["initial_sha256"]


def test_variants_start_from_the_same_weights_and_see_the_same_data(plan: TrainPlan, once: Once) -> None:
    folders = [once(plan, cell) for cell in cells_of(plan)]
    cards = [card_of(folder) for folder in folders]
    losses = [pd.read_csv(folder / "log.csv")["loss"] for folder in folders]
    assert len({card["initial_sha256"] for card in cards}) == 1
    assert losses[0][0] == losses[2][0]  # gated_xsa begins as the baseline,
    assert losses[0].iloc[-1] != losses[2].iloc[-1]  # and becomes something else
    assert losses[0][0] != losses[1][0]
    assert len({card["sha256"] for card in cards}) == 3
    assert cards[0]["parameters"] == cards[1]["parameters"] < cards[2]["parameters"]


class Stop(Exception):
    """Stands for a signal."""


def test_a_cell_stopped_before_its_card_repeats_nothing(
    plan: TrainPlan, once: Once, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint holds the last look; of a model that is half written nothing is left."""
    cell, aside = cells_of(plan)[2], tmp_path / "parts"

    def stop(task: object, model: object, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(type(task_of(plan)), "save", stop)
        with pytest.raises(Stop):
            trained(plan, cell, aside)
    assert sorted(path.name for path in aside.iterdir()) == ["checkpoint.pt"]
    trained(plan, cell, aside)
    for name in ("log.csv", "monitor.csv"):
        assert (aside / name).read_text() == (once(plan, cell) / name).read_text()


@pytest.mark.parametrize("stopped_at", [1, 3, 5])
def test_resumed_equals_uninterrupted(plan: TrainPlan, once: Once, tmp_path: Path, stopped_at: int) -> None:
    changed = {"checkpoint_every": 2, "ema": 0.9}
    plan = plan.model_copy(update={"recipe": Recipe(**{**RECIPE, **changed})})
    cell = cells_of(plan)[2]
    whole = once(plan, cell)
    steps = iter(range(stopped_at))

    def stop(done: int) -> None:
        if next(steps, None) is None:
            raise Stop

    with pytest.raises(Stop):
        trained(plan, cell, tmp_path / "parts", advance=stop)
    assert (tmp_path / "parts" / "checkpoint.pt").exists() == (stopped_at >= 2)
    torch.manual_seed(99)  # another process
    told: list[int] = []
    resumed = trained(plan, cell, tmp_path / "parts", advance=told.append)
    assert sum(told) == plan.recipe.steps
    assert told[0] == (stopped_at // 2 * 2 or 1)
    assert resumed["sha256"] == card_of(whole)["sha256"]
    for name in ("log.csv", "monitor.csv"):
        assert (tmp_path / "parts" / name).read_text() == (whole / name).read_text()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (None, ""),
        ([1], "list indices"),
        ({"generator": None}, "torch.ByteTensor"),
        ({"step": "3"}, "'step' is '3'"),
        ({"step": 7}, "'step' is 7"),
        ({"log": [1]}, "'log' or 'watched' is no list of rows"),
        ({"model": {"weight": torch.zeros(3)}}, "Error"),
        ({"optimiser": {}}, ""),
        ({"seconds": "x"}, "could not convert"),
    ],
)
def test_a_damaged_checkpoint_of_a_training_is_two_lines(tmp_path: Path, change: Any, told: str) -> None:
    file = tmp_path / "checkpoint.pt"
    training = Training(nn.Linear(2, 2), Recipe(**RECIPE), CPU)
    training.save(file)
    Training(nn.Linear(2, 2), Recipe(**RECIPE), CPU).resume(file)
    if change is None:
        file.write_bytes(file.read_bytes()[:300])
    else:
        whole = torch.load(file, weights_only=True)
        torch.save({**whole, **change} if isinstance(change, dict) else change, file)
    with pytest.raises(UserError, match=f"checkpoint '{file}' cannot be read: .*{told}") as caught:
        Training(nn.Linear(2, 2), Recipe(**RECIPE), CPU).resume(file)
    assert "\n" not in str(caught.value)
    assert str(caught.value.tip).startswith(f"rm '{file}', then run the same command again")


def test_a_finished_cell_is_left_alone(tmp_path: Path) -> None:
    plan = plan_of()
    cell = cells_of(plan)[0]
    trained(plan, cell, tmp_path)
    before = (tmp_path / "card.json").stat().st_mtime_ns
    trained(plan, cell, tmp_path)
    assert (tmp_path / "card.json").stat().st_mtime_ns == before


def test_watching_changes_nothing(plan: TrainPlan, once: Once, tmp_path: Path) -> None:
    cell = cells_of(plan)[1]
    blind = plan.model_copy(update={"monitor_every": 0})
    seen = once(plan, cell)
    assert card_of(seen)["sha256"] == trained(blind, cell, tmp_path)["sha256"]
    watched = pd.read_csv(seen / "monitor.csv")
    assert list(watched.columns) == ["step", "layer", "metric", "value"]
    assert sorted(watched["step"].unique()) == [0, 3, 6]
    assert len(watched) == 3 * 2 * 5


def test_workers_make_the_same_batches(once: Once, tmp_path: Path) -> None:
    plan = plan_of()
    cell = cells_of(plan)[0]
    assert card_of(once(plan, cell))["sha256"] == trained(plan, cell, tmp_path, workers=2)["sha256"]


def test_a_trained_cell_is_a_model_that_can_be_probed(plan: TrainPlan, once: Once) -> None:
    folder = once(plan, cells_of(plan)[2])
    card = card_of(folder)
    model = load(parse_name(str(folder / "model")), device="cpu", dtype=torch.float32)
    assert model.notes == ("trained with gated_xsa in 2 modules",)
    assert len(card["alphas"]) == 2
    assert ("accuracy" in card) == (plan.task != "language")
    assert card["loss"] > 0


def test_held_out_and_probed_data_are_the_same_every_time(plan: TrainPlan, tmp_path: Path) -> None:
    def content(folder: Path) -> list[bytes]:
        return [file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()]

    first, second = task_of(plan), task_of(plan)
    assert all(
        torch.equal(a, b) for a, b in zip(first.watched().values(), second.watched().values(), strict=True)
    )
    (kind,) = first.probed(tmp_path / "a")
    second.probed(tmp_path / "b")
    assert kind == ("texts" if plan.task == "language" else "images")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_tars_are_labelled_images(packed: Path, labelled: Path) -> None:
    both = {part: f"{packed}/{part}-{{0..1}}.tar" for part in ("train", "validation")}
    task: Any = task_of(plan_of("images", **both))
    assert task.classes == ("blue", "red", "yellow")
    loose: Any = task_of(
        plan_of("images", train=str(labelled / "train"), validation=str(labelled / "validation"))
    )

    def seen(task: Any) -> set[tuple[float, int]]:
        (batch,) = task.held_out()
        sums = batch["images"].double().sum((1, 2, 3)).tolist()
        return set(zip(sums, batch["labels"].tolist(), strict=True))

    assert len(seen(task)) == 12
    assert seen(task) == seen(loose)


def test_images_that_cannot_be_read_are_left_out_of_training(labelled: Path, tmp_path: Path) -> None:
    for part in ("train", "validation"):
        shutil.copytree(labelled / part, tmp_path / part)
        (tmp_path / part / "red" / "0.png").write_bytes(b"no image")
    task: Any = task_of(
        plan_of("images", train=str(tmp_path / "train"), validation=str(tmp_path / "validation"))
    )
    with pytest.warns(RuntimeWarning, match=r"red/0\.png is left out: cannot read image '0\.png'"):
        (batch,) = task.held_out()
    assert len(batch["images"]) == len(batch["labels"]) == 11
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(UserError, match="no image of a batch can be read; red/0"),
    ):
        task._read(task.training, [4], task.transforms[0])


def test_classes_that_cannot_be_read(labelled: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (
            ("a.png", (labelled / "train" / "red" / "0.png").read_bytes()),
            ("a.cls", b"\xff"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    given = plan_of("images", train=str(tmp_path / "a.tar"), validation=str(labelled / "validation"))
    with pytest.raises(UserError, match=r"cannot read the class 'a\.tar/a\.cls': 'utf-8' codec"):
        task_of(given)


def test_images_without_a_class(packed: Path, labelled: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "loose.png")
    with pytest.raises(UserError, match=r"image 'loose\.png' lies in no class folder"):
        task_of(plan_of("images", train=str(tmp_path), validation=str(labelled / "validation")))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "loose.png", "x.png")
    with pytest.raises(UserError, match=r"image 'a\.tar/x\.png' has no class"):
        task_of(plan_of("images", train=str(tmp_path / "a.tar"), validation=str(labelled / "validation")))
    with pytest.raises(UserError, match="has the class 'blue', which"):
        task_of(plan_of("images", train=_one_class(tmp_path), validation=str(labelled / "validation")))


def _one_class(root: Path) -> str:
    (root / "one" / "red").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(root / "one" / "red" / "a.png")
    return str(root / "one")


# --- the loop ------------------------------------------------------------------------------------------


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    recipe = Recipe(steps=100, batch_size=1, learning_rate=2.0, warmup=10)
    rates = [rate_at(recipe, step) for step in range(100)]
    assert rates[0] == 0.2
    assert rates[9] == 2.0
    assert max(rates) == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert 0 < rates[99] < 0.01


def test_only_matrices_decay_and_gates_learn_faster() -> None:
    model = task_of(plan_of()).build(16)
    apply(model, parse("gated_xsa"))
    groups = optimiser_of(model, Recipe(steps=1, batch_size=1, learning_rate=1.0)).param_groups
    assert [(g["weight_decay"], g["scale"]) for g in groups] == [(0.05, 1.0), (0.0, 1.0), (0.0, 10.0)]
    assert sum(p.numel() for p in groups[2]["params"]) == 2 * 3
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in model.parameters())


def test_the_first_update_is_adamw_by_hand(tmp_path: Path) -> None:
    """One weight, one step: m̂/√v̂ = sign(g) whatever the gradient's size."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    recipe = Recipe(steps=1, batch_size=1, learning_rate=0.1, warmup=0, weight_decay=0.5)
    training = Training(model, recipe, CPU)

    def batches() -> Iterator[dict[str, Tensor]]:
        yield {"x": torch.tensor([[3.0]])}

    training.run(batches(), lambda m, b: m(b["x"]).sum(), checkpoint=tmp_path / "c.pt")
    assert model.weight.item() == pytest.approx(1.0 * (1 - 0.1 * 0.5) - 0.1, abs=1e-6)
    assert training.log[0]["gradient_norm"] == pytest.approx(3.0)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    plan = plan_of(recipe={**RECIPE, "learning_rate": 1e30, "clip": 1e30})
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step"):
        trained(plan, cells_of(plan)[0], tmp_path)


# --- plans ---------------------------------------------------------------------------------------------


def test_cells_are_named_and_seeds_come_first() -> None:
    plan = plan_of(seeds=(0, 1), patch_sizes=(16, 8), variants=("sa", "gated_xsa=sigmoid:0-1"))
    assert [cell.name for cell in cells_of(plan)][:5] == [
        "p16-sa-s0",
        "p16-gated_xsa.sigmoid.0-1-s0",
        "p8-sa-s0",
        "p8-gated_xsa.sigmoid.0-1-s0",
        "p16-sa-s1",
    ]
    assert next(iter(cells_of(plan_of("language")))).name == "language-sa-s0"


def test_words_about_a_plan_do_not_change_its_key() -> None:
    assert plan_of().key == plan_of(about="something").key != plan_of(seeds=(1,)).key


def test_the_key_follows_ones_own_data(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not how their place is typed."""
    shutil.copytree(labelled, tmp_path / "data")
    monkeypatch.chdir(tmp_path / "data")
    plan = plan_of("images", train="train", validation="validation")
    assert plan.stamps().keys() == {"train", "validation"}
    key = plan.key
    assert plan_of("images", train="./train/", validation=str(tmp_path / "data" / "validation")).key == key
    for part in ("train", "validation"):
        file = Path(part, "red", "0.png")
        written = file.read_bytes()
        file.write_bytes(bytes(reversed(written)))
        assert plan.key != key
        key = plan.key
    text = Path("a.txt")
    text.write_text("one text")
    plan = plan_of("language", train="a.txt")
    assert plan_of("language", train=str(text.resolve())).key == plan.key != plan_of("language").key
    key, written = plan.key, text.stat()
    text.write_text("two text")
    os.utime(text, ns=(written.st_atime_ns, written.st_mtime_ns))
    assert plan.key != key
    with pytest.raises(UserError, match="does not exist"):
        plan_of("images", train="nowhere", validation="validation").stamps()


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_class_in_a_tar_has_no_mark_of_an_encoding(tmp_path: Path, mark: bytes) -> None:
    content = io.BytesIO()
    Image.new("RGB", (2, 2)).save(content, "png")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, part in (("0.png", content.getvalue()), ("0.cls", mark + b"red\r\n")):
            member = tarfile.TarInfo(name)
            member.size = len(part)
            tar.addfile(member, io.BytesIO(part))
    assert classes_of(str(tmp_path / "a.tar"), ["a.tar/0.png"]) == ["red"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": ["xsa"]}, "variants lack the baseline sa"),
        ({"variants": ["sa", "xsb"]}, "there is no attention variant 'xsb' (did you mean 'xsa'?)"),
        ({"patch_sizes": []}, "patch_sizes are missing"),
        ({"seeds": [1, 1]}, "seeds name something twice"),
        ({"task": "images"}, "task images takes train: and validation:"),
        ({"task": "language"}, "task language takes no patch_sizes"),
        ({"train": "x"}, "task crops brings its own images"),
        ({"recipe": {"steps": 0, "batch_size": 1, "learning_rate": 1}}, "recipe.steps"),
        ({"stepz": 3}, "stepz"),
        ({"recipe": {"steps": 10**12, "batch_size": 1, "learning_rate": 1}}, "recipe.steps"),
        ({"recipe": {"steps": 1, "batch_size": 1, "learning_rate": math.inf}}, "recipe.learning_rate"),
        ({"seeds": [2**70]}, "seeds.0"),
        ({"seeds": [-1]}, "seeds.0"),
        ({"seeds": list(range(20_000))}, "60,000 cells, 10,000 are the most"),
        ({"model": {"depth": 5000}}, "has 5,000 layers, 1,000 are the most"),
        ({"model": {"embed_dim": 10**9}}, "embed_dim is 1000000000, 1,000,000 is the most"),
        ({"model": {"img_size": "large"}}, "img_size is large, a whole number above 0 is due"),
    ],
)
def test_mistakes_in_a_plan(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    document = json.loads(plan_of().model_dump_json()) | change
    file = tmp_path / "plan.yaml"
    file.write_text(json.dumps(document))
    with pytest.raises(UserError) as caught:
        read_plan(file)
    assert message in str(caught.value)


def test_plans_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read plan"):
        read_plan(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(UserError, match="is no mapping"):
        read_plan(tmp_path / "list.yaml")


def test_models_that_cannot_be_built() -> None:
    with pytest.raises(UserError, match="timm cannot build 'vit_tiny_patch16_224'"):
        task_of(plan_of(model={**VIT, "widht": 3})).build(16)
    with pytest.raises(UserError, match="the text gives"):
        task_of(plan_of("language", model={**GPT2, "n_positions": 10**6}))
