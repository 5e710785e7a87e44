"""Blocks shared among threads: each is taken once, the numbers are the same, and nothing is left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch
from reference import CASES, make_call, random_mask, with_log_normaliser

from diag.attention import call as attention
from diag.attention import pattern
from diag.attention.softmax_statistics import softmax_statistics
from diag.attention.threads import MOST_THREADS, in_threads
from diag.attention.value_spread import value_spread
from diag.attention.value_statistics import value_statistics

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def taken(number: int = 6, **options: bool) -> dict[int, list[int]]:
    """Which blocks each thread took; all wait for each other where there are two."""
    found: dict[int, list[int]] = {}
    together = threading.Barrier(2, timeout=20)

    def work(blocks: Iterator[int]) -> None:
        assert not torch.is_grad_enabled()
        own = found.setdefault(threading.get_ident(), [])
        for block in blocks:
            own.append(block)
            if torch.get_num_threads() == 1 and len(own) == 1:
                together.wait()

    with torch.no_grad():
        in_threads(work, lambda: range(number), CPU, **options)
    return found


@pytest.mark.usefixtures("two_threads")
def test_each_thread_computes_alone_and_each_block_is_taken_once() -> None:
    found = taken()
    assert len(found) == 2
    assert sorted(block for own in found.values() for block in own) == list(range(6))
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_what_is_large_is_taken_here() -> None:
    assert taken(small=False) == {threading.get_ident(): list(range(6))}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("modes", [torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_what_belongs_to_one_thread_is_computed_in_it(modes: type) -> None:
    found = []
    with torch.no_grad(), modes():
        in_threads(lambda blocks: found.append(threading.get_ident()), lambda: range(6), CPU)
    assert found == [threading.get_ident()]


def test_so_many_threads_share_each_product() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(MOST_THREADS + 1)
    try:
        assert taken() == {threading.get_ident(): list(range(6))}
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_an_error_of_any_thread_is_raised_and_the_number_of_threads_is_as_before() -> None:
    here, begun = threading.get_ident(), threading.Event()

    def work(blocks: Iterator[int]) -> None:
        if threading.get_ident() != here:
            begun.set()
            raise MemoryError("of another thread")
        assert begun.wait(timeout=20)

    with torch.no_grad(), pytest.raises(MemoryError, match="another"):
        in_threads(work, lambda: range(2), CPU)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", list(CASES))
def test_numbers_are_those_of_one_thread(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, where blocks are the same: head by head."""
    monkeypatch.setitem(attention.TENSOR_ELEMENTS, "cpu", 1 << 10)
    monkeypatch.setitem(pattern.SEVERAL_HEADS_ELEMENTS, "cpu", 1 << 8)
    call = CASES[name]
    among = random_mask(call.batch, call.tokens, share=0.6)
    rows = (among[:, None] & (call.visibility.count > 1)).expand(call.output.shape[:3])
    found: list[list[torch.Tensor | None]] = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        with torch.inference_mode():
            values = value_statistics(call, among, rows, 4e-6)
            parts = [values, value_spread(call, among, values.value_norm)] if call.own_keys else [values]
            if call.has_pattern:
                parts.append(softmax_statistics(call))
        found.append([getattr(part, field.name) for part in parts for field in fields(part)])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("two_threads")
def test_statistics_are_computed_in_both_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control of the test above: without gradients, blocks of a call go to two threads."""
    call = with_log_normaliser(make_call(batch=4, tokens=40))
    began: list[int] = []
    submit = threading.Thread.start

    def started(thread: threading.Thread) -> None:
        began.append(1)
        submit(thread)

    monkeypatch.setattr(threading.Thread, "start", started)
    monkeypatch.setitem(attention.TENSOR_ELEMENTS, "cpu", 1 << 10)
    monkeypatch.setitem(pattern.SEVERAL_HEADS_ELEMENTS, "cpu", 1 << 11)
    with torch.inference_mode():
        softmax_statistics(call)
        among = torch.ones(1, 40, dtype=torch.bool)
        norm = value_statistics(call, among, among[:, None], 4e-6).value_norm
        value_spread(call, among, norm)
    assert len(began) == 3
    softmax_statistics(call)  # gradients are on
    assert len(began) == 3
