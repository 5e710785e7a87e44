"""A grid of trained cells in words, and its table of results for people. No torch.

Nothing is claimed beyond the data: where a 95 % interval includes 0, the sentence says "not distinguishable
from 0"; with one seed there is no interval, and nothing is judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from diag.show.words.phrases import decimal, interval, listed
from diag.studies.train.paired_gains import BASELINE, CONTROL, base_of, grouped

DIGITS = {"points": 2, "nats": 4, "": 3}
"""Digits behind the point; accuracies are coarse, losses are close to each other."""
CONTROLLED = ("xsa", "gated_xsa")
"""Variants whose claim is about the own value's direction, so that a random one is their control."""
PREDICTOR = ("value_similarity", "value similarity")
UNJUDGED = "one seed, not judged"


def words(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Sentences about each task: what was compared, what each variant changes, and what goes with it.

    tables: of `diag.studies.train.outcomes.outcome_tables`.
    """
    said: list[str] = []
    for task in dict.fromkeys(tables["outcomes"]["task"]):
        of = {name: table[table["task"] == task] for name, table in tables.items()}
        said += [*_compared(of), *_gains(of), *_control(of), *_predicted(of), *_inside(of), *_learned(of)]
    return said or ["No cell is finished, so there is nothing to compare."]


def shown(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The results as a table of words: a row per patch size and variant, without empty columns."""
    table = tables["outcomes"]
    rows = []
    for row in _records(table):
        cells = {
            "task": str(row["task"]),
            "patch": decimal(row["patch_size"], digits=0),
            "variant": str(row["variant"]),
            "seeds": str(row["n"]),
        }
        for name, word, digits in (("accuracy", "accuracy, %", 2), ("loss", "loss, nats", 4)):
            cells[word] = decimal(row[name], digits=digits)
            if pd.notna(row[f"{name}_sd"]):
                cells[word] += f" ± {decimal(row[f'{name}_sd'], digits=digits)}"
            unit = "points" if name == "accuracy" else "nats"
            for key, heading in (("gain", f"{name} − {BASELINE}"), ("over_control", f"{name} − control")):
                mean, low, high = (row[f"{name}_{key}{end}"] for end in ("", "_low", "_high"))
                ends = interval(low, high, digits=digits, sign=True)
                said = decimal(mean, digits=digits, sign=True)
                cells[f"{heading}, {unit} [95 %]"] = said if ends == "–" else f"{said} [{ends}]"
        rows.append(cells)
    words = pd.DataFrame(rows)
    if len(words) and words["task"].nunique() == 1:
        words = words.drop(columns="task")
    return words[[name for name in words if (words[name] != "–").any()]]


# --- sentences


def _compared(of: Mapping[str, pd.DataFrame]) -> Iterator[str]:
    """What was trained, what is missing, and what the intervals are about."""
    table = of["outcomes"]
    task, sizes = str(table["task"].iloc[0]), sorted(table["patch_size"].dropna().unique(), reverse=True)
    variants = [name for name in dict.fromkeys(table["variant"]) if name != BASELINE]
    seeds = int(table["n"].max())
    where = f" at patch size {listed([f'{size:g}' for size in sizes])}" if sizes else ""
    against = f"{listed(variants)} against {BASELINE}" if variants else BASELINE
    yield (
        f"Task {task}{where}: {against}, {_seeds(seeds)}; cells of one seed start from the same weights "
        "and see the same data in the same order, and are compared in pairs. Intervals are 95 % t intervals "
        "over seeds, on one set of held-out inputs."
    )
    whole = max(len(sizes), 1) * (len(variants) + 1) * seeds
    there = int(table["n"].sum())
    judged = of["gains"]["ci_low"].notna().sum()
    notes = []
    if there < whole:
        notes.append(f"missing: {whole - there} of {whole} cells")
    lost = int(table["lost"].sum())
    if lost:
        notes.append(f"left out, because their loss is not finite: {lost} of {there} cells")
    if judged > 1:
        notes.append(
            f"of the {judged} intervals against {BASELINE} and control, one in 20 would leave out 0 by chance"
        )
    if notes:
        said = "; ".join(notes)
        yield f"{said[0].upper()}{said[1:]}."


def _gains(of: Mapping[str, pd.DataFrame]) -> Iterator[str]:
    """A sentence per variant: its gain at each patch size, and whether it grows as patches shrink."""
    rows = of["gains"][of["gains"]["against"] == BASELINE]
    outcome = _main(rows)
    rows = rows[rows["outcome"] == outcome]
    for variant, part in rows.groupby("variant", sort=False):
        better = "above 0 is better" if outcome == "accuracy" else "below 0 is better"
        said = f"{variant} − {BASELINE}, {outcome} ({better}): {_judged_all(part)}."
        alike = of["trends"].query("variant == @variant and outcome == @outcome and against == @BASELINE")
        trend = next(iter(_records(alike)), None)
        if trend is not None:
            said += f" Per halving of the patch size it changes by {_judged(trend)}"
            if _sure(trend):
                # for a loss, that the difference falls is that the variant becomes better
                better_now = (trend["ci_low"] > 0) == (outcome == "accuracy")
                said += (
                    f": with smaller patches it fares {'better' if better_now else 'worse'}, over these sizes"
                )
            elif trend["n"] > 1:
                said += ": that it depends on the patch size is not shown"
            said += "."
        yield said


def _control(of: Mapping[str, pd.DataFrame]) -> Iterator[str]:
    """Whether it matters that the direction is the token's own value."""
    rows = of["gains"][of["gains"]["variant"].map(base_of).isin(CONTROLLED)]
    rows = rows[rows["outcome"] == _main(rows)] if len(rows) else rows
    if rows.empty:
        return
    compared = rows[rows["against"] != BASELINE]
    if compared.empty:
        yield (
            f"Without {CONTROL} on the same layers, it is open whether the token's own value matters or "
            "any direction would do."
        )
        return
    for (variant, against), part in compared.groupby(["variant", "against"], sort=False):
        said = f"{variant} − its control {against}: {_judged_all(part)}"
        if not any(_sure(row) for row in _records(part)):
            said += ": that the token's own value matters more than a random direction is not shown"
        yield f"{said}."


def _predicted(of: Mapping[str, pd.DataFrame]) -> Iterator[str]:
    """Whether the baseline's value similarity goes with the gain of the first variant that excludes it."""
    rows = of["relations"]
    metric, name = PREDICTOR
    rows = rows[(rows["predictor"] == metric) & (rows["correlation"] == "pearson")]
    if rows.empty:
        return
    outcome = _main(rows)
    rows = rows[rows["outcome"] == outcome]
    ours = [v for v in dict.fromkeys(rows["variant"]) if base_of(v) in CONTROLLED]
    variant = ours[0] if ours else rows["variant"].iloc[0]
    by = {row["cells"]: row for row in _records(rows[rows["variant"] == variant])}
    whole, within = by["all"], by["within patch sizes"]
    sizes = int(whole["n_patch_sizes"])
    over = f"{int(whole['n_cells'])} pairs of cells"
    if sizes:
        over += f" at {sizes} patch size{'s' if sizes > 1 else ''}"
    head = f"Baseline {name} against the change of {outcome} by {variant}, over {over} "
    if math.isnan(whole["value"]):
        yield f"{head}and {_seeds(int(whole['n_seeds']))}: too few for a correlation."
        return
    said = f"{head}and {_seeds(int(whole['n_seeds']))}: r = {_correlation(whole)}"
    if sizes > 1:
        said += (
            f". Patch size moves both sides, so that this is one trend over {sizes} points more than "
            f"{int(whole['n_cells'])} cells; within patch sizes "
        )
        if math.isnan(within["value"]):
            said += "there are too few cells for a correlation"
        else:
            said += f"r = {_correlation(within)}, p = {within['p']:.2g} of random pairings"
    shown = _sure(within) and within["p"] <= 0.05
    said += "." if shown else ": that it predicts the gain is not shown."
    if shown:
        said += " The baseline's own outcome is part of the gain, so that this is no cause."
    yield said


def _inside(of: Mapping[str, pd.DataFrame]) -> Iterator[str]:
    """How training moved the value similarity, on average over layers."""
    metric, name = PREDICTOR
    rows = of["compensation-means"]
    rows = rows[(rows["metric"] == metric) & rows["variant"].map(base_of).isin(CONTROLLED)]
    for variant, part in list(rows.groupby("variant", sort=False))[:1]:
        parts = [
            f"{_at(row)}{decimal(row['baseline'])} in {BASELINE} and {decimal(row['changed'])} in {variant}, "
            f"a difference of {_judged(row)}"
            for row in _records(part)
        ]
        yield f"The {name}, mean over layers, is {'; '.join(parts)}."


def _learned(of: Mapping[str, pd.DataFrame]) -> Iterator[str]:
    """What α became: mean over heads and layers, its extremes, and how many heads agree over seeds."""
    for variant, part in of["alpha"].groupby("variant", sort=False):
        parts = []
        for key, table in grouped(part, ["patch_size"]):
            rows = _records(table.sort_values("mean"))
            least, most = rows[0], rows[-1]
            apart = ((table["ci_low"] > 0) | (table["ci_high"] < 0)).sum()
            said = (
                f"{_at(key)}a mean of {decimal(table['mean'].mean(), sign=True)} over heads, from "
                f"{decimal(least['mean'], sign=True)} (layer {int(least['layer'])}) to "
                f"{decimal(most['mean'], sign=True)} (layer {int(most['layer'])})"
            )
            if table["ci_low"].notna().any() and "sigmoid" not in str(variant):  # which is never 0
                said += f", {apart} of {len(table)} heads with an interval that leaves out 0"
            parts.append(said)
        yield f"The α that {variant} learned has {'; '.join(parts)}."


# --- parts of sentences


def _main(rows: pd.DataFrame) -> str:
    """The outcome that sentences are about: accuracy where there is one."""
    return "accuracy" if (rows["outcome"] == "accuracy").any() else "loss"


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.itertuples(index=False)]


def _at(row: Mapping[str, Any]) -> str:
    return "" if pd.isna(row["patch_size"]) else f"at patch {row['patch_size']:g} "


def _sure(row: Mapping[str, Any]) -> bool:
    """Whether an interval leaves out 0; False without one."""
    return bool(row["ci_low"] > 0 or row["ci_high"] < 0)


def _judged(row: Mapping[str, Any]) -> str:
    """`+1.20 points (+0.30 to +2.10), above 0`, with n where nothing is claimed."""
    unit = str(row.get("unit", ""))
    digits, n = DIGITS[unit], int(row["n"])
    if n == 0:
        return "an unknown amount (no seed has every patch size)"
    said = " ".join(filter(None, [decimal(row["mean"], digits=digits, sign=True), unit]))
    if n == 1:
        return f"{said} ({UNJUDGED})"
    if pd.isna(row["ci_low"]):
        return f"{said} (the same in all {n} seeds, so no interval)"
    ends = interval(row["ci_low"], row["ci_high"], digits=digits, sign=True)
    if _sure(row):
        return f"{said} ({ends}, n = {n}), {'above' if row['ci_low'] > 0 else 'below'} 0"
    return f"{said} ({ends}), not distinguishable from 0 with n = {n} seeds"


def _judged_all(rows: pd.DataFrame) -> str:
    """`_judged` of every patch size; a judgement that all share is said once."""
    parts = [(_at(row), _judged(row)) for row in _records(rows)]
    ends = {said.rpartition("), ")[2] for _, said in parts}
    if len(parts) > 1 and len(ends) == 1 and all("), " in said for _, said in parts):
        end = ends.pop()
        shared = end.replace("not", "none", 1) if end.startswith("not") else f"all {end}"
        return "; ".join(at + said.removesuffix(f", {end}") for at, said in parts) + f"; {shared}"
    return "; ".join(at + said for at, said in parts)


def _correlation(row: Mapping[str, Any]) -> str:
    ends = interval(row["ci_low"], row["ci_high"], digits=2)
    return f"{decimal(row['value'], digits=2)} ({'no interval' if ends == '–' else ends})"


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count != 1 else ''}"
