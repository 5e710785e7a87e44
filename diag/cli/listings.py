"""Verbs that only list: `models`, `metrics`, `env`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from diag.cli.app import app
from diag.errors import UserError


@app.command()
def models(
    query: Annotated[str, typer.Argument(help="Part of a name.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List names that can be probed and what they resolve to."""
    from diag.models.names import listing
    from diag.terminal import columns

    rows = [dict(row) for row in listing(query)]
    if not rows:
        raise UserError(
            f"no listed name contains '{query}'",
            "other names work as they are: timm:NAME, open_clip:ARCHITECTURE/WEIGHTS, hf:ORG/NAME",
        )
    print(json.dumps(rows, indent=1) if as_json else columns(rows))


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices and threads: what to paste into a bug report."""
    import torch

    from diag.config import environment

    found: dict[str, Any] = environment()
    found["threads"] = torch.get_num_threads()
    found["devices"] = ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))]
    if as_json:
        print(json.dumps(found, indent=1))
        return
    flat = {**found, **found.pop("packages"), "devices": ", ".join(found["devices"])}
    flat.pop("packages", None)
    for name, value in flat.items():
        print(f"{name:18} {'not installed' if value is None else value}")


@app.command()
def metrics(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the metrics with their definitions."""
    from diag.metrics import METRICS
    from diag.records import RATIOS

    found = {name: metric.definition for name, metric in METRICS.items()}
    found |= {
        name: f"{above} / {below}, of their means over an input." for name, (above, below) in RATIOS.items()
    }
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    for name, definition in found.items():
        print(f"{name}\n    {definition}")
