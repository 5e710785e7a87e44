"""What is left of the bias after each null, in one sentence per line, and which nulls were not measured."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from diag.results.decimals import fixed
from diag.results.null_names import NULLS, Null
from diag.results.nulls import MEASURED, missing_nulls
from diag.show.words.phrases import Found, listed, share

THAN = {null.name: null.than for null in NULLS}


def verdicts(table: pd.DataFrame) -> list[str]:
    """What can be said of each row of `left_after`: left above 0, below 0, or what else."""
    return [
        state if state != MEASURED else Found(left, low, high, int(n)).judged()
        for left, low, high, n, state in _numbers(table)
    ]


def null_sentences(table: pd.DataFrame) -> list[str]:
    """A sentence for each line of `left_after`, and which nulls were not measured."""
    said = [_of_line(str(label), part) for label, part in table.groupby("label", sort=False)]
    return [*filter(None, said), *_not_measured(table)]


def _of_line(label: str, part: pd.DataFrame) -> str:
    part = part[part["state"] == MEASURED]
    if part.empty:
        return ""
    told = []
    for null, of_bias, (left, low, high, n, _) in zip(
        part["null"], part["share_left"], _numbers(part), strict=True
    ):
        found = Found(left, low, high, int(n))
        much = f", {share(of_bias)} of it" if found.above and pd.notna(of_bias) else ""
        told.append(
            f"{fixed(left, sign=True)} {found.interval(sign=True)} after {THAN[null]}, {found.judged()}{much}"
        )
    return f"Left of the bias of {label}: {'; '.join(told)}."


def _not_measured(table: pd.DataFrame) -> Iterator[str]:
    lacking, labels = missing_nulls(table), list(table["label"].unique())
    alike = [*map(tuple, lacking.values())]
    if alike and len(lacking) == len(labels) and len({*alike}) == 1:
        yield f"Nulls that were not measured: {_named(alike[0])}."
    elif alike:
        parts = [f"{label}: {_named(nulls)}" for label, nulls in zip(lacking, alike, strict=True)]
        yield f"Nulls that were not measured: {'; '.join(parts)}."


def _named(nulls: tuple[Null, ...]) -> str:
    """Their names, each with the option that measures it."""
    options = dict.fromkeys(null.option for null in nulls)
    by_option = {option: [null.name for null in nulls if null.option == option] for option in options}
    return ", ".join(
        f"{listed(names)} ({option})" if option else listed(names) for option, names in by_option.items()
    )


def _numbers(table: pd.DataFrame) -> Iterator[tuple[float, float, float, int, str]]:
    columns = table[["left", "ci_low", "ci_high", "n", "state"]]
    yield from columns.itertuples(index=False, name=None)
