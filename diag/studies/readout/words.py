"""A readout in words: a row per layer, where each is best, what attention adds, and what goes with it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from diag.errors import counted
from diag.results.caveats import caveats
from diag.results.decimals import fixed
from diag.show.terminal import aligned, filled, text_width
from diag.studies.readout.tables import ACCURACY, ATTENTIVE, GAIN, PREDICTORS, READOUTS

SHOWN = PREDICTORS[:2]
"""Predictors that are told; the others are in the table."""


def table(readout: pd.DataFrame, relations: pd.DataFrame, manifest: Mapping[str, Any]) -> str:
    """The readout on at most 80 columns."""
    model, names = manifest["model"], list(readout["readout"].unique())
    title = [model["given"], f"{manifest['classes']} classes", f"n = {int(readout['n'].max())} images"]
    title += [*caveats(model), f"largest class {fixed(manifest['chance'])}"]
    cells = {"layer": [str(row["layer"]) for row in _rows(readout, names[0], ACCURACY)]}
    for place, name in enumerate(names):
        rows = _rows(readout, name, ACCURACY)
        cells[name] = [fixed(row["mean"]) for row in rows]
        cells["95 % CI" + " " * place] = [_ends(row) for row in rows]  # a heading of its own for each
    legend = filled([f"{name}: {READOUTS[name]}" for name in names], "; ")
    said = (
        line for text in sentences(readout, relations, names) for line in textwrap.wrap(text, text_width())
    )
    return "\n".join([*filled(title), "", *aligned(cells), "", *legend, "", *said])


def sentences(readout: pd.DataFrame, relations: pd.DataFrame, names: list[str]) -> Iterator[str]:
    """Where each readout is best, whether attention adds to it, and what goes with it over depth."""
    for name in names:
        best = max(_rows(readout, name, ACCURACY), key=lambda row: row["mean"])
        yield f"{name}: best in layer {best['layer']}, {fixed(best['mean'])} [{_ends(best)}]."
    gains = _rows(readout, ATTENTIVE, GAIN)
    clear = [row for row in gains if row["ci_low"] > 0 or row["ci_high"] < 0]
    if clear:
        most = max(clear, key=lambda row: abs(row["mean"]))
        yield (
            f"A learned query changes accuracy clearly in {len(clear)} of {len(gains)} layers, most in layer "
            f"{most['layer']}: {fixed(most['mean'], sign=True)} [{_ends(most)}]."
        )
    else:
        yield "A learned query reads no layer clearly better or worse than the mean does."
    related = relations[(relations["readout"] == ATTENTIVE) & relations["predictor"].isin(list(SHOWN))]
    for row in related.to_dict("records"):
        if pd.isna(row["rho"]):
            layers = counted(row["places"], "layer")
            yield f"{layers}: too few to say whether {row['predictor']} goes with it."
            continue
        rho, low, high = (fixed(float(row[key]), 2, sign=True) for key in ("rho", "ci_low", "ci_high"))
        goes = "goes" if row["p"] <= 0.05 and row["ci_low"] * row["ci_high"] > 0 else "does not clearly go"
        yield (
            f"{row['predictor']} {goes} with attentive accuracy over {row['places']} layers: "
            f"ρ = {rho} [{low}, {high}], p = {row['p']:.2g}."
        )


def _rows(readout: pd.DataFrame, name: str, measure: str) -> list[dict[Any, Any]]:
    """One readout and measure, by layer."""
    rows = readout[(readout["readout"] == name) & (readout["measure"] == measure)]
    return rows.sort_values("layer").to_dict("records")


def _ends(row: Mapping[Any, Any]) -> str:
    between = "…" if row["ci_low"] < 0 else "–"  # a dash would read as a minus
    return f"{fixed(row['ci_low'])}{between}{fixed(row['ci_high'])}"
