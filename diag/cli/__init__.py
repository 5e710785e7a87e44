"""The command line: options become plans, results go to the screen. A file holds one verb, or a few.

stdout carries the result, stderr everything else. Everything heavy is imported inside functions, so
that `--help` is instant.

Exit codes: 0 done, 1 failed (also a result that cannot be printed), 2 usage or unreadable input, 3
finished but some models or inputs failed, 130 or 143 interrupted, 141 nobody read stdout to its end.
"""

from diag.cli import probe, merge, compare, attend, audit, figures  # noqa: F401, I001  in the order of --help
from diag.cli import report, intervene, readout, train, train_clip, listings  # noqa: F401
from diag.cli.app import app, main

__all__ = ["app", "main"]
