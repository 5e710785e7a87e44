"""A finished run: the same command finds it without torch, and only where nothing is left to do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Ended, run_cli

from diag.errors import UserError
from diag.results.staging import NEXT
from diag.results.tables import read_manifest
from diag.run.finished import found_again, open_run
from diag.run.plan import ProbePlan, inputs_of

GIVEN = ("-m", "demo:vit-p16", "--images", "demo", "--limit", "4", "--tokens", "patch,cls", "--seed", "3")
"""The words of the run of the fixture `finished`."""

PLAN = ProbePlan(models=("demo:vit-p16",), images="demo", limit=4, tokens=("patch", "cls"), seed=3)

COMMAND = """
import sys
from diag.cli import main
sys.argv = ["attnbias", *sys.argv[1:]]
try:
    main()
finally:
    print(*{name.split(".")[0] for name in sys.modules}, file=sys.stderr)
"""


def test_the_same_command_again_loads_no_model_library(finished: tuple[Path, Ended], tmp_path: Path) -> None:
    folder, first = finished
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    words = ("probe", *GIVEN, "-o", str(folder))
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *words], capture_output=True, text=True, cwd=tmp_path
    )
    said, ended, loaded = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (first.code, first.out)
    assert said == f"already complete: {folder} (measure again with --overwrite)"
    assert ended == f"run: {folder}"
    assert set(loaded.split()).isdisjoint({"torch", "timm", "open_clip", "transformers", "matplotlib"})
    assert "pandas" in loaded
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


class Heard:
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def start(self, what: str, inputs: int) -> None: ...

    def advance(self, inputs: int) -> None: ...


@pytest.fixture
def run(finished: tuple[Path, Ended], tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def found(folder: Path, plan: ProbePlan = PLAN) -> tuple[bool, list[str]]:
    heard = Heard()
    again = found_again(plan, inputs_of(plan), folder, heard)
    assert again is None or again.layers.equals(open_run(folder).layers)
    return again is not None, heard.said


def test_a_finished_run_is_found_and_what_has_changed_is_said(run: Path) -> None:
    complete = f"already complete: {run} (measure again with --overwrite)"
    assert found(run) == (True, [complete])
    assert found(run, PLAN.model_copy(update={"device": "cuda:0", "batch_size": 2})) == (True, [complete])
    (run / "layers.csv").write_text((run / "layers.csv").read_text() + "\n")
    assert found(run) == (True, [complete, f"layers.csv of '{run}' is not as the run wrote it"])


def test_figures_that_were_not_asked_for_are_drawn_later(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the tables, without a model; those that are there already stay, whatever is asked for."""
    written: list[str] = []

    def save(figure: object, data: object, folder: Path, stem: str, endings: tuple[str, ...]) -> list[Path]:
        written.extend(endings)
        return [folder / f"{stem}.{ending}" for ending in (*endings, "csv")]

    def asked(figures: str) -> tuple[list[str], object, set[str]]:
        written.clear()
        assert found(run, PLAN.model_copy(update={"figures": figures}))[0]
        manifest = open_run(run).manifest
        return [*written], manifest["plan"]["figures"], {Path(name).suffix for name in manifest["figures"]}

    whole = open_run(run).manifest
    for figures in ("none", "png", "all"):
        assert asked(figures) == ([], "all", {".pdf", ".png", ".csv"})
    monkeypatch.setattr("diag.show.figures.write.save", save)
    bare = {**whole, "figures": [], "plan": {**whole["plan"], "figures": "none"}}
    (run / "manifest.json").write_text(json.dumps(bare))
    assert asked("none") == ([], "none", set())
    assert asked("png") == (["png"] * 4, "png", {".png", ".csv"})
    assert asked("none") == ([], "png", {".png", ".csv"})
    assert asked("all") == (["pdf", "png"] * 4, "all", {".pdf", ".png", ".csv"})
    assert open_run(run).manifest == whole


def test_what_is_left_to_do_is_left_to_who_does_it(run: Path, tmp_path: Path) -> None:
    nothing = (False, list[str]())
    assert found(run)[0]
    assert found(tmp_path / "nowhere") == nothing
    assert not (tmp_path / "nowhere").exists()
    assert found(run, PLAN.model_copy(update={"seed": 4})) == nothing
    # a device that may be none is asked whether it is there
    assert found(run, PLAN.model_copy(update={"device": "gpu"})) == nothing
    for left in (run / NEXT, run / "shards"):
        left.mkdir()
        (left / "00-demo-vit-p16-vision-00000.json").write_text("{}")
        assert found(run) == nothing
        shutil.rmtree(left)
    assert found(run)[0]
    (run / "manifest.json").rename(run / "elsewhere.json")
    assert found(run) == nothing


def test_a_folder_of_another_verb_is_refused(run: Path) -> None:
    document = json.loads((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps(document | {"kind": "attend"}))
    with pytest.raises(UserError, match="holds what attnbias attend wrote"):
        found(run)


def test_figures_are_drawn_on_demand_and_nothing_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("probe", *GIVEN[:4], "--limit", "2", "--metrics", "cos_y_vself", "-o", str(tmp_path / "run"))

    def endings() -> list[str]:
        return sorted({file.suffix for file in (tmp_path / "run" / "figures").glob("*")})

    assert run_cli(*words, "--figures", "none").code == 0
    assert endings() == []
    tables = {file: file.read_bytes() for file in (tmp_path / "run").glob("*.parquet")}
    monkeypatch.setattr("diag.run.run.load", None)  # no model is loaded from here on
    assert run_cli(*words, "--figures", "png").code == 0
    assert endings() == [".csv", ".png"]
    assert run_cli(*words, "--figures", "none").code == 0  # what is there stays
    assert endings() == [".csv", ".png"]
    assert run_cli(*words).code == 0
    assert endings() == [".csv", ".pdf", ".png"]
    manifest = read_manifest(tmp_path / "run")
    assert manifest["plan"]["figures"] == "all"
    assert sorted(manifest["figures"]) == sorted(
        f"figures/{f.name}" for f in (tmp_path / "run/figures").glob("*")
    )
    assert {file: file.read_bytes() for file in tables} == tables
    refused = run_cli(*words, "--figures", "svg")
    assert refused.code == 2
    assert "figures" in refused.err
