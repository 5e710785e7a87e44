"""A study's result in its folder: made there once, and found again by its plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diag.results.hashes import edited
from diag.results.manifest import read as manifest_of
from diag.results.staging import Owner
from diag.run.environment import command_line
from diag.run.plan import Plan
from diag.run.progress import Listener
from diag.run.run_folder import alone_at_work

Make = Callable[[Path, Mapping[str, Any]], object]
"""Writes a result: where, and what its manifest says of how it came about."""


def once(
    plan: Plan,
    key: str,
    folder: Path,
    owner: Owner,
    make: Make,
    *,
    overwrite: bool,
    listener: Listener,
    complete: str = "",
) -> None:
    """Has `make` write a plan's result into a folder; one that is there stays, and edits in it are told.

    key: identifies the result. complete: what is said of one that is there. Raises UserError as
    `alone_at_work` does.
    """
    document: Mapping[str, Any] = {
        "kind": owner.verb,
        "key": key,
        "plan": plan.model_dump(mode="json"),
        "command": command_line(),
    }
    with alone_at_work(folder, owner, document, overwrite=overwrite, waiting=listener.say) as place:
        if place is not None:
            make(place, document)
            return
        if complete:
            listener.say(complete)
        for note in edited(folder, manifest_of(folder, owner.verb)):
            listener.say(note)
