"""Shares: every shard belongs to exactly one process, whoever says which."""

from __future__ import annotations

from typing import Any

import pytest

from diag.errors import UserError
from diag.run.processes import WHOLE, Share, share_of

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SLURM = {
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_MIN": "3",
    "SLURM_ARRAY_TASK_COUNT": "5",
    "SLURM_ARRAY_TASK_STEP": "2",
}


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        (None, {}, (0, 1, None)),
        (None, {"LOCAL_RANK": "2"}, (0, 1, 2)),
        (None, TORCHRUN, (1, 4, 1)),
        (None, SLURM, (2, 5, None)),
        (None, SLURM | TORCHRUN, (9, 20, 1)),
        (
            None,
            {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "1"},
            (0, 1, None),
        ),
        ("2/3", {}, (1, 3, None)),
        ("1/1", SLURM | TORCHRUN, (0, 1, 1)),
        (" 3 / 3 ", SLURM, (2, 3, None)),
    ],
)
def test_the_share_is_read_from_option_and_environment(
    given: str | None, environment: dict[str, str], expected: tuple[Any, ...]
) -> None:
    found = share_of(given, environment)
    assert (found.rank, found.of, found.local_rank) == expected


@pytest.mark.parametrize("given", ["0/4", "5/4", "1", "a/b", "-1/4", "1/0", "", "1/" + "9" * 5000])
def test_a_share_that_is_none_is_told(given: str) -> None:
    with pytest.raises(UserError, match="--shard does not understand") as caught:
        share_of(given, {})
    assert "--shard 1/4" in str(caught.value.tip)


@pytest.mark.parametrize(
    "environment",
    [
        TORCHRUN | {"RANK": "4"},
        TORCHRUN | {"RANK": "one"},
        TORCHRUN | {"LOCAL_WORLD_SIZE": "two"},
        TORCHRUN | {"RANK": "9" * 5000},
        TORCHRUN | {"WORLD_SIZE": "²"},
        SLURM | {"SLURM_ARRAY_TASK_ID": "6"},  # between two steps: the list has gaps
        SLURM | {"SLURM_ARRAY_TASK_ID": "13"},
        SLURM | {"SLURM_ARRAY_TASK_ID": "1"},
        {"SLURM_ARRAY_TASK_ID": "0"},
    ],
)
def test_an_environment_that_contradicts_itself_is_told(environment: dict[str, str]) -> None:
    with pytest.raises(UserError) as caught:
        share_of(None, environment)
    assert "--shard i/n" in str(caught.value.tip)


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_every_shard_is_one_processs(processes: int) -> None:
    shares = [Share(rank, processes) for rank in range(processes)]
    for model in range(3):
        for place in range(7):
            assert sum(share.has(model, place) for share in shares) == 1
    assert all(WHOLE.has(0, place) for place in range(7))
    # models of one shard each are shared as well
    assert {next(s.rank for s in shares if s.has(model, 0)) for model in range(5)} == set(range(processes))
