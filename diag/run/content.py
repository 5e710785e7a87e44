"""Whether a finished run is of what lies there now, by the hashes of what it has measured.

Keys know files by names, sizes and times, which a copy with its times kept (`cp -p`, `touch -r`) can have in
common with another file. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diag.inputs.items import Inputs, content_digest
from diag.run.plan import ProbePlan


def replaced(
    plan: ProbePlan, inputs: Mapping[str, Inputs], folder: Path, manifest: Mapping[str, Any]
) -> list[str]:
    """A sentence for each kind of inputs of which other bytes were measured than are there, else nothing.

    inputs: the plan's, by kind.
    Inputs whose samples were not kept have no hashes, nor have those of older runs: of them nothing is said.
    Reads as many files as were hashed.
    """
    told = manifest.get("inputs", {})
    found = []
    for kind, given in inputs.items():
        measured = told.get(kind, {}).get("content")
        if measured is None or given.files is None:
            continue
        hashed = min(plan.limit, plan.keep_samples, len(given))
        ids = [given.items[place].id for place in range(hashed)]
        if measured != content_digest(given.files.content(ids)):
            found.append(
                f"'{folder}' is of other {given.kind} than lie in '{given.source}' now, "
                "though of the same names, sizes and times"
            )
    return found
