"""Images read and preprocessed ahead of the model, in processes of their own, so that a GPU need not wait.

A worker does to a sample what the model's own process would do, and samples leave in the order in which they
came in: the number of workers changes no number. What one image does wrong is told of that image alone.
Workers are forked: preprocessing is made of functions that cannot be pickled.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diag.errors import UnreadableInput, UserError
from diag.models.base import Sample, Tower

MOST_WORKERS = 16
"""By default for a GPU. A JPEG of 500 × 375, read from a tar and brought to 224 × 224, takes a core 4 ms."""

WORTH_A_WORKER = 256
"""Images from which on a CPU, too, has one by default: it takes some 0.2 s to begin."""

JOB_IMAGES, JOB_BYTES = 16, 4 * 2**20
"""What a worker hands over at once, at most; at least one image."""

JOBS_AHEAD = 2
"""Jobs per worker that wait for the model: what bounds the memory."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What ends a run; the command line takes both."""

SHARED_MEMORY = Path("/dev/shm")


def workers_for(asked: int | None, images: int, *, on_gpu: bool) -> int:
    """How many processes decode so many images.

    None asked: for a GPU this process's share of the cores; on a CPU, where the model itself uses every core
    but waits for each image, one if they are many and it uses several.
    Raises UserError where processes cannot be forked.
    """
    if asked == 0:
        return 0
    able = "fork" in multiprocessing.get_all_start_methods()
    if asked is None and not (able and sys.platform == "linux"):  # macOS's own libraries do not stand it
        return 0
    if not able:
        raise UserError(f"--workers {asked}: this system cannot fork processes", "use --workers 0")
    if asked is not None:
        return asked
    if not on_gpu:
        return int(images >= WORTH_A_WORKER and torch.get_num_threads() > 1)
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that torchrun started here
    return max(0, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // beside - 1))


@contextmanager
def ahead(
    tower: Tower, samples: Sequence[Sample], *, workers: int, pin: bool = False
) -> Iterator[Iterator[Sample]]:
    """The samples in their order, each with its content at hand or the reason why there is none.

    samples: all that will be asked for, and no other: they are worked on before they are asked for.
    workers: 0 hands out the samples as they are. pin: memory from which a GPU can copy by itself.
    The workers end with the context. Raises UserError if one of them is killed.
    """
    if workers == 0 or tower.prepare is None:
        yield iter(samples)
        return
    with closing(_stream(samples, tower.prepare, workers, pin)) as stream:
        try:
            yield stream
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                "a process that decodes images was killed, perhaps for want of memory",
                "fewer --workers; 0 decodes in the process of the model",
            ) from error


@contextmanager
def shards_ahead(
    tower: Tower,
    shards: Sequence[Sequence[Sample]],
    places: Sequence[int],
    *,
    workers: int,
    pin: bool = False,
) -> Iterator[Callable[[int], Iterator[Sample]]]:
    """`take(place)`, the samples of a shard as `ahead` has them.

    places: the shards that will be asked for, in this order; one may be passed over, as when another process
    has it in hand. A shard that is asked for later than its turn is read when it is asked for.
    An iterator that `take` gave holds until `take` is called again.
    """
    waiting = deque(places)
    given = [sample for place in places for sample in shards[place]]
    taken: Iterator[Sample] = iter(())
    with ahead(tower, given, workers=workers, pin=pin) as stream:

        def take(place: int) -> Iterator[Sample]:
            nonlocal taken
            if place not in waiting:
                return iter(shards[place])
            passed = sum(len(shards[other]) for other in itertools.takewhile(place.__ne__, waiting))
            for _ in itertools.chain(taken, itertools.islice(stream, passed)):
                pass
            while waiting.popleft() != place:
                pass
            taken = itertools.islice(stream, len(shards[place]))
            return taken

        yield take


def _stream(
    samples: Sequence[Sample], prepare: Callable[[Any], Any], workers: int, pin: bool
) -> Generator[Sample, None, None]:
    jobs = _Jobs(samples, prepare)
    place = size = 0
    while not size and place < len(samples):  # the first that can be read tells how large they are
        done = jobs[place]
        size = done.size
        yield _sample(samples[place], done)
        place += 1
    per_job = max(1, min(JOB_IMAGES, JOB_BYTES // max(1, size)))
    workers = min(workers, -(-(len(samples) - place) // per_job))
    if SHARED_MEMORY.is_dir():  # often 64 MB in a container, and filling it kills the worker
        room = shutil.disk_usage(SHARED_MEMORY).free // 2
        workers = min(workers, room // (JOBS_AHEAD * per_job * max(1, size)))
    if workers == 0:
        yield from samples[place:]
        return
    with warnings.catch_warnings(), _signals_wait():
        # more workers than cores, and forking beside threads: both are meant, workers run one thread each
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork")
        loader: Any = iter(
            DataLoader(
                jobs,
                batch_size=per_job,
                sampler=range(place, len(samples)),
                num_workers=workers,
                collate_fn=_together,
                prefetch_factor=JOBS_AHEAD,
                pin_memory=pin,
                multiprocessing_context="fork",
                worker_init_fn=_leave_signals_to_the_parent,
                generator=torch.Generator(),  # else it draws from the generator of everybody
            )
        )
    try:
        for contents, failures in loader:
            for content, failure in zip(contents, failures, strict=True):
                yield _sample(samples[place], _Done(content, failure))
                place += 1
    finally:
        loader._shutdown_workers()  # letting go of it is too little: a traceback may hold it


@dataclass(frozen=True)
class _Done:
    """One sample after its preprocessing: its content, or why there is none."""

    content: Any
    failure: str | None

    @property
    def size(self) -> int:
        tensors = self.content if isinstance(self.content, tuple) else (self.content,)
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


class _Jobs(Dataset[_Done]):
    """What a worker is asked for by place."""

    def __init__(self, samples: Sequence[Sample], prepare: Callable[[Any], Any]) -> None:
        self.samples, self.prepare = samples, prepare

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> _Done:
        try:
            return _Done(self.prepare(self.samples[place].read()), None)
        except UnreadableInput as error:
            return _Done(None, str(error))


def _together(done: Sequence[_Done]) -> tuple[Any, list[str | None]]:
    """Contents and failures of one job; images of one shape as one tensor, which is one file descriptor."""
    contents, failures = [one.content for one in done], [one.failure for one in done]
    shapes = {content.shape if isinstance(content, Tensor) else None for content in contents}
    return (torch.stack(contents) if len(shapes) == 1 and None not in shapes else contents), failures


def _sample(of: Sample, done: _Done) -> Sample:
    if done.failure is not None:
        return Sample(of.id, partial(_refuse, done.failure))
    return Sample(of.id, lambda: done.content)


def _refuse(why: str) -> NoReturn:
    raise UnreadableInput(why)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Holds signals back until workers are there and know what to do with them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal: the parent answers it and ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
