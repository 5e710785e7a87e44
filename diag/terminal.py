"""What a person sees in the terminal: the per-layer table on stdout, progress on stderr. No torch."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

WIDTH = 80

COLUMNS = {
    "cos_y_vself": ("cos(y,v)", "alignment bias = self + context"),
    "self_part": ("self", ""),
    "context_part": ("context", ""),
    "cos_y_vpartner": ("partner", "null, another token's value"),
    "cos_y_vuniform": ("uniform", "null, uniform attention"),
    "value_similarity": ("v~v", "similarity of values"),
    "self_weight": ("A_ii", "weight on oneself"),
    "entropy_normalized": ("H/max", "entropy over its bound"),
    "excess": ("excess", "cos(y,v) - partner"),
    "self_specific_fraction": ("specific", "excess over cos(y,v)"),
    "removed_energy": ("cos²", "energy that XSA removes"),
    "value_similarity_partial": ("v~v|i", "similarity of values beyond v_i"),
    "value_similarity_partial_reference": ("ref|i", "v~v|i of equicorrelated values"),
    "output_similarity": ("y~y", "similarity of outputs"),
    "exclusive_output_similarity": ("z~z", "similarity of outputs without their part along v_i"),
    "value_participation_ratio": ("dim(v)", "directions that values fill"),
    "self_weight_ratio": ("A_ii·T", "weight on oneself over uniform"),
    "entropy": ("H", "entropy in nats"),
    "entropy_p15": ("H p15", "15th percentile of entropy"),
    "effective_keys": ("keys", "how many share the attention"),
    "first_weight": ("A_i0", "weight on the first token"),
    "attention_stream_cosine": ("Δattn·x", "cosine of the attention update with the stream"),
    "mlp_stream_cosine": ("Δmlp·x", "cosine of the MLP update with the stream"),
    "value_stream_cosine": ("Wv·x", "cosine of W_O v with the stream"),
    "output_value_cosine": ("Wy·Wv", "cosine of W_O y with W_O v"),
    "block_influence": ("BI", "block influence, 1 - cos(x_in, x_out)"),
    "token_similarity": ("x~x", "similarity of tokens after the block"),
    "massive_activation": ("max/med", "largest over median activation"),
    "attention_update_ratio": ("|Δattn|", "norm of the attention update over the stream's"),
    "mlp_update_ratio": ("|Δmlp|", "norm of the MLP update over the stream's"),
    "token_distance": ("X-mean", "distance of tokens from their mean, over their norm"),
    "attention_stream_energy": ("Δattn·x²", "share of the attention update along the stream"),
    "mlp_stream_energy": ("Δmlp·x²", "share of the MLP update along the stream"),
    "update_cosine_previous": ("Δattn·prev", "cosine of the attention update with the one before"),
    "delta_cosine_previous": ("Δ·prev", "cosine of the block's update with the one before"),
    "secondary_sinks": ("sinks", "secondary sinks that begin here"),
    "secondary_sink_lifetime": ("life", "share of layers in which they stand"),
    "first_key_received": ("α_0", "attention that the first key receives"),
    "sink_rate": ("α_0>.3", "share of heads that do"),
    "sink_share": ("top c", "share of all attention that one key receives"),
    "sink_strength": ("log c", "log10 of the largest over the median received attention"),
    "received_gini": ("gini", "inequality of received attention"),
    "sink_value_norm": ("‖v_s‖", "norm of the sink's value over the median"),
    "attention_distance": ("dist", "mean distance of attention in pixels or tokens"),
    "attention_distance_rms": ("rms", "root mean square distance"),
    "attention_distance_uniform": ("dist u", "distance of uniform attention"),
    "attention_distance_ratio": ("d/d_u", "distance over that of uniform attention"),
    "attention_nmi": ("NMI", "0 where all queries see the same map"),
    "top_key_overlap": ("top-10", "share of the 10 top keys kept from the layer before"),
    "top_key_overlap_chance": ("chance", "that share by chance"),
    "previous_weight": ("A_i,i-1", "weight on the token before"),
    "near_share": ("near", "share within 16 tokens or the next patches"),
    "near_share_uniform": ("near u", "that share of uniform attention"),
    "prefix_share": ("prefix", "share on class token and registers"),
    "head_divergence": ("‖y-y⁰‖", "distance of heads' outputs from those of a neutral image"),
    "head_divergence_relative": ("Δy rel", "that distance over the outputs' mean norm, 0 to 2"),
    "norm_weighted_self": ("self‖v‖", "self weight, weighted with norms of values"),
    "norm_weighted_first": ("first‖v‖", "weight on the first key, weighted with norms"),
    "norm_weighted_entropy": ("H‖v‖", "entropy, weighted with norms"),
}
"""Metric -> its heading and what that means. The table shows as many as fit, in this order."""

PLAIN_SECONDS = 15.0


def result_table(layers: pd.DataFrame) -> str:
    """The per-layer table of every model, tower and token set, and a legend, at most `WIDTH` columns wide."""
    blocks: list[str] = []
    legend: dict[str, None] = {}
    for _, part in layers.groupby(["model", "tower", "tokens"], sort=False):
        wide = part.pivot_table(index="layer", columns="metric", values="mean", aggfunc="first", dropna=False)
        spread = part[part["metric"] == "cos_y_vself"].set_index("layer")
        cells = {"layer": [str(layer) for layer in wide.index]}
        others = {str(name): (str(name), "") for name in part["metric"].unique() if name not in COLUMNS}
        for name, (heading, meaning) in (COLUMNS | others).items():
            if name not in wide:
                continue
            more = {heading: [_number(value) for value in wide[name]]}
            if name == "cos_y_vself" and spread["ci_low"].notna().any():
                ends = spread.loc[wide.index, ["ci_low", "ci_high"]].itertuples(index=False)
                more["95 % CI"] = [f"{_number(low)}–{_number(high)}" for low, high in ends]
            if _width(cells | more) > WIDTH:
                break
            cells |= more
            legend |= {f"{heading}: {meaning}": None} if meaning else {}
        blocks.append("\n".join([*_filled(_title(part), " · "), *aligned(cells)]))
    blocks.append("\n".join(_filled([*legend], "; ")))
    return "\n\n".join(blocks)


def _title(part: pd.DataFrame) -> list[str]:
    first, sizes = part.iloc[0], part["n_tokens"]
    size = str(sizes.min()) if sizes.min() == sizes.max() else f"{sizes.min()}–{sizes.max()}"
    title = [first["model"], first["tower"], f"{first['tokens']} tokens (T = {size})"]
    title += [f"n = {part['n'].max()}", f"values {first['values']}"]
    if first.get("intervention", "none") != "none":
        title.append(f"with {first['intervention']}")
    return [*title, "t=0 excluded"] if first["first_token"] == "excluded" else title


def _widths(cells: Mapping[str, Sequence[str]]) -> list[int]:
    return [max(len(heading), *map(len, column)) for heading, column in cells.items()]


def _width(cells: Mapping[str, Sequence[str]]) -> int:
    return sum(_widths(cells)) + len(cells) - 1


def aligned(cells: Mapping[str, Sequence[str]]) -> list[str]:
    """Columns under their headings, aligned on the right."""
    lines = [tuple(cells), *zip(*cells.values(), strict=True)]
    widths = _widths(cells)
    return [" ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def _filled(parts: Sequence[str], between: str) -> list[str]:
    """Parts in as few lines as they take, broken between parts."""
    # textwrap does not break at no-break spaces
    text = between.join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)
    lines = textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def columns(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as aligned columns."""
    heads = list(rows[0])
    cells = [[("" if row[head] is None else str(row[head])) for head in heads] for row in rows]
    widths = [max(len(head), *(len(line[i]) for line in cells)) for i, head in enumerate(heads)]
    lines = [heads, *cells]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


class StderrListener:
    """Draws a progress bar on a terminal, and a plain line now and then elsewhere; `with` it."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.what, self.total, self.done, self.told = "", 0, 0, 0.0

    def __enter__(self) -> StderrListener:
        if sys.stderr.isatty() and not self.quiet:
            from rich.console import Console
            from rich.progress import Progress

            self.bar = Progress(console=Console(stderr=True), transient=True)
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, text: str) -> None:
        """A line on stderr, above the bar."""
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def start(self, what: str, total: int) -> None:
        """A new bar."""
        self.what, self.total, self.done, self.told = what, total, 0, time.monotonic()
        if self.bar is not None:
            self.task = self.bar.add_task(what, total=total)

    def advance(self, inputs: int) -> None:
        """Moves the bar, or says where things are if nothing was said for a while."""
        self.done += inputs
        if self.bar is not None and self.task is not None:
            self.bar.advance(self.task, inputs)
        elif not self.quiet and time.monotonic() - self.told > PLAIN_SECONDS:
            self.told = time.monotonic()
            print(f"{self.what}: {self.done}/{self.total}", file=sys.stderr, flush=True)


def _number(value: float) -> str:
    if pd.isna(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
