"""attnbias: how much of what attention returns does the token already have?

    import diag
    run = diag.probe("demo:vit-p8", "demo")
    run.layers        # one row per layer and metric: mean, std, 95 % interval, n
    run.plot()        # {name: matplotlib Figure}

    run.save("runs/mine") # and diag.Probe.load; diag.compare(run, other), diag.report(run) take either
    diag.probe(model, ["a text …"], tokenizer=tokenizer)   # an object of transformers, timm, open_clip

    calls = diag.capture("demo:lm", ["some text …"], layers=[0], seq_len=16)
    diag.pattern_rows(calls[0])   # attention weights

    folder = diag.measured(diag.ProbePlan(models=("demo:vit-p16", "demo:vit-p8"), images="demo"))
    pandas.read_csv(folder / "layers.csv")

Names are imported when first used: `import diag` costs nothing. `diag.attend`, `diag.collect`,
`diag.figures`, `diag.profiles` and `diag.published` are modules. `import attnbias` is the same package.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_HOME = {
    "probe": "diag.run.api",
    "capture": "diag.run.api",
    "metrics_of": "diag.measure.captured",
    "compare": "diag.studies.from_python",
    "intervene": "diag.studies.from_python",
    "report": "diag.studies.from_python",
    "Probe": "diag.run.in_memory",
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
    "audit": "diag.studies.audit",
    "collect": "diag.results.collect",
    "figures": "diag.show.figures",
    "profiles": "diag.results.profiles",
    "published": "diag.results.published",
}
"""Public modules, and where they live: `from diag.collect import collect` does not know the floors."""

__all__ = list(_HOME)


ALIAS = "attnbias"
"""What the package is called besides, with all that is in it."""


class _Public(MetaPathFinder, Loader):
    """Finds a public module, and what is inside it, where it lives: under both names it is one module."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, *inside = name.split(".")
        if not inside or inside[-1] == "__main__":  # which is run, not imported
            return None
        if package == ALIAS:
            home = find_spec(".".join([__name__, *inside]))
        elif package == __name__ and inside[0] in _MODULES:
            home = find_spec(".".join([_MODULES[inside[0]], *inside[1:]]))
        else:
            return None
        return home and ModuleSpec(name, self, origin=home.origin, loader_state=home.name)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(spec.loader_state)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state  # the import put that of the public name there


sys.meta_path.insert(0, _Public())


def __getattr__(name: str) -> Any:
    if name in _MODULES or name == "variants":
        return import_module(f"diag.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'diag' has no attribute '{name}'")
    try:
        return getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        from diag.errors import EXTRAS, not_installed

        library = (error.name or "").partition(".")[0]
        if library not in EXTRAS:
            raise
        raise not_installed(f"diag.{name}", library) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES, "variants"])
