"""`attnbias report`: finished folders → one HTML page that opens by double-click."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from diag.cli.app import app
from diag.cli.options import output
from diag.cli.streams import answer
from diag.errors import say


@app.command()
def report(
    runs: Annotated[
        list[Path],
        Argument(metavar="RUN|FOLDER…", help="Folders of probe, and of any other verb."),
    ],
    out: Annotated[Path, output("The page to write; only a report is overwritten.")] = Path("report.html"),
    title: Annotated[str | None, Option(help="Title of the page [default: the models' names].")] = None,
    quiet: Annotated[bool, Option("-q", "--quiet", help="Print only the page's path.")] = False,
) -> None:
    """Write runs, and what was asked of them, as one self-contained HTML page."""
    from diag.show.report import write_report

    found = write_report(runs, out, title=title)
    for folder, why in found.problems.items():
        say(f"left out: {folder}: {why}")
    for note in found.notes:
        say(note)
    if not quiet:
        lines = "1 line" if found.lines == 1 else f"{found.lines} lines"
        say(f"{lines}, {found.size / 1e6:.1f} MB; open it in a browser")
        if found.size > 5_000_000:  # too heavy to send around
            say("tip: fewer folders make a smaller page")
    with answer(found.path):
        print(found.path)
    if found.problems:
        raise SystemExit(3)
