"""Which attention modules can be changed: one file per library, loaded when a module of it is met.

The class of an existing module is swapped for a subclass: same parameters, same names, same initialisation.
What the change learns lies under `change` in the module.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from diag.variants.changes import Change, Sizes

FILES = {"timm": "in_timm", "torch": "in_torch", "transformers": "in_transformers"}
"""Top-level package of a module's class -> the file beside this one that knows it."""


def can_be_changed(module: nn.Module) -> bool:
    """Whether a module is an attention that is understood, and not changed yet."""
    return _package(module) in FILES and _known(module).can_be_changed(module)


def sizes_of(module: nn.Module) -> Sizes:
    """Channels, query heads and head size of a module that can be changed."""
    return _known(module).sizes_of(module)


def swap(module: Any, path: str, change: Change) -> None:
    """Puts a change into a module that can be changed. Raises UserError, naming its path."""
    library = _known(module)
    parameter = next(module.parameters())
    library.swap(module, path)
    module.change = change.to(parameter.device).train(module.training)


def _package(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


def _known(module: nn.Module) -> Any:
    return importlib.import_module(f"diag.variants.{FILES[_package(module)]}")
