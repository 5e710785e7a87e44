"""Who this process is among those that share one run: each takes its shards by number."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from diag.errors import UserError


@dataclass(frozen=True)
class Share:
    """Which part of a run is this process's: shards whose number leaves `rank` when divided by `of`.

    local_rank: which device of its machine a process takes; None where nobody said so.
    source: what said so, for messages.
    """

    rank: int = 0
    of: int = 1
    local_rank: int | None = None
    source: str = ""

    def has(self, model: int, place: int) -> bool:
        """Whether a shard is this process's. model: place of the model in the plan. place: of the shard.

        Models begin with different processes, so that many models of one shard each are shared as well.
        """
        return (model + place) % self.of == self.rank

    def __str__(self) -> str:
        return f"process {self.rank + 1} of {self.of}"


WHOLE = Share()
"""A process that does everything."""


def share_of(given: str | None, environment: Mapping[str, str]) -> Share:
    """The share that `--shard i/n` names (i from 1), else that of torchrun and of a Slurm array.

    Under both, each task of the array starts processes of its own: the share is that of the process
    among all of them. Raises UserError for what is no share.
    """
    local = _number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else None
    if _number(environment, "LOCAL_WORLD_SIZE", "1") == 0:  # which shares out the cores of a machine
        raise UserError("the environment variable LOCAL_WORLD_SIZE is 0", "unset it, or start with torchrun")
    if given is not None:
        found = re.fullmatch(r"\s*([0-9]{1,9})\s*/\s*([0-9]{1,9})\s*", given)
        part, parts = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= part <= parts:
            raise UserError(
                f"--shard does not understand '{given}'", "i/n with i from 1 to n: --shard 1/4 … --shard 4/4"
            )
        return Share(part - 1, parts, local, "--shard")
    rank, of, sources = 0, 1, []
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, of = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
        sources.append("RANK")
    if "SLURM_ARRAY_TASK_ID" in environment:
        task, tasks = _slurm_task(environment)
        rank, of = task * of + rank, tasks * of
        sources.append("SLURM_ARRAY_TASK_ID")
    if not 0 <= rank < of:
        raise UserError(
            f"{' and '.join(sources)} say that this is process {rank} of {of}, counted from 0",
            "give the share yourself: --shard i/n, or --shard 1/1 for everything",
        )
    return Share(rank, of, local, " and ".join(sources))


def _slurm_task(environment: Mapping[str, str]) -> tuple[int, int]:
    """Place among the tasks of a Slurm array and their number. An array may begin anywhere, in steps."""
    place = _number(environment, "SLURM_ARRAY_TASK_ID")
    place -= _number(environment, "SLURM_ARRAY_TASK_MIN", "0")
    step = _number(environment, "SLURM_ARRAY_TASK_STEP", "1")
    count = _number(environment, "SLURM_ARRAY_TASK_COUNT", "0")
    if step < 1 or place % step or not 0 <= place // step < count:
        raise UserError(
            "the tasks of this Slurm array are not evenly spaced, or their number is not known",
            "sbatch --array=0-7, or give the share yourself: --shard i/n, or --shard 1/1 for everything",
        )
    return place // step, count


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environment.get(name, default)
    if text is None or not re.fullmatch(r"[0-9]{1,9}", text.strip()):
        raise UserError(
            f"the environment variable {name} is '{text}', which is no number",
            "give the share with --shard i/n",
        )
    return int(text)
