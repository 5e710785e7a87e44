"""The command line: the only place where typed names become objects.

stdout carries the result, stderr everything else. Everything heavy is imported inside functions, so
that `--help` is instant.

Exit codes: 0 done, 1 failed, 2 usage or unreadable input, 3 finished but some models or inputs
failed, 130 or 143 interrupted.
"""

from __future__ import annotations

import io
import json
import re
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from diag.errors import UserError

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
    help="How much of what attention returns does the token already have?",
)

FAILURES_SHOWN = 20

USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
"""click's UsageError; typer carries its own copy of click from some version on."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM; carries the exit code."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


@app.command()
def probe(
    model: Annotated[
        list[str],
        typer.Option("-m", "--model", help="Model name, repeatable: [family:]name[@revision] or a folder."),
    ],
    images: Annotated[str | None, typer.Option(help="Image folder or file, hf:NAME, or 'demo'.")] = None,
    texts: Annotated[str | None, typer.Option(help="Text file or folder, hf:NAME, or 'demo'.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many inputs (images, or windows of text).")] = 64,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens per window of text [default: 128, or the context].")
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="Comma-separated names [default: all].")] = None,
    layers: Annotated[str | None, typer.Option(help="Depth indices such as 0,5-11 [default: all].")] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="patch, all, cls or registers, comma-separated [default: patch; all for text]."),
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
        models=tuple(dict.fromkeys(model)),
        images=images,
        texts=texts,
        limit=limit,
        seq_len=seq_len,
        metrics=_names(metrics),
        layers=_ranges(layers),
        tokens=_names(tokens),
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
        _say(
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
        _say(f"{len(failures)} failed:")
        for name, why in list(failures.items())[:FAILURES_SHOWN]:
            _say(f"  {name}: {why}")
        if len(failures) > FAILURES_SHOWN:
            _say(f"  and {len(failures) - FAILURES_SHOWN} more, in manifest.json")
    if not as_json and not quiet:
        _say(f"run: {found.folder}")
    if failures:
        raise SystemExit(3)


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
    from diag.metrics import METRICS, RATIOS

    found = {name: metric.definition for name, metric in METRICS.items()}
    found |= {
        name: f"{above} / {below}, of their means over an input." for name, (above, below) in RATIOS.items()
    }
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    for name, definition in found.items():
        print(f"{name}\n    {definition}")


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """How much of what attention returns does the token already have?"""
    if version:
        from diag.config import version as installed

        print(installed())
        raise typer.Exit
    context.obj = debug
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> NoReturn:
    """Runs the command line and turns every expected failure into two lines and an exit code."""
    debug = "--debug" in sys.argv

    def stop(number: int, frame: object) -> NoReturn:
        raise Interrupted(number)

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a dash that the terminal lacks must not end a run
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        code = app(prog_name="attnbias", standalone_mode=False)
    except UserError as error:
        if debug:
            raise
        _two_lines(str(error), error.tip or "'attnbias --help' shows what can be typed")
        raise SystemExit(error.exit_code) from None
    except Interrupted as interrupted:
        _say("stopped")
        raise SystemExit(interrupted.exit_code) from None
    except Exception as error:
        if isinstance(error, USAGE_ERROR):
            context = error.ctx
            _two_lines(error.format_message(), f"{context.command_path if context else 'attnbias'} --help")
            raise SystemExit(2) from None
        if debug:
            raise
        _two_lines(
            f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            "this was not expected; attnbias --debug … shows the traceback for a report",
        )
        raise SystemExit(1) from None
    raise SystemExit(code if isinstance(code, int) else 0)


def _print_plan(plan: Any, as_json: bool) -> None:
    from diag.run import prepared

    specs, found = prepared(plan)
    document = {
        "models": {
            spec.given: f"{spec.family}:{spec.name}" + (f"@{spec.revision}" if spec.revision else "")
            for spec in specs
        },
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


def _names(text: str | None) -> tuple[str, ...] | None:
    return (
        None
        if text is None
        else tuple(part.strip().replace("-", "_") for part in text.split(",") if part.strip())
    )


def _ranges(text: str | None) -> tuple[int, ...] | None:
    """`0,5-11` → (0, 5, …, 11). Raises UserError."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part.strip())
        span = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else range(0)
        if not span:
            raise UserError(f"--layers does not understand '{part.strip()}'", "for example --layers 0,5-11")
        found.extend(span)
    return tuple(dict.fromkeys(found))


def _records(frame: Any) -> list[dict[str, Any]]:
    return json.loads(frame.to_json(orient="records"))


def _two_lines(message: str, tip: str) -> None:
    """What went wrong and what to type, one line each whatever a library put into its message."""
    _say(f"error: {' '.join(message.split())}")
    _say(f"tip: {' '.join(tip.split())}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
