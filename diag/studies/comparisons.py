"""The folder of a comparison: its files, its name, and whether it is there already.

A comparison is found again by what it is of: the runs as they are now, and how they were compared. What was
said of it then lies in its folder and is said again, so that nothing is computed or drawn. No torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import Any

from diag.errors import UserError
from diag.inputs.items import sha256
from diag.inputs.outside import mapping_in
from diag.results.folder import MANIFEST, is_finished, once
from diag.results.hashes import edited, hashes, sha256_of
from diag.results.manifest import PROBE
from diag.results.manifest import read as manifest_of
from diag.results.staging import NEXT, Owner, pictures
from diag.results.writing import file_stem
from diag.run.environment import version
from diag.run.plan import RUNS

TABLES = ("comparison.csv", "profiles.csv", "differences.csv", "nulls.csv", "nulls.tex")
VERDICT, ANSWER = "verdict.txt", "answer.json"

OWNER = Owner(
    "compare",
    result=(
        *(MANIFEST, *TABLES, VERDICT, ANSWER),
        *pictures("comparison", "profiles", "profiles-*"),
    ),
)


@dataclass(frozen=True)
class Answer:
    """What is said of a comparison.

    request: what it is of (`request_of`). notes: sentences for stderr. screen: the text for a person.
    document: the same for programs. failed: models and inputs that failed in its runs, with the reason.
    """

    request: str
    notes: Sequence[str]
    screen: str
    document: Mapping[str, Any]
    failed: Mapping[str, str]

    @property
    def written(self) -> dict[str, Any]:
        """As it lies in the folder."""
        return asdict(self)


def request_of(folders: Iterable[Path], asked: Mapping[str, Any]) -> str | None:
    """Identifies a comparison of run folders. asked: how they are compared.

    None where a run cannot be read, tells no hashes of its tables, or has one that was edited: whoever reads
    it tells that.
    """
    told = []
    for folder in once(folders):
        try:
            manifest = manifest_of(folder, PROBE) if is_finished(folder) else {}
            if not isinstance(manifest.get("tables"), dict) or edited(folder, manifest):
                return None
            told.append((str(folder), sha256_of(folder / MANIFEST)))
        except (UserError, OSError):
            return None
    return sha256(json.dumps([version(), told, asked]))


def found_again(
    request: str, folders: Iterable[Path], out: Path | None, root: Path = RUNS
) -> tuple[Path, Answer] | None:
    """The folder of a comparison and what was said of it; None where it is not there as it was written.

    out: the only folder that is looked at; those that `named` names under `root` if None.
    """
    stem = named(folder.resolve().name for folder in once(folders))
    for folder in sorted(root.glob(f"{escape(stem)}-????????")) if out is None else [out]:
        manifest = mapping_in(folder / MANIFEST)
        files = manifest.get("files")
        if manifest.get("request") != request or not isinstance(files, dict) or (folder / NEXT).exists():
            continue
        try:
            whole = ANSWER in files and hashes(folder, files) == files
            said = Answer(**mapping_in(folder / ANSWER))
        except (OSError, TypeError):  # TypeError: of fields that there are not
            continue
        if whole and said.request == request:
            return folder, said
    return None


def named(runs: Iterable[str]) -> str:
    """How the folder of a comparison of these runs is called, before its key."""
    bare = (re.sub(r"-[0-9a-f]{8}$", "", name) for name in runs)  # without their own keys
    return "compare-" + file_stem("+".join(dict.fromkeys(bare)))[:50].strip("-.+")
