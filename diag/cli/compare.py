"""`attnbias compare`: runs or models → profiles, differences, a verdict, and a folder with figures."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from diag.cli import options
from diag.cli.app import app, records, say_failures
from diag.cli.options import drawn, fields_of, models_of, output, whole_numbers, with_options
from diag.cli.streams import answer
from diag.errors import UserError, say

if TYPE_CHECKING:
    from diag.run.plan import ProbePlan
    from diag.show.figures.drawer import Drawer
    from diag.studies.compare import Comparison
    from diag.studies.comparisons import Answer


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What `attnbias compare` can be told."""

    runs: Annotated[
        list[Path] | None, Argument(metavar="RUN|MODEL", help="Run folders, and models as with -m.")
    ] = None
    model: Annotated[
        list[str] | None,
        Option("-m", "--model", help="Model to probe if there is no run of it yet, repeatable."),
    ] = None
    series: options.Series = None
    images: options.Images = None
    texts: options.Texts = None
    limit: options.Limit = 64
    lengths: Annotated[
        str | None, Option("--seq-len", help="Tokens per window of text; several (64,128,256) are compared.")
    ] = None
    image_size: Annotated[
        str | None, Option(help="Pixels, one or several (224,448): every model at each.")
    ] = None
    patch_size: Annotated[
        str | None, Option(help="Pixels, one or several (48,32,16): every model at each.")
    ] = None
    metrics: options.Metrics = None
    layers: options.Layers = None
    tokens: options.Tokens = None
    values: options.Values = "as-computed"
    growth: Annotated[
        str | None, Option(help="Two layers such as 5,11: growth between them [default: first, last].")
    ] = None
    published: Annotated[
        bool, Option("--published", help="Lay published curves of these models over the figures.")
    ] = False
    null: options.Null = None
    random_init: options.RandomInit = False
    trust_remote_code: options.TrustRemoteCode = False
    out: Annotated[Path | None, output("Folder [default: runs/compare-NAMES-KEY].")] = None
    device: options.Device = "auto"
    dtype: options.Dtype = "float32"
    batch_size: options.AutoBatchSize = "8"
    figures: options.Figures = "all"
    seed: Annotated[int, Option(help="Seed of the bootstrap.")] = 0
    dry_run: Annotated[bool, Option("--dry-run", help="Say what would be measured, and stop.")] = False
    as_json: options.AsJson = False
    quiet: options.QuietFolder = False


@app.command()
@with_options
def compare(given: CompareOptions) -> None:
    """Compare runs or models: profiles over depth, differences with intervals, and what follows."""
    between, runs, quiet = _pair(given.growth), given.runs or [], given.quiet
    drawn(given.figures)
    sweeps = {
        "seq_len": numbers(given.lengths, "--seq-len"),
        "img_size": numbers(given.image_size, "--image-size"),
        "patch_size": numbers(given.patch_size, "--patch-size"),
    }
    plans = _plans(given, sweeps)
    if not plans and not runs:
        raise UserError(
            "name what to compare: run folders, -m/--model NAME or --series NAME",
            "for example attnbias compare runs/demo-vision, or attnbias compare --series demo",
        )
    if not plans and any(sweeps.values()):
        raise UserError(
            "--seq-len, --image-size and --patch-size are for models to be measured",
            "name models with -m or --series; runs are compared as they are",
        )
    if given.dry_run:
        _print_plans(runs, plans, given.as_json)
        return
    from diag.show.figures.drawer import Drawer

    with Drawer() as drawer:
        folder, said = _answered(given, plans, between, drawer)
    with answer(folder):
        if given.as_json:
            print(json.dumps({**said.document, "folder": str(folder)}, indent=1, ensure_ascii=False))
        elif quiet:
            print(folder)
        else:
            print(said.screen)
    failed = dict(said.failed)
    if failed:
        say_failures(failed)
    if not given.as_json and not quiet:
        say(f"folder: {folder}")
    if failed:
        raise SystemExit(3)


def _answered(
    given: CompareOptions,
    plans: Sequence[ProbePlan],
    between: tuple[int, int] | None,
    drawer: Drawer,
) -> tuple[Path, Answer]:
    """The folder of the comparison and what is said of it, measured and written where it is not there."""
    runs, quiet = given.runs or [], given.quiet
    folders, failed = _measured(plans, quiet, drawer)
    from diag.show.terminal import WIDTH, text_width
    from diag.studies.comparisons import found_again, request_of

    compared = [*runs, *folders]
    asked: dict[str, Any] = {"growth": between, "seed": given.seed, "published": given.published}
    asked |= {"measured": list(map(str, folders)), "figures": given.figures}
    if text_width() < WIDTH:  # what was said is kept as it was laid out
        asked["width"] = text_width()
    request = None if failed else request_of(compared, asked)
    there = found_again(request, compared, given.out) if request else None
    if there is None:
        found = _compared(compared, between, given.seed, given.published, quiet)
        return _written(found, given, failed, folders, request, drawer)
    for note in () if quiet else there[1].notes:
        say(note)
    return there


def numbers(text: str | None, flag: str) -> tuple[int, ...]:
    """`64,128` → (64, 128); None → (). Raises UserError for anything but positive whole numbers."""
    found = () if text is None else whole_numbers(text, flag, f"for example {flag} 64,128", least=1)
    return tuple(dict.fromkeys(found))


def _pair(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    tip = "for example --growth 5,11"
    found = whole_numbers(text, "--growth", tip, least=0)
    if len(found) != 2 or found[0] == found[1]:
        raise UserError(f"--growth takes two layers, not '{text}'", tip)
    return found[0], found[1]


def _plans(given: CompareOptions, sweeps: Mapping[str, tuple[int, ...]]) -> list[ProbePlan]:
    """A plan per model, argument and length, so that a run is found again whatever it is compared with."""
    from diag.run.plan import ProbePlan

    fields = fields_of(given, ProbePlan)
    models = models_of(given.model, given.series)
    if not models:
        ProbePlan.checked(models=("runs alone",), **fields)  # a seed that none takes is none for runs either
    for argument in ("patch_size", "img_size"):
        if sweeps[argument]:
            models = tuple(f"{name},{argument}={size}" for name in models for size in sweeps[argument])
    return [
        ProbePlan.checked(models=(name,), seq_len=length, **fields)
        for name in dict.fromkeys(models)
        for length in sweeps["seq_len"] or (None,)
    ]


def _print_plans(runs: Sequence[Path], plans: Sequence[ProbePlan], as_json: bool) -> None:
    from diag.results.folder import is_finished, once
    from diag.run.cache import folder_of
    from diag.run.plan import specs_of

    planned = {folder_of(plan): plan for plan in plans}
    rows: list[dict[str, Any]] = []
    for folder in once([*planned, *runs]):
        row: dict[str, Any] = {"run": str(folder), "measured": is_finished(folder)}
        if folder in planned:
            model = specs_of(planned[folder])[0].resolved
            rows.append(row | {"model": model, "seq_len": planned[folder].seq_len})
        else:
            rows.append(row)
    rows.sort(key=lambda row: "model" in row)  # runs first, as they were given
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        length = f" · T = {row['seq_len']}" if row.get("seq_len") else ""
        what = f" ← {row['model']}{length}" if "model" in row else ""
        missing = "missing " if "model" not in row else "measure "
        print(f"{'there   ' if row['measured'] else missing}{row['run']}{what}")


def _measured(plans: Sequence[ProbePlan], quiet: bool, drawer: Drawer) -> tuple[list[Path], dict[str, str]]:
    """The run folders of plans, measured where they are missing, and what failed. UserError if all did."""
    from diag.run.cache import measured
    from diag.run.plan import inputs_of, specs_of
    from diag.show.terminal import StderrListener

    for plan in plans:
        specs_of(plan)  # a mistyped name ends the command before anything is measured
    inputs = inputs_of(plans[0]) if plans else None  # all plans name the same
    folders: list[Path] = []
    failed: dict[str, str] = {}
    last: UserError | None = None
    with StderrListener(quiet=quiet) as listener:
        for plan, following in itertools.zip_longest(plans, plans[1:]):
            name = plan.models[0] + (f" (T = {plan.seq_len})" if plan.seq_len else "")
            try:
                folders.append(
                    measured(plan, inputs=inputs, listener=listener, drawer=drawer, following=following)
                )
            except UserError as error:
                failed[name], last = str(error), error
    if last is not None and not folders:
        raise last
    return folders, failed


def _written(
    found: tuple[Comparison, Sequence[str]],
    given: CompareOptions,
    failed: dict[str, str],
    measured: Sequence[Path],
    request: str | None,
    drawer: Drawer,
) -> tuple[Path, Answer]:
    """Writes a comparison with what is said of it; that stays in the folder where there is a request."""
    from diag.run.environment import command_line
    from diag.studies.compare import default_folder, screen, write_comparison
    from diag.studies.comparisons import Answer

    comparison, notes = found
    folder = given.out or default_folder(comparison)
    document = json.loads(json.dumps(_document(comparison, folder, failed), default=str))
    told = {**failed, **comparison.collection.problems, **_incomplete(comparison, measured)}
    said = Answer(request or "", notes, screen(comparison), document, told)
    answered = said if request else None
    write_comparison(
        comparison, folder, command=command_line(), answer=answered, figures=given.figures, drawer=drawer
    )
    return folder, said


def _compared(
    folders: Sequence[Path], growth: tuple[int, int] | None, seed: int, published: bool, quiet: bool
) -> tuple[Comparison, list[str]]:
    """The comparison of run folders, and what its lines lack, which is said."""
    from diag.results.collect import collect
    from diag.studies.compare import compare as compared
    from diag.studies.compare import published_for

    collection = collect(folders)
    overlay = None
    notes: list[str] = []
    if published:
        overlay, notes = published_for(collection)
    found = compared(collection, growth=growth, seed=seed, published=overlay)
    notes += found.notes
    for note in () if quiet else notes:
        say(note)
    return found, notes


def _incomplete(found: Comparison, measured: Sequence[Path]) -> dict[str, str]:
    """Models and inputs that failed in the runs that this command measured."""
    failed: dict[str, str] = {}
    for name, folder in found.collection.folders.items():
        if folder in measured:
            manifest = found.collection.manifests[name]
            failed |= {**manifest.get("failed_models", {}), **manifest.get("failed_inputs", {})}
    return failed


def _document(found: Comparison, folder: Path, failed: dict[str, str]) -> dict[str, Any]:
    from diag.show.words.nulls import verdicts
    from diag.studies.compare import DIFFERENCE

    return {
        "folder": str(folder),
        "runs": {name: str(path) for name, path in found.collection.folders.items()},
        "problems": {**failed, **found.collection.problems},
        "labels": found.labels,
        "missing": found.missing,
        "settings": found.settings,
        "profiles": records(found.profiles),
        "difference": DIFFERENCE,
        "differences": records(found.differences),
        "nulls": records(found.nulls.assign(verdict=verdicts(found.nulls))),
        "verdict": found.verdict,
    }
