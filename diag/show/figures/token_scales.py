"""What the pictures of one target token share: colours of cosines and weights, the caption, colour bars."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from diag.show.figures.style import COLOUR_MAPS, OKABE_ITO, PAGE_WIDTH

BAR_LABELS = {
    "value_cosine": "value cosine with the target (its own is 1)",
    "times_uniform": "attention weight / uniform weight",
}
TARGET = OKABE_ITO["orange"]
LEAST = 0.5
"""Weights below half the uniform weight are white: the eye is to go to what the target looks at."""
MOST = (2.0, 100.0)
"""Factors of the uniform weight between which the colours of weights end."""


def with_times_uniform(tokens: pd.DataFrame) -> pd.DataFrame:
    """The tokens that the target sees, with `times_uniform`: weight × number of seen tokens (1 = uniform)."""
    seen = tokens[tokens["weight"].notna()]
    return seen.assign(times_uniform=seen["weight"] * seen.groupby("model")["weight"].transform("size"))


def scales(seen: pd.DataFrame) -> dict[str, Normalize]:
    """The colour range of each quantity, over all models.

    Cosines are centred on 0 and reach to the largest one of another token than the target; weights are
    logarithmic.
    """
    others = seen[~seen["is_target"]]
    cosine = float(others["value_cosine"].abs().clip(lower=0.05).max()) if len(others) else 1.0
    factor = float(np.clip(seen["times_uniform"].max(), *MOST))
    return {"value_cosine": Normalize(-cosine, cosine), "times_uniform": LogNorm(LEAST, factor, clip=True)}


def colour_bar(figure: Figure, ax: Axes, quantity: str, norm: Normalize, *, before: str = "") -> None:
    """A horizontal colour bar in `ax`. `before` goes in front of its label."""
    mappable = ScalarMappable(norm, COLOUR_MAPS[quantity])
    extend = "max" if quantity == "value_cosine" else "min"
    bar = figure.colorbar(mappable, cax=ax, orientation="horizontal", extend=extend)
    if quantity == "times_uniform":
        largest = float(norm.vmax or 1)
        round_ones = (0.5, 1, 2, 5, 10, 20, 50, 100) if largest < 30 else (0.5, 1, 3, 10, 30, 100)
        bar.set_ticks([factor for factor in round_ones if factor <= largest * 1.0001])
        bar.ax.xaxis.set_minor_locator(NullLocator())
        # the style draws no mathematics, which the formatter of logarithms writes
        bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    bar.set_label(before + BAR_LABELS[quantity], fontsize=7, labelpad=2)
    bar.outline.set_linewidth(0.4)  # type: ignore[operator]


def colours_of(rows: pd.DataFrame, quantity: str, norm: Normalize) -> np.ndarray:
    """The colours of a quantity, `[row, 4]`."""
    return ScalarMappable(norm, COLOUR_MAPS[quantity]).to_rgba(rows[quantity].to_numpy(float))


def blank(height: float, title: str, tokens: pd.DataFrame) -> Figure:
    """A page-wide figure for axes placed by hand, with title and caption in its upper half inch.

    height: inches. Call it inside `style()`.
    """
    figure = Figure(figsize=(PAGE_WIDTH, height))
    # the argument of `Figure` would be undone by the style sheet when the figure is saved
    figure.set_layout_engine("none")
    figure.suptitle(title, y=1 - 0.07 / height)
    figure.text(0.5, 1 - 0.27 / height, caption(tokens), fontsize=7, color="0.3", ha="center", va="top")
    return figure


def caption(tokens: pd.DataFrame) -> str:
    """Input, layer, head and what the picture is not."""
    first = tokens.iloc[0]
    layers = tokens.groupby("model", sort=False)["layer"].first()
    layer = f"layer {layers.iloc[0]}" if layers.nunique() == 1 else f"layers {', '.join(map(str, layers))}"
    head = "mean over heads" if first["head"] == "mean" else f"head {first['head']}"
    inputs = " and ".join(map(str, tokens["input"].unique()))
    return (
        f"{inputs} · {layer} · {head} · values as computed · one target in one input: an example, not a mean"
    )


def parts_of(tokens: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each model, in order of first appearance."""
    return {str(model): part for model, part in tokens.groupby("model", sort=False)}
