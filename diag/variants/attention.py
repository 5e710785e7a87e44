"""Which attention modules can be changed: one file per library, loaded when a module of it is met.

The class of an existing module is swapped for a subclass: same parameters, same names, same initialisation.
What the change learns lies under `change` in the module.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from diag.variants.formulas import Change, Sizes

FILES = {"timm": "in_timm", "torch": "in_torch", "transformers": "in_transformers"}
"""Top-level package of a module's class -> the file beside this one that knows it."""


def can_be_changed(module: nn.Module) -> bool:
    """Whether a module is an attention that is understood, and not changed yet."""
    return _package(module) in FILES and _known(module).can_be_changed(module)


def swap(module: Any, path: str, change: Callable[[Sizes], Change]) -> None:
    """Puts a change, made for its sizes, into a module that can be changed.

    Raises UserError, naming its path.
    """
    device = next(module.parameters()).device
    module.change = change(_known(module).swap(module, path)).to(device).train(module.training)


def _package(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


def _known(module: nn.Module) -> Any:
    return importlib.import_module(f"diag.variants.{FILES[_package(module)]}")


_CLASSES: dict[tuple[type, type], type] = {}


def mixed(ours: type, theirs: type, prefix: str) -> type:
    """The subclass `PREFIXTheirs` of both, ours first; the same one every time."""
    if (ours, theirs) not in _CLASSES:
        name = f"{prefix}{theirs.__name__}"
        _CLASSES[ours, theirs] = type(name, (ours, theirs), {"__module__": ours.__module__})
    return _CLASSES[ours, theirs]
