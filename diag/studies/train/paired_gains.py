"""Pairs of trained cells that differ in their variant only, and what seeds say of a difference.

A cell is one training run: a task, a patch size (NaN for language), a variant and a seed. Cells
of one seed start from the same weights and see the same data in the same order, so that a variant is compared
with the baseline seed by seed. The unit of replication is the seed; all cells of a task are evaluated on the
same inputs. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from diag.errors import UserError, one_of

# diag.variants has these names too, but loads torch
BASELINE = "sa"
CONTROL = "random_direction"
MATCHED = "matched_direction"
"""Takes as much of each token as `xsa` does."""

LEVEL = 0.95
OUTCOMES = {"accuracy": ("points", 100.0), "loss": ("nats", 1.0)}
"""Outcome -> its unit in tables of differences, and the factor from `results` to it."""

CASE = ["task", "patch_size"]
CELL = [*CASE, "variant", "seed"]
COMPARED = [*CASE, "variant", "against", "outcome", "unit"]
OVER_SEEDS = ["mean", "sd", "ci_low", "ci_high", "n"]
"""What `over_seeds` gives."""
REQUIRED = ["cell", *CELL, "accuracy", "loss"]


def base_of(variant: str) -> str:
    """Name of a variant without its form and layers.

    >>> base_of("gated_xsa=sigmoid:0-5")
    'gated_xsa'
    """
    return variant.partition(":")[0].partition("=")[0]


def control_of(variant: str, control: str = CONTROL) -> str:
    """The control of a variant: another direction instead of the token's own value, on the same layers.

    >>> control_of("xsa"), control_of("gated_xsa=sigmoid:0-5")
    ('random_direction', 'random_direction:0-5')
    """
    _, colon, layers = variant.partition(":")
    return control + colon + layers


def cleaned(results: pd.DataFrame) -> pd.DataFrame:
    """Results with plain numbers, sorted: tasks and variants as they appear, patches from coarse to fine.

    An outcome that is not finite, of a training that went astray, is NaN.
    Raises UserError for a missing column, a cell that is there twice, or cells of one task and patch size
    that were trained for different numbers of steps, which are no pairs.
    """
    missing = [name for name in REQUIRED if name not in results]
    if missing:
        raise UserError(f"the table of results has no column {one_of(missing)}", "a row per trained cell")
    table = results.reset_index(drop=True)
    for name in ("patch_size", *OUTCOMES):
        numbers = pd.to_numeric(table[name], errors="coerce").astype(float)
        table[name] = numbers.where(np.isfinite(numbers))
    for keys in (["cell"], CELL):
        twice = table[table.duplicated(keys)]
        if len(twice):
            raise UserError(
                f"cell '{twice['cell'].iloc[0]}' is in the results twice", "give the results of one grid"
            )
    if "steps" in table:
        for key, part in grouped(table, CASE):
            if part["steps"].nunique() > 1:
                size = "" if pd.isna(key["patch_size"]) else f" at patch size {key['patch_size']:g}"
                found = ", ".join(f"{steps:g}" for steps in sorted(part["steps"].unique()))
                raise UserError(
                    f"cells of task {key['task']}{size} were trained for {found} steps",
                    "only cells of one recipe can be compared",
                )

    def place(column: pd.Series) -> pd.Series:
        if column.name in ("task", "variant"):
            return pd.Series(pd.factorize(column)[0], column.index)
        return -column if column.name == "patch_size" else column

    return table.sort_values(CELL, key=place, ignore_index=True)


def pairs(results: pd.DataFrame) -> pd.DataFrame:
    """Differences of the outcomes of two cells of the same task, patch size and seed, a row each.

    results: of `cleaned`.

    Columns task, patch_size, variant, against, outcome, unit, seed, difference: variant − `sa`, and variant −
    its controls, of which the matched one is `xsa`'s; accuracy in percentage points, loss in nats (below 0 is
    better). A pair of which one is missing is left out.
    """
    bases = results["variant"].map(base_of)
    compared = (
        results[bases != BASELINE].assign(against=BASELINE),
        results[~bases.isin([BASELINE, CONTROL])].assign(against=results["variant"].map(control_of)),
        results[bases == "xsa"].assign(against=results["variant"].map(lambda x: control_of(x, MATCHED))),
    )
    parts = []
    for ours in compared:
        for outcome, (unit, factor) in OUTCOMES.items():
            theirs = results[[*CELL, outcome]].rename(columns={"variant": "against", outcome: "reference"})
            both = ours.merge(theirs, on=[*CASE, "against", "seed"])  # NaN matches NaN
            difference = factor * (both[outcome] - both["reference"])
            parts.append(both[[*CELL, "against"]].assign(outcome=outcome, unit=unit, difference=difference))
    rows = pd.concat(parts, ignore_index=True).dropna(subset=["difference"])
    return rows[[*COMPARED, "seed", "difference"]].reset_index(drop=True)


def over_seeds(values: Sequence[float] | np.ndarray | pd.Series) -> dict[str, float]:
    """Mean, sd (n − 1), 95 % t interval of the mean and n of one number per seed; NaN is missing.

    The interval is NaN with one seed, and where all seeds agree to rounding: a spread of 0 says that the
    outcome is coarse (accuracies are counts), not that nothing is uncertain.
    """
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    n = len(known)
    mean = float(known.mean()) if n else math.nan
    sd = float(known.std(ddof=1)) if n > 1 else math.nan
    if n > 1 and sd <= 1e-12 * max(float(np.abs(known).max()), 1.0):
        sd = 0.0
    reach = float(student.ppf((1 + LEVEL) / 2, n - 1)) * sd / n**0.5 if sd > 0 else math.nan
    return {"mean": mean, "sd": sd, "ci_low": mean - reach, "ci_high": mean + reach, "n": n}


def grouped(table: pd.DataFrame, keys: list[str]) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Parts of a table with their keys by name, in order of appearance; NaN is a key like any other."""
    for names, part in table.groupby(keys, sort=False, dropna=False, observed=True):
        yield dict(zip(keys, names, strict=True)), part


def of_cells(results: pd.DataFrame, table: pd.DataFrame, cell: str = "cell") -> pd.DataFrame:
    """Rows of a table that belong to a cell of the results, with its task, patch size, variant and seed.

    cell: the table's column with the name of the cell.
    """
    rest = table.drop(columns=[name for name in CELL if name in table])
    return results[["cell", *CELL]].merge(rest, left_on="cell", right_on=cell)
