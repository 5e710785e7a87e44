"""Figures drawn in another process: the same bytes as here, and no trace of it whatever becomes of it."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import Ended, probe_of, sketch

from diag.errors import UserError
from diag.show.figures import ENDINGS, Asked, figures_of
from diag.show.figures.drawer import Drawer, cores, draw_all


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setenv("OMP_NUM_THREADS", "2")


def made_up(model: str, heads: int) -> pd.DataFrame:
    """A heads table of three layers with the metrics of most panels."""
    names = ("cos_y_vself", "cos_y_vpartner", "self_part", "value_similarity", "self_weight", "excess")
    rows = pd.DataFrame(list(itertools.product(range(3), range(heads), names)))
    mean = np.random.default_rng(heads).uniform(0.05, 0.6, len(rows))
    rows.columns = pd.Index(["layer", "head", "metric"])
    intervals = {"mean": mean, "ci_low": mean - 0.02, "ci_high": mean + 0.02, "n": 14}
    return rows.assign(**intervals, model=model, tower="vision", tokens="patch")


def asked() -> dict[str, Asked]:
    """Curves and maps of one model."""
    return figures_of(made_up("vit-p8", 1).drop(columns="head"), made_up("vit-p8", 4))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def unused(*_: object) -> list[Path]:
    pytest.fail("this process has drawn")


def test_the_same_bytes_as_here_and_the_same_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = draw_all(asked(), tmp_path / "here", ENDINGS["all"])
    assert len(here) == 2 * 3
    with Drawer() as drawer:
        drawer.start()
        with monkeypatch.context() as patch:
            patch.setattr("diag.show.figures.write.save", unused)
            there = draw_all(asked(), tmp_path / "there", ENDINGS["all"], drawer)
        rows = made_up("vit-p8", 1)
        twice = {"a": Asked("curves:layer_curves", (pd.concat([rows, rows]),), rows)}
        with pytest.raises(UserError, match="more than one value of"):
            draw_all(twice, tmp_path / "wrong", ENDINGS["all"], drawer)
        assert drawer.process is None
    assert [path.name for path in there] == [path.name for path in here]
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_process_that_was_killed_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diag.show.figures.write.save", sketch)
    with Drawer() as drawer:
        drawer.start()
        assert drawer.process is not None
        drawer.process.kill()
        found = draw_all(asked(), tmp_path, ENDINGS["png"], drawer)
    assert [path for path in found if not path.is_file()] == []
    assert len(found) == 2 * 2


def test_one_process_at_most_and_none_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    with Drawer() as drawer:
        drawer.start()
        first = drawer.process
        drawer.start()
        assert drawer.process is first is not None
    assert first.returncode == -signal.SIGKILL
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with Drawer() as drawer:
        drawer.start()
        assert drawer.process is None


@pytest.mark.parametrize(
    ("asked", "count"), [("1", 1), ("8", 2), ("1,2", 1), ("", 2), ("0", 2), ("all", 2), ("²", 2)]
)
def test_cores_are_those_allowed_or_fewer(asked: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert cores() == count


def test_it_ends_with_the_process_that_started_it() -> None:
    program = """
import os
from diag.show.figures.drawer import Drawer
drawer = Drawer()
drawer.start()
print(drawer.process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    number = int(done.stdout)
    deadline = time.monotonic() + 30
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(number, 0)
            time.sleep(0.02)
        pytest.fail("it is still there")


@pytest.mark.parametrize("figures", ["none", "png"])
def test_a_command_starts_one_if_it_will_draw(
    figures: str, attnbias: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Drawer] = []
    monkeypatch.setattr(Drawer, "start", lambda drawer: started.append(drawer))
    for _ in range(2):  # the second time all is there
        assert attnbias(*probe_of(), "--figures", figures).code == 0
    assert len(started) == (figures != "none")
