"""`attnbias merge`: a run whose shards are all there, finished without measuring anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument

from diag.cli.app import app
from diag.cli.options import AsJson, QuietRun
from diag.cli.probe import show
from diag.errors import say


@app.command()
def merge(
    run: Annotated[Path, Argument(help="Folder of a run whose shards are all there.", metavar="RUN")],
    more: Annotated[
        list[Path] | None,
        Argument(help="Folders of the same run, measured elsewhere; copied into RUN.", metavar="[MORE]…"),
    ] = None,
    as_json: AsJson = False,
    quiet: QuietRun = False,
) -> None:
    """Finish a run that several processes measured: tables, figures and manifest out of its shards."""
    from diag.results.folder import is_finished
    from diag.results.staging import alone, clear, go_on
    from diag.results.tables import read_layers, read_manifest
    from diag.run.finish import check_whole, finish, gather
    from diag.run.locks import Locks
    from diag.run.run_folder import PROBE
    from diag.run.shard_ledger import SHARDS_LOCK, read_plan

    if run.is_dir():
        with alone(run):
            go_on(run, PROBE)
    there = is_finished(run)
    if not there:
        document = read_plan(run)
        told = (lambda text: None) if quiet else say
        gather(run, more or [], told)
        check_whole(run, document)
        with Locks.at(run / SHARDS_LOCK) as locks:
            finish(run, locks, say=told)
    clear(run, PROBE, PROBE.work)
    manifest, layers = read_manifest(run), read_layers(run)
    if there and not quiet:
        say(f"already complete: {run}")
    show(run, manifest, layers, as_json=as_json, quiet=quiet)
