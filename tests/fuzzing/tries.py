"""One try: a copy of good files, one of them spoilt, a command in a process of its own, and how it ended."""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NoReturn
from unittest import mock

import pandas as pd
from commands import sketch

from fuzzing.files import copied, tree
from fuzzing.kinds import KINDS, Command, Kind
from fuzzing.stock import Stock

FINE = ("fine", "refused", "partly", "failed")
FAULTS = ("not expected", "badly told", "wrote", "too slow", "crashed")
"""How tries end. As they must: with exit codes 0, 2, 3 and 1, and the lines that belong to each. And as they
must not: in the last resort or a traceback; in other lines than two, or signs that steer a terminal; with
files changed that the command does not own, or anything written where it refuses; after too long; by a
signal, or beyond the bound of memory."""

SECONDS = 20
MEMORY = 2 * 2**30
"""What a try may take: seconds, and bytes of addresses beyond those of the process that forks it."""
WRITTEN = 256 * 2**20

STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
LEAKED = re.compile(
    r"\b(?:Key|Attribute|Type|Index|ZeroDivision|Assertion|UnboundLocal|Name|Recursion)Error\b"
)
MEMORY_ENDED = re.compile(
    r"MemoryError|there is not enough memory|can't allocate memory|Cannot allocate memory(?! \(os error)"
    r"|Unable to allocate|bad_alloc"
)
"""Of what took too much. Not of a file that was to be mapped, which takes addresses and no memory."""


@dataclass(frozen=True)
class Ended:
    """How a try ended. done: what was spoilt. verdict: one of FINE or FAULTS. said: on stderr."""

    kind: str
    seed: int
    words: tuple[str, ...]
    done: str
    verdict: str
    code: int | None = None
    said: str = ""
    wrong: str = ""
    seconds: float = 0.0

    @property
    def message(self) -> str:
        """What is wrong, without what differs from try to try: for counting."""
        plain = re.sub(r"'[^']*'|\"[^\"]*\"|\d+(?:\.\d+)?", "…", self.wrong)
        return plain[:150]


UNDRAWN: Mapping[str, Any] = {
    "diag.studies.compare.draw_comparison": [],
    "diag.studies.intervene.run.draw": [],
}
"""What draws the figures of a verb, and what it returns where there are none."""


@contextmanager
def light(*, drawn: bool = True) -> Iterator[None]:
    """Libraries stay in one thread, and off the hub; figures are only laid out, or not even that.

    drawn: lay them out, which takes half the time of the verbs that draw.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ExitStack() as patched:
        patched.callback(torch.set_num_threads, threads)
        calm = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        patched.enter_context(mock.patch.dict(os.environ, calm))
        for name, none in ({} if drawn else UNDRAWN).items():
            patched.enter_context(mock.patch(name, return_value=none))
        patched.enter_context(mock.patch("diag.run.finish.draw", return_value=[]))
        patched.enter_context(mock.patch("diag.show.figures.write.save", sketch if drawn else _touched))
        yield


def _touched(figure: Any, data: pd.DataFrame, folder: Path, stem: str, *_: object) -> list[Path]:
    """Files of a figure, without the figure."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{stem}.{suffix}" for suffix in ("pdf", "png", "csv")]
    for file in files[:2]:
        file.touch()
    data.to_csv(files[2], index=False)
    return files


def tries(
    stock: Stock, kinds: Sequence[str], count: int, *, first: int = 0, seconds: int = SECONDS
) -> Iterator[Ended]:
    """So many tries, kinds in turn, seeds from `first` on."""
    for number in range(count):
        yield one(stock, kinds[number % len(kinds)], first + number // len(kinds), seconds=seconds)


def one(stock: Stock, name: str, seed: int, *, seconds: int = SECONDS) -> Ended:
    """The try of one kind and seed; the same whenever it is made."""
    kind = KINDS[name]
    stock.ready(kind.parts)
    folder = Path(tempfile.mkdtemp(prefix="try-", dir=stock.root.parent))
    gc.freeze()  # or every object is copied when a child collects
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads in what is forked
        child = os.fork()
    if child == 0:
        _child(stock, kind, Ended(name, seed, (), "", "crashed"), folder)
    status, took = _waited(child, seconds)
    gc.unfreeze()
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it has started
    told: dict[str, Any] = {"kind": name, "seed": seed, "words": (), "done": "", "verdict": "crashed"}
    for file in ("began", "ended"):
        with suppress(OSError):
            told |= json.loads((folder / file).read_text())
    shutil.rmtree(folder, ignore_errors=True)
    if os.WIFSIGNALED(status):
        slow = took > seconds
        told |= {"verdict": "too slow" if slow else "crashed", "code": None}
        told |= {"wrong": f"more than {seconds} s" if slow else signal.strsignal(os.WTERMSIG(status))}
    return Ended(**told | {"seconds": took})


def _waited(child: int, seconds: float) -> tuple[int, float]:
    """How a child ended, and after how many seconds; killed if it takes more. The alarm clock is its own."""
    began = time.monotonic()
    while (took := time.monotonic() - began) <= seconds:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status, took
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1], took


def _child(stock: Stock, kind: Kind, ended: Ended, folder: Path) -> NoReturn:
    """Runs the try and leaves two files of JSON: what is tried, and how it ended."""
    found: dict[str, Any] = {}
    try:
        os.setsid()
        draw = Random(f"{ended.kind} {ended.seed}")
        place = folder / "place"
        place.mkdir()
        for part in kind.parts:
            copied(stock.root / part, place / part)
        os.chdir(place)
        done = kind.spoil(draw, place)
        command = kind.command(draw)
        about = {"words": command.words, "done": done, "wrong": "the process ended by itself"}
        (folder / "began").write_text(json.dumps(about))
        found = _typed(command, folder, place)
    except BaseException:
        found = {"wrong": traceback.format_exc()[-2000:]}
    finally:
        (folder / "ended").write_text(json.dumps(found))
        os._exit(0)


def _typed(command: Command, folder: Path, place: Path) -> dict[str, Any]:
    """Runs a command line within bounds, and judges it."""
    from diag.cli import main

    out, err = folder / "out", folder / "err"
    temporary = folder / "place" / "tmp"
    temporary.mkdir()
    tempfile.tempdir = str(temporary)
    before = tree(place)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  open to the end
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)  # as Python does by itself
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (addresses + MEMORY, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (WRITTEN, WRITTEN))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.argv = ["attnbias", *command.words]
    code: object = None
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError, OSError):
            stream.flush()
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    told, said = (path.read_bytes().decode("utf-8", "backslashreplace") for path in (out, err))
    changed = _changed(before, tree(place))
    verdict, wrong = judged(code, told, said, changed, command.owns, keeps=command.keeps)
    return {"verdict": verdict, "code": code, "said": said[-3000:], "wrong": wrong}


def _changed(before: dict[str, str], after: dict[str, str]) -> dict[str, str]:
    """What has changed in a folder, by path."""
    names = sorted(before.keys() | after.keys())
    words = {
        name: "gone" if name not in after else "new" if name not in before else "changed" for name in names
    }
    return {name: word for name, word in words.items() if before.get(name) != after.get(name)}


def judged(
    code: object, out: str, err: str, changed: dict[str, str], owns: Sequence[str], *, keeps: bool = False
) -> tuple[str, str]:
    """A verdict, and what is wrong. changed: path → how, of the folder that the command ran in."""
    lines = err.splitlines()
    last = lines[-1] if lines else ""
    at = next((line for line in lines if line.startswith("error: ")), last)
    if MEMORY_ENDED.search(err):
        return "crashed", f"memory: {at}"
    if (
        "this was not expected" in err
        or "Traceback (most recent call last)" in err
        or code not in (0, 1, 2, 3)
    ):
        return "not expected", at
    two = len(lines) == 2 and lines[0].startswith("error: ") and last.startswith("tip: ")
    differing = code == 1 and "not as drawn now" in err and last.startswith("tip: ")
    if code in (1, 2) and not two and not differing:
        return "badly told", f"{len(lines)} lines: {' | '.join(lines)[:600]}" if lines else "nothing was said"
    if code == 3 and not lines:
        return "badly told", "exit code 3 without a word"
    if sign := STEERING.search(err) or STEERING.search(out):
        return "badly told", f"a control character {sign[0]!r} reaches the terminal"
    if leaked := LEAKED.search(err):
        return "badly told", f"{leaked[0]} in what is told: {' | '.join(lines)[:300]}"
    left = [path for path in changed if path.endswith(".tmp") or path.startswith("tmp/")]
    foreign = [path for path in changed if path.split("/")[0] not in owns]
    # a full disk may come after all the work
    whole = code == 2 and not keeps and not lines[0].startswith("error: cannot write")
    if wrong := left or foreign or (list(changed) if whole else []):
        return "wrote", f"exit code {code}: " + ", ".join(f"{path} {changed[path]}" for path in wrong[:5])
    return FINE[(0, 2, 3, 1).index(code)], ""
