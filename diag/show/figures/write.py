"""Writing a figure: PDF for the paper, PNG for the screen, CSV with its rows; the same bytes each time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from diag.inputs.csv_injection import to_csv
from diag.results.writing import replacing
from diag.show.figures.style import style

PICTURES: dict[str, dict[str, Any]] = {
    "pdf": {"metadata": {"CreationDate": None, "ModDate": None}},
    "png": {"metadata": {"Software": None}, "dpi": 200},
}


def save(figure: Figure, data: pd.DataFrame, folder: Path, stem: str) -> list[Path]:
    """Write `stem`.pdf, .png and .csv into the folder (made if it is missing); the paths written.

    Nothing in the files depends on the time or the machine, so that a changed figure can be told by its
    bytes. Each file is complete or absent. Raises OSError if the disk is full or the folder is read-only.
    """
    writers = {kind: partial(figure.savefig, format=kind, **options) for kind, options in PICTURES.items()}
    writers["csv"] = partial(to_csv, data)
    with style():
        for kind, write in writers.items():
            replacing(folder / f"{stem}.{kind}", write)
    return [folder / f"{stem}.{kind}" for kind in writers]


def save_all(drawn: Mapping[str, tuple[Figure, pd.DataFrame]], folder: Path) -> list[Path]:
    """Writes figures with the rows behind them, by stem, as `save` does; the paths written."""
    return [path for stem, (figure, data) in drawn.items() for path in save(figure, data, folder, stem)]
