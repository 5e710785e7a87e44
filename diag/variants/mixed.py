"""A class of ours mixed in before a library's: what a module's class is swapped for."""

from __future__ import annotations

_CLASSES: dict[tuple[type, type], type] = {}


def mixed(ours: type, theirs: type, prefix: str) -> type:
    """The subclass `PREFIXTheirs` of both, ours first; the same one every time."""
    if (ours, theirs) not in _CLASSES:
        name = f"{prefix}{theirs.__name__}"
        _CLASSES[ours, theirs] = type(name, (ours, theirs), {"__module__": ours.__module__})
    return _CLASSES[ours, theirs]
