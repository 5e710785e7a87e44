"""A sample of the fuzz program ends as it must, and faults that are planted are found."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz import faults, table
from fuzzing.kinds import KINDS
from fuzzing.stock import Stock
from fuzzing.tries import FAULTS, judged, light, one, tries

AREAS = ("reading", "shards", "models", "inputs", "cli")
SAMPLE = 4
"""The seed of the sample: a try of every kind."""

SEED, LISTING = 4, 0
"""Tries that end soon: one of a manifest, and one that lists models."""


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    with light(drawn=False):
        yield Stock(tmp_path_factory.mktemp("fuzz") / "stock")


@pytest.mark.parametrize("area", AREAS)
def test_a_sample_ends_as_it_must(stock: Stock, area: str) -> None:
    kinds = [name for name, kind in KINDS.items() if kind.area == area]
    found = list(tries(stock, kinds, len(kinds), first=SAMPLE))
    wrong = [ended for ended in found if ended.verdict in FAULTS]
    assert wrong == [], f"\n{table(found)}\n{faults(found, 3)}"
    assert len({ended.verdict for ended in found}) > 1  # some mutations do no harm, some do


def test_every_kind_is_in_the_sample() -> None:
    assert {kind.area for kind in KINDS.values()} == set(AREAS)


def test_a_try_is_the_same_again(stock: Stock) -> None:
    first, again = (one(stock, "manifest", SEED) for _ in range(2))
    assert (first.words, first.done, first.verdict) == (again.words, again.done, again.verdict)
    assert first.done.startswith("run/manifest.json: ")
    assert first.words[0] in ("compare", "report", "merge", "probe")


def raises(*arguments: Any, **more: Any) -> Any:
    raise KeyError("planted")


def never_ends(*arguments: Any, **more: Any) -> Any:
    while True:
        pass


def writes(*arguments: Any, **more: Any) -> Any:
    from diag.errors import UserError

    Path("left").touch()
    raise UserError("refused", "tip")


def takes_all(*arguments: Any, **more: Any) -> Any:
    return bytearray(2**40)


def steers(*arguments: Any, **more: Any) -> Any:
    os.write(1, b"\x1b[31mred")
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("planted", "verdict", "wrong"),
    [
        (raises, "not expected", "KeyError: 'planted'"),
        (never_ends, "too slow", "more than 1 s"),
        (writes, "wrote", "exit code 2: left new"),
        (takes_all, "crashed", "memory: error: there is not enough memory"),
        (steers, "badly told", "a control character '\\x1b'"),
    ],
)
def test_a_planted_fault_is_found(
    stock: Stock, monkeypatch: pytest.MonkeyPatch, planted: Any, verdict: str, wrong: str
) -> None:
    monkeypatch.setattr("diag.models.names.resolve.listing", planted)
    ended = one(stock, "options-models", LISTING, seconds=1 if planted is never_ends else 20)
    assert (ended.verdict, ended.wrong[: len(wrong) + 20].count(wrong)) == (verdict, 1), ended


@pytest.mark.parametrize(
    ("code", "err", "changed", "verdict"),
    [
        (0, "words\n", {"out/a": "new"}, "fine"),
        (2, "error: a\ntip: b\n", {}, "refused"),
        (3, "1 failed:\n  a: b\n", {"out/a": "new"}, "partly"),
        (1, "error: a\ntip: b\n", {}, "failed"),
        (2, "error: a\n", {}, "badly told"),
        (2, "a warning\nerror: a\ntip: b\n", {}, "badly told"),
        (2, "", {}, "badly told"),
        (3, "", {}, "badly told"),
        (3, "1 failed:\n  a: KeyError: 'b'\n", {}, "badly told"),
        (1, "error: a\ntip: this was not expected; b\n", {}, "not expected"),
        (None, "Traceback (most recent call last):\n", {}, "not expected"),
        (2, "error: a\ntip: b\n", {"out": "new"}, "wrote"),
        (2, "error: cannot write 'a': b\ntip: c\n", {"out": "new"}, "refused"),
        (0, "", {"run/layers.csv": "gone"}, "wrote"),
        (0, "", {"out/.a.csv.1-2.tmp": "new"}, "wrote"),
        (0, "", {"tmp/a": "new"}, "wrote"),
    ],
)
def test_how_an_end_is_judged(code: int | None, err: str, changed: dict[str, str], verdict: str) -> None:
    assert judged(code, "", err, changed, ("out",))[0] == verdict
