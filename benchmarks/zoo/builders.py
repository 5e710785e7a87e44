"""The libraries whose models are built, and the verdict on one of them."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

from zoo.case import NotBuiltError
from zoo.judge import NOT_BUILT, Verdict

BUILDERS: dict[str, Callable[[], ModuleType]] = {
    library: (lambda library=library: import_module(f"zoo.of_{library}"))  # type: ignore[misc]
    for library in ("torch", "timm", "open_clip", "transformers", "others")
}


def verdict_of(library: str, route: str, name: str) -> Verdict:
    """Builds a model and judges what attnbias says of it by one route."""
    from zoo import routes

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        try:
            case = BUILDERS[library]().build(name, Path(folder) if route == "name" else None)
        except NotBuiltError as error:
            return Verdict(NOT_BUILT, [str(error)])
        return routes.as_module(case) if route == "module" else routes.by_name(case)
