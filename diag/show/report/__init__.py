"""Runs as one self-contained HTML page: words, curves, tables, heads, pictures, provenance. No torch.

    write_report([Path("runs/demo-vision")], Path("report.html"))

The page holds all it needs: no file beside it, no request to anywhere. The same folders give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diag.errors import UserError
from diag.metrics.catalogue import entry_of

if TYPE_CHECKING:
    from diag.results.collect import Collection
    from diag.show.report.content import Line
    from diag.show.report.folders import Attended

GENERATOR = "attnbias"
"""What the page names as its maker; a file that does not is never overwritten."""

SEED = 0
"""Of the bootstrap behind the summary."""


@dataclass(frozen=True)
class Report:
    """A report that was written: where, its size in bytes, how many lines, and folders that were left out."""

    path: Path
    size: int
    lines: int
    problems: Mapping[str, str] = field(default_factory=dict)


def write_report(folders: Iterable[Path], path: Path, *, title: str | None = None) -> Report:
    """Reads run folders (and attend folders beside them) and writes the page.

    Raises UserError if no run can be read, or if `path` holds something that is no report.
    """
    from diag.results.collect import collect
    from diag.results.files import atomically
    from diag.show.report.folders import is_attend, read_attended

    check_free(path)
    given = list(dict.fromkeys(folders))
    looks = [folder for folder in given if is_attend(folder)]
    runs = [folder for folder in given if folder not in looks]
    if not runs:
        raise UserError(
            "no run was given" + (", only attend folders" if looks else ""),
            "give at least one run folder, for example: attnbias report runs/demo-vision",
        )
    collection = collect(runs)
    attended, problems = read_attended(looks)
    problems = {**collection.problems, **problems}
    text = page(collection, attended, title=title, problems=problems)
    atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))
    return Report(path, len(text.encode("utf-8")), len(collection.labels), problems)


def check_free(path: Path) -> None:
    """Raises UserError if writing to `path` would take the place of anything but a report."""
    if path.is_dir():
        raise UserError(f"'{path}' is a folder", "give a file with -o, for example -o report.html")
    if not path.exists():
        return
    with path.open("rb") as file:
        start = file.read(2048)
    if f'<meta name="generator" content="{GENERATOR}">'.encode() not in start:
        raise UserError(
            f"'{path}' exists and was not made by attnbias report",
            "choose another name with -o, or remove the file",
        )


def page(
    collection: Collection,
    attended: Sequence[Attended] = (),
    *,
    title: str | None = None,
    problems: Mapping[str, str] | None = None,
) -> str:
    """The page as text."""
    from diag.show.report import content, provenance
    from diag.show.report.attended import look
    from diag.show.report.glossary import grouped
    from diag.show.report.palette import PAPER, variables

    sentences, compared = words(collection)
    lines = content.lines_of(collection, sentences)
    charts = [drawn for line in lines for drawn in line.charts]
    comparison = content.comparison(lines, collection)
    charts += [found.chart for found in comparison]
    metrics = dict.fromkeys(name for line in lines for table in line.tables for name, _ in table.metrics)
    looks = [look(found) for found in attended]
    metrics |= dict.fromkeys(name for found in looks for name, _ in found.metrics)
    manifests = [*collection.manifests.items(), *((found.name, found.manifest) for found in attended)]
    colours = content.colours_of(collection)
    first_tokens = collection.layers.get("first_token", ())
    return _template().render(
        title=title or default_title(lines),
        lead=lead(lines),
        generator=GENERATOR,
        compared_words=compared,
        lines=lines,
        glance=content.glance(lines, collection),
        comparison=comparison,
        looks=looks,
        sources=[provenance.source(name, found) for name, found in manifests],
        problems=problems or {},
        notes=provenance.notes(collection.layers["values"], first_tokens)
        if "values" in collection.layers
        else [],
        glossary={
            title: [(name, entry_of(name)) for name in names] for title, names in grouped(metrics).items()
        },
        schemes={scheme: variables(colours, scheme) for scheme in PAPER},
        paper=PAPER,
        data=_embedded(
            {
                "charts": {drawn.name: drawn.data for drawn in charts},
                "heads": {line.slug: {"label": line.label, **line.heads} for line in lines if line.heads},
                "metrics": {name: {"heading": entry_of(name).heading} for name in metrics},
            }
        ),
    )


def words(collection: Collection) -> tuple[dict[str, list[str]], list[str]]:
    """Sentences about every line, by label, and about their differences where there are several."""
    from diag.results.profiles import profiles
    from diag.show.words import comparison, summary
    from diag.show.words.control import series_control

    found = profiles(collection.samples, seed=SEED)
    sentences = {label: summary(collection, found, label) for label in collection.labels}
    if len(sentences) == 1:
        return sentences, []
    return sentences, comparison(collection, found, control=series_control(collection))


def default_title(lines: Sequence[Line]) -> str:
    """`Attention bias in A, B and C`, or how many models there are where names would be too long a title."""
    models = list(dict.fromkeys(line.model for line in lines))
    named = _listed(models)
    return f"Attention bias in {named if len(named) <= 60 else f'{len(models)} models'}"


def lead(lines: Sequence[Line]) -> str:
    """What the page is, in one sentence."""
    models = list(dict.fromkeys(line.model for line in lines))
    counts = sorted({dict(line.facts).get("inputs (n)", "") for line in lines})
    what = models[0] if len(models) == 1 else f"{len(models)} models"
    more = f" in {len(lines)} ways of measuring" if len(lines) > len(models) else ""
    n = (
        f", n = {counts[0]} inputs" + (" each" if len(lines) > 1 else "")
        if len(counts) == 1 and counts[0]
        else ""
    )
    return (
        "How much of what attention returns does the token already have? "
        f"Measured in {what}{more}, layer by layer and head by head{n}."
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html")


def _embedded(document: Mapping[str, Any]) -> Any:
    """JSON that may stand in a `<script>`: no sign in it can end the element or begin another."""
    import markupsafe

    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return markupsafe.Markup(text)
