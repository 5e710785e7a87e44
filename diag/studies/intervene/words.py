"""A sweep in words: the layer table of the most telling effect, and what predicts it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from diag.errors import counted
from diag.models.names.changes import CONTROLS, MATCHED, is_control, labelled
from diag.results.caveats import caveats
from diag.results.decimals import fixed
from diag.show.terminal import aligned, filled, text_width
from diag.studies.intervene.costs import costs, ranking, wrapped
from diag.studies.intervene.effect import EFFECTS
from diag.studies.intervene.sweep import SCOPES

FIRST_EFFECTS = ("loss_change", "top1_change", "class_divergence", "embedding_change", "token_change")
"""The effect that is shown first is the first of these that was measured."""

PREDICTORS = {"cos_y_vself": "bias", "excess": "excess over partner"}
STUDY = "state_change"
OF_SINKS = [name for name in CONTROLS if name.startswith("sink_")]
OF_SINKS += dict.fromkeys(CONTROLS[name] for name in OF_SINKS)
PROJECTIONS = [name for name, control in CONTROLS.items() if control == MATCHED]
"""Their control stands beside them in the table; more words would be the same."""

SIDE_BY_SIDE = 3
"""Interventions that fit beside each other in a terminal."""


def main_effect(table: pd.DataFrame) -> str:
    """The most telling effect that was measured."""
    there = set(table["effect"])
    return next(name for name in FIRST_EFFECTS if name in there)


def table(
    sensitivity: pd.DataFrame,
    relations: pd.DataFrame,
    manifest: Mapping[str, Any],
    *,
    within: float | None = None,
) -> str:
    """The sweep on at most 80 columns: a row per layer, a column per intervention, and what predicts it.

    within: at which cost in per cent a layer can be spared; layers are ranked where it is given.
    """
    effect = main_effect(sensitivity)
    rows = sensitivity[(sensitivity["effect"] == effect) & (sensitivity["head"] < 0)]
    model = manifest["model"]
    lines = [
        *filled([model["given"], manifest["tower"], f"n = {int(rows['n'].max())}", *caveats(model)]),
        *textwrap.wrap(
            f"{effect}: {EFFECTS[effect].definition}; in brackets 95 % CI over inputs", text_width()
        ),
    ]
    for scope, said in SCOPES.items():
        part = rows[rows["scope"] == scope]
        if not part.empty:
            lines += ["", said, *_by_layer(part)]
    lines += _of_sinks(sensitivity)
    lines += [line for said in _beside_controls(sensitivity, effect) for line in wrapped(said)]
    if within is not None:
        lines += ["", ranking(costs(sensitivity), within)]
    return "\n".join([*lines, "", *_predicted(relations[relations["effect"] == effect])])


def _of_sinks(sensitivity: pd.DataFrame) -> Iterator[str]:
    """What edits of sinks do to the final tokens, beside their controls: the measure of 2606.08105."""
    rows = sensitivity[(sensitivity["effect"] == STUDY) & (sensitivity["head"] < 0)]
    rows = rows[(rows["scope"] == "one") & rows["intervention"].isin(OF_SINKS)]
    if not rows["intervention"].str.startswith("sink_").any():
        return
    yield ""
    yield from textwrap.wrap(f"{STUDY}: {EFFECTS[STUDY].definition}", text_width())
    yield from _by_layer(rows)


def _beside_controls(sensitivity: pd.DataFrame, effect: str) -> Iterator[str]:
    """A sentence for each intervention: what it costs in the mean over layers, and what its control costs;
    and how much of the attention it leaves where it was.
    """
    rows = sensitivity[(sensitivity["scope"] == "one") & (sensitivity["head"] < 0)]
    keys = ["intervention", "strength", "effect"]
    means = rows.groupby(keys, dropna=False)["mean"].mean()
    for name, strength in rows[["intervention", "strength"]].drop_duplicates().itertuples(index=False):
        control = CONTROLS.get(name)
        if (name, strength, effect) not in means or is_control(name) or name in PROJECTIONS:
            continue
        said, kept = [], (name, strength, "kept_mass")
        if control is not None and (control, strength, effect) in means:
            cost, other = (fixed(means[one, strength, effect], 4, sign=True) for one in (name, control))
            said.append(f"{cost} in the mean over layers, its control {labelled(control, strength)} {other}")
        if kept in means and not pd.isna(means[kept]):
            share = means[kept]
            said.append(
                f"the sink holds {100 * (1 - share):.0f} % of the attention"
                if name in OF_SINKS
                else f"{100 * share:.0f} % of the attention stays where it was"
            )
        if said:
            yield f"{labelled(name, strength)}: {'; '.join(said)}."


def _by_layer(rows: pd.DataFrame) -> Iterator[str]:
    """A row per layer, the interventions side by side as many as fit, the control last."""
    keys = ["intervention", "strength"]
    parts = {_label(name): part for name, part in rows.groupby(keys, sort=False, dropna=False)}
    names = _side_by_side({name: part["intervention"].iloc[0] for name, part in parts.items()})
    layers = sorted(rows["layer"].unique())
    for start in range(0, len(names), SIDE_BY_SIDE):
        cells = {"layer": [str(layer) for layer in layers]}
        for name in names[start : start + SIDE_BY_SIDE]:
            by_layer = parts[name].set_index("layer")
            cells[name] = [_cell(by_layer.loc[layer]) if layer in by_layer.index else "–" for layer in layers]
        yield from aligned(cells)
        if start + SIDE_BY_SIDE < len(names):
            yield ""


def _side_by_side(names: Mapping[str, str]) -> list[str]:
    """Interventions by their labels, each control behind the last one that it is for; directions, of all
    projections, are the last.
    """
    given, last = list(names), {CONTROLS.get(name): place for place, name in enumerate(names.values())}

    def place(label: str) -> tuple[bool, int, bool]:
        name = names[label]
        return name.endswith("_direction"), last.get(name, given.index(label)), name in last

    return sorted(given, key=place)


def _predicted(relations: pd.DataFrame) -> Iterator[str]:
    """Whether the bias, and its excess, predict the effect, layer by layer and head by head."""
    for level, part in relations.groupby("level", sort=False):
        shown = part[~part["intervention"].map(is_control) & part["predictor"].isin(list(PREDICTORS))]
        if shown.empty:
            continue
        places = int(shown["places"].max())
        if shown["rho"].isna().all():
            yield f"{counted(places, str(level))}: too few to tell whether the bias predicts the effect."
            continue
        yield f"does it predict the effect? Spearman ρ over {places} {level}s [95 % CI], p"
        cells: dict[str, list[str]] = {"intervention": []}
        for row in shown.to_dict("records"):
            name = _label((row["intervention"], row["strength"]))
            if name not in cells["intervention"]:
                cells["intervention"].append(name)
            rho, low, high = (_signed(row[key]) for key in ("rho", "ci_low", "ci_high"))
            said = f"{rho} [{low}, {high}] p = {float(row['p']):.2g}" if row["p"] == row["p"] else "–"
            cells.setdefault(PREDICTORS[row["predictor"]], []).append(said)
        yield from aligned(cells)
        clear = shown[(shown["p"] <= 0.05) & (shown["ci_low"] * shown["ci_high"] > 0)]
        if clear.empty:
            yield f"Over these {places} {level}s neither clearly predicts the effect."
        if len(shown) > 1:
            yield f"p: random pairings of {level}s; of {len(shown)} such tests, expect some below 0.05."


def _signed(value: Any) -> str:
    return "–" if pd.isna(value) else fixed(float(value), 2, sign=True)


def _label(name: Any) -> str:
    intervention, strength = name
    return labelled(str(intervention), float(strength))


def _cell(row: pd.Series) -> str:
    if pd.isna(row["ci_low"]):
        return fixed(row["mean"], 4, sign=True)
    ends = ", ".join(fixed(row[end], sign=True) for end in ("ci_low", "ci_high"))
    return f"{fixed(row['mean'], 4, sign=True)} [{ends}]"
