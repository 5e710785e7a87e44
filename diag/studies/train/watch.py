"""The curves over steps: what the probe says of a model while it is trained, on one held-out batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from diag.studies.monitor.monitor import COLUMNS, Monitor


def watcher(
    model: nn.Module, batch: dict[str, Tensor], every: int, last: int
) -> Callable[[int], list[dict[str, Any]]]:
    """A function from a step to rows of step, layer, metric, value: every so many steps and at the last.

    The batch is measured whole; every token counts.
    """
    if not every:
        return lambda step: []
    monitor = Monitor(model, batch.get("images", batch), every=every)

    def look(step: int) -> list[dict[str, Any]]:
        if step % every and step != last:
            return []
        monitor.measure(step)
        history = monitor.history
        now = history[history["step"] == step].itertuples(index=False)
        return [dict(zip(COLUMNS, row, strict=True)) for row in now]

    return look
