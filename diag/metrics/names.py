"""What `--metrics` may name: metrics, groups, or `all` of any model. Optional ones have to be named."""

from __future__ import annotations

from collections.abc import Sequence

from diag.errors import UserError, did_you_mean, one_of
from diag.metrics.catalogue import CATALOGUE

GROUPS: dict[str, tuple[str, ...]] = {}
"""What `--metrics` may name beside metrics: name of a group -> its metrics, ratios of others last."""

ALL = "all"

for _name in sorted(CATALOGUE, key=lambda name: CATALOGUE[name].ratio is not None):
    _group = CATALOGUE[_name].place.group
    GROUPS[_group] = (*GROUPS.get(_group, ()), _name)


NOT_OF_ALL = ("divergence", "followed", "untrained")
"""Groups that have to be named: they take images and a pass of their own, or other models."""

OF_OTHERS = [entry for entry in CATALOGUE.values() if entry.place.group == "untrained"]
"""Metrics that are not measured by name, but come of untrained twins."""


def metric_names(names: Sequence[str] | None) -> list[str]:
    """What `--metrics` stands for: the default metrics if None, groups and `all` written out.

    Raises UserError with the nearest name.
    """
    every = [name for group in GROUPS.values() for name in group]
    known = {**GROUPS, ALL: tuple(name for name in every if CATALOGUE[name].place.group not in NOT_OF_ALL)}
    written = [part for name in names or ("default",) for part in known.get(name, (name,))]
    if of_others := next((name for name in written if CATALOGUE.get(name) in OF_OTHERS), None):
        raise UserError(f"metric '{of_others}' is of another model, beside this one", "--null untrained")
    return chosen(written, [*every, *known])


def chosen(names: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """Checks names of metrics; None is all of them. Raises UserError with the nearest name."""
    for name in names or ():
        if name not in known:
            tip = did_you_mean(name, known) or f"metrics are {one_of(known)}"
            raise UserError(f"unknown metric '{name}'", tip)
    return list(known if names is None else dict.fromkeys(names))
