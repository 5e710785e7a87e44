"""`attnbias probe`: options → plan → run folder → table."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from diag.cli import options
from diag.cli.app import app, records, say_failures
from diag.cli.interrupts import interruptible
from diag.cli.options import fields_of, models_of, output, with_options
from diag.cli.streams import answer
from diag.errors import UserError, say


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """What `attnbias probe` can be told."""

    model: Annotated[
        list[str] | None,
        Option(
            "-m", "--model", help="Model name, repeatable: [family:]name[@revision][,key=value], or a folder."
        ),
    ] = None
    series: options.Series = None
    images: options.Images = None
    texts: options.Texts = None
    limit: options.Limit = 64
    seq_len: options.Length = None
    metrics: options.Metrics = None
    layers: options.Layers = None
    tokens: options.Tokens = None
    values: options.Values = "as-computed"
    intervene: Annotated[
        list[str] | None,
        Option(help="Change attention while measuring: NAME[=STRENGTH][:LAYERS[/HEADS]], repeatable."),
        options.Read(options.listed),
    ] = None
    checkpoint: options.Checkpoint = None
    model_args: options.ModelArgs = None
    null: options.Null = None
    random_init: options.RandomInit = False
    trust_remote_code: options.TrustRemoteCode = False
    allow_random: options.AllowRandom = False
    out: Annotated[Path | None, output("Run folder [default: runs/NAME-KEY].")] = None
    overwrite: options.Overwrite = False
    save_activations: Annotated[int, Option(help="Also write the attention calls of the first N inputs.")] = 0
    keep_samples: options.KeepSamples = 4096
    shard: options.Shard = None
    device: options.Device = "auto"
    dtype: options.Dtype = "float32"
    batch_size: options.AutoBatchSize = "8"
    exact: options.Exact = False
    sampled_rows: options.SampledRows = None
    workers: options.Workers = None
    figures: options.Figures = "all"
    seed: Annotated[int, Option(help="Seed of the bootstrap.")] = 0
    dry_run: Annotated[bool, Option("--dry-run", help="Say what would be done, and stop.")] = False
    as_json: options.AsJson = False
    quiet: options.QuietRun = False


@app.command()
@with_options
def probe(given: ProbeOptions) -> None:
    """Measure the attention bias of pretrained models, layer by layer and head by head."""
    from diag.metrics.names import metric_names
    from diag.run.plan import ProbePlan, inputs_of, specs_of
    from diag.run.processes import share_of

    models = models_of(given.model, given.series)
    if not models:
        raise UserError(
            "name what to measure with -m/--model NAME or --series NAME",
            "for example -m demo:vit-p8, or --series demo; attnbias probe --help shows more",
        )
    plan = ProbePlan.checked(models=models, **fields_of(given, ProbePlan))
    share = share_of(given.shard, os.environ)
    if given.dry_run:
        _print_plan(plan, given.as_json)
        return
    from diag.run.finished import found_again
    from diag.run.progress import Progress
    from diag.show.figures.drawer import Drawer
    from diag.show.terminal import StderrListener

    progress = Progress()
    # of the processes that share a terminal, one says what all would say
    quiet = given.quiet or bool(share.local_rank)
    with (
        interruptible(lambda: f"stopped after {progress}; run the same command again to resume"),
        StderrListener(quiet=quiet) as listener,
        Drawer() as drawer,
    ):
        metric_names(plan.metrics)
        specs_of(plan)  # what is mistyped is told before inputs are listed
        inputs = inputs_of(plan)
        found = None if given.overwrite else found_again(plan, inputs, given.out, listener)
        if found is None:
            if plan.figures != "none" and share.of == 1:  # of several processes only the last one draws
                drawer.start()
            from diag.run.run import run_share  # which brings torch

            found = run_share(
                plan,
                given.out,
                share,
                overwrite=given.overwrite,
                inputs=inputs,
                listener=listener,
                progress=progress,
                drawer=drawer,
            )
    if found is not None:
        show(found.folder, found.manifest, found.layers, as_json=given.as_json, quiet=given.quiet)


def show(folder: Path, manifest: Mapping[str, Any], layers: Any, *, as_json: bool, quiet: bool) -> None:
    """Prints a finished run. Raises SystemExit with code 3 if something failed on the way."""
    from diag.show.terminal import result_table

    with answer(folder):
        if as_json:
            document = {"run": str(folder), "manifest": manifest, "layers": records(layers)}
            print(json.dumps(document, indent=1, default=str))
        elif quiet:
            print(folder)
        else:
            print(result_table(layers, _sources(manifest)))
            if "sink_event" in set(layers["metric"]):
                print(_sinks(folder))
    failures = {**manifest["failed_models"], **manifest["failed_inputs"]}
    if failures:
        say_failures(failures, ", in manifest.json")
    if not as_json and not quiet:
        say(f"run: {folder}")
    if failures:
        raise SystemExit(3)


TOLD = {"-": "standard input", "typed": "text as typed", "demo": "demo", "demo-crops": "demo-crops"}
"""Sources of inputs -> how they are told; any other stands in quotes."""


def _sources(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Tower -> where its inputs are from; nothing where nobody named any, which is told as a caveat."""
    inputs, plan = manifest.get("inputs") or {}, manifest.get("plan") or {}
    found = dict[str, str]()
    for entry in manifest.get("models") or ():
        source = inputs.get(entry.get("takes") or entry["tower"], {}).get("source")
        if source and (plan.get("images") or plan.get("texts")):
            found[entry["tower"]] = TOLD.get(source, f"'{source}'")
    return found


def _sinks(folder: Path) -> str:
    """What the samples of a run say about its sinks, in words."""
    from diag.results.tables import read_samples
    from diag.show.terminal import text_width
    from diag.show.words.sinks import sink_sentences

    said = [
        "\n".join(textwrap.wrap(f"{line}: {'. '.join(sentences)}.", text_width(), break_on_hyphens=False))
        for line, sentences in sink_sentences(read_samples(folder)).items()
    ]
    return "\n".join(["", "sinks", *said])


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
