"""Sentences about sink events: how many heads have one, what sinks do, whether they stay where they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from diag.results.decimals import fixed
from diag.results.sinks import CLASSES, events_per_input, places


def sink_sentences(samples: pd.DataFrame) -> dict[str, list[str]]:
    """Line (model, tower, tokens) -> sentences about its sinks; empty where none were measured.

    Rates are over the heads of all layers but layer 0, which stands apart: shares, and events per input.
    """
    counts, stays, said = events_per_input(samples), places(samples), dict[str, list[str]]()
    for line, part in counts.groupby(["model", "tower", "tokens"], sort=False, observed=True):
        name = f"{line[0]}, {line[1]} tower, {line[2]} tokens"
        own = stays[(stays[["model", "tower", "tokens"]] == list(line)).all(axis=1)]
        said[name] = [_rates(part), *_staying(own)]
    return said


def _rates(counts: pd.DataFrame) -> str:
    """Events per input after layer 0, by class, and in layer 0."""
    words = []
    for which, place in (("others", "after layer 0"), ("0", "in layer 0")):
        records: list[dict[str, Any]] = counts[counts["layers"] == which].to_dict("records")  # type: ignore[assignment]
        rows = {row["counted"]: row for row in records}
        every = rows.get("all")
        if every is None:
            continue
        told = f"{place} {fixed(100 * every['mean'] / every['heads'], 1)} % of the heads have a sink event"
        if every["mean"]:
            known = [f"{_number(rows[word])} {word}" for word in CLASSES.values() if word in rows]
            told += f", {_number(every)} per input: " + (
                ", ".join(known) or "what they do is not known, as W_O is not"
            )
        words.append(told)
    return "; ".join(words)


def _number(row: Mapping[str, Any]) -> str:
    low, high = row["ci_low"], row["ci_high"]
    return fixed(row["mean"], 2) + ("" if pd.isna(low) else f" [{fixed(low, 2)}, {fixed(high, 2)}]")


def _staying(own: pd.DataFrame) -> list[str]:
    """Where sinks are, and how often at the place that their head has most often."""
    several = own[own["events"] > 1]
    if several.empty:
        return []
    events = several["events"].sum()
    share = (several["share"] * several["events"]).sum() / events
    kinds = several.groupby("kind", sort=False)["events"].sum().sort_values(ascending=False)
    where = ", ".join(
        f"{fixed(100 * n / events, 0)} % {kind or 'of no known kind'}" for kind, n in kinds.items()
    )
    return [
        f"Of heads with events in several inputs, {fixed(100 * share, 0)} % of the sinks are at their head's "
        f"most frequent place ({where})"
    ]
