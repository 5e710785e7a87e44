"""What timm's registry says about names: of timm itself where that is imported, else of an index of it.

Importing timm takes seconds. A registry that is in use may hold models of its user, which no index knows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

from diag.models.names.index import keep, kept

PARTS = ("", "models")
"""The folders of timm whose files say what it knows."""


@dataclass(frozen=True)
class Config:
    """What is known of one set of weights, or of an architecture's default ones.

    size: channels, height and width of an image. tag: which of the architecture's weights they are.
    quickgelu: whether timm's notes say that they were trained with that activation.
    """

    size: Sequence[int]
    licence: str = ""
    tag: str = ""
    quickgelu: bool = False


@dataclass(frozen=True)
class Registry:
    """Names of timm.

    models: every architecture. published: every name with weights, `ARCHITECTURE.TAG`, of one architecture
    or (of "") of all. has: whether a name is an architecture; also of those that timm has renamed since.
    config: of a name in either list; None where nothing is registered.
    """

    models: Callable[[], Sequence[str]]
    published: Callable[[str], Sequence[str]]
    has: Callable[[str], bool]
    config: Callable[[str], Config | None]


NO_TIMM = Registry(list, lambda architecture: [], lambda name: False, lambda name: None)


def timm_registry() -> Registry:
    """What timm knows now. Where it is not loaded and has no index, it is imported and the index is made.

    Where it is not installed, it knows no name.
    """
    if find_spec("timm") is None:
        return NO_TIMM
    if "timm" in sys.modules:
        return _of_timm()
    indexed = _indexed()
    if indexed is None:
        asked = _of_timm()
        keep("timm", _index_of(asked), PARTS)  # of timm alone: nobody else has imported it
        return asked
    return indexed


def _of_timm() -> Registry:
    import timm
    from timm.models import get_pretrained_cfg

    def config(name: str) -> Config | None:
        found = get_pretrained_cfg(name)
        if found is None:
            return None
        quickgelu = any("natively QuickGELU" in note for note in found.notes or ())
        return Config(tuple(found.input_size), found.license or "", found.tag or "", quickgelu)

    return Registry(timm.list_models, timm.list_pretrained, timm.is_model, config)


def _index_of(asked: Registry) -> dict[str, Any]:
    from timm.models import get_deprecated_models

    models, published = asked.models(), asked.published("")
    configs = {name: config for name in [*models, *published] if (config := asked.config(name))}
    return {
        "models": list(models),
        "published": list(published),
        "renamed": sorted(get_deprecated_models()),
        "configs": {name: asdict(config) for name, config in configs.items()},
    }


@cache
def _indexed() -> Registry | None:
    """The registry as this installation's index has it; None where there is none, or it is broken."""
    index = kept("timm", PARTS)
    try:
        models, published, renamed = (
            dict.fromkeys(map(str, index[key])) for key in ("models", "published", "renamed")
        )
        configs = {str(name): Config(**fields) for name, fields in index["configs"].items()}
    except (KeyError, TypeError, AttributeError):
        return None

    def of(architecture: str) -> list[str]:
        return [name for name in published if architecture in ("", name.partition(".")[0])]

    return Registry(lambda: [*models], of, (models | renamed).__contains__, configs.get)
