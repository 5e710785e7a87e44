"""Verbs that only list: `models`, `metrics`, `env`."""

from __future__ import annotations

import json
import textwrap
from typing import Annotated, Any

from typer import Argument, Option

from diag.cli.app import app
from diag.cli.options import JsonOnly
from diag.errors import UserError, say

MEMBERS_SHOWN = 24


@app.command()
def models(
    query: Annotated[str, Argument(help="Part of a name.")] = "",
    series: Annotated[
        bool, Option("--series", help="List series of models for controlled comparison.")
    ] = False,
    as_json: JsonOnly = False,
) -> None:
    """List names that can be probed and what they resolve to."""
    if series:
        _print_series(query, as_json)
        return
    from diag.models.families import all_families
    from diag.models.names.resolve import listing
    from diag.show.terminal import columns

    rows = [dict(row) for row in listing(query)]
    if not rows:
        forms = (f"{family.prefix}:{family.form}" for family in all_families() if family.form)
        raise UserError(
            f"no listed name contains '{query}'", f"other names work as they are: {', '.join(forms)}"
        )
    print(json.dumps(rows, indent=1) if as_json else columns(rows, whole=True))


def _print_series(query: str, as_json: bool) -> None:
    from diag.models.names.series import find, listing

    rows = listing(query)
    if not rows:
        find(query)
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    exact = [row for row in rows if row["name"] == query]
    if exact or len(rows) == 1:
        print("\n".join(_one_series((exact or rows)[0])))
        return
    alike: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        told = (len(row["members"]), tuple(row["tokens"]), row["varies"], row["control"])
        alike.setdefault(told, []).append(row["name"])
    for (count, tokens, varies, control), found in alike.items():
        print("\n".join(_filled(", ".join(found), "")))
        counted = [f"{', '.join(map(str, tokens))} patch tokens"] if tokens else []
        print("\n".join(_filled(" · ".join([f"{count} models", varies, *counted]), "    ")))
        print("\n".join(_filled(control, "    ")))
    say("models --series NAME lists one, attnbias probe --series NAME measures it")


def _one_series(row: dict[str, Any]) -> list[str]:
    """A series with its members, one a line."""
    told = {"varies": row["varies"], "constant": row["constant"], "control": row["control"]}
    lines = [row["name"]]
    for name, text in told.items():
        lines += _filled(f"{name:8}  {text}", "    ", hanging=10)
    shown = row["members"][:MEMBERS_SHOWN]
    width = max(map(len, shown))
    lines += [
        f"  {member:{width}}  {tokens:>5} patch tokens" if tokens else f"  {member}"
        for member, tokens in zip(shown, row["tokens"] or [0] * len(shown), strict=False)
    ]
    left = len(row["members"]) - len(shown)
    return [*lines, f"  and {left} more, to {row['members'][-1]} (--json lists all)"] if left else lines


def _filled(text: str, indent: str, hanging: int = 0) -> list[str]:
    more = indent + " " * hanging
    whole = textwrap.TextWrapper(79, indent, more, break_on_hyphens=False, break_long_words=False)
    return whole.wrap(text)


@app.command()
def env(as_json: JsonOnly = False) -> None:
    """Show versions, devices and threads: what to paste into a bug report."""
    import torch

    from diag.run.environment import environment

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
def metrics(as_json: JsonOnly = False) -> None:
    """List the metrics with their definitions, by group."""
    from diag.metrics.catalogue import CATALOGUE
    from diag.metrics.names import GROUPS

    found = {name: CATALOGUE[name].definition for names in GROUPS.values() for name in names}
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    for group, names in GROUPS.items():
        print(f"--metrics {group}\n")
        for name in names:
            print("\n".join([name, *_filled(found[name], "    ")]))
        print()
