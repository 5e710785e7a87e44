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

from importlib import import_module
from typing import Any

_HOME = {
    "probe": "diag.api",
    "capture": "diag.api",
    "Probe": "diag.api",
    "ProbePlan": "diag.config",
    "measured": "diag.cache",
    "Monitor": "diag.monitor",
    "MonitorCallback": "diag.monitor_hf",
    "images": "diag.inputs",
    "texts": "diag.inputs",
    "pattern_rows": "diag.pattern",
    "AttentionCall": "diag.attention",
    "METRICS": "diag.metrics",
    "UserError": "diag.errors",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'diag' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
