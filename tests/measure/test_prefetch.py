"""Decoding ahead: same samples, order and numbers for any number of workers, and no worker left over."""

from __future__ import annotations

import io
import itertools
import os
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diag.errors import UnreadableInput, UserError
from diag.inputs import tars
from diag.inputs.images import images
from diag.measure import prefetch
from diag.measure.batch_readings import Incidents
from diag.measure.loop import measure, readable
from diag.measure.prefetch import ahead, shards_ahead, workers_for
from diag.models import load
from diag.models.base import Sample, Tower
from diag.models.encoding import image_encoder, image_preparation, image_samples
from diag.models.names.resolve import parse
from diag.run.plan import SHARD_INPUTS, ProbePlan
from diag.run.processes import Share
from diag.run.run import run_share


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def tower(transform: Any = pixels) -> Tower:
    prepare = image_preparation(transform, torch.float32)
    encode = image_encoder(prepare, "cpu")
    return Tower("vision", (), image_samples, encode, lambda batch: None, prepare=prepare)


def picture(number: int, size: int = 8) -> Image.Image:
    return Image.fromarray(np.full((size, size, 3), number, dtype=np.uint8))


def samples(count: int, size: int = 8) -> list[Sample]:
    return [Sample(f"{number:03d}", partial(picture, number, size)) for number in range(count)]


def children() -> set[int]:
    """The processes that this one has started and that still live."""
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return {int(number) for number in text.split()}


@pytest.fixture(autouse=True)
def _nobody_is_left() -> Any:
    before = children()
    yield
    deadline = time.monotonic() + 5
    while children() - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not children() - before


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_samples_leave_in_the_order_in_which_they_came(workers: int) -> None:
    given = samples(50)
    with ahead(tower(), given, workers=workers) as stream:
        found = list(readable(stream, Incidents(), tower().prepare))
    assert [sample.id for sample in found] == [sample.id for sample in given]
    for number, sample in enumerate(found):
        assert torch.equal(sample.read(), torch.full((3, 8, 8), number / 255))


def process_of(folder: Path, number: int) -> Image.Image:
    """An image, and a note of who read it."""
    with (folder / f"{os.getpid()}").open("a") as file:
        file.write(f"{number}\n")
    return picture(number)


def read_by(folder: Path) -> dict[int, list[int]]:
    return {int(file.name): [int(line) for line in file.read_text().split()] for file in folder.iterdir()}


def test_workers_do_the_reading_and_nothing_twice(tmp_path: Path) -> None:
    given = [Sample(str(number), partial(process_of, tmp_path, number)) for number in range(60)]
    with ahead(tower(), given, workers=2) as stream:
        list(stream)
    found = read_by(tmp_path)
    assert found.pop(os.getpid()) == [0]  # it tells how large they are
    assert len(found) == 2
    assert sorted(number for part in found.values() for number in part) == list(range(1, 60))


def test_a_share_of_the_inputs_reads_that_share_only(tmp_path: Path) -> None:
    """Worker 1 of 3 with its shards of 4: nobody opens what belongs to others, in a tar or elsewhere."""
    given = [Sample(str(number), partial(process_of, tmp_path, number)) for number in range(48)]
    own = [place for place in range(48) if place // 4 % 3 == 1]
    with ahead(tower(), [given[place] for place in own], workers=2) as stream:
        found = [sample.id for sample in stream]
    assert found == [str(place) for place in own]
    assert sorted(number for part in read_by(tmp_path).values() for number in part) == own


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_that_are_passed_over(workers: int) -> None:
    """Shard 4 is in the hands of another process at first, shard 2 is used in part, 7 is never asked for."""
    given = samples(40)
    shards = [given[place : place + 4] for place in range(0, 40, 4)]
    found: dict[int, list[str]] = {}
    with shards_ahead(tower(), shards, [0, 2, 4, 6, 7, 8], workers=workers) as take:
        for place in (0, 2, 6, 8, 4, 0):
            taken = itertools.islice(take(place), 1 if place == 2 else None)
            found[place] = [sample.id for sample in readable(taken, Incidents(), tower().prepare)]
    assert found == {
        place: [sample.id for sample in shards[place]][: 1 if place == 2 else 4] for place in (0, 2, 6, 8, 4)
    }


def test_little_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    """Images of 3 MB: one is a job, and two jobs wait for each worker."""
    given = [Sample(str(number), partial(process_of, tmp_path, number)) for number in range(60)]
    with ahead(tower(lambda image: torch.zeros(3, 512, 512)), given, workers=2) as stream:
        next(stream), next(stream)
        time.sleep(0.5)
        assert sum(len(part) for part in read_by(tmp_path).values()) <= 1 + 1 + 2 * 2 + 1


def test_the_generator_of_everybody_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with ahead(tower(), samples(30), workers=1) as stream:
        list(stream)
    assert torch.equal(torch.rand(1), expected)


# --- what goes wrong


def fail(error: Exception) -> Image.Image:
    raise error


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("broken", [0, 7, 19])
def test_errors_of_one_image_are_its_own(workers: int, broken: int) -> None:
    given = samples(20)
    given[broken] = Sample("broken", partial(fail, UnreadableInput("it is torn")))

    def narrow(image: Image.Image) -> torch.Tensor:
        if np.asarray(image)[0, 0, 0] == 3:
            raise ValueError("too narrow\nfor words")
        if np.asarray(image)[0, 0, 0] == 5:
            raise KeyError("mode")
        return pixels(image)

    incidents = Incidents()
    with ahead(tower(narrow), given, workers=workers) as stream:
        found = [sample.id for sample in readable(stream, incidents, tower(narrow).prepare)]
    assert incidents.failed == {
        "broken": "it is torn",
        "003": "cannot preprocess the image: too narrow",
        "005": "cannot preprocess the image: it lacks 'mode'",
    }
    assert found == [f"{number:03d}" for number in range(20) if number not in (3, 5, broken)]


def test_all_are_unreadable() -> None:
    incidents = Incidents()
    given = [Sample(str(number), partial(fail, UnreadableInput("torn"))) for number in range(5)]
    with ahead(tower(), given, workers=2) as stream:
        assert not list(readable(stream, incidents, tower().prepare))
    assert list(incidents.failed) == ["0", "1", "2", "3", "4"]


def test_images_of_different_sizes() -> None:
    given = [Sample(str(size), partial(picture, size, size)) for size in range(4, 24)]
    with ahead(tower(), given, workers=2) as stream:
        assert [sample.read().shape[-1] for sample in stream] == list(range(4, 24))


def test_an_unexpected_error_is_not_swallowed() -> None:
    given = samples(20)
    given[9] = Sample("bug", partial(fail, LookupError("a mistake of ours")))
    with pytest.raises(LookupError, match="a mistake of ours"), ahead(tower(), given, workers=2) as stream:
        list(stream)


def test_an_error_of_the_model_is_not_taken_for_one_of_workers() -> None:
    def fails() -> None:
        with ahead(tower(), samples(40), workers=2) as stream:
            for number, _ in enumerate(stream):
                if number == 2:
                    raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fails()


def kill(number: int) -> Image.Image:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_worker_is_told_in_two_lines() -> None:
    given = samples(60)
    given[30] = Sample("x", partial(kill, 30))
    with pytest.raises(UserError, match="was killed") as caught, ahead(tower(), given, workers=2) as stream:
        list(stream)
    assert "--workers" in str(caught.value.tip)


INTERRUPTED = """
import os, signal, threading, time
from functools import partial
from pathlib import Path

import torch

from diag.models.base import Sample, Tower
from diag.measure.prefetch import ahead

# a shell that starts tests in the background has them ignore what this is about
signal.signal(signal.SIGINT, signal.default_int_handler)

def slow(number):
    time.sleep(0.05)
    return torch.zeros(3, 4, 4)

tower = Tower("vision", (), None, None, None, prepare=slow)
given = [Sample(str(number), partial(int, number)) for number in range(2500)]
try:
    with ahead(tower, given, workers=2) as stream:
        for number, sample in enumerate(stream):
            if number == 1:
                print(Path(f"/proc/self/task/{os.getpid()}/children").read_text(), flush=True)
                threading.Timer(0.1, lambda: os.killpg(os.getpgrp(), signal.SIGINT)).start()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_ends_the_workers_without_a_word() -> None:
    command = [sys.executable, "-c", INTERRUPTED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, start_new_session=True)
    workers, told = done.stdout.splitlines()
    assert told == "interrupted"
    assert not done.stderr
    assert len(workers.split()) == 2
    assert not any(Path(f"/proc/{number}").exists() for number in workers.split())


# --- how many


def test_numbers_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    assert workers_for(0, 100_000, on_gpu=True) == 0
    assert workers_for(3, 2, on_gpu=False) == 3
    assert workers_for(None, 100_000, on_gpu=True) == 11
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers_for(None, 100_000, on_gpu=True) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert workers_for(None, 100_000, on_gpu=True) == 0


@pytest.mark.parametrize(
    ("threads", "pictures", "workers"), [(1, 100_000, 0), (2, 255, 0), (2, 256, 1), (64, 100_000, 1)]
)
def test_a_cpu_has_one_worker_for_many_images(
    threads: int, pictures: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    assert workers_for(None, pictures, on_gpu=False) == workers


def test_a_system_without_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    assert workers_for(None, 100_000, on_gpu=True) == 0
    assert workers_for(0, 100_000, on_gpu=False) == 0
    with pytest.raises(UserError, match="cannot fork") as caught:
        workers_for(2, 100_000, on_gpu=False)
    assert caught.value.tip == "use --workers 0"


def test_macos_forks_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert workers_for(None, 100_000, on_gpu=True) == 0
    assert workers_for(None, 100_000, on_gpu=False) == 0
    assert workers_for(2, 100_000, on_gpu=False) == 2


def test_shared_memory_that_is_too_small_is_not_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 4 * prefetch.JOBS_AHEAD * 3 * 512 * 512 * 4  # half of it holds two workers' jobs of one image

    started: list[int] = []
    loader = prefetch.DataLoader

    def counted(*given: Any, num_workers: int, **options: Any) -> Any:
        started.append(num_workers)
        return loader(*given, num_workers=num_workers, **options)

    monkeypatch.setattr(prefetch, "DataLoader", counted)
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    for size, expected in ((512, [2]), (1024, [])):
        started.clear()
        with ahead(tower(), samples(12, size), workers=8) as stream:
            assert len(list(stream)) == 12
        assert started == expected


# --- a real model


def test_numbers_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    """Photographs from a tar, one of them broken, through the model's own preprocessing."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, item in enumerate(images("demo")):
            file = io.BytesIO()
            item.read().save(file, "JPEG")  # type: ignore[union-attr]
            content = file.getvalue() if number != 5 else b"broken"
            member = tarfile.TarInfo(f"n{number:02d}/{item.id}.jpg")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    model = load(parse("demo:vit-p16"), device="cpu", dtype=torch.float32)
    of_photographs = model.towers["vision"]
    given = list(of_photographs.samples(images(tmp_path / "a.tar"), None))
    found = []
    for workers in (0, 1, 2):
        incidents = Incidents()
        with ahead(of_photographs, given, workers=workers) as stream:
            parts = list(
                measure(of_photographs, stream, metrics=["cos_y_vself"], batch_size=4, incidents=incidents)
            )
        assert list(incidents.failed) == [given[5].id]
        found.append(([part[0].ids for part in parts], [x.values for part in parts for x in part]))
    plain = list(measure(of_photographs, given, metrics=["cos_y_vself"], batch_size=4))
    found.append(([part[0].ids for part in plain], [x.values for part in plain for x in part]))
    for ids, values in found[1:]:
        assert ids == found[0][0]
        assert all(np.array_equal(a, b) for a, b in zip(values, found[0][1], strict=True))
    assert not np.array_equal(found[0][1][0][:, :, 0], found[0][1][0][:, :, 1])  # images do differ


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("workers", [0, 2])
def test_three_processes_open_what_is_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """A run over two tars in shards of 16, shared by three: each image is read once, by its own process."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(50):
                file = io.BytesIO()
                picture(number, 64).save(file, "PNG")
                member = tarfile.TarInfo(f"{number:03d}.png")
                member.size = len(file.getvalue())
                tar.addfile(member, io.BytesIO(file.getvalue()))
    log = tmp_path / "log"
    read = tars.Index.read

    def logged(index: tars.Index, place: int) -> bytes:
        with log.open("a") as out:  # by any process, one line at once
            out.write(f"{place}\n")
        return read(index, place)

    monkeypatch.setattr(tars.Index, "read", logged)
    plan = ProbePlan.checked(
        models=("demo:vit-p16",),
        images=f"{tmp_path}/{{0..1}}.tar",
        limit=100,
        metrics=("cos_y_vself",),
        batch_size=16,
        workers=workers,
    )
    for rank in (1, 2, 0):
        log.write_text("")
        found = run_share(plan, tmp_path / "run", Share(rank, 3))
        own = [place for place in range(100) if place // SHARD_INPUTS % 3 == rank]
        read_by_it = sorted(int(line) for line in log.read_text().split())
        assert read_by_it == sorted(2 * own)  # once to decode it, once for the hash of its bytes
    assert found is not None
    assert found.complete
    assert found.layers["n"].unique().tolist() == [100]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pinned_images_reach_the_gpu_as_others_do() -> None:
    prepare = image_preparation(pixels, torch.bfloat16)
    on_gpu = Tower("vision", (), image_samples, image_encoder(prepare, "cuda"), lambda batch: None, prepare)
    given = samples(40)
    with ahead(on_gpu, given, workers=2, pin=True) as stream:
        fed = list(stream)
    assert fed[-1].read().is_pinned()
    assert torch.equal(on_gpu.encode(fed).data, on_gpu.encode(given).data)
