"""Processes that are killed, and processes that torchrun starts: the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from commands import Ended

ROOT = Path(__file__).parents[2]
FILES = ("layers.csv", "heads.parquet", "samples.parquet")

KILLING = '''
"""Everything is loaded once, and workers are forked: a round costs what it measures."""

import os, random, signal, sys, time
from pathlib import Path

import torch

from diag.run import finish, run
from diag.run.plan import ProbePlan
from diag.models import load
from diag.models.names.resolve import parse
from diag.run.processes import Share

finish.draw = lambda *_: []
load(parse("demo:lm"), device=torch.device("cpu"), dtype=torch.float32)
target = Path(sys.argv[1])
plan = ProbePlan.checked(
    models=("demo:lm",), texts=sys.argv[2], limit=100, seq_len=16, layers=(0, 3), batch_size=16,
    metrics=("cos_y_vself", "self_specific_fraction"), keep_samples=60, device="cpu",
)


def start(folder, share):
    child = os.fork()
    if child == 0:
        try:
            run.run_share(plan, folder, share)
        except BaseException as error:
            print(f"{share}: {error!r}", flush=True)
            os._exit(1)
        os._exit(0)
    return child


began = time.monotonic()
assert os.waitpid(start(target / "undisturbed", Share()), 0)[1] == 0
whole = time.monotonic() - began

chance, killed, number = random.Random(0), 0, 0
while number < 5 or killed < 5:  # a machine that was busy at first and is not now kills too late
    processes, before = (1, 1, 1, 3, 3)[number % 5], killed
    folder = target / f"run-{number}"
    while not (folder / "manifest.json").exists():
        now = time.monotonic()
        running = {
            start(folder, Share(rank, processes)): now + chance.uniform(0, 1.5 * whole)
            for rank in range(processes)
        }
        while running:
            time.sleep(0.005)
            for child, end in list(running.items()):
                if time.monotonic() > end:
                    os.kill(child, signal.SIGKILL)
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    assert status in (0, signal.SIGKILL), status
                    killed += status == signal.SIGKILL
                    del running[child]
        whole *= 1.1  # and one that is busier now would never come to the end
    number += 1
    if killed == before:
        whole /= 2
print("runs", number, "killed", killed)
'''


def own_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_killing_loses_at_most_the_shard_in_hand(tmp_path: Path) -> None:
    """SIGKILL at random moments, one process and three at once, until the run has come to its end."""
    done = subprocess.run(
        [sys.executable, "-c", KILLING, str(tmp_path), __file__],
        capture_output=True,
        text=True,
        env=own_environment(),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _, runs, _, killed = done.stdout.split()
    assert int(killed) >= 5
    names = sorted(file.name for file in (tmp_path / "undisturbed").iterdir())
    assert names == sorted([*FILES, "quantiles.parquet", "manifest.json", "plan.json"])
    for number in range(int(runs)):
        folder = tmp_path / f"run-{number}"
        assert [file for file in names if not (folder / file).is_file()] == []
        assert {file.name for file in folder.iterdir()} - {*names} <= {"shards"}
        for name in (*FILES, "quantiles.parquet"):
            assert (folder / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name


def test_torchrun_with_two_processes_is_one_process(attnbias: Callable[..., Ended], tmp_path: Path) -> None:
    given = ["probe", "-m", "demo:lm", "--texts", __file__, "--limit", "40", "--seq-len", "16"]
    given += ["--metrics", "cos_y_vself,self_specific_fraction", "--layers", "0,3", "--device", "cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "diag", *given, "-o", "two", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=own_environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)["manifest"]  # one of the processes finished and told
    assert manifest["status"] == "complete"
    assert attnbias(*given, "-o", "one").code == 0
    for name in FILES:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
