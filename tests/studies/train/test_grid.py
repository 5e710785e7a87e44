"""A whole grid: trained, probed, tabulated, drawn; resumed; spread over processes; from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from commands import run_cli

from diag.errors import UserError
from diag.models.families.demo import build_vit
from diag.run.progress import Silent
from diag.studies.train.cells import cells_of, train_cell
from diag.studies.train.grid import open_grid, run_train
from diag.studies.train.plan import TrainPlan
from diag.studies.train.tasks import task_of
from tools.embedded_models import ship_grid


class Heard(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


RECIPE: dict[str, Any] = {"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "warmup": 2, "held_out": 14}
VIT = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}
PLAN = TrainPlan(
    title="t",
    task="crops",
    patch_sizes=(16,),
    variants=("sa", "xsa", "gated_xsa"),
    seeds=(0, 1),
    model=VIT,
    recipe=RECIPE,  # type: ignore[arg-type]
    monitor_every=2,
    probe_limit=4,
)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diag.run.finish.draw", lambda *tables: [])  # of the probe
        found = run_train(PLAN, folder, device="cpu")
    assert found is not None
    assert found.words
    return folder


def test_every_cell_is_in_the_tables(grid: Path) -> None:
    results = pd.read_csv(grid / "results.csv")
    assert list(results["cell"]) == [cell.name for cell in cells_of(PLAN)]
    for _, one in results.groupby("seed"):
        assert one["initial_sha256"].nunique() == 1
        assert one["sha256"].nunique() == len(one)
    gains = pd.read_csv(grid / "gains.csv")
    assert {"xsa", "gated_xsa"} == set(gains[gains["against"] == "sa"]["variant"])
    card = json.loads((grid / "cells" / "p16-xsa-s0" / "card.json").read_text())
    assert results.set_index("cell").loc["p16-xsa-s0", "accuracy"] == card["accuracy"]
    by_hand = results.pivot(index="seed", columns="variant", values="loss")
    row = gains.query("variant == 'xsa' and against == 'sa' and outcome == 'loss'").iloc[0]
    assert row["mean"] == pytest.approx((by_hand["xsa"] - by_hand["sa"]).mean(), abs=1e-7)


def test_the_probe_is_of_the_trained_models(grid: Path) -> None:
    layers = pd.read_csv(grid / "probe" / "layers.csv")
    assert layers["model"].nunique() == 6
    compared = pd.read_csv(grid / "compensation.csv")
    baseline = layers[(layers["model"].str.contains("p16-sa-s")) & (layers["metric"] == "value_similarity")]
    rows = compared[(compared["metric"] == "value_similarity") & (compared["variant"] == "xsa")]
    for layer, one in baseline.groupby("layer"):
        assert rows.set_index("layer").loc[layer, "baseline"] == pytest.approx(one["mean"].mean(), rel=1e-6)


def test_figures_and_words_are_there(grid: Path) -> None:
    found = open_grid(grid)
    assert found.manifest["status"] == "complete"
    for name in found.manifest["figures"]:
        assert (grid / name).stat().st_size > 0
    stems = {Path(name).stem for name in found.manifest["figures"]}
    assert {"gain-crops", "alpha-crops", "compensation-crops-value_similarity", "steps-crops-p16"} <= stems
    assert "2 seeds" in " ".join(found.words)


def test_the_same_command_again_reads_it(grid: Path) -> None:
    before = (grid / "manifest.json").stat().st_mtime_ns
    found = run_train(PLAN, grid, device="cpu")
    assert found is not None
    assert (grid / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds another run"):
        run_train(PLAN.model_copy(update={"seeds": (5,)}), grid, device="cpu")


def test_tables_that_were_edited_are_told(grid: Path, tmp_path: Path) -> None:
    shutil.copytree(grid, tmp_path / "run")
    manifest = json.loads((grid / "manifest.json").read_text())
    assert manifest["hashes"].keys() == {f"{name}.csv" for name in manifest["tables"]}
    heard = Heard()
    run_train(PLAN, tmp_path / "run", device="cpu", listener=heard)
    assert heard.said == [f"already complete: {tmp_path / 'run'} (train again with --overwrite)"]
    with (tmp_path / "run" / "results.csv").open("a") as file:
        file.write("\n")
    run_train(PLAN, tmp_path / "run", device="cpu", listener=heard)
    assert heard.said[2:] == [f"results.csv of '{tmp_path / 'run'}' is not as the run wrote it"]


def test_data_that_are_replaced_meanwhile_are_told(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("red", "blue"):
        shutil.copytree(noise, tmp_path / "data" / name)
    given = {"task": "images", "train": str(tmp_path / "data"), "validation": str(tmp_path / "data")}
    mine = PLAN.model_copy(update=given | {"variants": ("sa",), "seeds": (0,)})

    def replaces(plan: Any, cell: Any, task: Any, folder: Path, **how: Any) -> None:
        folder.mkdir(parents=True)
        (folder / "card.json").write_text("{}")
        (tmp_path / "data" / "red" / "00.png").touch()

    monkeypatch.setattr("diag.studies.train.grid.train_cell", replaces)
    with pytest.raises(UserError, match="was trained on was replaced meanwhile"):
        run_train(mine, tmp_path / "run", device="cpu")
    with pytest.raises(UserError, match="holds another run: its inputs were replaced since"):
        run_train(mine, tmp_path / "run", device="cpu")


def test_cells_that_are_there_are_not_trained_again(grid: Path, tmp_path: Path) -> None:
    cells = cells_of(PLAN)
    task = task_of(PLAN)
    train_cell(PLAN, cells[0], task, tmp_path / "cells" / cells[0].name, device=torch.device("cpu"))
    card = tmp_path / "cells" / cells[0].name / "card.json"
    again = json.loads(card.read_text())
    first = json.loads((grid / "cells" / cells[0].name / "card.json").read_text())
    assert again["sha256"] == first["sha256"]


@pytest.mark.usefixtures("undrawn", "sketched")
def test_processes_share_the_cells(grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = PLAN.model_copy(update={"variants": ("sa", "xsa"), "seeds": (0,), "monitor_every": 0})
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert run_train(small, tmp_path / "run", device="cpu") is None
    assert [path.parent.name for path in (tmp_path / "run" / "cells").glob("*/card.json")] == ["p16-sa-s0"]
    monkeypatch.setenv("RANK", "1")
    found = run_train(small, tmp_path / "run", device="cpu")
    assert found is not None
    whole = pd.read_csv(grid / "results.csv").set_index("cell")
    for name, row in found.tables["results"].set_index("cell").iterrows():
        assert row["sha256"] == whole.loc[name, "sha256"]


@pytest.mark.usefixtures("undrawn", "sketched")
def test_overwriting_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = PLAN.model_copy(update={"variants": ("sa",), "seeds": (0,), "monitor_every": 0})
    first = run_train(small, tmp_path / "run", device="cpu")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    for mistake in ({"device": "tpu"}, {"device": "spread"}):
        with pytest.raises(UserError):
            run_train(small, tmp_path / "run", overwrite=True, **mistake)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")} == before
    changed = small.model_copy(update={"recipe": small.recipe.model_copy(update={"steps": 3})})
    second = run_train(changed, tmp_path / "run", device="cpu", overwrite=True)
    assert first is not None
    assert second is not None
    assert not list((tmp_path / "run").rglob("checkpoint.pt"))
    assert first.tables["results"]["sha256"][0] != second.tables["results"]["sha256"][0]
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == [
        *("cells", "figures", "probe", "probed")
    ]
    assert list(pd.read_csv(tmp_path / "run/probe/layers.csv")["model"].unique()) == ["cells/p16-sa-s0/model"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="would remove what others train"):
        run_train(changed, tmp_path / "run", device="cpu", overwrite=True)


@pytest.mark.usefixtures("undrawn", "sketched")
def test_a_grid_is_taken_back_however_its_folder_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    small = PLAN.model_copy(update={"variants": ("sa",), "seeds": (0,), "monitor_every": 0})
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("diag.studies.train.grid.outcome_tables", stop)
        with pytest.raises(KeyboardInterrupt):
            run_train(small, Path("run"), device="cpu")
    before = (tmp_path / "run" / "probe" / "manifest.json").stat().st_mtime_ns
    assert run_train(small, tmp_path / "run", device="cpu") is not None
    assert (tmp_path / "run" / "probe" / "manifest.json").stat().st_mtime_ns == before
    unlike = small.model_copy(update={"model": {"depth": "two"}})
    with pytest.raises(UserError):
        run_train(unlike, tmp_path / "mistaken", device="cpu")
    assert not (tmp_path / "mistaken").exists()


def test_seed_0_is_shipped_in_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diag.models import load
    from diag.models.names.resolve import parse

    sizes = {"img_size": 64, "embed_dim": 96, "depth": 6, "num_heads": 3}
    plan = PLAN.model_copy(update={"model": sizes, "variants": ("sa", "xsa"), "monitor_every": 0})
    for cell in cells_of(plan):
        if cell.seed == 0:
            train_cell(plan, cell, task_of(plan), tmp_path / "cells" / cell.name, device=torch.device("cpu"))
    (tmp_path / "plan.json").write_text(json.dumps({"plan": plan.model_dump(mode="json")}))
    cards = ship_grid(tmp_path, tmp_path / "out")
    assert [card["name"] for card in cards] == ["grid-p16-sa", "grid-p16-xsa"]
    monkeypatch.setattr("diag.models.families.demo.EMBEDDED", tmp_path / "out")
    images = torch.randn(2, 3, 64, 64)
    for card in cards:
        model = load(parse(f"demo:{card['name']}"), device="cpu", dtype=torch.float32)
        assert model.facts["card"]["validation_accuracy"] == card["validation_accuracy"]
        assert bool(model.notes) == (card["variant"] == "xsa")
        plain = build_vit(16).eval()
        plain.load_state_dict(model.module.state_dict())
        with torch.inference_mode():
            assert torch.equal(plain(images), model.module(images)) == (card["variant"] == "sa")


def test_the_command_line(grid: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(PLAN.model_dump_json())
    listed = run_cli("train", file, "--dry-run")
    assert listed.out.split() == [cell.name for cell in cells_of(PLAN)]
    done = run_cli("train", file, "-o", grid)
    assert done.code == 0
    assert "patch" in done.out
    assert "xsa − sa" in done.out
    assert f"folder: {grid}" in done.err
    quiet = run_cli("train", file, "-o", grid, "-q")
    assert quiet.out.strip() == str(grid)
    document = json.loads(run_cli("train", file, "-o", grid, "--json").out)
    assert document["manifest"]["status"] == "complete"


def test_variants_are_listed() -> None:
    text = run_cli("variants").out
    rows = json.loads(run_cli("variants", "--json").out)
    assert list(rows) == [
        "sa",
        "xsa",
        "gated_xsa",
        "random_direction",
        "matched_direction",
        "gated",
        "affine",
        "mixture_of_heads",
        "cb",
        "cb_s",
    ]
    assert all(name in text for name in rows)
    assert rows["gated_xsa"]["forms"] == ["tanh", "sigmoid"]


def test_a_wrong_plan_is_two_lines(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(
        "{title: t, task: crops, variants: [sa], seeds: [0], recipe: {steps: 1}, patch_sizes: [8]}"
    )
    done = run_cli("train", file)
    assert done.code == 2
    assert done.lines[0] == f"error: {file}, line 1: recipe.batch_size is missing"
