"""A made-up grid of trained cells, with known effects, as the tables that a real one leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

VARIANTS = ("sa", "xsa", "gated_xsa", "random_direction")
GAINS = {"xsa": 0.02, "gated_xsa": 0.01, "random_direction": 0.0}
METRICS = ("value_similarity", "cos_y_vself", "excess", "entropy", "self_weight")


def grid(
    *,
    task: str = "crops",
    patches: Sequence[float] = (16, 8, 4),
    variants: Sequence[str] = VARIANTS,
    seeds: int = 3,
    gains: Mapping[str, float] = GAINS,
    noise: float = 0.004,
    drawn: int = 0,
) -> pd.DataFrame:
    """One row per cell. The gain of accuracy is as given, the same at every patch size, with noise."""
    rng = np.random.default_rng(drawn)
    rows = []
    for seed in range(seeds):
        for patch in patches:
            luck = 0.02 * rng.normal()
            for variant in variants:
                off = noise * rng.normal()
                accuracy = 0.6 + 0.05 * (len(patches) > 1) * (16 / patch if patch == patch else 0) / 4
                accuracy += luck + gains.get(variant.split("=")[0].split(":")[0], 0.0) + off
                size = task if math.isnan(patch) else f"p{patch:g}"
                rows.append(
                    {
                        "cell": f"{size}-{variant.replace('=', '.').replace(':', '.')}-s{seed}",
                        "task": task,
                        "patch_size": patch,
                        "variant": variant,
                        "seed": seed,
                        "accuracy": math.nan if task == "language" else accuracy,
                        "loss": 2.5 - 2 * accuracy,
                        "steps": 600,
                        "parameters": 700_000,
                        "seconds_per_step": 0.1,
                    }
                )
    return pd.DataFrame(rows)


def probed(results: pd.DataFrame, *, layers: int = 6, shift: float = 0.15, drawn: int = 1) -> pd.DataFrame:
    """The per-layer table of the cells' probes: XSA's value similarity is `shift` above the baseline's."""
    rng = np.random.default_rng(drawn)
    rows = []
    for cell in results.to_dict("records"):
        own = 0.02 * rng.normal()
        for metric in METRICS:
            for layer in range(layers):
                mean = 0.5 - 0.04 * layer + own + 0.02 * rng.normal()
                if metric == "value_similarity" and "xsa" in cell["variant"]:
                    mean += shift * (layer + 1) / layers
                if metric == "excess":
                    mean = 0.05 + 0.02 * rng.normal()
                for tokens in ("patch",) if cell["task"] != "language" else ("all",):
                    rows.append(
                        {
                            "model": cell["cell"],
                            "tower": "vision",
                            "layer": layer,
                            "tokens": tokens,
                            "metric": metric,
                            "mean": mean,
                        }
                    )
    return pd.DataFrame(rows)


def learned(results: pd.DataFrame, *, layers: int = 6, heads: int = 4) -> pd.DataFrame:
    """The learned α: below 0 in the first layer, above in the last; of the cells that have one."""
    rng = np.random.default_rng(2)
    rows = [
        {"cell": cell["cell"], "layer": layer, "head": head, "alpha": 0.1 * (layer - 2) + 0.03 * rng.normal()}
        for cell in results.to_dict("records")
        if cell["variant"].startswith("gated_xsa")
        for layer in range(layers)
        for head in range(heads)
    ]
    return pd.DataFrame(rows, columns=["cell", "layer", "head", "alpha"])


def watched(results: pd.DataFrame, *, layers: int = 6) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`(monitor, log)`: every metric settles on its value, the loss falls; every 100 and every step."""
    rng = np.random.default_rng(3)
    monitor, log = [], []
    for cell in results.to_dict("records"):
        raised = 0.15 if "xsa" in cell["variant"] else 0.0
        for step in range(100, 601, 100):
            for metric in METRICS:
                for layer in range(layers):
                    value = (0.4 + raised) * (1 - math.exp(-step / 200)) + 0.01 * rng.normal()
                    monitor.append(
                        {
                            "cell": cell["cell"],
                            "step": step,
                            "layer": layer,
                            "metric": metric,
                            "value": value,
                        }
                    )
        for step in range(1, 601):
            loss = 1.2 + 1.5 * math.exp(-step / 150) + 0.1 * rng.normal()
            log.append({"cell": cell["cell"], "step": step, "loss": loss, "learning_rate": 1e-3})
    names = ["cell", "step", "layer", "metric", "value"]
    return pd.DataFrame(monitor, columns=names), pd.DataFrame(log)
