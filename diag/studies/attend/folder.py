"""What a look at one token gives, and the folder it is kept in. No torch: figures are redrawn from here.

tokens.parquet      one row per model and token of the input
decomposition.csv   one row per model and head, and one for the mean over heads
gaze.parquet        where a question was asked about the image: the maps of every layer
agreement.csv       where it was asked for: how received attention agrees with saliency, in every layer
pictures/           the image as each model sees it
figures/            PDF, PNG and the CSV behind each
manifest.json       "kind": "attend"; written last
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diag.errors import UserError
from diag.inputs.images import open_image
from diag.inputs.items import Inputs
from diag.inputs.outside import regular
from diag.inputs.tables import read_table
from diag.results.agreement import AGREED, AGREEMENT
from diag.results.caveats import filled_in
from diag.results.folder import MANIFEST, PLAN, is_finished
from diag.results.gaze import GAZE, LOOKED
from diag.results.hashes import hashes
from diag.results.looks import DECOMPOSITION, SEEN, TOKENS, WHOLE_SPLIT
from diag.results.manifest import ATTEND, FORMAT, again
from diag.results.manifest import read as manifest_of
from diag.results.staging import Owner, pictures, settle
from diag.results.writing import atomically, write_json, writing
from diag.results.writing import write as write_table
from diag.run.environment import command_line, environment
from diag.studies.attend.plan import AttendPlan

OWNER = Owner(
    ATTEND,
    result=(
        *(PLAN, MANIFEST, TOKENS, DECOMPOSITION, AGREEMENT, GAZE, "pictures/*.png"),
        *pictures("strip", "similarity-map", "most-attended", "agreement", "gaze"),
    ),
)
TOKEN_TYPES = {"row": "Int64", "col": "Int64", "rank": "Int64"}
"""Whole numbers that not every token has."""


@dataclass(frozen=True)
class Attended:
    """One token of one input, seen in one layer of each model.

    tokens: one row per model and token; columns input, model, tower, layer, head ("mean" over heads,
        or the head's index as text), token (position), kind ("patch", "cls", "registers", "text"), row,
        col, text, weight (A_ij), value_cosine (cos(v_j, v_i)), rank (1 is the most attended), is_target.
        Weight, cosine and rank are missing where the target does not see the token.
    decomposition: one row per model and head, and a row "mean" with the means over heads; columns
        model, layer, head, n_visible, and the numbers of `diag.results.looks.NUMBERS`. Both have the columns
        of `diag.results.caveats` that a model tells.
    pictures: model -> the image as the model sees it, `[height, width, 3]` of uint8; empty for texts.
    models: what each name resolved to, its layer and target; for the manifest.
    failed: model -> why it is missing. given: the input that was looked at; None of what was read again.
    agreement: as `diag.results.agreement.AGREED`, gaze: as `diag.results.gaze.LOOKED`; None where they were
        not asked for.
    """

    tokens: pd.DataFrame
    decomposition: pd.DataFrame
    pictures: Mapping[str, np.ndarray]
    models: Sequence[Mapping[str, Any]]
    failed: Mapping[str, str] = field(default_factory=dict)
    given: Inputs | None = None
    agreement: pd.DataFrame | None = None
    gaze: pd.DataFrame | None = None


def write(attended: Attended, plan: AttendPlan, folder: Path) -> list[Path]:
    """Writes the folder, its figures included; the paths of the figures. Raises UserError if it cannot."""
    from PIL import Image

    from diag.show.figures.attend import draw_attended
    from diag.show.figures.write import save_all

    write_table(attended.tokens, folder / TOKENS)
    write_table(attended.decomposition, folder / DECOMPOSITION)
    tables = [TOKENS, DECOMPOSITION]
    for entry in attended.models:
        if entry.get("picture"):
            picture = Image.fromarray(attended.pictures[entry["given"]])
            atomically(folder / entry["picture"], partial(picture.save, format="png"))
    drawn = {}
    if attended.gaze is None:
        drawn = draw_attended(attended.tokens, attended.decomposition, attended.pictures, top=plan.top)
    else:
        from diag.show.figures.gaze import gaze_maps

        write_table(attended.gaze, folder / GAZE)
        tables.append(GAZE)
        layers = {entry["given"]: entry["layer"] for entry in attended.models}
        drawn["gaze"] = gaze_maps(attended.gaze, attended.pictures, layers), attended.gaze
    if attended.agreement is not None:
        from diag.show.figures.agreement import agreement_over_depth

        write_table(attended.agreement, folder / AGREEMENT)
        tables.append(AGREEMENT)
        drawn["agreement"] = agreement_over_depth(attended.agreement), attended.agreement
    with writing(folder / "figures"):
        figures = save_all(drawn, folder / "figures")
    given = attended.given or plan.inputs()
    settle(folder)
    write_json(
        {
            "format": FORMAT,
            "kind": ATTEND,
            "status": "partial" if attended.failed else "complete",
            "key": plan.key(given),
            "plan": plan.model_dump(mode="json"),
            "command": command_line(),
            "input": {"kind": given.kind, "source": given.source, "sha256": given.digest},
            "models": [dict(entry) for entry in attended.models],
            "failed_models": dict(attended.failed),
            "environment": environment(),
            "tables": hashes(folder, tables),
            "figures": [str(path.relative_to(folder)) for path in figures],
        },
        folder / MANIFEST,
    )
    return figures


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an attend folder. Raises UserError if it is none, or one of another version."""
    if not is_finished(folder):
        raise UserError(
            f"'{folder}' is no finished look at a token (no {MANIFEST})", f"attnbias attend … -o {folder}"
        )
    manifest = manifest_of(folder, ATTEND)
    if manifest.get("kind") != ATTEND:
        raise UserError(
            f"'{folder}' is not what attnbias attend wrote (kind {manifest.get('kind', 'of a probe')!r})",
            "give a folder of attnbias attend",
        )
    return manifest


def read(folder: Path) -> Attended:
    """What `write` wrote. Raises UserError if the folder is none, or lacks a file. Does not import torch."""
    manifest, tip = read_manifest(folder), again(folder, ATTEND)
    tokens, decomposition = (
        filled_in(read_table(folder / name, layout, "table", tip=tip), manifest["models"])
        for name, layout in ((TOKENS, SEEN), (DECOMPOSITION, WHOLE_SPLIT))
    )
    pictures = {}
    for entry in manifest["models"]:
        of_model = (table[table["model"] == entry["given"]] for table in (tokens, decomposition))
        heads, split = (set(table["head"]) for table in of_model)
        if len(heads) != 1 or not heads <= split:
            raise UserError(f"'{folder}': its tables have no rows of model '{entry['given']}'", tip)
        if entry.get("picture"):
            file = folder / entry["picture"]
            regular(file, "picture", tip)
            try:
                pictures[entry["given"]] = np.asarray(open_image(file))
            except UserError as error:
                raise UserError(f"'{folder}': {error}", tip) from error
    agreement = gaze = None
    if GAZE in manifest.get("tables", {}):
        gaze = filled_in(read_table(folder / GAZE, LOOKED, "table", tip=tip), manifest["models"])
        gaze = gaze.astype({"row": "Int64", "col": "Int64"})
    if AGREEMENT in manifest.get("tables", {}):
        table = read_table(folder / AGREEMENT, AGREED, "table", tip=tip)
        agreement = filled_in(table, manifest["models"]).astype({"layer": "Int64"})
    return Attended(
        tokens.astype(TOKEN_TYPES),
        decomposition,
        pictures,
        manifest["models"],
        manifest["failed_models"],
        agreement=agreement,
        gaze=gaze,
    )
