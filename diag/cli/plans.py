"""Which verb a YAML file is for, and where it lies.

configs/ holds plans for several verbs, and `configs/*.yaml` names all of them. They are in the package as
well: `attnbias train patch-sizes` and `attnbias train configs/train-patch-sizes.yaml` work anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diag.errors import UserError, one_of, say

YAML = (".yaml", ".yml")

KEYS = {
    "figures": {"figures", "tables", "probes"},
    "train": {"task", "recipe", "variants", "patch_sizes"},
    "train-clip": {"train-data", "train-num-samples", "global-batch-size", "dataset-type", "epochs", "lr"},
}
"""Keys that the files of one verb have, and those of no other."""


HOUSE = Path(__file__).parents[1]
FOLDER = "configs"


def shipped() -> dict[str, Path]:
    """The plans of this package by name: they lie in it where it is installed, beside it in a clone."""
    files = sorted((HOUSE / FOLDER).glob("*.yaml")) or sorted((HOUSE.parent / FOLDER).glob("*.yaml"))
    return {file.stem: file for file in files}


def found(verb: str, given: Path) -> Path:
    """The file as given, or the shipped plan of that name where there is no such file.

    A plan `train-NAME` is found as NAME by the verb train. Raises UserError for a name without an ending that
    neither a file nor a plan has.
    """
    if given.exists() or given.parent not in (Path(), Path(FOLDER)):
        return given
    plans, name = shipped(), given.name.removesuffix(".yaml")
    file = plans.get(f"{verb}-{name}") or plans.get(name)
    if file is not None:
        return file
    if given.suffix:
        return given  # whoever reads it says that it is not there
    own = [name.removeprefix(f"{verb}-") for name, file in plans.items() if verb_of(file) == verb]
    raise UserError(
        f"neither a file nor a shipped plan is called '{given}'",
        f"for attnbias {verb} there are {one_of(own)}",
    )


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

    files: as typed, see `found`. Raises UserError where all are for another, and for a name of none.
    """
    files = [found(verb, file) for file in files]
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
