"""`attnbias probe`: options → plan → run folder → table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from diag.cli.app import Interrupted, app, say
from diag.cli.options import names, ranges
from diag.errors import UserError

FAILURES_SHOWN = 20


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
    series: Annotated[
        list[str] | None,
        typer.Option(help="Models of a series, repeatable; 'attnbias models --series' lists them."),
    ] = None,
    images: Annotated[str | None, typer.Option(help="Image folder or file, hf:NAME, or 'demo'.")] = None,
    texts: Annotated[str | None, typer.Option(help="Text file or folder, hf:NAME, or 'demo'.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many inputs (images, or windows of text).")] = 64,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens per window of text [default: 128, or the context].")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Names or groups, comma-separated; see 'attnbias metrics'.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Depth indices such as 0,5-11 [default: all].")] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="patch, all, cls or registers, comma-separated [default: patch; all for text]."),
    ] = None,
    values: Annotated[
        str, typer.Option(help="as-computed, or bias-free: without what biases add to every value.")
    ] = "as-computed",
    intervene: Annotated[
        list[str] | None,
        typer.Option(help="Change attention while measuring: NAME[=STRENGTH][:LAYERS[/HEADS]], repeatable."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Your weights: safetensors, or a weights-only .pt.")
    ] = None,
    model_arg: Annotated[
        list[str] | None, typer.Option(help="key=value for the model's constructor, repeatable.")
    ] = None,
    random_init: Annotated[
        bool, typer.Option("--random-init", help="Build the model without pretrained weights.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let a hub repository run its own code.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--output-path", help="Run folder [default: runs/NAME-KEY].")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Measure again what the folder holds.")
    ] = False,
    save_activations: Annotated[
        int, typer.Option(help="Also write the attention calls of the first N inputs.")
    ] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    batch_size: Annotated[int, typer.Option(help="Inputs per forward pass; does not change the table.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document instead of a table.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print only the run's path.")] = False,
) -> None:
    """Measure the attention bias of pretrained models, layer by layer and head by head."""
    from diag.config import checked

    plan = checked(
        models=_models(model or [], series or []),
        images=images,
        texts=texts,
        limit=limit,
        seq_len=seq_len,
        metrics=names(metrics),
        layers=ranges(layers),
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
        device=device,
        batch_size=batch_size,
    )
    if dry_run:
        _print_plan(plan, as_json)
        return
    from diag.run import Progress, run_probe
    from diag.terminal import StderrListener, result_table

    progress = Progress()
    try:
        with StderrListener(quiet=quiet) as listener:
            found = run_probe(plan, out, overwrite=overwrite, listener=listener, progress=progress)
    except (Interrupted, KeyboardInterrupt) as stop:
        say(
            f"stopped after {progress.shards_done}/{progress.shards_total} shards; "
            "run the same command again to resume"
        )
        raise SystemExit(getattr(stop, "exit_code", 130)) from None
    if as_json:
        document = {"run": str(found.folder), "manifest": found.manifest, "layers": _records(found.layers)}
        print(json.dumps(document, indent=1, default=str))
    elif quiet:
        print(found.folder)
    else:
        print(result_table(found.layers))
    failures = {**found.manifest["failed_models"], **found.manifest["failed_inputs"]}
    if failures:
        say(f"{len(failures)} failed:")
        for name, why in list(failures.items())[:FAILURES_SHOWN]:
            say(f"  {name}: {why}")
        if len(failures) > FAILURES_SHOWN:
            say(f"  and {len(failures) - FAILURES_SHOWN} more, in manifest.json")
    if not as_json and not quiet:
        say(f"run: {found.folder}")
    if failures:
        raise SystemExit(3)


def _models(given: list[str], series: list[str]) -> tuple[str, ...]:
    """The models that were named, one by one and as series. Raises UserError if there is none."""
    from diag.models.series import members

    found = [*given, *(name for one in series for name in members(one))]
    if not found:
        raise UserError(
            "name what to measure with -m/--model NAME or --series NAME",
            "for example -m demo:vit-p8, or --series demo; attnbias probe --help shows more",
        )
    return tuple(dict.fromkeys(found))


def _print_plan(plan: Any, as_json: bool) -> None:
    from diag.run import prepared

    specs, found = prepared(plan)
    document = {
        "models": {spec.given: spec.resolved for spec in specs},
        "inputs": {kind: f"{len(given)} {given.kind} from '{given.source}'" for kind, given in found.items()},
        "plan": plan.model_dump(mode="json"),
    }
    if as_json:
        print(json.dumps(document, indent=1))
        return
    for name, resolved in document["models"].items():
        print(f"model  {name} → {resolved}")
    for kind, given in document["inputs"].items():
        print(f"input  {kind}: {given}, at most {plan.limit}")


def _records(frame: Any) -> list[dict[str, Any]]:
    return json.loads(frame.to_json(orient="records"))
