"""Writing a figure: PDF for the paper, PNG for the screen, CSV with its rows; the same bytes each time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from diag.show.figures.style import style

PNG_DPI = 200


def save(figure: Figure, data: pd.DataFrame, folder: Path, stem: str) -> list[Path]:
    """Write `stem`.pdf, .png and .csv into the folder (made if it is missing); the paths written.

    Nothing in the files depends on the time or the machine, so that a changed figure can be told by its
    bytes. Each file is complete or absent: it is written under a temporary name and then renamed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with style():
        return [
            _write(
                folder / f"{stem}.pdf",
                lambda path: figure.savefig(
                    path, format="pdf", metadata={"CreationDate": None, "ModDate": None}
                ),
            ),
            _write(
                folder / f"{stem}.png",
                lambda path: figure.savefig(path, format="png", dpi=PNG_DPI, metadata={"Software": None}),
            ),
            _write(folder / f"{stem}.csv", lambda path: data.to_csv(path, index=False, lineterminator="\n")),
        ]


def save_all(drawn: Mapping[str, tuple[Figure, pd.DataFrame]], folder: Path) -> list[Path]:
    """Writes figures with the rows behind them, by stem, as `save` does; the paths written."""
    return [path for stem, (figure, data) in drawn.items() for path in save(figure, data, folder, stem)]


def _write(path: Path, write: Callable[[Path], None]) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
