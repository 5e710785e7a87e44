"""What a person sees in the terminal: the per-layer table on stdout, progress on stderr. No torch."""

from __future__ import annotations

import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pandas as pd

from diag.errors import say, spans, visible
from diag.metrics.catalogue import CATALOGUE, MetricEntry
from diag.metrics.names import GROUPS
from diag.results.caveats import caveats
from diag.results.decimals import shown
from diag.show.figures.tables import span
from diag.show.words.ledger import ledger_sentence
from diag.show.words.unusual import OTHER_KEYS

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

WIDTH = 80
"""Columns that text takes at most, and tables where nobody reads them in a terminal."""

NARROWEST, WIDEST = 40, 240

PLAIN_SECONDS = 15.0


def _before(entry: MetricEntry) -> tuple[int, int]:
    """The default metrics come first, then the stream's, then all others."""
    return min(list(GROUPS).index(entry.place.group), 2), entry.rank


COLUMNS = {entry.name: (entry.column, entry.gloss) for entry in sorted(CATALOGUE.values(), key=_before)}
"""Metric -> its heading and what that means. The table shows as many as fit, in this order."""


def width() -> int:
    """Columns of the terminal that stdout is, or that COLUMNS says; `WIDTH` where it is none."""
    told = os.environ.get("COLUMNS", "")
    found = int(told) if re.fullmatch("[0-9]{1,5}", told) else 0
    if not found and sys.stdout.isatty():
        with suppress(OSError, ValueError):  # a stream without a file under it
            found = os.get_terminal_size(sys.stdout.fileno()).columns
    return min(max(found, NARROWEST), WIDEST) if found else WIDTH


def text_width() -> int:
    """Columns of text: as the terminal has, and at most `WIDTH`, beyond which lines are hard to read."""
    return min(width(), WIDTH)


def result_table(layers: pd.DataFrame, sources: Mapping[str, str] | None = None) -> str:
    """The per-layer table of every model, tower and token set, and a legend, as wide as the terminal is.

    sources: tower -> where its inputs are from, in words.
    """
    blocks: list[str] = []
    legend: dict[str, None] = {}
    for _, part in layers.groupby(["model", "tower", "tokens"], sort=False):
        wide = part.pivot_table(index="layer", columns="metric", values="mean", aggfunc="first", dropna=False)
        spread = part[part["metric"] == "cos_y_vself"].set_index("layer")
        cells = {"layer": [str(layer) for layer in wide.index]}
        others = {str(name): (str(name), "") for name in part["metric"].unique() if name not in COLUMNS}
        for name, (heading, meaning) in (COLUMNS | others).items():
            if name not in wide or (name in GROUPS["ledger"] and wide[name].isna().all()):
                continue  # a ledger has classes of which the model has no key
            more = {heading: [shown(value) for value in wide[name]]}
            if name == "cos_y_vself" and spread["ci_low"].notna().any():
                ends = spread.loc[wide.index, ["ci_low", "ci_high"]].itertuples(index=False)
                between = "…" if (spread["ci_low"] < 0).any() else "–"  # a dash would read as a minus
                more["95 % CI"] = [f"{shown(low)}{between}{shown(high)}" for low, high in ends]
            if len(_lines(_padded(cells | more, str.rjust))[0]) > width():
                break
            cells |= more
            legend |= {f"{heading}: {meaning}": None} if meaning else {}
        whose = textwrap.wrap(ledger_sentence(part), text_width())
        blocks.append("\n".join([*filled(_title(part, sources or {})), *aligned(cells), *whose]))
    blocks.append("\n".join(filled([*legend], "; ")))
    return "\n\n".join(blocks)


def _title(part: pd.DataFrame, sources: Mapping[str, str]) -> list[str]:
    first = part.iloc[0]
    size = f" (T = {span(part['n_tokens'])})" if "n_tokens" in part else ""
    title = [first["model"], first["tower"], f"{first['tokens']} tokens{size}", f"n = {part['n'].max()}"]
    if source := sources.get(str(first["tower"])):
        title[-1] += f" of {source}"
    title += [f"values {first['values']}"] if "values" in part else []
    if first.get("intervention", "none") != "none":
        title.append(f"with {first['intervention']}")
    title += caveats(first)
    if "mixer" in part and (linear := sorted(set(part["layer"][part["mixer"] == "linear"]))):
        title.append(f"no softmax in layer{'s' if len(linear) > 1 else ''} {spans(linear)}")
    of_others = part[part["value_from"].isin(OTHER_KEYS)] if "value_from" in part else part.iloc[:0]
    if some := sorted(set(of_others["layer"])):
        title.append(
            f"pooled keys or queries in layer{'s' if len(some) > 1 else ''} {spans(some)}: no v_i there"
        )
    title += ["t=0 excluded"] if first.get("first_token") == "excluded" else []
    return [visible(str(part)) for part in title]


def aligned(
    cells: Mapping[str, Sequence[str]], justify: Callable[[str, int], str] = str.rjust, between: str = " "
) -> list[str]:
    """Columns under their headings, aligned on the right; `beside` each other."""
    return beside(_padded(cells, justify), between)


def beside(columns: Sequence[Sequence[str]], between: str = " ") -> list[str]:
    """The lines of columns of padded cells. A terminal of less than `WIDTH` columns that is too narrow for
    all gets them in blocks below each other, each with the first column: it would break lines elsewhere.
    """
    first, *others = columns
    blocks, room = [[first]], width()
    for column in others:
        block = [*blocks[-1], column]
        if room < WIDTH and len(block) > 2 and len(_lines(block, between)[0]) > room:
            blocks.append([first, column])
        else:
            blocks[-1] = block
    return [line for n, block in enumerate(blocks) for line in [*[""] * (n > 0), *_lines(block, between)]]


def _padded(cells: Mapping[str, Sequence[str]], justify: Callable[[str, int], str]) -> list[Sequence[str]]:
    """Columns of cells of one length, each under its heading."""
    found: list[Sequence[str]] = []
    for column in ([visible(head), *map(visible, texts)] for head, texts in cells.items()):
        longest = max(map(len, column))
        found.append([justify(cell, longest) for cell in column])
    return found


def _lines(columns: Sequence[Sequence[str]], between: str = " ") -> list[str]:
    return [between.join(line) for line in zip(*columns, strict=True)]


def filled(parts: Sequence[str], between: str = " · ") -> list[str]:
    """Parts in as few lines of text as they take, broken between parts, and within one that is longer."""
    most = text_width() - len(between) - 2
    whole = (part.replace(" ", "\N{NO-BREAK SPACE}") if len(part) <= most else part for part in parts)
    text = between.join(whole)  # textwrap does not break at no-break spaces
    lines = textwrap.wrap(text, text_width(), subsequent_indent="  ", break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def columns(rows: Sequence[Mapping[str, Any]], *, whole: bool = False) -> str:
    """Rows of equal keys as aligned columns. whole: in one block, however narrow the terminal is."""
    cells = {head: ["" if row[head] is None else str(row[head]) for row in rows] for head in rows[0]}
    lines = _lines(_padded(cells, str.ljust), "  ") if whole else aligned(cells, str.ljust, "  ")
    return "\n".join(line.rstrip() for line in lines)


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
            self.bar.console.print(visible(text), markup=False, highlight=False)
        else:
            say(text)

    def start(self, what: str, total: int) -> None:
        """A new bar."""
        self.what, self.total, self.done, self.told = what, total, 0, time.monotonic()
        if self.bar is not None:
            from rich.markup import escape

            self.task = self.bar.add_task(escape(visible(what)), total=total)

    def advance(self, inputs: int) -> None:
        """Moves the bar, or says where things are if nothing was said for a while."""
        self.done += inputs
        if self.bar is not None and self.task is not None:
            self.bar.advance(self.task, inputs)
        elif not self.quiet and time.monotonic() - self.told > PLAIN_SECONDS:
            self.told = time.monotonic()
            say(f"{self.what}: {self.done}/{self.total}")
