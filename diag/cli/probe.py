"""`attnbias probe`: options → plan → run folder → table."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from diag.cli.app import Interrupted, app, say, say_failures
from diag.cli.options import (
    AsJson,
    AutoBatchSize,
    Checkpoint,
    Device,
    Dtype,
    Exact,
    Images,
    KeepSamples,
    Layers,
    Length,
    Limit,
    Metrics,
    ModelArg,
    Overwrite,
    RandomInit,
    SampledRows,
    Series,
    Shard,
    Texts,
    Tokens,
    TrustRemoteCode,
    Values,
    Workers,
    inputs_at_once,
    layer_ranges,
    names,
)
from diag.errors import UserError


@app.command()
def probe(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "-m",
            "--model",
            help="Model name, repeatable: [family:]name[@revision][,key=value], or a folder.",
        ),
    ] = None,
    series: Series = None,
    images: Images = None,
    texts: Texts = None,
    limit: Limit = 64,
    seq_len: Length = None,
    metrics: Metrics = None,
    layers: Layers = None,
    tokens: Tokens = None,
    values: Values = "as-computed",
    intervene: Annotated[
        list[str] | None,
        typer.Option(help="Change attention while measuring: NAME[=STRENGTH][:LAYERS[/HEADS]], repeatable."),
    ] = None,
    checkpoint: Checkpoint = None,
    model_arg: ModelArg = None,
    random_init: RandomInit = False,
    trust_remote_code: TrustRemoteCode = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--output-path", help="Run folder [default: runs/NAME-KEY].")
    ] = None,
    overwrite: Overwrite = False,
    save_activations: Annotated[
        int, typer.Option(help="Also write the attention calls of the first N inputs.")
    ] = 0,
    keep_samples: KeepSamples = 4096,
    shard: Shard = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: AutoBatchSize = "8",
    exact: Exact = False,
    sampled_rows: SampledRows = None,
    workers: Workers = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print only the run's path.")] = False,
) -> None:
    """Measure the attention bias of pretrained models, layer by layer and head by head."""
    from diag.run.plan import ProbePlan
    from diag.run.processes import share_of

    plan = ProbePlan.checked(
        models=_models(model or [], series or []),
        images=images,
        texts=texts,
        limit=limit,
        seq_len=seq_len,
        metrics=names(metrics),
        layers=layer_ranges(layers),
        tokens=names(tokens),
        values=values,
        intervene=tuple(intervene or ()),
        checkpoint=checkpoint,
        model_args=tuple(model_arg or ()),
        random_init=random_init,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        seed=seed,
        save_activations=save_activations,
        keep_samples=keep_samples,
        device=device,
        batch_size=inputs_at_once(batch_size),
        exact=exact,
        sampled_rows=sampled_rows,
        workers=workers,
    )
    if dry_run:
        _print_plan(plan, as_json)
        return
    from diag.run.progress import Progress
    from diag.run.run import run_share
    from diag.show.terminal import StderrListener

    share, progress = share_of(shard, os.environ), Progress()
    try:
        # of the processes that share a terminal, one says what all would say
        with StderrListener(quiet=quiet or bool(share.local_rank)) as listener:
            found = run_share(plan, out, share, overwrite=overwrite, listener=listener, progress=progress)
    except (Interrupted, KeyboardInterrupt) as stop:
        say(
            f"stopped after {progress.shards_done}/{progress.shards_total} shards; "
            "run the same command again to resume"
        )
        raise SystemExit(getattr(stop, "exit_code", 130)) from None
    if found is not None:
        show(found.folder, found.manifest, found.layers, as_json=as_json, quiet=quiet)


def show(folder: Path, manifest: Mapping[str, Any], layers: Any, *, as_json: bool, quiet: bool) -> None:
    """Prints a finished run. Raises SystemExit with code 3 if something failed on the way."""
    from diag.show.terminal import result_table

    if as_json:
        document = {"run": str(folder), "manifest": manifest, "layers": _records(layers)}
        print(json.dumps(document, indent=1, default=str))
    elif quiet:
        print(folder)
    else:
        print(result_table(layers))
    failures = {**manifest["failed_models"], **manifest["failed_inputs"]}
    if failures:
        say_failures(failures, ", in manifest.json")
    if not as_json and not quiet:
        say(f"run: {folder}")
    if failures:
        raise SystemExit(3)


def _models(given: list[str], series: list[str]) -> tuple[str, ...]:
    """The models that were named, one by one and as series. Raises UserError if there is none."""
    from diag.models.names.series import members

    found = [*given, *(name for one in series for name in members(one))]
    if not found:
        raise UserError(
            "name what to measure with -m/--model NAME or --series NAME",
            "for example -m demo:vit-p8, or --series demo; attnbias probe --help shows more",
        )
    return tuple(dict.fromkeys(found))


def _print_plan(plan: Any, as_json: bool) -> None:
    from diag.run.forecast import forecast
    from diag.run.prepared import Prepared

    prepared = Prepared.of(plan)
    document = {
        "models": {spec.given: spec.resolved for spec in prepared.specs},
        "inputs": {
            kind: f"{len(given)} {given.kind} from '{given.source}'"
            for kind, given in prepared.inputs.items()
        },
        "memory": forecast(prepared),
        "plan": plan.model_dump(mode="json"),
    }
    if as_json:
        print(json.dumps(document, indent=1))
        return
    for name, resolved in document["models"].items():
        print(f"model  {name} → {resolved}")
    for kind, given in document["inputs"].items():
        print(f"input  {kind}: {given}, at most {plan.limit}")
    for name, words in document["memory"].items():
        print(f"memory {name}: {words}")


def _records(frame: Any) -> list[dict[str, Any]]:
    return json.loads(frame.to_json(orient="records"))
