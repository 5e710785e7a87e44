"""Curves over depth: the four panels of one model, and several models beside each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from diag.metrics.catalogue import CATALOGUE, DrawnAs
from diag.results.caveats import BETWEEN, apart
from diag.show.figures.lines import BANDS, NO_BANDS, layer_axis, line, lines_drawn, published_handle, rule
from diag.show.figures.overlay import overlays
from diag.show.figures.page import grow, legend_below, letter, page
from diag.show.figures.panels import COMPARISON_METRICS, CURVE_METRICS, CURVES
from diag.show.figures.style import (
    BESIDE_ORDERED,
    DASHES,
    LINE_COLOURS,
    MARKERS,
    MOST_BANDS,
    RULE,
    paper,
    shades_of,
    style,
)
from diag.show.figures.tables import (
    CONDITIONS,
    caption,
    check_columns,
    compared_metrics,
    drawable,
    label_of,
    last_layer,
    one_selection,
    patch_size_of,
    profile,
    rows_of,
    selections,
    shorten,
    span,
)

LABEL_LENGTH = 84
"""Characters of a label that fit a row of the legend below the panels, beside its mark and T."""
LEGEND_ROW = 10.5
"""Points that one row of a panel's legend takes between its title and its axes."""
LONE_MARKERS = {"-": "o", "--": "D", ":": "x"}
"""What tells lines without markers apart where there is only one layer, and so no line."""


@style()
def layer_curves(layers: pd.DataFrame, published: pd.DataFrame | None = None) -> Figure:
    """The diagnostics of one model over depth: bias with its nulls, its split, similarities, attention.

    `layers` is the long-form table of one (model, tower, tokens). `published`: values to lay over it, as
    hollow grey markers (columns model, metric, layer, value, uncertainty, source). Panels whose metrics
    were not measured are left out. The panels of cosines share their limits. Lines join
    neighbouring layers; across layers that are not measured, a fine dotted line leads to the next one. More
    than 16 layers are marked every second, third, ...

    Raises UserError if the table holds several selections or none of the metrics.
    """
    rows = drawable(check_columns(layers), CURVE_METRICS, "layer curves")
    one_selection(rows, "layer curves")
    panels = [panel for panel in CURVES if not rows_of(rows, panel.lines).empty]
    cosines = {metric for panel in panels if not panel.unit_interval for metric in panel.lines}
    known = overlays(published, CURVE_METRICS)
    limits = _cosine_limits(rows_of(rows, cosines), [overlay.of(cosines).rows for overlay in known])
    said = caption(rows, bands=BANDS)
    figure, axes = page(len(panels), row_height=2.45, title=label_of(rows), caption=said)
    drawn: set[str] = set()
    for place, (panel, ax) in enumerate(zip(panels, axes, strict=True)):
        for metric, look in panel.lines.items():
            _draw_line(ax, profile(rows, metric), look)
        if not panel.unit_interval:
            rule(ax)
        fresh = {*panel.lines} - drawn  # a metric of two panels once
        for overlay in known:
            overlay.of(fresh).draw(ax)
        drawn |= fresh
        ax.set_title(letter(place) + panel.title)
        ax.set_ylim((-0.02, 1.02) if panel.unit_interval else limits)
        ax.set_ylabel(panel.y_label)
        layer_axis(ax, rows, *(overlay.rows["layer"] for overlay in known))
    _legends(axes)
    if known:
        marks = [published_handle(overlay.label, overlay.marker) for overlay in known]
        legend_below(figure, marks)
    return figure


@style()
def model_comparison(layers: pd.DataFrame, published: pd.DataFrame | None = None) -> Figure:
    """Small multiples: one panel per metric, one line per model over relative depth, layer / (last layer).

    A model measured on two token sets or in two ways gives two lines; where the table has a `label` column,
    every label is a line. Where every patch size occurs once, the lines with a patch size go from dark
    (coarse) to light (fine), and so does one model at several T (few to many); all others take Okabe-Ito
    colours. `published`: values to lay over them, as in `layer_curves`; depth is relative to the last
    published layer. Above five lines, no bands are drawn.
    Self weight is shown relative to uniform weight if every model has it so: 49 and 256 tokens compare.

    Raises UserError if the table holds none of the metrics, or several values for one layer of one line.
    """
    rows = drawable(check_columns(layers), COMPARISON_METRICS, "comparisons")
    entries = _entries(rows)
    metrics = compared_metrics([part for part, _ in entries])
    banded = len(entries) <= MOST_BANDS
    known = overlays(published, metrics)
    figure, axes = page(
        len(metrics),
        row_height=2.1,
        title="Comparison over relative depth",
        caption=caption(rows, bands=BANDS if banded else NO_BANDS),
    )
    for place, (metric, ax) in enumerate(zip(metrics, axes, strict=True)):
        title, y_label = CATALOGUE[metric].panel
        for part, look in entries:
            curve = profile(part, metric)
            _draw_line(
                ax, curve.assign(depth=curve["layer"] / last_layer(part)), look, x="depth", bands=banded
            )
        for overlay in known:
            overlay.of([metric]).draw(ax, relative=True)
        if metric == "self_weight_ratio":
            ax.axhline(1, color=RULE, linewidth=0.7, linestyle=":")  # uniform attention
        elif ax.get_ylim()[0] < 0:
            ax.axhline(0, color=RULE, linewidth=0.7)
        ax.set_title(letter(place) + title)
        ax.set_ylabel(y_label)
        ax.set_xlabel("relative depth")
        ax.set_xlim(-0.03, 1.03)
    handles = lines_drawn(axes)
    marks = [handles[look.label] for _, look in entries if look.label in handles]
    marks += [published_handle(overlay.label, overlay.marker) for overlay in known]
    legend_below(figure, marks)
    return figure


def _entries(rows: pd.DataFrame) -> list[tuple[pd.DataFrame, DrawnAs]]:
    """The rows of each line of a comparison, with how it is drawn."""
    parts = [one_selection(part, "each line of a comparison") for part in selections(rows)]
    patch_of = patch_size_of
    if rows["model"].nunique() == 1 and all(patch_size_of(part) is None for part in parts):
        patch_of = _few_first
    shades = shades_of([patch_of(part) for part in parts])
    if shades:  # coarse to fine, then the models without patches
        parts.sort(key=lambda part: -(patch_of(part) or 0))
    palette = BESIDE_ORDERED if shades else LINE_COLOURS
    labels = _numbered([_label(part, rows) for part in parts])
    entries = []
    plain = 0  # lines so far that are not on the map
    for index, (part, label) in enumerate(zip(parts, labels, strict=True)):
        marker = MARKERS[index % len(MARKERS)]
        if (patch := patch_of(part)) in shades:
            look = DrawnAs(label, shades[patch], "-", marker)
        else:
            dashes = DASHES[(plain // len(palette) + bool(shades)) % len(DASHES)]
            look = DrawnAs(label, palette[plain % len(palette)], dashes, marker)
            plain += 1
        entries.append((part, look))
    return entries


def _few_first(part: pd.DataFrame) -> float | None:
    """The number of tokens as a place in the order of `_entries`, where the largest number comes first."""
    size = part["n_tokens"].max() if "n_tokens" in part.columns else float("nan")
    return None if pd.isna(size) else -float(size)


def _label(part: pd.DataFrame, everything: pd.DataFrame) -> str:
    """The model's name, what tells this line from the model's other lines, caveats, and its number of tokens.

    Of two lines of one model, one may have a caveat that the other has not.
    """
    length = span(part["n_tokens"]) if "n_tokens" in part.columns else ""
    family = everything[everything["model"] == part["model"].iloc[0]]
    telling = [
        f"{column.replace('_', ' ')} {part[column].iloc[0]}"
        if column in CONDITIONS
        else str(part[column].iloc[0])
        for column in ("tower", "tokens", *CONDITIONS)
        if column in family.columns and family[column].nunique(dropna=False) > 1
    ]
    name = label_of(part, *telling)
    behind = len(name) - len(apart(name)[0].split(BETWEEN)[0])
    name = shorten(name, min(60 + behind, LABEL_LENGTH))
    return f"{name} (T = {length})" if length and " T = " not in name else name


def _numbered(labels: Sequence[str]) -> list[str]:
    """The labels, numbered where shortening made two of them alike."""
    return [
        f"{label} #{labels[: index + 1].count(label)}" if labels.count(label) > 1 else label
        for index, label in enumerate(labels)
    ]


def _draw_line(ax: Axes, curve: pd.DataFrame, look: DrawnAs, *, x: str = "layer", bands: bool = True) -> None:
    """`line`, but where there is only one layer, and so no line, its dashes become a marker."""
    if len(curve) == 1:
        look = replace(look, marker=look.marker or LONE_MARKERS[look.dashes], dashes="")
    line(ax, curve, look, x=x, bands=bands)


def _legends(axes: Sequence[Axes]) -> None:
    """A legend between title and axes, where it covers no line; titles of one row stand at one height.

    The figure grows by what a legend takes beyond two rows.
    """
    beside = min(2, paper().columns)  # panels in a row, and so columns of a legend
    for start in range(0, len(axes), beside):
        row = axes[start : start + beside]
        lines = max(math.ceil(len(ax.get_legend_handles_labels()[0]) / beside) for ax in row)
        height = 3 + LEGEND_ROW * lines
        for ax in row:
            ax.set_title(ax.get_title(loc="left"), pad=height + 4)
            above = ScaledTranslation(0, height / 72, ax.figure.dpi_scale_trans)
            ax.legend(
                loc="upper left", bbox_to_anchor=(0, 1), bbox_transform=ax.transAxes + above, ncols=beside
            )
        grow(row[0].figure.get_figure(root=True), LEGEND_ROW / 72 * max(lines - 2, 0))


def _cosine_limits(rows: pd.DataFrame, published: Sequence[pd.DataFrame]) -> tuple[float, float]:
    """Common limits of the panels of cosines: all means and intervals, and zero, with a margin."""
    ends = [part["value"] + sign * part["uncertainty"].fillna(0) for part in published for sign in (-1, 1)]
    numbers = pd.concat([*(rows[name] for name in ("mean", "ci_low", "ci_high")), *ends]).astype(float)
    low, high = min(numbers.min(), 0.0), max(numbers.max(), 0.0)
    margin = 0.04 * max(high - low, 0.05)
    return (low - margin, high + margin)
