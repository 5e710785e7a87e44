"""The log of open_clip_train: read for losses that are no numbers any more, and put back as it was."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

from diag.errors import UserError

LOGGED_LOSS = re.compile(r"^(Train Epoch: \d+ \[[^\]]*\]).* Loss: (\S+)")
"""A line of open_clip_train's log: where it is, and the loss of the batch."""


class DivergedError(UserError):
    """The loss is not a number, and stays so."""

    exit_code = 1


class LossWatch(logging.Handler):
    """Reads the losses that open_clip_train logs, and stops it at the second in a row that is no number.

    One may be a batch that mixed precision skips.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bad = 0
        self.where = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a line of the log. Raises DivergedError where the losses of two in a row are no numbers."""
        found = LOGGED_LOSS.match(record.getMessage())
        if found is None:
            return
        self.where = f"{found[1]}: {found[2]}"
        self.bad = 0 if math.isfinite(float(found[2])) else self.bad + 1
        if self.bad > 1:
            self.finish()

    def finish(self) -> None:
        """Raises DivergedError if the last loss that was logged is no finite number."""
        if self.bad:
            raise DivergedError(
                f"the loss is no finite number any more ({self.where})",
                "lower --lr, lengthen --warmup or add --grad-clip-norm 1, and start anew with another --name",
            )


@contextmanager
def watched() -> Iterator[LossWatch]:
    """A watch over every line that is logged in the block.

    What open_clip_train does to every logger's level is undone, and the handlers that it adds are closed.
    """
    handlers = list(logging.root.handlers)
    levels = {logger: logger.level for logger in _loggers()}
    watch = LossWatch()
    logging.root.addHandler(watch)
    try:
        yield watch
    finally:
        for handler in [handler for handler in logging.root.handlers if handler not in handlers]:
            logging.root.removeHandler(handler)
            handler.close()
        for logger in _loggers():
            logger.setLevel(levels.get(logger, logging.NOTSET))  # those that came since, too


def _loggers() -> list[logging.Logger]:
    named = logging.root.manager.loggerDict.values()
    return [logging.root, *(logger for logger in named if isinstance(logger, logging.Logger))]
