"""What every test stands on: one thread, no hub, and a way to run the command line inside the process."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import contextlib
import io
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines of stderr."""
        return self.err.splitlines()


def run_cli(*arguments: object) -> Ended:
    """Runs `attnbias ARGUMENTS` in this process."""
    from diag.cli import main

    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["attnbias", *map(str, arguments)])
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert isinstance(code, int)
    return Ended(code, out.getvalue(), err.getvalue())


@pytest.fixture
def attnbias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """`attnbias("probe", …)` runs the command line in an empty folder, without drawing figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diag.run.draw", lambda layers, heads, folder: [])
    return run_cli


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no figures, which takes longer than all else."""
    monkeypatch.setattr("diag.run.draw", lambda layers, heads, folder: [])


@pytest.fixture(scope="session")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 20 small random images."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for number in range(20):
        # smooth, so that images differ in more than their pixels' noise
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((64, 64)).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Ended]]:
    """A finished run of two token sets with its figures, and how its command ended. Only to be read."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    yield (
        folder,
        run_cli(
            *("probe", "-m", "demo:vit-p16", "--images", "demo", "--limit", 4, "--tokens", "patch,cls"),
            *("-o", folder, "--seed", 3),
        ),
    )
