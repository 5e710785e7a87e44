"""Does attention spread in images with more to see? A probe's entropy per image, against the images."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from diag.errors import UnreadableInput, UserError
from diag.inputs.complexity import MEASURES, complexity_of
from diag.inputs.items import Item
from diag.results.bootstrap import INTERVAL, drawn
from diag.results.correlation import LEAST_PLACES, pearson
from diag.results.tables import layer_samples, read_samples
from diag.run.in_memory import Probe

LINE = ["model", "tower", "tokens", "layer"]


@dataclass(frozen=True)
class Complexity:
    """points: a row per line, layer and image: the metric's `value`, mean over heads, and every measure.

    correlations: a row per line, layer and measure: Spearman's `rho` over images with its 95 % bootstrap
    interval (`ci_low`, `ci_high`), and `n`.
    """

    points: pd.DataFrame
    correlations: pd.DataFrame


def against_complexity(
    run: Probe | Path | str, images: Iterable[Item], metric: str = "entropy", *, seed: int = 0
) -> Complexity:
    """A metric of a probe's images against their complexity.

    run: what `diag.probe` gave, or a run folder. images: those that it measured, as `diag.images(…)` lists
    them; they are known by their ids.

    Raises UserError where the run has not measured the metric input by input, or fewer than 4 of its images
    are among those given.
    """
    samples = run.samples if isinstance(run, Probe) else read_samples(Path(run))
    rows = samples[samples["metric"] == metric]
    if rows.empty:
        raise UserError(
            f"the run holds no '{metric}' of single inputs",
            f"probe with --metrics {metric} and keep its samples",
        )
    return of_values(layer_samples(rows), images, seed=seed)


def of_values(values: pd.DataFrame, images: Iterable[Item], *, seed: int = 0) -> Complexity:
    """As `against_complexity`, of one metric's values: columns of `LINE`, input and value, mean over heads.

    Raises UserError where fewer than 4 of the images are among those given.
    """
    values = values[[*LINE, "input", "value"]]
    found, wanted = dict[str, dict[str, float]](), set(values["input"])
    for item in images:
        if item.id in wanted:
            with suppress(UnreadableInput):
                content = item.read()
                if isinstance(content, Image.Image):  # a text has nothing to see
                    found[item.id] = complexity_of(content)
    if len(found) < LEAST_PLACES:
        raise UserError(
            f"{len(found)} of the run's {len(wanted)} images are among those given; a correlation needs "
            f"{LEAST_PLACES}",
            "give the images that were measured: diag.images(FOLDER)",
        )
    of_images = pd.DataFrame.from_dict(found, orient="index").rename_axis("input").reset_index()
    points = values.merge(of_images, on="input").dropna(subset="value")
    lines = [
        {**dict(zip(LINE, line, strict=True)), "measure": measure, **correlation(part, measure, seed)}
        for line, part in points.groupby(LINE, sort=False, observed=True)
        for measure in MEASURES
    ]
    return Complexity(points, pd.DataFrame(lines))


def correlation(part: pd.DataFrame, measure: str, seed: int) -> dict[str, float]:
    """Spearman's ρ of `value` and a measure over images, with the interval of resampled images."""
    first, second = part["value"].to_numpy(float), part[measure].to_numpy(float)
    counts = drawn(len(part), seed).astype(float)
    once = np.ones((1, len(part)))
    rho, *_ = pearson(ranks_of(first, once), ranks_of(second, once), once)
    resampled = pearson(ranks_of(first, counts), ranks_of(second, counts), counts)
    known = resampled[~np.isnan(resampled)]
    low, high = np.quantile(known, INTERVAL) if len(known) else (np.nan, np.nan)
    return {"rho": float(rho), "ci_low": float(low), "ci_high": float(high), "n": len(part)}


def ranks_of(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Ranks of values `[place]` in samples that hold each so often, `[sample, place]`; ties at the mean."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(values[order]) != 0])
    sizes = np.add.reduceat(counts[:, order], starts, axis=1)  # [sample, distinct value]
    ranks = np.cumsum(sizes, axis=1) - sizes + 0.5 * sizes + 0.5
    group = np.empty(len(values), int)
    group[order] = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(values)]))
    return ranks[:, group]
