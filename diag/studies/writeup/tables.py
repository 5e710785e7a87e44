"""Tables of a plan: tidy numbers for CSV, and the same for people, as LaTeX and Markdown show them.

Each kind is a class, with what a plan may say of it and how it is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pandas as pd
from pydantic import Field

from diag.errors import UserError
from diag.metrics.catalogue import CATALOGUE, entry_of
from diag.results import published as literature
from diag.results.caveats import with_caveats
from diag.results.decimals import fixed
from diag.results.latex import latex
from diag.results.profiles import differences, profiles
from diag.results.writing import write, write_text
from diag.show.words.phrases import decimal, interval
from diag.studies.writeup.captions import settings
from diag.studies.writeup.item import Names, OfProbe, WriteupItem
from diag.studies.writeup.material import Material, known_metrics, published_name

_SHORT = {name: CATALOGUE[name].column for name in ("cos_y_vself", "self_part", "context_part")}
HEADINGS = _SHORT | {
    "entropy": f"{CATALOGUE['entropy'].heading}, {CATALOGUE['entropy'].unit}",
    "bias": _SHORT["cos_y_vself"],
    "bias_last_minus_first": f"last − first of {_SHORT['cos_y_vself']}",
    "self_share": "share of the self part",
}
"""Where a table for people says it shorter than the catalogue's heading, and quantities of profiles."""


def heading(name: str) -> str:
    """A metric or quantity as a table's heading."""
    return HEADINGS.get(name) or entry_of(name).heading


SUFFIXES = (".csv", ".tex", ".md")


@dataclass(frozen=True)
class Tabled:
    """One table. data: numbers; shown: words, for people. verdicts: one line each, for the terminal."""

    stem: str
    data: pd.DataFrame
    shown: pd.DataFrame
    words: str
    rows: pd.DataFrame
    verdicts: tuple[str, ...] = ()
    settings: ClassVar[str] = ""

    def save(self, folder: Path) -> tuple[str, ...]:
        """Writes its files; their endings."""
        write(self.data, folder / f"{self.stem}.csv")
        write(self.shown, folder / f"{self.stem}.md")
        write_text(latex(self.shown, settings(self.rows, ())), folder / f"{self.stem}.tex")
        return SUFFIXES


class LayerTable(OfProbe):
    """A row per layer, a column per metric."""

    kind: Literal["layers"]
    metrics: Names = (
        "cos_y_vself",
        "self_part",
        "context_part",
        "cos_y_vpartner",
        "cos_y_vuniform",
        "value_similarity",
        "self_weight",
    )

    def made(self, stem: str, material: Material) -> list[Tabled]:
        rows = known_metrics(material.table(self), self.metrics, self.probe)
        keys = ["label", "layer"]
        wide = rows.pivot_table(
            index=keys, columns="metric", values="mean", sort=False, dropna=False
        ).reset_index()
        shown = pd.DataFrame({"model": wide["label"], "layer": wide["layer"].astype(int)})
        for name in self.metrics:
            shown[heading(name)] = wide[name].map(decimal)
            if name == self.metrics[0]:
                ends = rows[rows["metric"] == name].set_index(keys)
                ends = ends.loc[list(zip(wide["label"], wide["layer"], strict=True))]
                shown["95 % interval"] = _intervals(ends)
        return [Tabled(stem, rows, shown, "Means over inputs, layer by layer.", rows)]


class ProfileTable(OfProbe):
    """First, minimum, last value and shape of metrics over depth, a row per line."""

    kind: Literal["profiles"]
    metrics: Names = ("cos_y_vself",)

    def made(self, stem: str, material: Material) -> list[Tabled]:
        samples = material.table(self, "samples")
        found = profiles(samples)
        _refuse_unknown(self.metrics, found["metric"], "profiles")
        found = found[found["metric"].isin(self.metrics)].reset_index(drop=True)
        rows = []
        for (label, metric), part in found.groupby(["label", "metric"], sort=False):
            by = {str(row["quantity"]): row for _, row in part.iterrows()}
            row = {"model": label}
            if len(self.metrics) > 1:
                row["metric"] = heading(str(metric))
            for quantity in ("first", "minimum", "last", "last_minus_first", "mean"):
                if quantity in by:
                    row[quantity.replace("_minus_", " − ")] = _profiled(by[quantity], quantity)
            if "shape" in by:
                row["shape"] = str(by["shape"]["word"])
            row["n"] = str(int(part["n"].max()))
            rows.append(row)
        words = "Profiles over depth: values with 95 % intervals, where the minimum lies, and the shape."
        return [Tabled(stem, found, pd.DataFrame(rows), words, _measured(self, material))]


class DifferenceTable(OfProbe):
    """Differences between lines, with intervals."""

    kind: Literal["differences"]
    quantities: Names | None = None

    def made(self, stem: str, material: Material) -> list[Tabled]:
        found = differences(material.table(self, "samples"))
        if self.quantities is not None:
            _refuse_unknown(self.quantities, found["quantity"], "differences")
            found = found[found["quantity"].isin(self.quantities)].reset_index(drop=True)
        if found.empty:
            raise UserError("a table of differences needs two lines", "name a second model in the probe")
        shown = pd.DataFrame(
            {
                "difference": found["b"] + " − " + found["a"],
                "of": found["quantity"].map(heading),
                "value": [decimal(value, sign=True) for value in found["difference"]],
                "95 % interval": _intervals(found, sign=True),
                "n": [
                    f"{a}, paired" if paired else str(a) if a == b else f"{a} and {b}"
                    for a, b, paired in zip(found["n_a"], found["n_b"], found["paired"], strict=True)
                ],
            }
        )
        words = (
            "Differences between models, of means over layers (B − A: above 0, B has more); paired where the "
            "inputs are the same."
        )
        return [Tabled(stem, found, shown, words, _measured(self, material))]


class ReproductionTable(OfProbe):
    """Published value, measured value, difference, within or not. reference: a CSV of one's own."""

    kind: Literal["reproduction"]
    published: dict[str, str] = Field(default={})
    reference: Path | None = None

    def made(self, stem: str, material: Material) -> list[Tabled]:
        layers = material.table(self)
        parts, verdicts = [], []
        lines = layers.drop_duplicates("model").set_index("model")
        named = {str(model): with_caveats(str(model), line) for model, line in lines.iterrows()}
        for model in named:
            name = self.published.get(model) or published_name(model)
            if name is None:
                verdicts.append(f"{model}: nothing is published here")
                continue
            found = literature.reproduction(layers, model, name, self.reference)
            parts.append(found.assign(model=model, published_model=name))
            rest = len(literature.curves(name, self.reference)) - len(found)
            verdicts.append(literature.verdict(found, named[model], not_measured=rest))
            other = literature.other_settings(layers, model, str(found["source"].iloc[0]))
            verdicts += [f"{model}: other settings than published: {'; '.join(other)}"] if other else []
        if not parts:
            raise UserError(
                f"nothing is published for the models of probe '{self.probe}'", "published: {MODEL: NAME}"
            )
        found = pd.concat(parts, ignore_index=True)
        found = found[["model", "published_model", *[name for name in found if "model" not in str(name)]]]
        shown = pd.DataFrame(
            {
                "model": found["model"].map(named),
                "metric": found["metric"],
                "layer": found["layer"].astype(int),
                "published": [
                    f"{fixed(value)} ± {off:g}"
                    for value, off in found[["published", "uncertainty"]].to_numpy(float)
                ],
                "measured": found["measured"].map(decimal),
                "95 % interval": _intervals(found),
                "difference": [decimal(value, sign=True) for value in found["difference"]],
                "within": found["within"].map({True: "yes", False: "no"}),
            }
        )
        words = (
            "Published and measured values. Within: the published value lies in the measured 95 % interval, "
            "widened by the uncertainty of the published value. " + " ".join(f"{line}." for line in verdicts)
        )
        return [Tabled(stem, found, shown, words, layers, tuple(verdicts))]


class ResultsTable(WriteupItem):
    """Published: accuracy and value similarity without and with XSA."""

    kind: Literal["results"]

    def made(self, stem: str, material: Material) -> list[Tabled]:
        found = literature.accuracy()
        second = found["training_run"] > 1
        shown = pd.DataFrame(
            {
                "model": found["label"] + second.map({True: ", second training", False: ""}),
                "top-1": found["baseline"].map("{:.2f}".format),
                "top-1 with XSA": found["xsa"].map("{:.2f}".format),
                "change": found["change"].map(lambda value: decimal(value, sign=True, digits=2)),
                "value similarity": found["similarity_baseline"].where(~second).map(decimal),
                "with XSA": found["similarity_xsa"].where(~second).map(decimal),
            }
        )
        words = (
            "Published values: zero-shot ImageNet top-1 in per cent, and value similarity (mean over "
            "layers), of CLIP models trained on CC12M."
        )
        return [Tabled(stem, found, shown, words, pd.DataFrame())]


def _intervals(rows: pd.DataFrame, *, sign: bool = False) -> list[str]:
    ends = rows[["ci_low", "ci_high"]].to_numpy(float)
    return [interval(low, high, sign=sign) for low, high in ends]


def _profiled(row: pd.Series, quantity: str) -> str:
    sign = quantity == "last_minus_first"
    said = f"{decimal(row['value'], sign=sign)} [{interval(row['ci_low'], row['ci_high'])}]"
    return f"{said} at {row['layer']:.0f}" if quantity == "minimum" else said


def _refuse_unknown(wanted: tuple[str, ...], there: pd.Series, what: str) -> None:
    for name in wanted:
        if name not in set(there):
            known = ", ".join(dict.fromkeys(there))
            raise UserError(f"{what} have no '{name}'", f"they have {known}")


def _measured(item: OfProbe, material: Material) -> pd.DataFrame:
    """The rows that a caption counts inputs and tokens of."""
    rows = material.table(item)
    return rows[rows["metric"] == "cos_y_vself"] if (rows["metric"] == "cos_y_vself").any() else rows
