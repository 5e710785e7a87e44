"""`attnbias audit`: is what people hook what attention uses, and do padded or packed batches leak?"""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from diag.cli import options
from diag.cli.app import app, records, say_failures
from diag.cli.options import fields_of, output, with_options
from diag.cli.streams import answer
from diag.errors import say

if TYPE_CHECKING:
    import pandas as pd

    from diag.studies.audit import Audited


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """What `attnbias audit` can be told."""

    model: Annotated[
        list[str],
        Option("-m", "--model", help="Model name, repeatable: [family:]name[@revision] or a folder."),
    ]
    images: options.Images = None
    texts: options.Texts = None
    seq_len: Annotated[
        int | None, Option(help="Tokens of the longest text; all that hooks show is kept [default: 32].")
    ] = None
    lens: Annotated[
        bool, Option("--lens/--no-lens", help="Ask transformer-lens, too, where it loads the model.")
    ] = True
    checkpoint: options.Checkpoint = None
    model_args: options.ModelArgs = None
    random_init: options.RandomInit = False
    trust_remote_code: options.TrustRemoteCode = False
    out: Annotated[Path | None, output("Folder [default: runs/audit-NAME-KEY].")] = None
    overwrite: options.Overwrite = False
    device: options.Device = "auto"
    dtype: options.Dtype = "float32"
    as_json: options.AsJson = False
    quiet: options.QuietFolder = False


@app.command()
@with_options
def audit(given: AuditOptions) -> None:
    """Check hooks against what attention used, and whether padded or packed batches leak."""
    from diag.show.terminal import StderrListener
    from diag.studies.audit import AuditPlan, read, run_audit

    plan = AuditPlan.checked(models=tuple(given.model), **fields_of(given, AuditPlan))
    with StderrListener(quiet=given.quiet) as listener:
        folder = run_audit(plan, given.out, overwrite=given.overwrite, listener=listener)
    found = read(folder)
    with answer(folder):
        if given.as_json:
            print(json.dumps(_document(found, folder), indent=1, ensure_ascii=False))
        elif given.quiet:
            print(folder)
        else:
            print("\n\n".join("\n".join(_block(entry, found)) for entry in found.models))
    if not given.as_json and not given.quiet:
        say(f"folder: {folder}")
    if found.failed:
        say_failures(found.failed)
        raise SystemExit(3)


def _document(found: Audited, folder: Path) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "verdicts": found.verdicts,
        "models": [dict(entry) for entry in found.models],
        "hooks": records(found.hooks),
        "leaks": records(found.leaks),
        "failed": dict(found.failed),
    }


def _block(entry: Any, found: Audited) -> list[str]:
    """Of one tower: its hooks, its cases, and a sentence on each. At most 80 columns wide."""
    from diag.results.caveats import with_caveats
    from diag.show.figures.tables import title_lines
    from diag.show.terminal import columns, text_width

    hooks, leaks = (
        table[(table["model"] == entry["model"]) & (table["tower"] == entry["tower"])]
        for table in (found.hooks, found.leaks)
    )
    said = found.verdicts.get(f"{entry['model']} · {entry['tower']}", {})
    lines = title_lines(f"{with_caveats(entry['model'], entry)} · {entry['tower']}", text_width())
    for table, rows, name in ((hooks, _hook_rows, "hooks"), (leaks, _leak_rows, "leaks")):
        if len(table):
            lines += columns(rows(table)).splitlines()
            lines += textwrap.wrap(said[name], text_width(), initial_indent="→ ", subsequent_indent="  ")
    return lines


def _hook_rows(table: pd.DataFrame) -> list[dict[str, str]]:
    """Layers that are alike in one row, with the largest of their errors."""
    from diag.errors import spans

    alike = table.groupby(["hook", "of", "reason"], sort=False)
    return [
        {
            "hook": str(hook),
            "of": str(of),
            "layers": spans(part["layer"]),
            "error": _number(part["relative_error"].max()),
            "left": _number(part["remaining_error"].max()),
            "reason": str(reason),
        }
        for (hook, of, reason), part in alike
    ]


def _leak_rows(table: pd.DataFrame) -> list[dict[str, str]]:
    """What was changed in each case, with the largest change of any layer and its worst level."""
    from diag.studies.audit.words import worst

    return [
        {
            "case": str(case),
            "changed": str(changed),
            "change": _number(part["change"].max()),
            "": worst(part["level"]),
        }
        for (case, changed), part in table.groupby(["case", "changed"], sort=False)
    ]


def _number(value: float) -> str:
    """A relative error; one that is rounding has no digits to show."""
    if value != value:
        return "–"
    return "0" if value == 0 else "<1e-5" if value < 1e-5 else f"{value:.2g}"
