"""How well each layer is read by linear and attentive probes, and what a probe measures there."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from diag.metrics.catalogue import DrawnAs
from diag.show.figures.lines import layer_axis, line, rule
from diag.show.figures.page import legend_below, letter, page
from diag.show.figures.style import style

LOOKS = {
    "attentive": DrawnAs("attentive: one learned query", "blue", "-", "o"),
    "mean": DrawnAs("linear, mean of patch tokens", "orange", "--", "s"),
    "cls": DrawnAs("linear, class token", "green", ":", "^"),
}
ACCURACY, GAIN = "accuracy", "gain_over_mean"


@style()
def readout_over_depth(table: pd.DataFrame, *, title: str, chance: float) -> Figure:
    """Accuracy of each readout over depth beside the largest class, and what others add to mean tokens.

    table: `readout.csv`.
    """
    n = int(table["n"].max())
    figure, (left, right) = page(
        2,
        row_height=2.5,
        title=title,
        caption=f"n = {n} images, each predicted without its part · bands: 95 % bootstrap over images",
    )
    for ax, measure, said in ((left, ACCURACY, "accuracy"), (right, GAIN, "accuracy beyond mean tokens")):
        rows = table[table["measure"] == measure]
        for name, look in LOOKS.items():
            curve = rows[rows["readout"] == name].sort_values("layer")
            line(ax, curve, look, marks=len(curve))
        layer_axis(ax, rows)
        ax.set_ylabel(said)
    rule(left, chance)
    left.annotate(
        "largest class",
        (0.99, chance),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=6.5,
    )
    rule(right)
    left.set_title(letter(0) + "what can be read")
    right.set_title(letter(1) + "what a readout adds")
    handles, labels = left.get_legend_handles_labels()
    legend_below(figure, handles, labels)
    return figure
