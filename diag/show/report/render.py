"""The page as text: everything that the template shows, put together from runs and attend folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from diag.errors import visible
from diag.metrics.catalogue import entry_of
from diag.results.collect import Collection
from diag.results.profiles import profiles
from diag.show.figures.style import MOST_BANDS
from diag.show.report import content, provenance
from diag.show.report.attended import AttendFolder, section_of
from diag.show.report.content import ReportLine
from diag.show.report.palette import PAPER, variables
from diag.show.report.studied import FIRST_PICTURES, StudyFolder
from diag.show.words import comparison, summary
from diag.show.words.control import series_control
from diag.show.words.phrases import listed

FIRST_WORDS = 3
"""Sentences that stand open under the first charts; the others are unfolded."""
GENERATOR = "attnbias"
"""What the page names as its maker; a file that does not is never overwritten."""


def page(
    collection: Collection,
    attended: Sequence[AttendFolder] = (),
    studies: Sequence[StudyFolder] = (),
    *,
    title: str | None = None,
    problems: Mapping[str, str] | None = None,
) -> str:
    """The page as text."""
    sentences, compared = words(collection) if collection.labels else ({}, [])
    lines = content.lines_of(collection, sentences) if sentences else []
    said = compared or [words for line in lines for words in line.sentences]
    looks = [section_of(found) for found in attended]
    side_by_side = content.comparison(lines, collection)
    ledgers = [drawn for line in lines for drawn in line.ledgers]
    charts = [*(drawn for line in lines for drawn in line.charts), *(chart for chart, _ in side_by_side)]
    shown = [*(table.metrics for line in lines for table in line.tables), *(look.metrics for look in looks)]
    metrics = dict.fromkeys(entry.name for entries in shown for entry in entries)
    manifests = [
        *collection.manifests.items(),
        *((found.name, found.manifest) for found in attended),
        *((found.name, found.manifest) for found in studies),
    ]
    colours = content.colours_of(collection)
    first_tokens = collection.layers.get("first_token", ())
    return _template().render(
        title=title or default_title(lines, studies),
        lead=lead(lines),
        generator=GENERATOR,
        said=said,
        first_count=FIRST_WORDS,
        reading=reading(lines),
        lines=lines,
        glance=content.glance(lines, collection) if lines else None,
        comparison=side_by_side,
        looks=looks,
        studies=studies,
        first_pictures=FIRST_PICTURES,
        sources=[provenance.source(name, found) for name, found in manifests],
        problems=problems or {},
        notes=[
            *collection.notes,
            *provenance.notes(collection.layers.get("values", ()), first_tokens),
        ],
        glossary={title: list(map(entry_of, names)) for title, names in content.grouped(metrics).items()},
        schemes={scheme: variables(colours, scheme) for scheme in PAPER},
        paper=PAPER,
        data=_embedded(
            {
                "charts": {drawn.name: drawn.data for drawn in ledgers}
                | {drawn.name: drawn.data for drawn in charts},
                "heads": {line.slug: {"label": line.label, **line.heads} for line in lines if line.heads},
                "metrics": {name: {"heading": entry_of(name).heading} for name in metrics},
            }
        ),
    )


def words(collection: Collection) -> tuple[dict[str, list[str]], list[str]]:
    """Sentences about every line, by label, and about their differences where there are several."""
    found = profiles(collection.samples, seed=0)
    sentences = {label: summary(collection, found, label) for label in collection.labels}
    if len(sentences) == 1:
        return sentences, []
    return sentences, comparison(collection, found, control=series_control(collection))


def default_title(lines: Sequence[ReportLine], studies: Sequence[StudyFolder] = ()) -> str:
    """`Attention bias in A, B and C`, or how many models there are where names would be too long a title."""
    if not lines:  # folders of other verbs alone
        return studies[0].title if len(studies) == 1 else "Attention bias"
    models = list(dict.fromkeys(line.named for line in lines))
    named = listed(models)
    few = len(models) == 1 or len(named) <= 60
    return f"Attention bias in {named if few else f'{len(models)} models'}"


def lead(lines: Sequence[ReportLine]) -> str:
    """What the page is, in one sentence."""
    if not lines:
        return "How much of what attention returns does the token already have?"
    models = list(dict.fromkeys(line.model for line in lines))
    counts = sorted({dict(line.facts).get("inputs (n)", "") for line in lines})
    what = lines[0].named if len(models) == 1 else f"{len(models)} models"
    more = f" in {len(lines)} ways of measuring" if len(lines) > len(models) else ""
    each = " each" if len(lines) > 1 else ""
    n = f", n = {counts[0]} inputs{each}" if len(counts) == 1 and counts[0] else ""
    return (
        "How much of what attention returns does the token already have? "
        f"Measured in {what}{more}, layer by layer and head by head{n}."
    )


def reading(lines: Sequence[ReportLine]) -> str:
    """How the first charts are read: what lines, bands and the horizontal axis are."""
    several = len(lines) > 1
    bands = "bands are 95 % bootstrap intervals over inputs"
    if len(lines) > MOST_BANDS:
        bands = (
            f"with {len(lines)} of them, their bands are left out: intervals are in the tables, and told "
            "when pointed at"
        )
    depth = " Depth runs from a model's first layer (0) to its last (1)." if several else ""
    return (
        f"Lines are means over heads and inputs; {bands}.{depth} Point at a chart, or select it and use the "
        "arrow keys, to read values."
    )


def _template() -> Any:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html")


def _plain(value: Any) -> Any:
    """What the template writes: names of models and inputs are whatever somebody called them."""
    return visible(value, keep="\n\t") if type(value) is str else value


def _embedded(document: Mapping[str, Any]) -> Any:
    """JSON that may stand in a `<script>`: no sign in it can end the element or begin another."""
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return markupsafe.Markup(text)
