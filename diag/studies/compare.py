"""Runs side by side: profiles, differences and a verdict, on one screen and in a folder. No torch.

comparison.csv    the per-layer tables of all runs, with `label`
profiles.csv      every line's curves in numbers (`diag.results.profiles`)
differences.csv   between lines
nulls.csv, .tex   what is left of each line's bias after each null (`diag.results.nulls`)
verdict.txt       in sentences (`diag.show.words`)
manifest.json     what was compared; written last
figures/          curves over relative depth, profiles with their minimum marked
"""

from __future__ import annotations

import json
import string
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from diag.errors import UserError
from diag.inputs.items import sha256
from diag.results.caveats import BETWEEN, apart
from diag.results.collect import Collection
from diag.results.decimals import fixed
from diag.results.folder import MANIFEST
from diag.results.hashes import hashes
from diag.results.nulls import MEASURED, for_people, left_after
from diag.results.profiles import UNCLEAR, differences, missing, profiles
from diag.results.published import curves, name_of, other_settings, sinks
from diag.results.staging import check_free, is_empty, staged, verb_of
from diag.results.writing import write, write_json, write_text, writing
from diag.run.plan import RUNS
from diag.show.figures import ENDINGS, Asked
from diag.show.figures.drawer import Drawer, draw_all
from diag.show.figures.panels import COMPARISON_METRICS, PROFILE_METRICS
from diag.show.figures.tables import rows_of, shorten, span
from diag.show.terminal import beside, filled, text_width
from diag.show.words import comparison as compared_words
from diag.show.words import summary
from diag.show.words.control import series_control
from diag.show.words.nulls import null_sentences, verdicts
from diag.show.words.phrases import Found, Profile, doubt_of, percent, profile_of
from diag.show.words.unusual import undefined
from diag.studies.comparisons import ANSWER, OWNER, TABLES, VERDICT, Answer, named

Row = Mapping[str, str | tuple[str, str]]
"""Of a table on the screen, by heading: a word or number, or a number and its interval."""

DIFFERENCE = "b - a: above 0, b has more"
"""Which way round all differences are."""

PROFILES_PER_FIGURE = 12

SHORT_DIFFERENCES = {"bias": "bias", "excess_over_partner": "over partner", "value_similarity": "v~v"}
"""Differences on the screen; all are in differences.csv. Name -> heading."""


@dataclass(frozen=True, repr=False)
class Comparison:
    """Lines side by side.

    profiles, differences: tables of `results.profiles`. nulls: that of `results.nulls`. verdict: sentences.
    missing: metrics that lines lack.
    published: values to lay over the figures, with the `label` of the line that they belong to; or None.
    settings: how it was computed: seed, growth, control.
    """

    collection: Collection
    profiles: pd.DataFrame
    differences: pd.DataFrame
    nulls: pd.DataFrame
    verdict: tuple[str, ...]
    missing: Mapping[str, tuple[str, ...]]
    published: pd.DataFrame | None
    settings: Mapping[str, Any]

    def __repr__(self) -> str:
        """Its lines; `print` shows what the command line does."""
        return f"Comparison({'; '.join(self.labels)})"

    def __str__(self) -> str:
        return screen(self)

    @property
    def labels(self) -> list[str]:
        """The labels of the lines, in order."""
        return self.collection.labels

    @property
    def notes(self) -> list[str]:
        """What could not be computed and why, a note per line (and reason)."""
        said = list(self.collection.notes)
        for label, part in self.collection.layers.groupby("label", sort=False):
            said += [f"{label!s}: {words}" for words in undefined(part)]
        said += [f"{label}: not measured: {', '.join(names)}" for label, names in self.missing.items()]
        if self.settings["growth"] is not None:
            lost = self.profiles[(self.profiles["quantity"] == "growth") & self.profiles["value"].isna()]
            said += dict.fromkeys(f"{row.label}: no growth from {row.word}" for row in lost.itertuples())
        return said

    @property
    def key(self) -> str:
        """Identifies the result: the runs' own keys, and how they were compared."""
        runs = [manifest.get("key") for manifest in self.collection.manifests.values()]
        overlaid = None if self.published is None else len(self.published)
        text = json.dumps([runs, self.labels, dict(self.settings), overlaid], default=str)
        return sha256(text)


def compare(
    collection: Collection,
    *,
    growth: tuple[int, int] | None = None,
    seed: int = 0,
    control: str | None = None,
    published: pd.DataFrame | None = None,
) -> Comparison:
    """Profiles, differences and verdict of all lines of a collection.

    growth: see `profiles.profiles`. control: what is controlled between the lines; by default what the
    series says that holds all their models, if there is one. published: see `published_for`.

    Raises UserError for a line whose samples were not kept.
    """
    sampled = set(collection.samples["label"])
    if bare := next((label for label in collection.labels if label not in sampled), None):
        raise UserError(
            f"no samples of '{bare}' were kept, and lines are compared by them",
            "measure it again with --keep-samples 64, or leave it out",
        )
    control = control or series_control(collection)
    found = profiles(collection.samples, seed=seed, growth=growth)
    apart = differences(collection.samples, seed=seed)
    left = left_after(collection.samples, seed=seed)
    if len(collection.labels) > 1:
        verdict = compared_words(collection, found, apart, control=control, seed=seed)
    else:
        verdict = summary(collection, found, collection.labels[0])
    verdict = [*verdict, *null_sentences(left)]
    settings = {"seed": seed, "growth": growth, "control": control}
    lacking = missing(collection.samples)
    return Comparison(collection, found, apart, left, tuple(verdict), lacking, published, settings)


def published_for(collection: Collection) -> tuple[pd.DataFrame, list[str]]:
    """Published curves of the lines' models with their `label`, and notes: what was measured otherwise.

    A table without rows where nothing is published for any of them.
    """
    parts, notes = [], []
    if (collection.layers["metric"] == "sink_event").any():
        notes += [
            f"published ({row['source']}): {row['model']}: {row['broadcast']:.2f} broadcast and "
            f"{row['no_op']:.2f} no-op events per image, blocks 1 to 23, {row['images']} images"
            for _, row in sinks().iterrows()
        ]
    lines = collection.layers.drop_duplicates("label")
    for label, model in zip(lines["label"], lines["model"], strict=True):
        name = name_of(str(model))
        if name is None:
            notes.append(f"{label}: nothing is published here")
            continue
        found = curves(name).assign(label=label)
        parts.append(found)
        own = collection.layers[collection.layers["label"] == label]
        for source in found["source"].unique():
            others = other_settings(own, str(model), str(source))
            notes += [f"{label}, {source}: measured otherwise: {'; '.join(others)}"] if others else []
    columns = [*curves().columns, "label"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns), notes


# --- the folder


def default_folder(found: Comparison, root: Path = RUNS) -> Path:
    """`runs/compare-NAMES-KEY`: the same comparison has the same folder."""
    return root / f"{named(found.collection.folders)}-{found.key[:8]}"


def write_comparison(
    found: Comparison,
    folder: Path,
    *,
    command: str | None = None,
    answer: Answer | None = None,
    figures: str = "all",
    drawer: Drawer | None = None,
) -> list[Path]:
    """Writes the folder in the place of an earlier comparison; the paths of its figures.

    answer: what is said of it, where it is to be found again. figures: those of `ENDINGS` that are drawn.
    drawer: as in `draw_comparison`.
    Raises UserError if the folder holds anything else, or cannot be written.
    """
    check_free(folder, OWNER)
    if not is_empty(folder) and verb_of(folder) != OWNER.verb:
        raise UserError(f"'{folder}' is not empty and holds no comparison", "give another folder with -o")
    with staged(folder, OWNER) as place:
        write(found.collection.layers, place / "comparison.csv")
        write(found.profiles, place / "profiles.csv")
        write(found.differences, place / "differences.csv")
        said = verdicts(found.nulls)
        write(found.nulls.assign(verdict=said), place / "nulls.csv")
        write(for_people(found.nulls, said), place / "nulls.tex")
        text = "\n\n".join(map(_filled, found.verdict)) + "\n"
        write_text(text, place / VERDICT)
        drawn = draw_comparison(found, place / "figures", ENDINGS[figures], drawer)
        names = [path.relative_to(place).as_posix() for path in drawn]
        if answer is not None:
            write_json(answer.written, place / ANSWER)
        document = {
            "kind": OWNER.verb,
            "key": found.key,
            "command": command,
            "runs": {
                name: {"folder": str(path), "key": found.collection.manifests[name].get("key")}
                for name, path in found.collection.folders.items()
            },
            "problems": found.collection.problems,
            "labels": found.labels,
            "missing": found.missing,
            "difference": DIFFERENCE,
            **found.settings,
            "tables": hashes(place, TABLES),
            "figures": names,
            "request": answer and answer.request,
            "files": hashes(place, [*TABLES, VERDICT, ANSWER, *names]),
        }
        write_json(document, place / MANIFEST)
    return [folder / name for name in names]


def draw_comparison(
    found: Comparison,
    folder: Path,
    endings: Sequence[str] = ENDINGS["all"],
    drawer: Drawer | None = None,
) -> list[Path]:
    """The figures that the lines' metrics allow, as such pictures and CSV, if any; the paths.

    drawer: who draws, if it was started; this process else.
    """
    if not endings:
        return []
    layers, asked = found.collection.layers, dict[str, Asked]()
    rows = rows_of(layers, COMPARISON_METRICS)
    if not rows.empty and len(found.labels) > 1:
        asked["comparison"] = Asked("curves:model_comparison", (rows, found.published), rows)
    for start in range(0, len(found.labels), PROFILES_PER_FIGURE):
        part = layers[layers["label"].isin(found.labels[start : start + PROFILES_PER_FIGURE])]
        rows = rows_of(part, PROFILE_METRICS)
        if not rows.empty:
            stem = "profiles" if len(found.labels) <= PROFILES_PER_FIGURE else f"profiles-{start + 1}"
            asked[stem] = Asked("depth:depth_profiles", (rows, found.published), rows)
    with writing(folder):
        return draw_all(asked, folder, endings, drawer)


# --- the screen


def screen(found: Comparison) -> str:
    """Lines, means, depth, differences and verdict, at most 80 columns wide."""
    names = (
        list(string.ascii_uppercase)
        if len(found.labels) <= 26
        else list(map(str, range(1, len(found.labels) + 1)))
    )
    keys = dict(zip(found.labels, names, strict=False))
    shown = {keys[label]: profile_of(found.profiles, label) for label in found.labels}
    blocks = [_lines(found, keys), _means(shown), _left(found.nulls, keys)]
    blocks += [_depth(shown), _similarity(shown), _unclear(shown), _apart(found.differences, keys)]
    blocks.append("\n".join(map(_filled, found.verdict)))
    return "\n\n".join(block for block in blocks if block)


def _filled(said: str) -> str:
    """A paragraph in lines; `n = 14` stays together, because textwrap does not break at no-break spaces."""
    bound = said.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
    return textwrap.fill(bound, text_width(), break_on_hyphens=False).replace("\N{NO-BREAK SPACE}", " ")


def _lines(found: Comparison, keys: Mapping[str, str]) -> str:
    said = []
    for label, part in found.collection.layers.groupby("label", sort=False):
        size, counts = span(part["n_tokens"]) if "n_tokens" in part else "", span(part["n"])
        facts = [f"T = {size}"] if size and " T = " not in str(label) else []
        facts += [f"n = {counts}", str(part["tokens"].iloc[0])]
        key, (name, behind) = keys[str(label)], apart(str(label))
        room = text_width() - len(key) - len(BETWEEN.join(["", *facts])) - 1
        said += filled([f"{key} {shorten(name, room)}", *behind, *facts])
    return "\n".join(said)


def _means(shown: Mapping[str, Profile]) -> str:
    means = {"bias": "cos_y_vself", "over partner": "excess", "over uniform": "excess_over_uniform"}
    rows: list[Row] = []
    for key, profile in shown.items():
        share = profile.get(("self_part", "share"))
        said = {head: _with_interval(profile.get((metric, "mean"))) for head, metric in means.items()}
        own = percent(share.value) if share is not None and share.known else "–"
        rows.append({"": key, **said, "self": own})
    title = "Mean over layers: bias cos(y,v) with 95 % CI, its excess over two nulls, share "
    return _titled(title + "of it that is the token attending to itself", rows)


def _left(table: pd.DataFrame, keys: Mapping[str, str]) -> str:
    rows: list[Row] = []
    columns = ["label", "null", "bias", "value", "left", "ci_low", "ci_high", "share_left", "n"]
    measured = table[table["state"] == MEASURED][columns]
    for label, null, bias, value, left, low, high, share, n in measured.itertuples(index=False):
        row = {"": f"{keys[str(label)]} {null}", "bias": fixed(bias), "null": fixed(value)}
        of_bias = "–" if pd.isna(share) else percent(share)
        rows.append({**row, "left": _with_interval(Found(left, low, high, n)), "share left": of_bias})
    return _titled("What each null leaves of the bias, bias - null, with 95 % CI", rows)


def _depth(shown: Mapping[str, Profile]) -> str:
    rows: list[Row] = []
    for key, profile in shown.items():
        if ("cos_y_vself", "first") in profile:
            rise = _with_interval(profile["cos_y_vself", "last_minus_first"])
            rows.append({"": key, **_over_depth(profile, "cos_y_vself", {"last - first": rise})})
    return _titled("Bias over depth (minimum @layer, relative depth)", rows)


def _similarity(shown: Mapping[str, Profile]) -> str:
    rows: list[Row] = []
    words = set()
    for key, profile in shown.items():
        if ("value_similarity", "first") in profile:
            growth, onset = profile["value_similarity", "growth"], profile["value_similarity", "onset"]
            begun = f"{onset.value:.0f}" if onset.known else "–"
            more: Row = {"growth": _with_interval(growth, digits=2), "onset": begun}
            rows.append({"": key, **_over_depth(profile, "value_similarity", more)})
            words.add(growth.word.split(":")[0])
    said = words.pop() if len(words) == 1 else "first to last"
    return _titled(f"Value similarity over depth (growth: {said}; after the onset it grows)", rows)


def _unclear(shown: Mapping[str, Profile]) -> str:
    """Why shapes are not named that resamples have, and what the shares beside them count."""
    said = []
    for metric, name in (("cos_y_vself", "bias"), ("value_similarity", "value similarity")):
        doubts: dict[str, list[str]] = {}
        for key, profile in shown.items():
            if doubt := doubt_of(profile, metric):
                doubts.setdefault(doubt, []).append(key)
        told = [f"{doubt} ({', '.join(keys)})" for doubt, keys in doubts.items()]
        said += [f"Unclear {name}: {'; '.join(told)}."] if told else []
    if not said:
        return ""
    said.append(
        "A share counts the resamples that look so; noise is judged over all pairs of layers at once."
    )
    return "\n".join(map(_filled, said))


def _apart(table: pd.DataFrame, keys: Mapping[str, str]) -> str:
    rows: list[Row] = []
    for pair, part in table.groupby(["a", "b"], sort=False):
        a, b = (keys[str(label)] for label in pair)  # type: ignore[attr-defined]
        columns = part[["quantity", "difference", "ci_low", "ci_high", "n_a"]].itertuples(index=False)
        known = {name: Found(value, low, high, int(n)) for name, value, low, high, n in columns}
        said = {head: _with_interval(known.get(name)) for name, head in SHORT_DIFFERENCES.items()}
        rows.append({"": f"{b} - {a}", **said, "paired": "yes" if part["paired"].all() else "no"})
    return _titled("Differences of means over layers, with 95 % CI (B - A above 0: B has more)", rows)


def _over_depth(profile: Profile, metric: str, more: Row) -> Row:
    """A curve's ends, more of it, and its shape with the share of resamples that have it: `falling 89%`."""
    first, low, last = (profile[metric, quantity] for quantity in ("first", "minimum", "last"))
    shape, likeliest = profile[metric, "shape"], profile[metric, "likeliest_shape"]
    said = UNCLEAR if doubt_of(profile, metric) else shape.word
    if shape.known:
        said += f" {percent(shape.value)}"
    elif likeliest.known:
        said += f": {likeliest.word} {percent(likeliest.value)}"
    minimum = f"{fixed(low.value)} @{low.layer:.0f} {low.depth:.2f}"
    ends = {"first": fixed(first.value), "minimum": minimum, "last": fixed(last.value)}
    return {**ends, **more, "shape": said}


def _with_interval(number: Found | None, digits: int = 3) -> tuple[str, str]:
    """A number and its interval, two parts of one cell."""
    if number is None or not number.known:
        return "–", ""
    spread = "" if pd.isna(number.low) else f"{fixed(number.low, digits)}…{fixed(number.high, digits)}"
    return fixed(number.value, digits), spread


def _titled(title: str, rows: Sequence[Row]) -> str:
    return f"{_filled(title)}\n{_table(rows)}" if rows else ""


def _table(rows: Sequence[Row]) -> str:
    """Aligned columns: words left, numbers right; of a number with an interval, both."""
    columns = []
    for head in rows[0]:
        cells = [row[head] for row in rows]
        pairs = [cell if isinstance(cell, tuple) else (cell, "") for cell in cells]
        widths = [max(len(pair[part]) for pair in pairs) for part in (0, 1)]
        if widths[1]:
            texts = [f"{number:>{widths[0]}} {spread:>{widths[1]}}" for number, spread in pairs]
        else:
            texts = [number for number, _ in pairs]
        width = max(len(head), *map(len, texts))
        left = head in ("", "shape")
        shown = head.ljust(width) if left or widths[1] else head.rjust(width)
        columns.append([shown, *(text.ljust(width) if left else text.rjust(width) for text in texts)])
    return "\n".join(line.rstrip() for line in beside(columns))
