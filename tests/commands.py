"""The command line, run inside the process of the tests."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines of stderr."""
        return self.err.splitlines()


def run_cli(*arguments: object) -> Ended:
    """Runs `attnbias ARGUMENTS` in this process."""
    from diag.cli import main

    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["attnbias", *map(str, arguments)])
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert isinstance(code, int)
    return Ended(code, out.getvalue(), err.getvalue())


def probe_of(metric: str = "cos_y_vself", *, limit: int = 1, out: str = "run") -> tuple[object, ...]:
    """The words of a small probe of demonstration photographs, which are asked for."""
    given = ("-m", "demo:vit-p16", "--images", "demo", "--limit", limit)
    return ("probe", *given, "--metrics", metric, "-o", out)


def sketch(
    figure: Figure, data: pd.DataFrame, folder: Path, stem: str, endings: Sequence[str] = ("pdf", "png")
) -> list[Path]:
    """Lays a figure out and writes its rows, but its pictures stay empty: fonts take the time."""
    from diag.show.figures.style import style

    folder.mkdir(parents=True, exist_ok=True)
    with style():
        figure.draw_without_rendering()
    pictures = [folder / f"{stem}.{suffix}" for suffix in endings]
    for picture in pictures:
        picture.touch()
    data.to_csv(folder / f"{stem}.csv", index=False)
    return [*pictures, folder / f"{stem}.csv"]
