"""Writing a figure: PDF for the paper, PNG for the screen, CSV with its rows; the same bytes each time.

What only writes what another process has drawn (`drawer.py`) needs no matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diag.inputs.csv_injection import to_csv
from diag.results.writing import replacing

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PICTURES: dict[str, dict[str, Any]] = {
    "pdf": {"metadata": {"CreationDate": None, "ModDate": None}},
    "png": {"metadata": {"Software": None}, "dpi": 200},
}


def save(
    figure: Figure, data: pd.DataFrame, folder: Path, stem: str, endings: Sequence[str] = tuple(PICTURES)
) -> list[Path]:
    """Write `stem`.pdf, .png and .csv into the folder (made if it is missing); the paths written.

    endings: the pictures that are written, of `PICTURES`. Nothing in the files depends on the time or the
    machine, so that a changed figure can be told by its bytes. Each file is complete or absent.
    Raises OSError if the disk is full or the folder is read-only.
    """
    return put(pictures(figure, endings), data, folder, stem)


def save_all(
    drawn: Mapping[str, tuple[Figure, pd.DataFrame]], folder: Path, endings: Sequence[str] = tuple(PICTURES)
) -> list[Path]:
    """Writes figures with the rows behind them, by stem, as `save` does; the paths written."""
    return [
        path for stem, (figure, data) in drawn.items() for path in save(figure, data, folder, stem, endings)
    ]


def pictures(figure: Figure, endings: Sequence[str] = tuple(PICTURES)) -> dict[str, bytes]:
    """The files of a figure by their endings. Its layout is solved once, for all of them, and stays."""
    import matplotlib

    from diag.show.figures.glyphs import make_legible
    from diag.show.figures.style import style

    written = {ending: BytesIO() for ending in endings}
    # a figure without an engine for its layout takes the one that is set here
    with style(), matplotlib.rc_context({"figure.constrained_layout.use": False}):
        make_legible(figure)
        _lay_out(figure)
        for ending, file in written.items():
            figure.savefig(file, format=ending, **PICTURES[ending])
    return {ending: file.getvalue() for ending, file in written.items()}


def put(drawn: Mapping[str, bytes], data: pd.DataFrame, folder: Path, stem: str) -> list[Path]:
    """Writes what `pictures` made, and the rows behind it, as `save` does."""
    paths = [folder / f"{stem}.{ending}" for ending in (*drawn, "csv")]
    for path, content in zip(paths, drawn.values(), strict=False):
        replacing(path, partial(Path.write_bytes, data=content))
    replacing(paths[-1], partial(to_csv, data))
    return paths


def _lay_out(figure: Figure) -> None:
    """Solves the layout as the PNG needs it: saving would solve it, and draw everything, once per format."""
    engine, dpi = figure.get_layout_engine(), figure.dpi
    if engine is not None:
        figure.dpi = PICTURES["png"]["dpi"]
        engine.execute(figure)
        figure.dpi = dpi
        figure.set_layout_engine(None)
