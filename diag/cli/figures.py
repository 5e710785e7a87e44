"""`attnbias figures`: plans → missing runs measured → every figure, table and caption of a writeup."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from diag.cli.app import app
from diag.cli.interrupts import interruptible
from diag.cli.options import output
from diag.cli.plans import plans_for
from diag.cli.streams import answer
from diag.errors import say

if TYPE_CHECKING:
    from diag.studies.writeup import Need, Produced


@app.command()
def figures(
    plans: Annotated[
        list[Path],
        Argument(
            metavar="PLAN…",
            help="Plans in YAML, or names of shipped ones, such as demo; others are left out.",
        ),
    ],
    out: Annotated[Path, output("A folder per plan is written here.")] = Path("figures"),
    runs: Annotated[Path, Option(help="Where finished runs are, and missing ones are put.")] = Path("runs"),
    check: Annotated[
        bool, Option("--check", help="Write nothing; exit 1 if a file would change, is missing or extra.")
    ] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Say what is measured and what is missing, and stop.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON document instead of tables.")] = False,
    quiet: Annotated[bool, Option("-q", "--quiet", help="Print only the folders.")] = False,
) -> None:
    """Draw every figure and table of a writeup, measuring only what is missing."""
    from diag.show.terminal import StderrListener
    from diag.studies.writeup import needs_of, produce, read_plans, shows

    found = read_plans(plans_for("figures", plans))
    if dry_run:
        needs = [(document.file, shows(plan), needs_of(plan, document, runs)) for plan, document in found]
        _print_needs(needs, as_json)
        return
    with (
        interruptible(lambda: "stopped; run the same command again to go on"),
        StderrListener(quiet=quiet) as listener,
    ):
        outcomes = [
            produce(plan, document, out, root=runs, check=check, listener=listener)
            for plan, document in found
        ]
    with answer(out):
        if as_json:
            document = {"plans": [_document(outcome) for outcome in outcomes]}
            print(json.dumps(document, indent=1, ensure_ascii=False))
        elif quiet:
            print(*(outcome.folder for outcome in outcomes), sep="\n")
        else:
            print("\n\n".join(_said(outcome, check) for outcome in outcomes))
    given = (("-o", out, "figures"), ("--runs", runs, "runs"))
    _end(outcomes, check, [f"{flag} {path}" for flag, path, usual in given if path != Path(usual)])


def _end(outcomes: Sequence[Produced], check: bool, options: Sequence[str]) -> None:
    failed = {f"{outcome.plan}: {what}": why for outcome in outcomes for what, why in outcome.failed.items()}
    if failed:
        say(f"{len(failed)} failed:")
        for what, why in failed.items():
            say(f"  {what}: {why}")
    differing = [
        f"  {outcome.folder / name}: {state}"
        for outcome in outcomes
        for name, state in outcome.differing.items()
    ]
    if check and differing:
        command = " ".join([*(str(outcome.plan) for outcome in outcomes), *options])
        count = "1 file is" if len(differing) == 1 else f"{len(differing)} files are"
        say(f"{count} not as drawn now:")
        for line in differing:
            say(line)
        say(f"tip: attnbias figures {command}   # draws them again")
        raise SystemExit(1)
    if failed:
        raise SystemExit(3)


def _said(outcome: Produced, check: bool) -> str:
    """What is in the folder, one line per figure or table; then the tables that are an answer themselves."""
    from diag.show.figures.tables import shorten
    from diag.show.terminal import columns

    rows = []
    for shown in outcome.shown:
        states = {outcome.files[f"{shown.stem}{ending}"] for ending in shown.endings}
        rows.append(
            {
                "name": shorten(shown.stem, 42),
                "kind": shown.kind,
                "files": " ".join(ending.lstrip(".") for ending in shown.endings),
                "state": next(iter(states)) if len(states) == 1 else "changed",
            }
        )
    changed = sum(state != "same" for state in outcome.files.values())
    done = "differ" if check else "written"
    head = f"{outcome.folder}: {len(outcome.files)} files, {changed} {done}; "
    head += f"{outcome.measured} runs measured, {outcome.reused} reused"
    return "\n\n".join([f"{head}\n{columns(rows)}", *_answers(outcome)])


def _answers(outcome: Produced) -> list[str]:
    """Tables with a verdict, in full."""
    from diag.show.terminal import columns, text_width

    said = []
    for table in outcome.tables:
        if not table.verdicts:
            continue
        for model, rows in table.shown.groupby("model", sort=False):
            cells = [
                {str(name): str(cell) for name, cell in row.items() if name != "model"}
                for _, row in rows.iterrows()
            ]
            said.append(f"{model}\n{columns(cells)}")
        said.append(
            "\n".join(line for verdict in table.verdicts for line in textwrap.wrap(verdict, text_width()))
        )
    return said


def _document(outcome: Produced) -> dict[str, Any]:
    return {
        "plan": str(outcome.plan),
        "folder": str(outcome.folder),
        "shown": [
            {"name": shown.stem, "kind": shown.kind, "files": [f"{shown.stem}{end}" for end in shown.endings]}
            for shown in outcome.shown
        ],
        "files": dict(outcome.files),
        "measured": outcome.measured,
        "reused": outcome.reused,
        "failed": dict(outcome.failed),
        "verdicts": [verdict for table in outcome.tables for verdict in table.verdicts],
    }


def _print_needs(found: Sequence[tuple[Path, list[str], list[Need]]], as_json: bool) -> None:
    if as_json:
        plans = [
            {"plan": str(file), "shows": shows, "needs": [asdict(need) for need in needs]}
            for file, shows, needs in found
        ]
        print(json.dumps({"plans": plans}, indent=1, ensure_ascii=False))
        return
    print("\n\n".join(_needs(file, shows, needs) for file, shows, needs in found))


def _needs(file: Path, shows: Sequence[str], needs: Sequence[Need]) -> str:
    from diag.show.figures.tables import shorten
    from diag.show.terminal import text_width

    counts = [
        f"{sum(need.state == state for need in needs)} {state}"
        for state in ("measured", "missing", "unknown")
    ]
    lines = [
        f"{file}: {len(needs)} runs, {', '.join(count for count in counts if not count.startswith('0 '))}"
    ]
    group = ("", "")
    for need in needs:
        if group != (group := (need.group, need.inputs)):
            lines.append(shorten(f"  {need.group}: {need.inputs}", text_width()))
        for place, (given, resolved) in enumerate(need.models.items()):
            length = f", T = {need.length}" if need.length else ""
            arrow = "" if resolved in (given, f"timm:{given}") else f" → {resolved}"
            lines.append(
                shorten(f"    {need.state if place == 0 else '':8}  {given}{length}{arrow}", text_width())
            )
    if any(need.state == "unknown" for need in needs):
        lines.append("  unknown: the data set is not looked up in a dry run")
    shown = textwrap.wrap(
        f"draws {', '.join(shows)}", text_width() - 2, break_on_hyphens=False, subsequent_indent="  "
    )
    return "\n".join([*lines, *(f"  {line}" for line in shown)])
