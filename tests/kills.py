"""Every verb killed at steps that change the disk, run again, and compared with a run that nothing disturbed.

    python tests/kills.py --kills 100 --seed 0

A step is a rename, a link, a removal or a new folder; a process ends just before one or just after it, as
SIGKILL ends it: nothing is tidied up. Then the same command is given again. Every file must hold the same
bytes (of JSON all but times), nothing may be left over, and whoever reads a folder in between must find the
old result, the new one, or one that says that it is not finished. Processes are forked after everything is
imported, so that a kill costs no start; pictures are empty.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pyarrow.parquet  # noqa: F401  here, and not in every process
import timm  # noqa: F401
import torch
import torchvision.transforms  # noqa: F401
from commands import run_cli
from made_runs import CURVES, made_run
from PIL import Image
from safetensors import safe_open

import diag.cli.merge
import diag.run.finish
import diag.show.figures.write
import diag.show.report
import diag.studies.attend.measure
import diag.studies.compare
import diag.studies.intervene.run
import diag.studies.train.grid
import diag.studies.writeup.produce
from diag.results.staging import NEXT
from diag.results.writing import replacing

KILLED = 77
"""The exit code of a process that ended at its step."""

STEPS = ("replace", "rename", "link", "unlink", "remove", "rmdir", "mkdir")
"""Functions of `os` that change what a folder holds."""

VOLATILE = frozenset(
    {"started", "seconds", "seconds_per_step", "environment", "command", "key", "sha256", "stamp"}
)
"""Of JSON documents, what differs from one run to the next: times, and digests of files that bear times."""

TIME = "seconds_per_step"
"""Of tables, the column, or what rows tell, that is a time."""

Tree = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A command. prepare: makes what it finds, with commands of its own. home: the folder it writes.

    last: of the home's files, the one without which it is not finished. code: how it ends.
    """

    name: str
    arguments: tuple[object, ...]
    prepare: Callable[[], object]
    home: str = "out"
    last: str = "manifest.json"
    code: int = 0


# --- processes


def forked(work: Callable[[], int], seconds: int = 120) -> int:
    """The exit code of a process that does the work and nothing else."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            signal.alarm(seconds)
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def command(place: Path, arguments: Sequence[object], stop_at: int | None = None) -> tuple[int, int]:
    """Runs a command in a folder: its exit code, and how many moments it had to be killed at.

    stop_at: the moment at which it is; every step has two, before and after.
    """
    told = place.parent / "moments"

    def work() -> int:
        os.chdir(place)
        tempfile.tempdir = str(place / "temporary")
        moments = _stopping(stop_at)
        ended = run_cli(*arguments)
        told.write_text(str(moments[0]))
        return ended.code

    told.unlink(missing_ok=True)
    code = forked(work)
    return code, int(told.read_text()) if told.exists() else 0


def _stopping(stop_at: int | None) -> list[int]:
    """Counts the moments of this process, and ends it at one of them."""
    count = [0]

    def moment() -> None:
        if count[0] == stop_at:
            os._exit(KILLED)
        count[0] += 1

    def watched(step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            moment()
            done = step(*given, **named)
            moment()
            return done

        return call

    for name in STEPS:
        setattr(os, name, watched(getattr(os, name)))
    return count


# --- what lies on the disk


def tree(folder: Path) -> Tree:
    """Every file and folder by name, hidden ones too: bytes, or a document without what is volatile."""
    found: Tree = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            found[f"{name}/"] = None
        elif path.suffix == ".json":
            found[name] = _lasting(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".safetensors":
            found[name] = _weights(path)
        elif TIME in (text := path.read_bytes()).decode(errors="replace"):
            found[name] = _without_times(text.decode())
        else:
            found[name] = path.read_bytes()
    return found


def _weights(file: Path) -> Tree:
    """Tensors and metadata: the latter are written in any order."""
    with safe_open(file, "np") as opened:
        tensors = {name: opened.get_tensor(name).tobytes() for name in opened.keys()}  # noqa: SIM118
        return {**tensors, "": opened.metadata()}


def _without_times(table: str) -> list[list[str]]:
    """A table without the column of times, or without the rows that tell them."""
    rows = list(csv.reader(table.splitlines()))
    column = rows[0].index(TIME) if TIME in rows[0] else None
    return [
        [cell for place, cell in enumerate(row) if place != column]
        for row in rows
        if column or TIME not in row
    ]


def _lasting(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: _lasting(value) for key, value in document.items() if key not in VOLATILE}
    return [_lasting(value) for value in document] if isinstance(document, list) else document


def visible(folder: Path) -> Tree:
    """What a reader of a folder sees: its files that are not hidden."""
    hidden = (NEXT, "shards")
    return {
        name: content
        for name, content in tree(folder).items()
        if not name.endswith("/")
        and not any(part.startswith(".") or part in hidden for part in Path(name).parts)
    }


def differing(one: Tree, other: Tree) -> list[str]:
    """Names of what is not the same in two trees."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name, ...) != other.get(name, ...))


# --- one verb


@dataclass
class Outcome:
    """What came of killing one verb. steps: that it has. faults: what was not as it should be."""

    name: str
    steps: int = 0
    kills: int = 0
    whole: int = 0
    leftovers: int = 0
    torn: int = 0


def killed(case: Case, root: Path, chosen: Callable[[int], Sequence[int]], outcome: Outcome) -> Iterator[str]:
    """Kills a verb at the chosen ones of its moments; yields what was wrong after each, and counts it."""
    base, place = root / "base", root / "work" / "place"
    base.mkdir(parents=True)
    with _inside(base):
        (base / "temporary").mkdir()
        code = forked(lambda: _prepared(case))
    assert code == 0, f"{case.name}: what it needs could not be made"
    before = visible(base / case.home) if (base / case.home).is_dir() else {}

    def anew() -> None:
        shutil.rmtree(place.parent, ignore_errors=True)
        place.parent.mkdir()
        shutil.copytree(base, place, symlinks=True)

    anew()
    code, moments = command(place, case.arguments)
    assert code == case.code, f"{case.name} ended with {code}"
    whole, after = tree(place), visible(place / case.home)
    outcome.steps = moments // 2
    for moment in chosen(moments):
        anew()
        code, _ = command(place, case.arguments, moment)
        assert code == KILLED, f"{case.name}: ended with {code} before moment {moment}"
        wrong = []
        between = visible(place / case.home)
        if case.last in between and between not in (before, after):
            wrong.append(f"torn: {differing(between, after)} and {differing(between, before)}")
        code, _ = command(place, case.arguments)
        now = tree(place)
        extra = sorted(now.keys() - whole.keys())
        if code != case.code or any(name in whole for name in differing(now, whole)):
            wrong.append(f"exit code {code}, differs: {differing(now, whole)}")
        if extra:
            wrong.append(f"left over: {extra}")
        outcome.kills += 1
        outcome.torn += any(text.startswith("torn") for text in wrong)
        outcome.whole += not any(text.startswith("exit") for text in wrong)
        outcome.leftovers += bool(extra)
        yield f"{case.name}, moment {moment}: {'; '.join(wrong)}" if wrong else ""


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _prepared(case: Case) -> int:
    case.prepare()
    return 0


# --- the verbs

PROBE = ("probe", "-m", "demo:vit-p16", "--images", "images", "--layers", "0")
FAST = ("--metrics", "cos_y_vself,self_weight", "--device", "cpu")


def images(count: int = 18) -> None:
    """A folder of small images: more than one shard of them."""
    generator = np.random.default_rng(0)
    Path("images").mkdir()
    for number in range(count):
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"images/{number:02d}.png")


def ran(*arguments: object) -> None:
    """A command of the preparation."""
    ended = run_cli(*arguments)
    assert ended.code == 0, ended.err


def measured_before() -> None:
    """A finished run of another plan, with activations and quantiles that the new one has not."""
    images()
    more = ("--save-activations", 1, "--keep-samples", 4)
    ran(*PROBE, "--metrics", "cos_y_vself", *more, "-o", "out")


def in_two_folders() -> None:
    """A run whose halves were measured in two folders."""
    images()
    ran(*PROBE, *FAST, "--shard", "1/2", "-o", "out")
    ran(*PROBE, *FAST, "--shard", "2/2", "-o", "other")


def two_runs() -> None:
    made_run(Path("one"), model="demo:vit-p16", patch_size=16, n_tokens=17)
    made_run(Path("two"), curves=CURVES | {"cos_y_vself": [0.4, 0.3, 0.35]})


def compared_before() -> None:
    two_runs()
    ran("compare", "one", "two", "-o", "out")


def reported_before() -> None:
    two_runs()
    ran("report", "one", "-o", "report.html")


WRITEUP = """\
title: A small one
probes:
  eyes: {models: [demo:vit-p16], images: images, limit: 2, layers: [0], metrics: [cos_y_vself, self_weight]}
figures:
  - {kind: depth, probe: eyes, metrics: [cos_y_vself]}
tables:
"""


def drawn_before() -> None:
    images(2)
    more = "  - {kind: layers, probe: eyes, metrics: [cos_y_vself], name: other}\n"
    Path("small.yaml").write_text(WRITEUP + more)
    ran("figures", "small.yaml")
    Path("small.yaml").write_text(
        WRITEUP + more.replace("other", "renamed").replace("cos_y_vself", "self_weight")
    )


LOOK = ("attend", "-m", "demo:vit-p16", "--image", "images/00.png", "--layer", 0, "--device", "cpu")


def looked_before() -> None:
    images(1)
    ran(*LOOK, "--patch", "0,0", "-o", "out")


SWEEP = ("intervene", "-m", "demo:vit-p16", "--images", "images", "--layers", "0", "--scope", "one")
SWEEP = (*SWEEP, "--device", "cpu")


def swept_before() -> None:
    images(2)
    ran(*SWEEP, "--limit", 2, "--intervene", "gated_xsa=0.5", "-o", "out")
    ran(*SWEEP, "--limit", 2, "-o", "other")  # the probe of the untouched model


GRID = """\
title: t
task: crops
patch_sizes: [16]
variants: [sa, xsa]
seeds: [0]
model: {img_size: 32, embed_dim: 24, depth: 1, num_heads: 3}
recipe: {steps: STEPS, batch_size: 2, learning_rate: 0.001, warmup: 1, held_out: 7, checkpoint_every: 1}
monitor_every: 1
probe_limit: 2
"""


def grid() -> None:
    Path("grid.yaml").write_text(GRID.replace("STEPS", "2"))


def trained_before() -> None:
    Path("grid.yaml").write_text(GRID.replace("STEPS", "1"))
    ran("train", "grid.yaml", "-o", "out", "--device", "cpu")
    grid()


TRAIN = ("train", "grid.yaml", "-o", "out", "--device", "cpu")

CASES = (
    Case("probe", (*PROBE, *FAST, "--save-activations", 1, "-o", "out"), images),
    Case("probe, moments", (*PROBE, *FAST, "--keep-samples", 4, "-o", "out"), images),
    Case("probe --overwrite", (*PROBE, *FAST, "-o", "out", "--overwrite"), measured_before),
    Case("merge", ("merge", "out", "other"), in_two_folders),
    Case("compare", ("compare", "one", "two", "-o", "out"), two_runs),
    Case("compare, again", ("compare", "one", "-o", "out"), compared_before),
    Case("figures", ("figures", "small.yaml"), drawn_before, home="figures/small", last="plan.json"),
    Case("figures --check", ("figures", "small.yaml", "--check"), drawn_before, home="figures/small", code=1),
    Case("report", ("report", "one", "two"), two_runs, home="."),
    Case("report, again", ("report", "one", "two"), reported_before, home="."),
    Case("attend", (*LOOK, "--patch", "1,1", "-o", "out"), lambda: images(1)),
    Case("attend --overwrite", (*LOOK, "--patch", "1,1", "-o", "out", "--overwrite"), looked_before),
    Case("intervene", (*SWEEP, "--limit", 2, "-o", "new"), swept_before, home="new"),
    Case("intervene --overwrite", (*SWEEP, "--limit", 2, "-o", "out", "--overwrite"), swept_before),
    Case("train", TRAIN, grid),
    Case("train --overwrite", (*TRAIN, "--overwrite"), trained_before),
)


def sketch(figure: Any, data: Any, folder: Path, stem: str, *_: object) -> list[Path]:
    """The files of a figure, each renamed into place, without what takes the time."""
    paths = [folder / f"{stem}.{ending}" for ending in ("pdf", "png", "csv")]
    for path in paths:
        replacing(path, lambda temporary: temporary.write_text(f"{stem} {len(data)}"))
    return paths


def main(given: Sequence[str] | None = None) -> int:
    """Prints a row per verb; 1 if anything was not whole."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--kills", type=int, default=100, help="over all verbs [100]; 0: all moments")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", help="verbs whose names match this pattern")
    asked = options.parse_args(given)
    torch.set_num_threads(1)
    diag.show.figures.write.save = sketch
    diag.run.finish.draw = lambda layers, heads, folder, *_: sketch(None, layers, folder, "curves-demo")
    cases = [case for case in CASES if asked.only is None or re.search(asked.only, case.name)]
    chance, began, faults, outcomes = random.Random(asked.seed), time.time(), [], []
    print(f"{'verb':22} {'steps':>6} {'kills':>6} {'whole':>6} {'torn':>6} {'leftovers':>10}")
    for number, case in enumerate(cases):
        # what verbs of few moments leave goes to those that follow
        done = sum(outcome.kills for outcome in outcomes)
        share = round((asked.kills - done) / (len(cases) - number))

        def chosen(moments: int, share: int = share) -> Sequence[int]:
            some = share if asked.kills else moments
            return sorted(chance.sample(range(moments), min(some, moments)))

        with tempfile.TemporaryDirectory(prefix="kills-") as root:
            outcomes.append(Outcome(case.name))
            for wrong in killed(case, Path(root), chosen, outcomes[-1]):
                faults += [wrong] if wrong else []
        print(_row(outcomes[-1]), flush=True)
    counts = ("steps", "kills", "whole", "torn", "leftovers")
    total = Outcome("all", *(sum(getattr(outcome, name) for outcome in outcomes) for name in counts))
    print(_row(total), f"{time.time() - began:.0f} s", sep="\n")
    print(*faults, sep="\n", file=sys.stderr)
    return 1 if faults else 0


def _row(outcome: Outcome) -> str:
    counts = f"{outcome.steps:6} {outcome.kills:6} {outcome.whole:6} {outcome.torn:6} {outcome.leftovers:10}"
    return f"{outcome.name:22} {counts}"


if __name__ == "__main__":
    raise SystemExit(main())
