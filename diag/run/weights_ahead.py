"""The next model's weights, read from the disk while another model is measured and its figures are drawn.

Bytes are read and let go: they stay with the system, in memory that it takes back where that is wanted, and
loading the model finds them there. No model is built before its turn, and no state of a library is touched.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import torch

from diag.measure.memory import available
from diag.models.families import family_of
from diag.models.names.spec import SCHEMAS, ModelSpec, folder_named
from diag.run.plan import WEIGHTS, model_files

MOST = 0.5
"""The share of the memory there is that files may be read into ahead of their time."""

AT_ONCE = 4 * 2**20


class WeightsAhead:
    """Reads files in the background, those of one model at a time."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    def read(self, spec: ModelSpec) -> None:
        """Begins with the files of a model, if they are on this machine and not too large. Never raises."""
        if self.thread is not None and self.thread.is_alive():  # slower than the model before was measured
            return
        files = weights_of(spec)
        with suppress(OSError):  # of a file that went meanwhile; whoever loads it tells
            if sum(file.stat().st_size for file in files) < MOST * available(torch.device("cpu")):
                self.thread = threading.Thread(target=self._read, args=[files], daemon=True)
                self.thread.start()

    def _read(self, files: Sequence[Path]) -> None:
        buffer = bytearray(AT_ONCE)
        for file in files:
            with suppress(OSError), file.open("rb", buffering=0) as opened:
                while not self.ended.is_set() and opened.readinto(buffer):
                    pass

    def end(self) -> None:
        """Ends the reading, done or not."""
        self.ended.set()
        if self.thread is not None:
            self.thread.join()


@contextmanager
def weights_ahead() -> Iterator[WeightsAhead]:
    """`with` it, files are read ahead; the reading ends with the block."""
    ahead = WeightsAhead()
    try:
        yield ahead
    finally:
        ahead.end()


def weights_of(spec: ModelSpec) -> list[Path]:
    """The files on this machine that a model is loaded from; none where they cannot be told."""
    if spec.random_init:
        return []
    if spec.checkpoint is not None:
        return [spec.checkpoint]
    name = spec.name
    for schema in SCHEMAS:
        name = name.removeprefix(schema)
    folder = folder_named(name) or _in_cache(spec)
    found = [] if folder is None else [file for file in model_files(folder) if file.suffix in WEIGHTS]
    readable = [file for file in found if file.suffix == ".safetensors"]
    return sorted(readable or found)  # what lies there in two formats is loaded from one


def _in_cache(spec: ModelSpec) -> Path | None:
    """The folder of a repository in the cache of the hub."""
    if find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    repository = family_of(spec.family).repository(spec)
    try:
        file = repository and try_to_load_from_cache(repository, "config.json", revision=spec.revision)
    except (OSError, ValueError):  # no name of a repository
        return None
    return Path(file).parent if isinstance(file, str) else None
