"""Attend folders on the page: what was looked at, its pictures in words, the split of the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from diag.metrics.catalogue import CATALOGUE, MetricEntry
from diag.show.report.content import NO_NUMBER, NumberCell
from diag.show.report.folders import AttendFolder, Picture
from diag.show.report.maps import number

SPLIT = (
    "cos_y_vself",
    "self_part",
    "context_part",
    "cos_y_vpartner",
    "cos_y_vuniform",
    "excess",
    "self_weight",
)
"""Columns of the split, where they are there."""


@dataclass(frozen=True)
class AttendSection:
    """One token of one input. pictures: with alternative texts. rows: (model, layer, head, cells)."""

    name: str
    title: str
    pictures: tuple[tuple[Picture, str], ...]
    metrics: tuple[MetricEntry, ...]
    rows: tuple[tuple[str, str, str, tuple[NumberCell, ...]], ...]
    failures: tuple[tuple[str, str], ...]


def section_of(attended: AttendFolder) -> AttendSection:
    """An attend folder as the page shows it; what the folder does not say is left out."""
    manifest, numbers = attended.manifest, attended.decomposition
    title, said = _title(manifest), _found(numbers)
    shown = [metric for metric in SPLIT if metric in numbers]
    return AttendSection(
        name=attended.name,
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
    parts = [
        str(
            (manifest.get("input") or {}).get("source")
            or plan.get("image")
            or plan.get("text")
            or "one input"
        )
    ]
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
        f"{row['model']}: cosine of output and own value {row['cos_y_vself']:.3f}, "
        f"of which {row['self_part']:.3f} self part and {row['context_part']:.3f} context part."
        for row in (means if len(means) else numbers).to_dict("records")
    ]


def _row(row: Mapping[Any, Any], shown: Sequence[str]) -> tuple[str, str, str, tuple[NumberCell, ...]]:
    cells = [
        NO_NUMBER if pd.isna(row[name]) else NumberCell(float(row[name]), number(float(row[name])), "")
        for name in shown
    ]
    return str(row.get("model", "")), str(row.get("layer", "")), str(row.get("head", "")), tuple(cells)
