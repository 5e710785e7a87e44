"""One target patch on its image: whose values are like its own, where it attends, what its output is made of.

Tables are those of an attend folder (`tokens`, `decomposition`); pictures are `[height, width, 3]`
arrays by model. Texts are drawn by `diag.show.figures.strip`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from diag.errors import UserError
from diag.metrics.catalogue import CATALOGUE
from diag.results.decimals import fixed
from diag.show.figures.page import letter
from diag.show.figures.strip import heat_strip
from diag.show.figures.style import COLOUR_MAPS, OKABE_ITO, PAGE_WIDTH, RULE, style
from diag.show.figures.tables import label_of, shorten
from diag.show.figures.token_scales import (
    TARGET,
    blank,
    colour_bar,
    colours_of,
    parts_of,
    scales,
    with_times_uniform,
)

ATTENDED = OKABE_ITO["sky"]
PARTS = {
    "self part": OKABE_ITO["vermillion"],
    "context part": OKABE_ITO["green"],
    "along its own value": OKABE_ITO["blue"],
    "exclusive": "#c8c8c8",
}
NULLS = ("cos_y_vuniform", "cos_y_vpartner")
MAPS = {"value_cosine": "Value cosine cos(vⱼ, vᵢ)", "times_uniform": "Attention Aᵢⱼ / uniform"}

LEFT, GAP, SWATCHES, PICTURE = 0.1, 0.14, 0.34, 1.75
"""Inches: page margin, room between maps and for class and register tokens, width of the attended picture."""
ROW = 0.5
"""Inches of a row of maps beside the maps themselves: its heading, the titles, and room below."""

Pictures = Mapping[str, np.ndarray]


def draw_attended(
    tokens: pd.DataFrame, decomposition: pd.DataFrame, pictures: Pictures, *, top: int = 10
) -> dict[str, tuple[Figure, pd.DataFrame]]:
    """Every figure of an attend folder with the rows behind it, by file stem."""
    seen = with_times_uniform(tokens)
    if (tokens["kind"] == "text").all():
        return {"strip": (heat_strip(tokens), seen)}
    listed = seen[seen["rank"] <= top].sort_values(["model", "rank"])
    return {
        "similarity-map": (similarity_maps(tokens, pictures), seen),
        "most-attended": (most_attended(tokens, decomposition, pictures, top=top), listed),
    }


@style()
def similarity_maps(tokens: pd.DataFrame, pictures: Pictures) -> Figure:
    """A row per model: the image with the target outlined, value cosines, attention relative to uniform.

    The maps share their colours over all models: see `token_scales.scales`. Class and register tokens
    are squares beside the map.

    Raises UserError if the table holds no patches.
    """
    parts = _parts(tokens)
    norms = scales(pd.concat(parts.values()))
    beside = SWATCHES if (tokens["kind"] != "patch").any() else 0.0
    side = (PAGE_WIDTH - 2 * LEFT - 2 * GAP - 2 * beside) / 3
    across = [LEFT, LEFT + side + GAP, LEFT + 2 * (side + GAP) + beside]
    heights = {model: side * pictures[model].shape[0] / pictures[model].shape[1] for model in parts}
    total = 0.5 + sum(height + ROW for height in heights.values()) + 0.4
    figure = blank(total, "Whose values are like the target's, and where the target attends", tokens)
    for model, height, place in _rows(figure, parts, heights, ROW):
        part, titles = parts[model], (_where(parts[model]), *MAPS.values())
        row = [place(x, side, height, title) for x, title in zip(across, titles, strict=True)]
        _picture(row[0], pictures[model], _grid(part))
        for ax, quantity in zip(row[1:], MAPS, strict=True):
            _map(ax, part, quantity, norms[quantity])
        for ax in row:
            _outline(ax, _target(part), TARGET, 1.4)
    for x, quantity in zip(across[1:], MAPS, strict=True):
        colour_bar(figure, _axes(figure, 0.46, x, side, 0.08), quantity, norms[quantity])
    return figure


@style()
def most_attended(
    tokens: pd.DataFrame, decomposition: pd.DataFrame, pictures: Pictures, *, top: int = 10
) -> Figure:
    """A row per model: the `top` most attended tokens on the image and as bars, and what y is made of.

    Outlines are the wider the more weight; numbers are ranks. Class and register tokens and the target
    itself take part in the ranking.

    Raises UserError if the table holds no patches.
    """
    parts = _parts(tokens)
    shown = {model: part[part["rank"] <= top].sort_values("rank") for model, part in parts.items()}
    numbers = {model: _head(decomposition, part) for model, part in parts.items()}
    cosines = _reach(rows["value_cosine"] for rows in shown.values())
    bias = _reach(row[["cos_y_vself", "self_part", "context_part", *NULLS]] for row in numbers.values())
    bars = 0.14 * max(5, *map(len, shown.values())) + 0.1
    pictured = {model: PICTURE * pictures[model].shape[0] / pictures[model].shape[1] for model in parts}
    heights = {model: max(bars, pictured[model]) for model in parts}
    total = 0.5 + sum(height + ROW + 0.15 for height in heights.values()) + 0.3
    figure = blank(total, "The tokens that the target attends to most, and what attention returns", tokens)
    for model, height, place in _rows(figure, parts, heights, ROW + 0.15):
        part = parts[model]
        picture = place(LEFT, PICTURE, pictured[model], _where(part))
        _attended_picture(picture, pictures[model], part, shown[model])
        weights = place(2.5, 1.0, height, "Weight Aᵢⱼ")
        _bars(weights, shown[model], "weight", OKABE_ITO["purple"])
        weights.axvline(1 / len(part), color="0.1", linewidth=1.0, linestyle=":")
        values = place(3.68, 1.0, height, "Value cosine")
        _bars(values, shown[model], "value_cosine", ATTENDED)
        values.set_xlim(*cosines)
        values.set_yticklabels([])
        split = place(4.88, PAGE_WIDTH - 4.88 - LEFT - 0.05, height, "Output yᵢ of the target")
        lines = _split(split, numbers[model], bias)
    handles = [Rectangle((0, 0), 1, 1, color=colour, label=name) for name, colour in PARTS.items()]
    names = [*PARTS, *(CATALOGUE[name].heading for name in NULLS)]
    figure.legend(
        [*handles, *lines],
        names,
        loc="lower center",
        bbox_to_anchor=(0.5, 0.07 / total),
        ncols=6,
        columnspacing=1.1,
    )
    return figure


def token_name(token: pd.Series) -> str:
    """A token of an image in a list: `(3, 4)` for a patch, its kind otherwise; the target is named."""
    if token["is_target"]:
        return "itself"
    return f"({token['row']}, {token['col']})" if token["kind"] == "patch" else str(token["kind"])


def _parts(tokens: pd.DataFrame) -> dict[str, pd.DataFrame]:
    if not (tokens["kind"] == "patch").any():
        raise UserError("the table holds no patches to draw on an image", "texts are drawn by heat_strip")
    return parts_of(with_times_uniform(tokens))


def _rows(
    figure: Figure, parts: Mapping[str, pd.DataFrame], heights: Mapping[str, float], room: float
) -> Iterator[tuple[str, float, Callable[..., Axes]]]:
    """Each model, under its name and caveats, with the height of its row and `_axes` that begin there.

    parts: by model, as heights. In inches.
    """
    total = figure.get_figheight()
    top = total - 0.5
    for number, (model, height) in enumerate(heights.items()):
        name = letter(number) + shorten(label_of(parts[model]), 80)
        figure.text(LEFT / PAGE_WIDTH, (top - 0.1) / total, name, fontsize=8, fontweight="bold", va="center")
        yield model, height, partial(_axes, figure, top - 0.37)
        top -= height + room


def _axes(figure: Figure, top: float, left: float, width: float, height: float, title: str = "") -> Axes:
    """Axes by their place in inches; `top` from below."""
    total = figure.get_figheight()
    ax = figure.add_axes((left / PAGE_WIDTH, (top - height) / total, width / PAGE_WIDTH, height / total))
    ax.set_title(title, fontweight="normal")
    return ax


def _where(part: pd.DataFrame) -> str:
    return "{} × {} patches, target {}".format(*_grid(part), _target(part))


def _grid(part: pd.DataFrame) -> tuple[int, int]:
    return int(part["row"].max()) + 1, int(part["col"].max()) + 1


def _target(part: pd.DataFrame) -> tuple[int, int]:
    target = part[part["is_target"]].iloc[0]
    return int(target["row"]), int(target["col"])


def _head(decomposition: pd.DataFrame, part: pd.DataFrame) -> pd.Series:
    """The decomposition of the head (or mean) that the tokens' weights are of."""
    model, head = part["model"].iloc[0], part["head"].iloc[0]
    alike = (decomposition["model"] == model) & (decomposition["head"].astype(str) == head)
    return decomposition[alike].iloc[0]


def _reach(numbers: Iterable[pd.DataFrame | pd.Series]) -> tuple[float, float]:
    """Common limits: 0 to 1, and further down where a number is negative."""
    low = min(float(np.nanmin(part.to_numpy(float), initial=0.0)) for part in numbers)
    return (1.08 * low - 0.02 if low < 0 else 0.0), 1.03


def _picture(ax: Axes, picture: np.ndarray, grid: tuple[int, int]) -> None:
    """The image in units of patches."""
    ax.imshow(picture, extent=(0, grid[1], grid[0], 0), interpolation="nearest", aspect="auto")
    ax.set_box_aspect(picture.shape[0] / picture.shape[1])
    _bare(ax)


def _map(ax: Axes, part: pd.DataFrame, quantity: str, norm: Normalize) -> None:
    """One colour per patch; class and register tokens as squares on the right."""
    patches, grid = part[part["kind"] == "patch"], _grid(part)
    field = np.full(grid, np.nan)
    field[patches["row"].to_numpy(int), patches["col"].to_numpy(int)] = patches[quantity].to_numpy(float)
    extent, colours = (0, grid[1], grid[0], 0), COLOUR_MAPS[quantity]
    ax.imshow(field, cmap=colours, norm=norm, extent=extent, interpolation="none", aspect="auto")
    _bare(ax)
    side, prefix = 0.07, part[part["kind"] != "patch"]
    for place, (kind, colour) in enumerate(
        zip(prefix["kind"], colours_of(prefix, quantity, norm), strict=True)
    ):
        low = 1 - side - place * (side + 0.02)
        ax.add_patch(
            Rectangle(
                (1.03, low),
                side,
                side,
                transform=ax.transAxes,
                clip_on=False,
                facecolor=tuple(colour),
                edgecolor="0.3",
                linewidth=0.5,
            )
        )
        name = "cls" if kind == "cls" else "reg"
        ax.text(1.05 + side, low + side / 2, name, transform=ax.transAxes, fontsize=5.5, va="center")


def _bare(ax: Axes) -> None:
    """No ticks; a thin frame, because the lightest colour is that of the page."""
    ax.grid(False)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set(visible=True, color="0.75", linewidth=0.5)


def _outline(ax: Axes, patch: tuple[int, int], colour: str, width: float) -> None:
    """A patch's border, with a dark line beneath so that it shows on any picture."""
    for line, edge in ((width + 1.2, "black"), (width, colour)):
        border = Rectangle((patch[1], patch[0]), 1, 1, fill=False, edgecolor=edge, linewidth=line, zorder=4)
        border.set_clip_on(False)
        ax.add_patch(border)


def _attended_picture(ax: Axes, picture: np.ndarray, part: pd.DataFrame, shown: pd.DataFrame) -> None:
    _picture(ax, picture, _grid(part))
    most = float(shown["weight"].max())
    patches = shown[(shown["kind"] == "patch") & ~shown["is_target"]]
    for _, token in patches[::-1].iterrows():  # the most attended on top
        place = int(token["row"]), int(token["col"])
        _outline(ax, place, ATTENDED, 0.3 + 1.7 * float(token["weight"]) / most)
        ax.text(
            place[1] + 0.5,
            place[0] + 0.5,
            str(token["rank"]),
            ha="center",
            va="center",
            fontsize=5.5,
            color="white",
            path_effects=[withStroke(linewidth=1.4, foreground="black")],
            zorder=6,
        )
    _outline(ax, _target(part), TARGET, 1.6)


def _bars(ax: Axes, shown: pd.DataFrame, column: str, colour: str) -> None:
    places = np.arange(len(shown))
    colours = [TARGET if target else colour for target in shown["is_target"]]
    ax.barh(places, shown[column], color=colours, height=0.7)
    names = [f"{token_name(token)}  {token['rank']}" for _, token in shown.iterrows()]
    ax.set_yticks(places, names, fontsize=6)
    ax.set_ylim(max(len(shown), 5) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.axvline(0, color=RULE, linewidth=0.7)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=3, min_n_ticks=2))


def _split(ax: Axes, numbers: pd.Series, limits: tuple[float, float]) -> list[Line2D]:
    """Two bars: cos(y, v) = self + context with its nulls, ‖y‖² = along v + exclusive. The nulls' lines."""
    start = {True: 0.0, False: 0.0}
    for name, column in (("self part", "self_part"), ("context part", "context_part")):
        part = float(numbers[column])
        ax.barh(1, part, left=start[part >= 0], color=PARTS[name], height=0.42)
        start[part >= 0] += part
    nulls = [
        ax.plot([numbers[name]] * 2, [0.66, 1.34], CATALOGUE[name].line.dashes, color="black", linewidth=1.2)[
            0
        ]
        for name in NULLS
    ]
    energy = float(numbers["removed_energy"])
    ax.barh(0, energy, color=PARTS["along its own value"], height=0.42)
    ax.barh(0, 1 - energy, left=energy, color=PARTS["exclusive"], height=0.42)
    ax.vlines([0, 0], [-0.28, 0.72], [0.24, 1.28], color=RULE, linewidth=0.7)  # not through the words
    shown = numbers[["cos_y_vself", "self_part", "context_part"]]
    bias, own, context = (fixed(float(number), 2).replace("-", "−") for number in shown)
    context = context.replace("−", "− ") if context.startswith("−") else f"+ {context}"
    said = f"cos(yᵢ, vᵢ) = {bias} = {own} {context}"
    shares = f"‖yᵢ‖² in shares: {fixed(energy, 2)} + {fixed(1 - energy, 2)}"
    for place, text in ((1.42, said), (0.28, shares)):
        ax.text(limits[0], place, text, fontsize=6.5, va="bottom")
    ax.set_xlim(*limits)
    ax.set_ylim(-0.4, 1.75)
    ax.set_yticks([])
    ax.grid(False, axis="y")
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    return nulls
