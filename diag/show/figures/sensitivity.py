"""What changing a layer costs, beside its control; and the bias of a layer against that cost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diag.errors import UserError
from diag.metrics.catalogue import CATALOGUE, Dashes, DrawnAs
from diag.models.names.changes import CONTROLS, is_control, labelled
from diag.results.decimals import fixed
from diag.show.figures.lines import line, rule
from diag.show.figures.page import legend_below, letter, page
from diag.show.figures.style import LINE_COLOURS, OKABE_ITO, style
from diag.show.figures.tables import span

COLOURS = LINE_COLOURS[:6]
"""Black is the controls'."""
MARKERS = "os^DvP"
DASHES: tuple[Dashes, ...] = ("--", ":", "-.")
"""Of one control after the other."""
SCOPES = {"one": "one layer", "first": "first to this layer", "last": "this to last layer"}
LABELS = {
    "loss_change": "loss, after − before (nats per token)",
    "loss_change_per_byte": "loss, after − before (nats per byte)",
    "top1_change": "top-1 accuracy, after − before",
    "top5_change": "top-5 accuracy, after − before",
    "class_divergence": "KL of the classes (nats)",
    "same_class": "share with the same class",
    "embedding_change": "1 − cos of the embedding",
    "embedding_norm": "norm of the embedding, ratio",
    "token_change": "1 − cos of the last tokens",
    "token_norm": "norm of the last tokens, ratio",
    "loss_increase": "loss, after / before − 1",
    "state_change": "relative change of the last tokens",
    "kept_mass": "share of attention that stays",
}
COST_LABELS = {
    "loss_increase": "cost (% of the loss)",
    "top1_change": "cost (% of top-1 accuracy)",
    "same_class": "cost (% in another class)",
    "embedding_change": "cost (% of the cosine)",
    "state_change": "cost (% of the tokens' size)",
}
PREDICTORS = {
    name: CATALOGUE[name].labelled
    for name in ("cos_y_vself", "excess", "cos_y_vuniform", "self_part", "value_similarity", "self_weight")
}


@style()
def layer_sensitivity(table: pd.DataFrame, *, title: str, effects: Sequence[str]) -> Figure:
    """The effect of each intervention over depth: a row of panels per effect, a column per scope.

    table: `sensitivity.csv`, of all heads together. Matched controls are black, dashed, marked,
    and above the others.
    Raises UserError if none of the effects was measured.
    """
    rows = table[(table["head"] < 0) & table["effect"].isin(list(effects)) & table["mean"].notna()]
    if rows.empty:
        raise UserError("nothing to draw: no such effect was measured", f"effects are {', '.join(LABELS)}")
    there = set(zip(rows["effect"], rows["scope"], strict=True))
    panels = [place for place in itertools.product(effects, SCOPES) if place in there]
    names = list(dict.fromkeys(zip(rows["intervention"], rows["strength"], strict=True)))
    names.sort(key=lambda name: is_control(name[0]))  # drawn last, over what it may lie on
    n = int(rows["n"].max())
    figure, axes = page(
        len(panels),
        row_height=2.3,
        title=title,
        caption=f"n = {n} inputs · paired with the untouched model · bands: 95 % bootstrap over inputs",
    )
    for place, ((effect, scope), ax) in enumerate(zip(panels, axes, strict=True)):
        part = rows[(rows["effect"] == effect) & (rows["scope"] == scope)]
        for number, (name, strength) in enumerate(names):
            alike = part["strength"].isna() if pd.isna(strength) else part["strength"] == strength
            curve = part[(part["intervention"] == name) & alike].sort_values("layer")
            line(ax, curve, _look(name, strength, number, names), marks=len(curve))
        rule(ax, _unchanged(effect))
        ax.set_title(letter(place) + SCOPES[scope])
        ax.set_ylabel(LABELS[effect])
        ax.set_xlabel("layer")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    handles, labels = axes[0].get_legend_handles_labels()
    legend_below(figure, handles, labels)
    return figure


@style()
def layer_costs(costs: pd.DataFrame, *, title: str) -> Figure:
    """What each layer costs, from the cheapest on, a panel per intervention, the control at the same layers.

    costs: the ranked rows of one sweep (`rank`, `layer`, `cost` …), shares; drawn in per cent.
    """
    parts = [part for _, part in costs.groupby(["intervention", "strength"], sort=False, dropna=False)]
    figure, axes = page(
        len(parts),
        row_height=2.3,
        title=title,
        caption=f"one layer changed · n = {int(costs['n'].max())} inputs · bars: 95 % bootstrap over inputs",
    )
    for number, (part, ax) in enumerate(zip(parts, axes, strict=True)):
        name, strength = part["intervention"].iloc[0], part["strength"].iloc[0]
        control = part["control"].iloc[0]
        drawn = [("cost", "cost_low", "cost_high", labelled(name, strength), OKABE_ITO["blue"], "o", -0.1)]
        if isinstance(control, str):
            ends = ("control_cost", "control_low", "control_high")
            drawn.append((*ends, labelled(control, strength), "black", "x", 0.1))
        for mean, low, high, label, colour, marker, aside in drawn:
            rows = part[[mean, low, high]].mul(100)
            reach = [(rows[mean] - rows[low]).fillna(0), (rows[high] - rows[mean]).fillna(0)]
            ax.errorbar(
                part["rank"] + aside,
                rows[mean],
                yerr=[length.clip(lower=0) for length in reach],
                fmt=marker,
                color=colour,
                markersize=3.5,
                elinewidth=0.7,
                label=label,
            )
        ax.set_xticks(part["rank"], [str(layer) for layer in part["layer"]])
        rule(ax)
        ax.set_title(letter(number, len(parts)) + labelled(name, strength))
        ax.set_xlabel("layer, cheapest first")
        ax.set_ylabel(COST_LABELS[part["measure"].iloc[0]])
        bottom, top = ax.get_ylim()
        ax.set_ylim(bottom, top + 0.2 * (top - bottom))  # room for the legend
        ax.legend(loc="upper left", ncols=2)
    return figure


@style()
def costs_of_models(costs: pd.DataFrame) -> Figure:
    """What each layer costs over depth, a panel per intervention, a line per model, its control dotted.

    costs: the ranked rows of several sweeps with a column `model`; shares; drawn in per cent.
    """
    places = ["intervention", "strength", "measure"]
    parts = [part for _, part in costs.groupby(places, sort=False, dropna=False)]
    models = list(dict.fromkeys(costs["model"]))
    figure, axes = page(
        len(parts),
        row_height=2.3,
        title=f"{len(models)} models, one layer changed at a time",
        caption=f"n = {span(costs['n'])} inputs · bands: 95 % bootstrap over inputs · dotted: the control",
    )
    for number, (part, ax) in enumerate(zip(parts, axes, strict=True)):
        for model, curve in part.sort_values("layer").groupby("model", sort=False):
            place = models.index(model)
            colour = COLOURS[place % len(COLOURS)]
            look = DrawnAs(str(model), colour, "-", MARKERS[place % len(MARKERS)])
            for prefix, one in (("", look), ("control_", DrawnAs("_", colour, ":", ""))):
                ends = [f"{prefix or 'cost_'}{end}" for end in ("low", "high")]
                shares = curve[["layer", f"{prefix}cost", *ends]].set_axis(
                    ["layer", "mean", "ci_low", "ci_high"], axis=1
                )
                shares[["mean", "ci_low", "ci_high"]] *= 100
                line(ax, shares, one, marks=len(shares))
        rule(ax)
        first = part.iloc[0]
        ax.set_title(letter(number, len(parts)) + labelled(first["intervention"], first["strength"]))
        ax.set_xlabel("layer")
        ax.set_ylabel(COST_LABELS[first["measure"]])
        ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    drawn = {
        text: handle for ax in axes for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    legend_below(figure, [*drawn.values()], [*drawn])
    return figure


@style()
def bias_against_effect(
    table: pd.DataFrame,
    relations: pd.DataFrame,
    layers: pd.DataFrame,
    *,
    title: str,
    effect: str,
    intervention: str,
) -> Figure:
    """What the untouched model measures at a layer, against the effect of changing that layer: a panel each.

    layers: the probe's table, for the predictors. title: the model. Points are layers, numbered; bars are
    95 % intervals over inputs; a panel's title holds Spearman's ρ with its interval and p.
    """
    same = "intervention == @intervention and effect == @effect"
    chosen = relations.query(f"{same} and level == 'layer'")
    alone = table.query("effect == @effect and scope == 'one' and head < 0").set_index("layer")
    cost = alone[alone["intervention"] == intervention]
    control = CONTROLS.get(intervention)
    beside = alone[(alone["intervention"] == control) & alone["strength"].isin(cost["strength"])]
    names = [name for name in PREDICTORS if name in set(chosen["predictor"])][:4]
    if not names or cost.empty:
        raise UserError("nothing to draw: no layer was changed alone", "use --scope one")
    n = int(cost["n"].max())
    figure, axes = page(
        len(names),
        row_height=2.4,
        title=title,
        caption=f"does it predict what {intervention} costs? · each point a layer · n = {n} inputs\n"
        "bars: 95 % bootstrap over inputs · p: random pairings of layers"
        + (
            "" if beside.empty else f" · ×: {labelled(str(control), beside['strength'].iloc[0])}, the control"
        ),
    )
    for place, (name, ax) in enumerate(zip(names, axes, strict=True)):
        given = layers[layers["metric"] == name].set_index("layer")
        shown = [layer for layer in cost.index if layer in given.index]
        first, second = given.loc[shown], cost.loc[shown]
        ax.errorbar(
            first["mean"],
            second["mean"],
            xerr=_reach(first),
            yerr=_reach(second),
            fmt="o",
            color=OKABE_ITO["blue"],
            markersize=3,
            elinewidth=0.6,
        )
        both = [layer for layer in shown if layer in beside.index]
        ax.plot(given.loc[both, "mean"], beside.loc[both, "mean"], "x", color="black", markersize=3)
        for layer, at in zip(shown, zip(first["mean"], second["mean"], strict=True), strict=True):
            ax.annotate(str(layer), at, xytext=(3, 3), textcoords="offset points", fontsize=6.5)
        row = chosen[chosen["predictor"] == name].iloc[0]
        ax.set_title(letter(place) + _said(row))
        ax.set_xlabel(PREDICTORS[name])
        ax.set_ylabel(LABELS[effect])
        rule(ax, _unchanged(effect))
    return figure


def _look(intervention: str, strength: float, number: int, names: Sequence[tuple[str, float]]) -> DrawnAs:
    label = labelled(intervention, strength)
    if is_control(intervention):
        before = sum(is_control(name) for name, _ in names[:number])
        return DrawnAs(label, "black", DASHES[before % len(DASHES)], "X")
    number -= sum(is_control(name) for name, _ in names[:number])
    return DrawnAs(label, COLOURS[number % len(COLOURS)], "-", MARKERS[number % len(MARKERS)])


def _reach(rows: pd.DataFrame) -> list[pd.Series]:
    """Lengths of the bars below and above the mean; 0 without an interval."""
    lengths = rows["mean"] - rows["ci_low"], rows["ci_high"] - rows["mean"]
    return [length.fillna(0).clip(lower=0) for length in lengths]


def _said(row: pd.Series) -> str:
    if pd.isna(row["rho"]):
        return "too few layers for a ρ"
    rho, low, high = (fixed(row[name], 2) for name in ("rho", "ci_low", "ci_high"))
    return f"ρ = {rho} [{low}, {high}], p = {row['p']:.2g}"


def _unchanged(effect: str) -> float:
    return 1.0 if effect in ("same_class", "embedding_norm", "token_norm", "kept_mass") else 0.0
