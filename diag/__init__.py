"""attnbias: how much of what attention returns does the token already have?

    import diag
    run = diag.probe("demo:vit-p8", "demo")
    run.layers        # one row per layer and metric: mean, std, 95 % interval, n
    run.plot()        # {name: matplotlib Figure}

    calls = diag.capture("demo:lm", ["some text …"], layers=[0], seq_len=16)
    diag.pattern_rows(calls[0])   # attention weights

    folder = diag.measured(diag.ProbePlan(models=("demo:vit-p16", "demo:vit-p8"), images="demo"))
    pandas.read_csv(folder / "layers.csv")

Names are imported when first used: `import diag` costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_HOME = {
    "probe": "diag.run.api",
    "capture": "diag.run.api",
    "Probe": "diag.run.api",
    "ProbePlan": "diag.run.plan",
    "measured": "diag.run.cache",
    "Monitor": "diag.studies.monitor.monitor",
    "MonitorCallback": "diag.studies.monitor.hf_trainer",
    "images": "diag.inputs.images",
    "texts": "diag.inputs.texts",
    "pattern_rows": "diag.attention.pattern",
    "AttentionCall": "diag.attention.call",
    "METRICS": "diag.metrics.default",
    "UserError": "diag.errors",
}

_MODULES = {
    "attend": "diag.studies.attend",
    "collect": "diag.results.collect",
    "figures": "diag.show.figures",
    "figures.curves": "diag.show.figures.curves",
    "figures.depth": "diag.show.figures.depth",
    "profiles": "diag.results.profiles",
    "published": "diag.results.published",
}
"""Public modules, and where they live: `from diag.collect import collect` does not know the floors."""

__all__ = list(_HOME)


class _Public(ModuleType):
    """A module under its public name; the one that it stands for is loaded when something of it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        return getattr(import_module(_MODULES[self.__name__.removeprefix("diag.")]), name)


for _name in _MODULES:
    sys.modules[f"diag.{_name}"] = _Public(f"diag.{_name}")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return sys.modules[f"diag.{name}"]
    if name not in _HOME:
        raise AttributeError(f"module 'diag' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])
