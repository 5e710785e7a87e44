"""Published numbers: per-layer curves, a ladder of models, accuracies; how a measurement compares.

The tables in `published_data/` were read from others' code, data and figures; each row names its source, and
`uncertainty` says how well the number could be read (half a digit of a table, or a digitised plot). No torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from diag.errors import UserError, did_you_mean, one_of
from diag.inputs.tables import COUNT, NAME, NUMBER, PLACE, TEXT, Layout, read_table
from diag.results.decimals import fixed

FOLDER = Path(__file__).parent / "published_data"
CURVES = Layout(
    {"model": NAME, "metric": NAME, "layer": PLACE, "value": NUMBER, "uncertainty": NUMBER, "source": TEXT}
)
COLUMNS = tuple(CURVES.needed)
LADDER = Layout(
    {"model": NAME, "tokens": COUNT, "source": TEXT}
    | dict.fromkeys(("cos_y_vself", "cos_y_vpartner", "self_specific_percent"), NUMBER)
)
ACCURACY = Layout(
    {"label": NAME, "model": NAME, "training_run": COUNT, "baseline": NUMBER, "xsa": NUMBER, "source": TEXT}
)

SINKS = Layout({"model": NAME, "broadcast": NUMBER, "no_op": NUMBER, "images": COUNT, "source": TEXT})

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "FrancescoPaoloL/xsa_POC": {"values": "bias_free", "n_tokens": 128, "n": 32, "first_token": "excluded"},
    "RohanMulay1/xsa-controls": {"values": "as_computed", "n_tokens": 384, "first_token": "excluded"},
    "Fraser-Greenlee/blog": {"n": 8},
}
"""How a source measured, as far as it says so, in the columns of a run's tables."""

_PREFIX = re.compile(r"^(?:\w+:)?(?:[\w.-]+/)?")


def curves(model: str | None = None, file: Path | None = None) -> pd.DataFrame:
    """Per layer, of one published model or all: columns model, metric, layer, value, uncertainty, source.

    file: a CSV of one's own with the same columns, instead of the package's.
    Raises UserError for an unknown model, or a file that is not such a table.
    """
    table = _read(FOLDER / "published_curves.csv" if file is None else file, CURVES)
    if model is None:
        return table
    found = table[table["model"] == model].reset_index(drop=True)
    if found.empty:
        models = list(dict.fromkeys(table["model"]))
        raise UserError(
            f"nothing is published here for '{model}'",
            did_you_mean(model, models) or f"choose from {one_of(models)}",
        )
    return found


def ladder() -> pd.DataFrame:
    """Means over layers of nine language models at T = 512.

    Columns model, tokens, cos_y_vself, cos_y_vpartner, self_specific_percent, source.
    """
    return _read(FOLDER / "published_ladder.csv", LADDER)


def accuracy() -> pd.DataFrame:
    """Zero-shot ImageNet top-1 in per cent of CLIP models trained on CC12M without and with XSA.

    Columns label, model, training_run, baseline, xsa, source, change (xsa - baseline, in points), and
    similarity_baseline, similarity_xsa: the value similarity, mean over layers, of the first training run
    (no curves are published for the second).
    """
    similar = curves().query("metric == 'value_similarity'").groupby("model")["value"].mean()
    table = _read(FOLDER / "published_accuracy.csv", ACCURACY)
    return table.assign(
        change=(table["xsa"] - table["baseline"]).round(2),
        similarity_baseline=table["model"].map(similar),
        similarity_xsa=(table["model"] + "-xsa").map(similar),
    )


def sinks() -> pd.DataFrame:
    """Broadcast and no-op events per image of models whose sinks were studied, in blocks 1 to 23 of 24.

    Columns model, broadcast, no_op (heads with such an event, mean over images of ADE20K), images, source.
    """
    return _read(FOLDER / "published_sinks.csv", SINKS)


def name_of(model: str) -> str | None:
    """The published model that a model's name stands for; None where nothing is published for it.

    >>> name_of("hf:openai-community/gpt2-medium"), name_of("gpt2-small"), name_of("demo:lm")
    ('gpt2-medium', 'gpt2', None)
    """
    if "@" in model or "," in model:
        return None  # another revision or size is another model
    name = _PREFIX.sub("", model).removesuffix("-small")
    return name if name in set(curves()["model"]) else None


def reproduction(
    layers: pd.DataFrame, model_in_table: str, published_model: str | None = None, file: Path | None = None
) -> pd.DataFrame:
    """Published and measured values side by side, a row per metric and layer that both have.

    layers: per-layer table of runs; one line of `model_in_table` (one token set, measured in one way).
    published_model: by default what the model's name stands for. file: see `curves`.

    Columns metric, layer, published, uncertainty, measured, ci_low, ci_high, difference (measured -
    published), within, source. `within`: the published value lies in the measured 95 % interval widened by
    the uncertainty on both sides; without an interval (one input), |difference| <= uncertainty.

    Raises UserError if nothing is published, the model is not in the table, or the table has several lines.
    """
    name = published_model or name_of(model_in_table)
    if name is None:
        raise UserError(
            f"nothing is published here for '{model_in_table}'", "name it: published: {MODEL: NAME}"
        )
    measured = layers[layers["model"] == model_in_table]
    if measured.empty:
        raise UserError(
            f"'{model_in_table}' is not in the table", f"it holds {one_of(layers['model'].unique())}"
        )
    if measured.duplicated(["metric", "layer"]).any():
        raise UserError(
            f"'{model_in_table}' was measured in several ways, or on several token sets",
            "choose one: a published value is compared with one measured value",
        )
    known = curves(name, file)[list(COLUMNS[1:])].rename(columns={"value": "published"})
    both = known.merge(
        measured.rename(columns={"mean": "measured"})[["metric", "layer", "measured", "ci_low", "ci_high"]],
        on=["metric", "layer"],
    )
    if both.empty:
        raise UserError(
            f"no value of '{name}' was measured", f"measure --metrics {','.join(known['metric'].unique())}"
        )
    low = both["ci_low"].astype(float).fillna(both["measured"]) - both["uncertainty"]
    high = both["ci_high"].astype(float).fillna(both["measured"]) + both["uncertainty"]
    return both.drop(columns="source").assign(
        difference=both["measured"] - both["published"],
        within=(low <= both["published"]) & (both["published"] <= high),
        source=both["source"],
    )


def verdict(table: pd.DataFrame, name: str, *, not_measured: int = 0) -> str:
    """One line about a `reproduction` table: how many values are within, and the largest difference.

    not_measured: published values of the model that the table has no measurement of.
    """
    worst = table.iloc[int(table["difference"].abs().to_numpy().argmax())]
    largest = fixed(worst["difference"], sign=True).replace("-", "\N{MINUS SIGN}")
    rest = f"; {not_measured} more are published and were not measured" if not_measured else ""
    return (
        f"{name}: {int(table['within'].sum())} of {len(table)} published values are within uncertainty and "
        f"interval; largest difference {largest} ({worst['metric']}, layer {worst['layer']}){rest}"
    )


def other_settings(layers: pd.DataFrame, model_in_table: str, source: str) -> list[str]:
    """What differs between a measurement and the settings of a source, in words; empty where nothing does."""
    rows = layers[layers["model"] == model_in_table]
    said = []
    for column, theirs in SETTINGS.get(source, {}).items():
        ours = list(rows[column].dropna().unique()) if column in rows else []
        if ours and ours != [theirs]:
            said.append(f"{_word(column)} {', '.join(map(_word, ours))} (published: {_word(theirs)})")
    return said


def _word(value: object) -> str:
    plain = {"n_tokens": "T", "first_token": "t = 0"}.get(str(value), str(value))
    return plain.replace("_", " ")


def _read(file: Path, layout: Layout) -> pd.DataFrame:
    tip = f"give a CSV file with the columns {','.join(layout.needed)}"
    return read_table(file, layout, "published values from", tip=tip)
