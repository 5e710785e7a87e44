"""How a run tells how it is going."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Listener(Protocol):
    """Hears how a run is going; the CLI draws it, tests and Python users need not."""

    def say(self, text: str) -> None:
        """A line worth reading: what a name resolved to, what was left out."""

    def start(self, what: str, total: int) -> None:
        """A model begins, with so many inputs."""

    def advance(self, inputs: int) -> None:
        """So many more inputs are done."""


class Silent:
    """Hears nothing."""

    def say(self, text: str) -> None: ...
    def start(self, what: str, total: int) -> None: ...
    def advance(self, inputs: int) -> None: ...


@dataclass
class Progress:
    """How far a run has come; told when it is interrupted."""

    shards_done: int = 0
    shards_total: int = 0

    def __str__(self) -> str:
        return f"{self.shards_done}/{self.shards_total} shards"
