"""Which verb a YAML file is for: configs/ holds plans for several, and `configs/*.yaml` names all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diag.errors import UserError, say

YAML = (".yaml", ".yml")

KEYS = {
    "figures": {"figures", "tables", "probes"},
    "train": {"task", "recipe", "variants", "patch_sizes"},
    "train-clip": {"train-data", "train-num-samples", "global-batch-size", "dataset-type", "epochs", "lr"},
}
"""Keys that the files of one verb have, and those of no other."""


def verb_of(file: Path) -> str | None:
    """The verb that a file is for; None where nothing tells, and whoever was asked says what is wrong."""
    from diag.inputs.document import read_document

    try:
        document = read_document(file).data
    except UserError:
        return None
    keys = set(document) if isinstance(document, dict) else set()
    verbs = [verb for verb, own in KEYS.items() if keys & own]
    return verbs[0] if len(verbs) == 1 else None


def plans_for(verb: str, files: Sequence[Path]) -> list[Path]:
    """The files that are for a verb, or for none that is known; says which of several are for another.

    Raises UserError where all are for another.
    """
    verbs = {file: verb_of(file) or verb for file in files}
    others = {file: other for file, other in verbs.items() if other != verb}
    if others and len(others) == len(verbs):
        file, other = next(iter(others.items()))
        raise UserError(f"'{file}' is for attnbias {other}, not {verb}", for_verb(other, file))
    for file, other in others.items():
        say(f"left out: {file} is for attnbias {other}")
    return [file for file in files if file not in others]


def for_verb(verb: str, file: str | Path) -> str:
    """What to type for a file that is for a verb."""
    return f"attnbias {verb} {'--config ' if verb == 'train-clip' else ''}{file}"
