"""Blocks of a call shared among threads, each of which computes alone.

A block is small, and a product of it that two threads share costs a hand-over that may take as long as the
product; where another program holds a core, each of them waits. So each thread takes whole blocks instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Block = TypeVar("Block")

MOST_THREADS = 8
"""With more of them than this each product is shared as elsewhere: they would wait for Python's lock."""


def in_threads(
    work: Callable[[Iterator[Block]], None],
    blocks: Callable[[], Iterable[Block]],
    device: torch.device,
    *,
    small: bool = True,
) -> None:
    """Has `work` take the blocks one after the other, on a CPU in as many threads as PyTorch may use.

    The threads live as long as this call, and after it products are shared as they were before it. With
    gradients or autocast, which belong to one thread, and within one of the threads, all are taken here.

    work: writes what it finds of a block to that block's place; its memory is its own.
    blocks: lists them, as of one thread where each has its own. small: whether a block is small enough for
        each thread to have one.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    if not (small and plain and 1 < threads <= MOST_THREADS):
        work(iter(blocks()))
        return
    inference = torch.is_inference_mode_enabled()

    def part() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(remaining)

    # a thread that begins now computes alone
    torch.set_num_threads(1)
    try:
        every = list(blocks())
        remaining = iter(every)  # of a list: whoever asks takes the next
        with ThreadPoolExecutor(max(1, min(threads, len(every)) - 1)) as pool:
            others = [pool.submit(part) for _ in range(min(threads, len(every)) - 1)]
            work(remaining)
            for other in others:
                other.result()
    finally:
        torch.set_num_threads(threads)
