"""Figures drawn in a process of its own, which makes itself ready while a model is loaded and runs.

It is a fresh interpreter, not a fork of one that holds torch and its threads. It is sent tables and sends
back the bytes of pictures, the same as are drawn here; files are written by who asked. Where it cannot be
started, or does not do what it should, figures are drawn here after all: an error is told as if there had
been no other process. It ends with the process that started it, whose end of a pipe it waits at.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from diag.show.figures import Asked

Pictures = Mapping[str, bytes]
"""The files of a figure, by their endings."""

PROGRAM = """
import json, sys
sys.path[:], processes = json.loads(sys.argv[1])
from diag.show.figures.drawer import serve
serve(processes)
"""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""The process may be forked as long as it has one thread."""


def cores() -> int:
    """How many cores this process may use: those it may run on, or fewer where OMP_NUM_THREADS says so."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(allowed, int(asked)) if asked.isascii() and asked.isdigit() and int(asked) else allowed


class Drawer:
    """Draws figures in another process once it is told to start one; `with` it, that ends in time.

    With one core, and on a system that is not POSIX, it starts none.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.tried = False

    def __enter__(self) -> Drawer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the process, once. Call it when figures will be drawn, before what takes time."""
        if self.tried or os.name != "posix" or not sys.executable or cores() < 2:
            return
        self.tried = True
        given = json.dumps([list(map(str, sys.path)), cores() if sys.platform == "linux" else 1])
        with suppress(OSError):  # no memory or no processes left
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, given],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | ONE_THREAD,
                process_group=0,  # Ctrl-C is for this process, which ends that one
            )

    def pictures(self, asked: Sequence[Asked], endings: Sequence[str]) -> list[Pictures] | None:
        """The pictures of figures, in their order; None where no process gives them."""
        if self.process is None or not asked:
            return None
        requests: Any = self.process.stdin
        answers: Any = self.process.stdout
        try:
            pickle.dump((list(asked), tuple(endings)), requests)
            requests.flush()
            return [pickle.load(answers) for _ in asked]
        except (OSError, EOFError, pickle.UnpicklingError):  # it ended: what it met is met here again
            self.stop()
            return None

    def stop(self) -> None:
        """Ends the process, if there is one."""
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        for pipe in filter(None, (process.stdin, process.stdout)):
            with suppress(OSError):  # what was not sent yet cannot be sent any more
                pipe.close()
        process.wait()


def draw_all(
    asked: Mapping[str, Asked], folder: Path, endings: Sequence[str], drawer: Drawer | None = None
) -> list[Path]:
    """Writes figures with the rows behind them, by stem, as `write.save` does; the paths written.

    drawer: who draws, if it was started; this process else. Raises OSError as `write.save` does.
    """
    from diag.show.figures import write

    found = None if drawer is None else drawer.pictures(list(asked.values()), endings)
    paths = list[Path]()
    for place, (stem, one) in enumerate(asked.items()):
        if found is None:
            paths += write.save(one.draw(), one.rows, folder, stem, endings)
        else:
            paths += write.put(found[place], one.rows, folder, stem)
    return paths


# --- in the other process


def serve(processes: int) -> None:
    """Answers one request after another, until there is none; forks so many processes for several figures."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    # what is worth a warning is met again, and told, by who asked
    warnings.simplefilter("error")
    for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", kind)
    make_ready()
    with suppress(EOFError, BrokenPipeError):
        while True:
            asked, endings = pickle.load(requests)
            for pictures in drawn(asked, endings, processes):
                pickle.dump(pictures, answers)
                answers.flush()


def make_ready() -> None:
    """Imports what drawing takes, and draws once: only then are fonts looked for and backends loaded."""
    from matplotlib.figure import Figure

    from diag.show.figures import curves, heatmaps, tables  # noqa: F401
    from diag.show.figures.style import style
    from diag.show.figures.write import PICTURES, pictures

    with style():
        figure = Figure(figsize=(1, 1))
        figure.suptitle("a")
        axes = figure.add_subplot()
        axes.set_title("b")
    pictures(figure, tuple(PICTURES))


def drawn(asked: Sequence[Asked], endings: Sequence[str], processes: int) -> Iterator[Pictures]:
    """The pictures of figures, in their order, by so many processes at once."""
    from diag.show.figures.write import pictures

    count = min(processes, len(asked))
    if count < 2:
        for one in asked:
            yield pictures(one.draw(), endings)
        return
    streams, numbers = list[IO[bytes]](), list[int]()
    for first in range(count):
        number, stream = _forked(asked[first::count], endings)
        numbers.append(number)
        streams.append(stream)
    for place in range(len(asked)):
        yield pickle.load(streams[place % count])
    for number in numbers:
        os.waitpid(number, 0)


def _forked(asked: Sequence[Asked], endings: Sequence[str]) -> tuple[int, IO[bytes]]:
    """The number of a forked process, and the stream of the pictures that it draws; that ends if it fails."""
    reader, writer = os.pipe()
    number = os.fork()
    if number == 0:
        try:
            with os.fdopen(writer, "wb") as answers:
                for pictures in drawn(asked, endings, 1):
                    pickle.dump(pictures, answers)
                    answers.flush()
        finally:
            os._exit(0)
    os.close(writer)
    return number, os.fdopen(reader, "rb")
