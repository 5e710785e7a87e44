"""What figures and tables are made of: the runs of each probe as one collection, looks, published values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diag.errors import UserError, did_you_mean, one_of
from diag.models.names.aliases import aliases
from diag.models.names.arguments import split
from diag.results import published
from diag.results.bootstrap import summary
from diag.results.caveats import COLUMNS
from diag.results.collect import Collection
from diag.run.plan import ProbePlan
from diag.studies.attend.plan import AttendPlan


@dataclass(frozen=True)
class Material:
    """Everything measured for one plan.

    runs: probe -> folder of a finished run -> its plan. collections: by probe. lines: probe -> run folder's
    name -> what the run is a point of. looks: folders of finished looks.
    """

    runs: dict[str, dict[Path, ProbePlan]] = field(default_factory=dict)
    collections: dict[str, Collection] = field(default_factory=dict)
    lines: dict[str, dict[str, str]] = field(default_factory=dict)
    looks: dict[AttendPlan, Path] = field(default_factory=dict)

    def collection(self, item: Any) -> Collection:
        """The runs that a figure or table shows. Raises UserError if none of them is there."""
        if item.probe not in self.collections:
            raise UserError(f"no run of probe '{item.probe}' is there", "see what failed above")
        return self.collections[item.probe]

    def table(self, item: Any, which: str = "layers") -> pd.DataFrame:
        """The `layers`, `heads` or `samples` of an item, of its model and token set where it names them.

        Raises UserError if nothing is left.
        """
        found: pd.DataFrame = getattr(self.collection(item), which)
        for column in ("model", "tokens"):
            wanted = getattr(item, column)
            if wanted is None:
                continue
            if wanted not in set(found[column]):
                known = list(dict.fromkeys(found[column]))
                near = did_you_mean(wanted, known) or f"there is {one_of(known)}"
                raise UserError(f"probe '{item.probe}' has no {column} '{wanted}'", near)
            found = found[found[column] == wanted]
        return found


def known_metrics(table: pd.DataFrame, metrics: tuple[str, ...], probe: str) -> pd.DataFrame:
    """The rows of these metrics. Raises UserError for one that the runs do not have."""
    there = list(dict.fromkeys(table["metric"]))
    for name in metrics:
        if name not in there:
            near = did_you_mean(name, there) or "'attnbias metrics' lists them"
            raise UserError(f"the runs of probe '{probe}' have no metric '{name}'", near)
    return table[table["metric"].isin(metrics)]


def published_name(model: str) -> str | None:
    """The published model that a name stands for, also behind a short name; None where there is none."""
    short = aliases().get(split(model)[0].rpartition(":")[2].lower())
    return published.name_of(model) or (published.name_of(short["model"]) if short else None)


def overlay(layers: pd.DataFrame, wanted: bool | Mapping[str, str]) -> pd.DataFrame | None:
    """Published values of a table's lines: columns label, model, metric, layer, value, uncertainty, source.

    wanted: model -> published name; True: what each model's name stands for. None where nothing is known.
    Raises UserError for a published name that is not known.
    """
    if not wanted:
        return None
    lines = layers.drop_duplicates("label")
    parts = []
    for label, model in zip(lines["label"], lines["model"], strict=True):
        name = published_name(model) if wanted is True else dict(wanted).get(model)  # type: ignore[arg-type]
        if name is not None:
            parts.append(published.curves(name).assign(label=label))
    return pd.concat(parts, ignore_index=True) if parts else None


def points(
    samples: pd.DataFrame,
    lines: Mapping[str, str],
    *,
    metrics: tuple[str, ...],
    against: str,
    layers: tuple[int, ...] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Means over layers of every line against what varies between runs, with 95 % intervals over inputs.

    samples: of a collection; within each input, a metric is averaged over its layers first.
    lines: run -> what the run is a point of. against: a key of `diag.show.figures.lengths.AXES`.
    layers: only the mean over these.

    Columns line, against, at, label, model, tower, tokens, metric, mean, std, ci_low, ci_high, n, and the
    constants n_tokens, values, intervention, first_token and those of caveats where the samples have them.
    Raises UserError if a line does not say what it is at.
    """
    chosen = samples if layers is None else samples[samples["layer"].isin(layers)]
    chosen = chosen[chosen["metric"].isin(metrics)]
    if layers is not None and set(layers) - set(chosen["layer"]):
        lacking = sorted(set(layers) - set(chosen["layer"]))
        raise UserError(
            f"layer {lacking[0]} was not measured", "choose layers that all models of the probe have"
        )
    rows = []
    for (_, metric), part in chosen.groupby(["label", "metric"], sort=False):
        within = part.groupby("input_index")["value"].mean().to_numpy()
        first = part.iloc[0]
        row = {
            "line": lines[first["run"]],
            "against": against,
            "at": _at(part, against),
            **{name: first[name] for name in ("label", "model", "tower", "tokens")},
            "metric": metric,
        }
        found = summary(within[:, None], seed=seed)
        row |= {str(name): found[name].iloc[0] for name in found}
        constants = ("n_tokens", "values", "intervention", "first_token", *COLUMNS)
        rows.append(row | {name: first[name] for name in constants if name in part})
    table = pd.DataFrame(rows)
    return table.sort_values(
        "metric", key=lambda names: names.map(metrics.index), kind="stable", ignore_index=True
    )


def _at(part: pd.DataFrame, against: str) -> float:
    """Where a line stands on the axis."""
    model = str(part["model"].iloc[0])
    if against == "step":
        _, _, step = model.partition("@step")
        if not step.isdigit():
            raise UserError(f"'{model}' does not say its training step", "name models with @stepN")
        return float(step)
    if against == "patch_tokens":
        sides = [_number(part, name, model) for name in ("image_size", "patch_size")]
        return float((sides[0] // sides[1]) ** 2)
    return _number(part, against, model)


def _number(part: pd.DataFrame, column: str, model: str) -> float:
    number = pd.to_numeric(part[column], errors="coerce").max() if column in part else np.nan
    if np.isnan(number):
        raise UserError(f"'{model}' has no {column}", "against: n_tokens")
    return float(number)
