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
from diag.results.correlation import LEAST_PLACES, pearson, ranks
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
    values = layer_samples(rows)
    return of_values(values, measured_in(images, values["input"]), seed=seed)


def measured_in(images: Iterable[Item], wanted: Iterable[str]) -> pd.DataFrame:
    """Column `input` and every measure of those images whose ids are wanted, each read once.

    Raises UserError where they are fewer than 4.
    """
    found, wanted = dict[str, dict[str, float]](), set(wanted)
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
    return pd.DataFrame.from_dict(found, orient="index").rename_axis("input").reset_index()


def of_values(values: pd.DataFrame, measured: pd.DataFrame, *, seed: int = 0) -> Complexity:
    """As `against_complexity`, of one metric's values: columns of `LINE`, input and value, mean over heads.

    measured: what `measured_in` gave.
    """
    points = values[[*LINE, "input", "value"]].merge(measured, on="input").dropna(subset="value")
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
    rho, *_ = pearson(ranks(first[None]), ranks(second[None]))
    one, other = (ranks(np.broadcast_to(x, counts.shape), counts) for x in (first, second))
    resampled = pearson(one, other, counts)
    known = resampled[~np.isnan(resampled)]
    low, high = np.quantile(known, INTERVAL) if len(known) else (np.nan, np.nan)
    return {"rho": float(rho), "ci_low": float(low), "ci_high": float(high), "n": len(part)}
