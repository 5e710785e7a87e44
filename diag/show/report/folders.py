"""Attend folders among those given to `attnbias report`: their pictures and numbers."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from diag.errors import UserError
from diag.results.folder import manifest_in

PICTURE_BYTES = 2_500_000
"""All pictures together as they are; if they are more, they are made smaller."""
PICTURE_WIDTH = 1400
"""Pixels: about twice what the page shows, for dense screens."""


@dataclass(frozen=True)
class Picture:
    """A picture for the page: its bytes as a `data:` address, its size in pixels, and what it is called."""

    name: str
    address: str
    width: int
    height: int


@dataclass(frozen=True)
class AttendFolder:
    """One attend folder. decomposition: how the outputs split; tokens: most attended first. May be empty."""

    name: str
    manifest: Mapping[str, Any]
    pictures: tuple[Picture, ...]
    decomposition: pd.DataFrame
    tokens: pd.DataFrame


def read_attended(folders: Iterable[Path]) -> tuple[list[AttendFolder], dict[str, str]]:
    """Attend folders, and those that could not be read with the reason."""
    found: list[tuple[Path, Mapping[str, Any], pd.DataFrame, pd.DataFrame, list[Path]]] = []
    problems: dict[str, str] = {}
    for folder in dict.fromkeys(folders):
        try:
            manifest = manifest_in(folder)
            decomposition = pd.read_csv(folder / "decomposition.csv")
            tokens = pd.read_parquet(folder / "tokens.parquet")
            pictures = sorted((folder / "figures").glob("*.png"))
            if not pictures:
                raise UserError(f"'{folder}' holds no figures/*.png")
        except (UserError, OSError, ValueError) as error:
            problems[str(folder)] = " ".join(str(error).split())
            continue
        found.append((folder, manifest, decomposition, tokens, pictures))
    small = sum(path.stat().st_size for *_, paths in found for path in paths) > PICTURE_BYTES
    attended = [
        AttendFolder(folder.resolve().name, manifest, _pictures(paths, small), decomposition, tokens)
        for folder, manifest, decomposition, tokens, paths in found
    ]
    return attended, problems


def _pictures(paths: Sequence[Path], small: bool) -> tuple[Picture, ...]:
    from PIL import Image

    found = []
    for path in paths:
        data, kind = path.read_bytes(), "png"
        with Image.open(path) as image:
            size = image.size
            if small:
                buffer = io.BytesIO()
                smaller = image.convert("RGB")
                smaller.thumbnail((PICTURE_WIDTH, 10 * PICTURE_WIDTH))
                smaller.save(buffer, "WEBP", quality=85, method=6)
                data, kind, size = buffer.getvalue(), "webp", smaller.size
        address = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
        found.append(Picture(path.stem, address, *size))
    return tuple(found)
