"""Which layers can be changed at which cost: costs ranked, in words and a table, of one model or several.

No torch.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from diag.errors import spans
from diag.models.names.changes import CONTROLS, is_control, labelled
from diag.results.decimals import fixed
from diag.show.terminal import aligned, text_width


@dataclass(frozen=True)
class Cost:
    """How a cost follows from an effect: `start + sign · effect`, a share.

    said: of what it is a share. counted: whether each input either has it or not.
    """

    start: float
    sign: float
    said: str
    counted: bool = False


COSTS = {
    "loss_increase": Cost(0, 1, "of the loss"),
    "top1_change": Cost(0, -1, "of top-1 accuracy", counted=True),
    "same_class": Cost(1, -1, "of the inputs' classes", counted=True),
    "embedding_change": Cost(0, 1, "of the embedding's cosine"),
    "state_change": Cost(0, 1, "of the final tokens' size"),
}
"""Effect -> the cost that follows; of a sweep, the first that was measured."""

COLUMNS = [
    *("rank", "layer", "intervention", "strength", "cost", "cost_low", "cost_high"),
    *("control", "control_cost", "control_low", "control_high", "measure", "n"),
]

DONE = {
    "skip": "removed",
    "window": "windowed (|i−j| < {:g})",
    "neighbourhood": "restricted to {0:g} × {0:g} patches",
    "top_keys": "restricted to the {:g} top keys of each row",
    "zero": "silenced",
}
"""What can be done to a layer, as the end of a sentence."""


def costs(sensitivity: pd.DataFrame) -> pd.DataFrame:
    """Per intervention, the layers from the cheapest on, each beside its control; a row per layer, `COLUMNS`.

    sensitivity: the table of one sweep. Single layers, all heads. Where an intervention has no control, or
    none was measured, the control's columns are NaN. Empty where no layer was changed alone.
    """
    alone = sensitivity[(sensitivity["scope"] == "one") & (sensitivity["head"] < 0)]
    measure = next((name for name in COSTS if name in set(alone["effect"])), None)
    if measure is None:
        return pd.DataFrame(columns=COLUMNS)
    how, rows = COSTS[measure], alone[alone["effect"] == measure].copy()
    ends = ["ci_low", "ci_high"] if how.sign > 0 else ["ci_high", "ci_low"]
    for name, column in zip(("cost", "cost_low", "cost_high"), ("mean", *ends), strict=True):
        rows[name] = how.start + how.sign * rows[column]
    if how.counted:  # none of n inputs is no proof of none: the rule of three
        rows["cost_high"] = rows["cost_high"].fillna(rows["cost"]).clip(lower=3 / rows["n"])
    parts = []
    for name, strength, part in _each(rows):
        if is_control(name):
            continue
        control = CONTROLS.get(name)
        alike = rows["strength"].eq(strength) | (rows["strength"].isna() & pd.isna(strength))
        beside = rows[(rows["intervention"] == control) & alike].set_index("layer")
        part = part.sort_values(["cost", "layer"], ignore_index=True)
        part = part.assign(rank=part.index + 1, control=control if len(beside) else None)
        part = part.assign(measure=measure)
        for column in ("cost", "low", "high"):
            of = beside["cost" if column == "cost" else f"cost_{column}"]
            part[f"control_{column}"] = part["layer"].map(of).astype(float)
        parts.append(part[COLUMNS])
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS)


def ranking(found: pd.DataFrame, within: float) -> str:
    """The ranked costs, a table per intervention, and which layers cost less than `within` per cent."""
    if found.empty:
        return "No layer was changed alone: which can be spared is not known (--scope one)."
    said = COSTS[found["measure"].iloc[0]].said
    lines = [f"what one layer costs, % {said} [95 % CI over inputs], cheapest first"]
    for name, strength, part in _each(found):
        cells = {
            "rank": [str(rank) for rank in part["rank"]],
            "layer": [str(layer) for layer in part["layer"]],
            labelled(name, strength): [*_percents(part, "cost", "cost_low", "cost_high")],
        }
        control = part["control"].iloc[0]
        if isinstance(control, str):
            cells[labelled(control, strength)] = [
                *_percents(part, "control_cost", "control_low", "control_high")
            ]
        lines += ["", *aligned(cells)]
    return "\n".join([*lines, "", *(line for one in spared(found, within) for line in wrapped(one))])


def spared(found: pd.DataFrame, within: float) -> Iterator[str]:
    """A sentence for each intervention: which layers it costs less than `within` per cent, and what their
    control costs.
    """
    for name, strength, part in _each(found):
        said = COSTS[part["measure"].iloc[0]].said
        done = DONE.get(name, f"changed by {labelled(name, strength)}").format(strength)
        cheap = part[part["cost_high"] < within / 100]
        at = f"at under {within:g} % {said}"
        if part["cost_high"].isna().all():
            yield f"Whether a layer can be {done} {at} is not judged: one input has no interval."
            continue
        if cheap.empty:
            best = part.iloc[0]
            up_to = "" if pd.isna(best["cost_high"]) else f", up to {fixed(100 * best['cost_high'], 2)} %"
            yield (
                f"No layer can be {done} {at}; the cheapest is layer {best['layer']}: "
                f"{fixed(100 * best['cost'], 2)} %{up_to}."
            )
            continue
        several = len(cheap) > 1
        end = " each, alone" if several else ""
        control = part["control"].iloc[0]
        beside = ""
        if isinstance(control, str):
            mean = 100 * cheap["control_cost"].mean()
            words = "their" if several else "its"
            beside = f"; {words} control, {labelled(control, strength)}, costs {fixed(mean, 2)} %"
            beside += " in the mean" if several else ""
        layers = spans(int(layer) for layer in cheap["layer"])
        yield f"Layer{'s' if several else ''} {layers} can be {done} {at}{end}{beside}."
    yield "A layer counts by the upper end of its interval. Costs of single layers do not add up."


def beside_each_other(found: pd.DataFrame) -> list[str]:
    """Several models: a line for each model and intervention, from the costs with a column `model`."""
    cells: dict[str, list[str]] = {}
    of_models = ((model, *case) for model, rows in found.groupby("model", sort=False) for case in _each(rows))
    for model, name, strength, part in of_models:
        ends = part.sort_values("cost").iloc[[0, -1]]
        control = part["control_cost"].mean()
        row = {
            "model": str(model),
            "intervention": labelled(name, strength),
            "mean %": fixed(100 * part["cost"].mean(), 2),
            "control %": "–" if pd.isna(control) else fixed(100 * control, 2),
            "least (layer)": f"{fixed(100 * ends['cost'].iloc[0], 2)} ({ends['layer'].iloc[0]})",
            "most (layer)": f"{fixed(100 * ends['cost'].iloc[1], 2)} ({ends['layer'].iloc[1]})",
        }
        for heading, cell in row.items():
            cells.setdefault(heading, []).append(cell)
    if not cells:
        return []
    measures = [COSTS[name].said for name in dict.fromkeys(found["measure"])]
    return [
        f"what one layer costs, % {' or '.join(measures)}: over the layers of each model",
        *aligned(cells),
    ]


def _each(rows: pd.DataFrame) -> Iterator[tuple[str, float, pd.DataFrame]]:
    """The rows of each intervention with its strength."""
    for case, part in rows.groupby(["intervention", "strength"], sort=False, dropna=False):
        name, strength = case
        yield str(name), float(str(strength)), part


def _percents(part: pd.DataFrame, mean: str, low: str, high: str) -> Iterator[str]:
    for row in part[[mean, low, high]].mul(100).itertuples(index=False):
        if pd.isna(row[0]):
            yield "–"
            continue
        ends = "" if pd.isna(row[1]) else f" [{fixed(row[1], 2, sign=True)}, {fixed(row[2], 2, sign=True)}]"
        yield fixed(row[0], 2, sign=True) + ends


def wrapped(text: str) -> list[str]:
    """A sentence in lines, a number and its % in one."""
    lines = textwrap.wrap(text.replace(" %", "\N{NO-BREAK SPACE}%"), text_width(), break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]
