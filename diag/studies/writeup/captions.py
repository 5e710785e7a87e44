"""Captions: the plan's own text, or that of the kind, and what each must say: models, T, n, settings."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from diag.results.caveats import of_table, with_caveats
from diag.show.figures.tables import span
from diag.studies.attend.folder import Attended

NAMED = 4
"""Models that a caption names one by one; of more, it names the first and the last."""


def caption(text: str | None, words: str, rows: pd.DataFrame, inputs: Sequence[str]) -> str:
    """A caption with its placeholders filled in, and the settings behind it.

    text: of the plan; words: of the kind, used where the plan gives none. rows: of a run's table,
    may be empty. inputs: what the runs were given.
    """
    filled = (text or words).strip().format_map(_placeholders(rows, inputs))
    return " ".join(part for part in (filled, settings(rows, inputs)) if part)


def settings(rows: pd.DataFrame, inputs: Sequence[str]) -> str:
    """How it was measured, in one sentence; empty where nothing was."""
    if "n" not in rows or rows.empty:
        return ""
    found = _placeholders(rows, inputs)
    changed = _listed(rows, "intervention") or "none"
    parts = [
        found["models"],
        f"{found['tokens']} tokens" if found["tokens"] else "",
        f"T = {found['T']}" if found["T"] else "",
        f"n = {found['n']} {found['inputs']}" if found["inputs"] else f"n = {found['n']}",
        f"values {found['values']}" if found["values"] else "",
        f"intervention {changed}" if changed != "none" else "",
        "t = 0 excluded" if _listed(rows, "first_token") == "excluded" else "",
        _listed(rows, "dtype"),
        *of_table(rows),
        "95 % bootstrap intervals over inputs" if "ci_low" in rows and rows["ci_low"].notna().any() else "",
    ]
    return "; ".join(part for part in parts if part) + "."


def look_settings(look: Attended) -> str:
    """How one target was looked at, in one sentence."""
    parts, first = [], look.tokens.iloc[0]
    for entry in look.models:
        target = entry["target"]
        if entry["tower"] == "vision":
            where = "patch {}, {} of {} × {}".format(*target, *entry["grid"])
        else:
            where = f"token {target}"
        parts.append(f"{with_caveats(entry['given'], entry)}: layer {entry['layer']}, {where}")
    heads = "mean over heads" if first["head"] == "mean" else f"head {first['head']}"
    said = [str(first["input"]), *parts, heads, "values as computed"]
    return f"{'; '.join(said)}; one input: an example, not a mean."


PLACEHOLDERS = ("n", "T", "values", "models", "tokens", "inputs")
"""What a caption may have in braces; a plan with another is refused when it is read."""


def _placeholders(rows: pd.DataFrame, inputs: Sequence[str]) -> dict[str, str]:
    models = [str(name) for name in dict.fromkeys(rows["model"])] if "model" in rows else []
    if len(models) > NAMED:
        models = [f"{len(models)} models from {models[0]} to {models[-1]}"]
    return {
        "n": span(rows["n"]) if "n" in rows else "",
        "T": span(rows["n_tokens"]) if "n_tokens" in rows else "",
        "values": _listed(rows, "values"),
        "models": ", ".join(models),
        "tokens": _listed(rows, "tokens"),
        "inputs": " and ".join(dict.fromkeys(inputs)),
    }


def _listed(rows: pd.DataFrame, column: str) -> str:
    if column not in rows:
        return ""
    return ", ".join(str(value).replace("_", " ") for value in dict.fromkeys(rows[column].dropna()))
