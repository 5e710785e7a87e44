"""What every test stands on: one thread, no hub, and a way to run the command line inside the process."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("COLUMNS", None)  # tables are as wide as nobody's terminal
os.environ["OMP_NUM_THREADS"] = "1"  # for what runs in processes of its own

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Ended, run_cli, sketch
from PIL import Image

torch.set_num_threads(1)
gc.set_threshold(100_000, 20, 100)  # tests make many small objects, libraries are large, and cycles are few
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # its kernels run on the CPU; read when Triton is imported


@pytest.fixture
def attnbias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None, sketched: None
) -> Callable[..., Ended]:
    """`attnbias("probe", …)` runs the command line in an empty folder: probes draw nothing, others sketch."""
    monkeypatch.chdir(tmp_path)
    return run_cli


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no figures, which takes longer than all else."""
    monkeypatch.setattr("diag.run.finish.draw", lambda *tables: [])


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are laid out and their rows are written, but the pictures are empty: fonts take the time."""
    monkeypatch.setattr("diag.show.figures.write.save", sketch)


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
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A finished run of two token sets with its figures, and how its command ended. Only to be read."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    given = ("-m", "demo:vit-p16", "--images", "demo", "--limit", 4, "--tokens", "patch,cls", "--seed", 3)
    return folder, run_cli("probe", *given, "-o", folder)
