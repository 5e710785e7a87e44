"""Attend folders on the page: their pictures, also in words, and how the output splits."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from diag.errors import UserError
from diag.inputs.images import open_image
from diag.inputs.outside import regular
from diag.inputs.tables import Layout, read_table
from diag.metrics.catalogue import CATALOGUE, MetricEntry
from diag.results.caveats import filled_in, with_caveats
from diag.results.decimals import fixed
from diag.results.folder import once
from diag.results.hashes import edited
from diag.results.looks import DECOMPOSITION, SPLIT, TOKENS
from diag.results.manifest import ATTEND, again
from diag.results.manifest import read as manifest_of
from diag.show.report.content import GLANCE, NO_NUMBER, NumberCell
from diag.show.report.maps import number

SHOWN = (*GLANCE, "self_weight")
"""Columns of the split, where they are there."""

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
    """One attend folder. decomposition: how the outputs split; may be empty. notes: tables edited since."""

    name: str
    manifest: Mapping[str, Any]
    pictures: tuple[Picture, ...]
    decomposition: pd.DataFrame
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class AttendSection:
    """One token of one input. pictures: with alternative texts. rows: (model, layer, head, cells)."""

    title: str
    pictures: tuple[tuple[Picture, str], ...]
    metrics: tuple[MetricEntry, ...]
    rows: tuple[tuple[str, str, str, tuple[NumberCell, ...]], ...]
    failures: tuple[tuple[str, str], ...]


def read_attended(folders: Iterable[Path]) -> tuple[list[AttendFolder], dict[str, str]]:
    """Attend folders, and those that could not be read with the reason."""
    found: list[tuple[Path, Mapping[str, Any], pd.DataFrame, list[Path]]] = []
    problems: dict[str, str] = {}
    for folder in once(folders):
        try:
            manifest, tip = manifest_of(folder, ATTEND), again(folder, ATTEND)
            decomposition = read_table(folder / DECOMPOSITION, SPLIT, "table", tip=tip)
            decomposition = filled_in(decomposition, manifest.get("models") or ())
            # not shown, but a folder without it is not whole
            read_table(folder / TOKENS, Layout({}), "table", tip=tip)
            pictures = sorted((folder / "figures").glob("*.png"))
            if not pictures:
                raise UserError(f"'{folder}' holds no figures/*.png")
            for picture in pictures:
                regular(picture, "picture", tip)
                open_image(picture)  # decoded, so that one that is damaged is told here
        except UserError as error:
            problems[str(folder)] = " ".join(str(error).split())
            continue
        found.append((folder, manifest, decomposition, pictures))
    small = sum(path.stat().st_size for *_, paths in found for path in paths) > PICTURE_BYTES
    attended = [
        AttendFolder(
            folder.resolve().name,
            manifest,
            pictures_of(paths, small),
            decomposition,
            edited(folder, manifest),
        )
        for folder, manifest, decomposition, paths in found
    ]
    return attended, problems


def pictures_of(paths: Sequence[Path], small: bool) -> tuple[Picture, ...]:
    """Pictures in files as the page holds them."""
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


def section_of(attended: AttendFolder) -> AttendSection:
    """An attend folder as the page shows it; what the folder does not say is left out."""
    manifest, numbers = attended.manifest, attended.decomposition
    title, said = _title(manifest), _found(numbers)
    shown = [metric for metric in SHOWN if metric in numbers]
    return AttendSection(
        title=title,
        pictures=tuple(
            (picture, " ".join([f"{picture.name.replace('-', ' ').replace('_', ' ')}: {title}.", *said]))
            for picture in attended.pictures
        ),
        metrics=tuple(CATALOGUE[metric] for metric in shown),
        rows=tuple(_row(row, shown) for row in numbers.to_dict("records")),
        failures=tuple((str(name), str(why)) for name, why in (manifest.get("failed_models") or {}).items()),
    )


def _title(manifest: Mapping[str, Any]) -> str:
    """`demo:astronaut · layer 5 · mean over heads · patch in row 2, column 3`, as far as it is known."""
    plan = manifest.get("plan") or {}
    source = (manifest.get("input") or {}).get("source") or plan.get("image") or plan.get("text")
    parts = [str(source or "one input")]
    if plan.get("layer") is not None:
        parts.append("last layer" if plan["layer"] == -1 else f"layer {plan['layer']}")
    elif plan.get("depth") is not None:
        parts.append(f"relative depth {plan['depth']:g}")
    parts.append("mean over heads" if plan.get("head") is None else f"head {plan['head']}")
    if plan.get("patch") is not None:
        parts.append("patch in row {}, column {}".format(*plan["patch"]))
    elif plan.get("pixel") is not None:
        parts.append("patch at pixel x = {}, y = {}".format(*plan["pixel"]))
    elif plan.get("token") is not None:
        parts.append(f"token {plan['token']}")
    return " · ".join(parts)


def _found(numbers: pd.DataFrame) -> list[str]:
    """The split of each model in a sentence, for those who do not see the picture."""
    if not {"model", "head", "cos_y_vself", "self_part", "context_part"} <= set(numbers):
        return []
    means = numbers[numbers["head"].astype(str) == "mean"]
    return [
        f"{with_caveats(str(row['model']), row)}: cosine of output and own value "
        f"{fixed(row['cos_y_vself'])}, of which {fixed(row['self_part'])} self part and "
        f"{fixed(row['context_part'])} context part."
        for _, row in (means if len(means) else numbers).iterrows()
    ]


def _row(row: Mapping[Any, Any], shown: Sequence[str]) -> tuple[str, str, str, tuple[NumberCell, ...]]:
    cells = [
        NO_NUMBER if pd.isna(row[name]) else NumberCell(float(row[name]), number(float(row[name])), "")
        for name in shown
    ]
    model = with_caveats(str(row.get("model", "")), row)
    return model, str(row.get("layer", "")), str(row.get("head", "")), tuple(cells)
