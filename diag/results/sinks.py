"""What samples tell of sink events beyond means: how many an input has, and where sinks stay. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from diag.results.bootstrap import summary

CLASSES = {"sink_no_op": "no-op", "sink_broadcast": "broadcast", "sink_unclassified": "unclassified"}
EVENTS = {"sink_event": "all", **CLASSES}
"""Metric -> what is counted."""

KINDS: Mapping[str, str] = {
    "sink_on_cls": "cls",
    "sink_on_registers": "register",
    "sink_on_image": "image",
    "sink_on_text": "text",
}

LINE = ["model", "tower", "tokens"]
PLACES = [*LINE, "layer", "head", "inputs", "events", "index", "row", "column", "kind", "share"]


def events_per_input(samples: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """How many heads have an event in an input, layer 0 apart, where a line has the metrics.

    Columns model, tower, tokens, layers ("0" or "others"), counted (of `EVENTS`), heads (of these layers
    together), then mean, std, ci_low, ci_high, n over inputs. What is not known of a layer counts nothing.
    """
    rows = samples[samples["metric"].isin(list(EVENTS)) & samples["value"].notna()]
    found = []
    for line, part in rows.groupby(LINE, sort=False, observed=True):
        for which, some in (("0", part["layer"] == 0), ("others", part["layer"] != 0)):
            counted = part[some].pivot_table(
                index="input_index", columns="metric", values="value", aggfunc="sum", observed=True
            )
            names = [name for name in EVENTS if name in counted]
            if not names:
                continue
            heads = len(part[some].drop_duplicates(["layer", "head"]))
            numbers = summary(counted[names].to_numpy(float), seed=seed)
            front: dict[str, Any] = {**dict(zip(LINE, line, strict=True)), "layers": which}
            counts = pd.DataFrame({"counted": [EVENTS[name] for name in names], "heads": heads})
            found.append(pd.concat([counts, numbers], axis=1).assign(**front))
    columns = [*LINE, "layers", "counted", "heads", "mean", "std", "ci_low", "ci_high", "n"]
    return pd.concat(found, ignore_index=True)[columns] if found else pd.DataFrame(columns=columns)


def places(samples: pd.DataFrame) -> pd.DataFrame:
    """Where the sink of each head is, and whether it stays there: a row per head that had an event.

    Columns `PLACES`: inputs (measured), events (inputs with one), index (the most frequent place, the first
    of several), row and column of its patch, kind of key, share of the events that are there: 1 where the
    same place is the sink of every image that has one.
    """
    rows = samples[samples["metric"].isin(["sink_event", "sink_index", "sink_row", "sink_column", *KINDS])]
    keys = [*LINE, "layer", "head", "input_index"]
    if rows.loc[rows["metric"] == "sink_index", "value"].isna().all():  # also where there is none
        return pd.DataFrame(columns=PLACES)
    wide = rows.pivot_table(
        index=keys, columns="metric", values="value", aggfunc="first", observed=True, sort=False
    ).reset_index()
    found = []
    for head, part in wide.groupby(keys[:-1], sort=False, observed=True):
        there = part[part["sink_index"].notna()]
        if there.empty:
            continue
        counts = there["sink_index"].value_counts()
        place = counts[counts == counts.max()].index.min()
        one = there[there["sink_index"] == place].iloc[0]
        kind = next((word for name, word in KINDS.items() if one.get(name, 0) == 1), "")
        found.append(
            dict(zip(keys[:-1], head, strict=True))
            | {"inputs": len(part), "events": len(there), "index": place, "kind": kind}
            | {name: one.get(f"sink_{name}", np.nan) for name in ("row", "column")}
            | {"share": counts.max() / len(there)}
        )
    return pd.DataFrame(found, columns=PLACES)
