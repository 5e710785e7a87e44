"""Whose folder it is: made for one run, given up if nothing came of it, and large enough.

A folder that holds anything else is left alone.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from diag.errors import UserError
from diag.inputs.outside import json_of
from diag.results.folder import HEADS, LAYERS, MANIFEST, PLAN, QUANTILES, SAMPLES, is_finished
from diag.results.writing import CannotWrite, json_text, write_json, writing
from diag.run.plan import what_differs


def claim(folder: Path, document: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Makes a folder this run's own with its `plan.json`; True if it already holds this run, finished.

    document: what is to be run; its "key" tells runs apart.
    overwrite: remove what another run (or this one) left, and nothing else.
    Raises UserError if the folder holds anything else.
    """
    plan = folder / PLAN
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file", "give a folder with -o")
    # before the plan is looked for: another process may be writing it at this moment
    foreign = folder.exists() and any(file.suffix != ".tmp" for file in folder.iterdir())
    if plan.exists() and overwrite:
        # the manifest goes first: without it the folder is no finished run
        for name in (MANIFEST, LAYERS, HEADS, SAMPLES, QUANTILES):
            (folder / name).unlink(missing_ok=True)
        for name in ("shards", "figures", "activations"):
            shutil.rmtree(folder / name, ignore_errors=True)
    elif plan.exists():
        tip = "give another folder with -o, or --overwrite"
        theirs = json_of(plan, "the plan of a run", tip=tip)
        if theirs.get("key") != document["key"]:
            raise UserError(f"'{folder}' holds another run{what_differs(document, theirs)}", tip)
        return is_finished(folder)
    elif foreign:
        raise UserError(f"'{folder}' is not empty and holds no run", "give another folder with -o")
    elif not _written_first(document, plan):
        return claim(folder, document, overwrite=False)
    else:
        return False
    write_json(document, plan)
    return False


def _written_first(document: Mapping[str, Any], path: Path) -> bool:
    """Writes a document unless another process has; False if one has."""
    own = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(json_text(document), encoding="utf-8")
        try:
            path.hardlink_to(own)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            own.replace(path)
        finally:
            own.unlink(missing_ok=True)
    return True


def release(folder: Path) -> None:
    """Gives up a claimed folder in which nothing was measured, so that a corrected command can have it."""
    if any((folder / "shards").glob("*.parquet")):
        return
    shutil.rmtree(folder / "shards", ignore_errors=True)
    with suppress(OSError):
        (folder / PLAN).unlink()
        folder.rmdir()


def check_room(folder: Path, needed: int) -> None:
    """Raises CannotWrite if the disk of a folder has not so many bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CannotWrite(
            f"'{folder}' needs about {needed / 1e6:.0f} MB more, and {free / 1e6:.0f} MB are free",
            "make room and run the same command again, or choose another folder with -o",
        )
