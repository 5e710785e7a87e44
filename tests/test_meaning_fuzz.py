"""A sample of the random modules of `benchmarks/meaning_fuzz.py`, and its judge on what is wrong."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import meaning_fuzz
from meaning_fuzz import EXACT, NAMED, SILENT, WRONG, Built, judged

PLAIN = replace(
    Built.drawn(0),
    layout="plain",
    window=4,
    every=1,
    depth=2,
    masked="",
    other="",
    decoder=False,
    lengths=(6, 8),
)
SEEDS = [*range(10), 10, 44, 56, 75, 83, 115, 117, 129, 149, 161]
"""Ten as they come, and ten that were wrong or refused for a false reason when they were first tried."""


@pytest.mark.parametrize("seed", SEEDS)
def test_a_module_is_measured_as_it_was_built(seed: int) -> None:
    assert judged(seed) == (EXACT, "")


@pytest.mark.parametrize("other", ["channels", "rolled keys"])
def test_what_attends_to_others_is_named(other: str) -> None:
    assert judged(0, replace(PLAIN, window=0, other=other)) == (EXACT, "")


def test_the_judge_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = meaning_fuzz._measured

    def shifted(*given: object) -> object:
        found, skipped = measured(*given)
        return {path: numbers + 1e-4 for path, numbers in found.items()}, skipped

    assert judged(0, PLAIN)[0] == EXACT
    monkeypatch.setattr(meaning_fuzz, "_measured", shifted)
    assert judged(0, PLAIN)[0] == WRONG
    monkeypatch.setattr(meaning_fuzz, "_measured", lambda *given: ({}, {}))
    assert judged(0, PLAIN)[0] == SILENT
    monkeypatch.setattr(
        meaning_fuzz, "_measured", lambda *given: ({}, {"blocks.0": "why", "blocks.1": "why"})
    )
    assert judged(0, PLAIN) == (NAMED, "why")
