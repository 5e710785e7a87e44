"""Locks that keep two processes off one shard.

They save work and are not what keeps a folder whole (every file is renamed into place, and equal shards are
equal), so that a file system without locks costs time at worst.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from diag.results.writing import writing

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

PATIENCE = 0.2
"""Seconds between looks at what another process has in hand."""

PRESENT = 1 << 62
"""The lock that all processes share which work in a folder: who has it alone is the only one there."""

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
"""What file systems say that have no locks."""


class Locks:
    """Locks in one file, one byte each; `with` it. The kernel frees them when a process ends, however.

    Held by the process, not the object: use one per process and folder. Raises OSError where the file
    cannot be made.
    """

    def __init__(self, file: Path) -> None:
        self.descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)

    @staticmethod
    def at(file: Path) -> Locks:
        """Those in a file whose folder may have to be made. Raises CannotWrite where it cannot be."""
        with writing(file.parent):
            file.parent.mkdir(exist_ok=True)
            return Locks(file)

    def __enter__(self) -> Locks:
        return self

    def __exit__(self, *raised: object) -> None:
        os.close(self.descriptor)

    def take(self, place: int) -> bool:
        """Takes a lock if no other process has it; True where there are no locks at all."""
        return fcntl is None or self._set(fcntl.LOCK_EX | fcntl.LOCK_NB, place)

    def share(self, place: int) -> bool:
        """Takes a lock together with all others that share it; False while one has it alone."""
        return fcntl is None or self._set(fcntl.LOCK_SH | fcntl.LOCK_NB, place)

    def give(self, place: int) -> None:
        """Gives a lock back."""
        if fcntl is not None:
            self._set(fcntl.LOCK_UN, place)

    def _set(self, what: int, place: int) -> bool:
        try:
            fcntl.lockf(self.descriptor, what, 1, place, os.SEEK_SET)
        except OSError as error:
            return error.errno in NO_LOCKS
        return True
