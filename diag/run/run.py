"""A plan carried out: models × shards of inputs → shard files → tables, figures and manifest in a run folder.

Every shard is written under a temporary name and renamed, so that the folder can be finished from its
shards whatever happened in between: running the same command again skips what is there. Several
processes may work on one folder, each on its share of the shards; whoever finds all of them there
finishes the run.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from diag.errors import UserError
from diag.inputs.items import Files, Inputs
from diag.measure.activations import save_activations
from diag.measure.batch_readings import Incidents
from diag.measure.meaning import understood
from diag.measure.prefetch import shards_ahead, workers_for
from diag.metrics.divergence import DIVERGENCE_METRICS
from diag.models import load
from diag.models.base import Model, Sample, Tower
from diag.models.names.spec import ModelSpec
from diag.models.untrained import untrained_twin
from diag.results.folder import is_finished
from diag.results.hashes import sha256_of
from diag.results.moments import moments_of
from diag.results.staging import alone, clear
from diag.results.tables import samples_frame
from diag.results.writing import WRITERS, CannotWrite, atomically, file_stem, free_stem, write, write_json
from diag.run.environment import command_line
from diag.run.finish import finish
from diag.run.finished import FinishedRun, open_run, opened, with_figures
from diag.run.locks import PATIENCE, Locks
from diag.run.plan import ProbePlan, default_folder, shard_inputs
from diag.run.prepared import Prepared
from diag.run.processes import WHOLE, Share
from diag.run.progress import Listener, Progress, Silent
from diag.run.run_folder import PROBE, Vanished, at_work, check_room
from diag.run.shard_ledger import (
    SHARDS_LOCK,
    Part,
    failure_file,
    forget_failures,
    read_plan,
    standing,
)
from diag.run.shards import TowerJob, entry_of, shard_values, tower_samples
from diag.run.unused import unused
from diag.run.weights_ahead import WeightsAhead, weights_ahead
from diag.show.figures.drawer import Drawer
from diag.variants import variants_in

ROOM = 32_000_000
"""Bytes that must be free before anything begins: a small run with its figures."""


@dataclass(frozen=True)
class _Job:
    """What all models of a run share.

    key: the run's. size: inputs per shard, as the folder's first process chose it. ahead: reads the weights
    of the next model, of this run or `following` it.
    """

    prepared: Prepared
    folder: Path
    share: Share
    key: str
    size: int
    locks: Locks
    listener: Listener
    progress: Progress
    ahead: WeightsAhead
    following: ModelSpec | None


def run_probe(
    plan: ProbePlan,
    folder: Path | None = None,
    *,
    overwrite: bool = False,
    inputs: Mapping[str, Inputs] | None = None,
    listener: Listener | None = None,
    progress: Progress | None = None,
    drawer: Drawer | None = None,
    following: ModelSpec | None = None,
) -> FinishedRun:
    """Carries out a plan in `folder` (its `default_folder` if None), resuming what is already there.

    inputs: the plan's, if they are listed already. drawer: draws its figures, if it was started.
    following: a model that will be loaded next, by another run.
    Raises UserError for anything the user can mend: before any work where that is possible. A model
    that fails among several, or one of its towers, is noted in the manifest, and the run goes on.
    """
    found = run_share(
        plan,
        folder,
        WHOLE,
        overwrite=overwrite,
        inputs=inputs,
        listener=listener,
        progress=progress,
        drawer=drawer,
        following=following,
    )
    assert found is not None, "a process that does everything finishes the run"
    return found


def run_share(
    plan: ProbePlan,
    folder: Path | None,
    share: Share,
    *,
    overwrite: bool = False,
    inputs: Mapping[str, Inputs] | None = None,
    listener: Listener | None = None,
    progress: Progress | None = None,
    drawer: Drawer | None = None,
    following: ModelSpec | None = None,
) -> FinishedRun | None:
    """One process's part of `run_probe`. None where the run is left to others: their shards are missing yet.

    Raises UserError as `run_probe` does, and for `overwrite` where others may have begun already.
    """
    listener, progress = listener or Silent(), progress or Progress()
    prepared = Prepared.of(plan, share.local_rank, inputs)
    document = _document(prepared)
    folder = folder or default_folder(plan, document["key"])
    if overwrite and share.of > 1:
        raise UserError(
            "--overwrite would remove what other processes have just measured",
            f"remove the folder first: rm -r '{folder}'",
        )
    with (
        weights_ahead() as ahead,
        at_work(folder, PROBE, document, lock=SHARDS_LOCK, overwrite=overwrite, keep=share.of > 1) as work,
    ):
        if work is None:
            clear(folder, PROBE, PROBE.work)  # of a process that was killed at the very end
            with alone(folder):
                return opened(plan, prepared.inputs, folder, listener)
        place, document = work.place, read_plan(work.place)
        try:
            check_room(place, ROOM)
            forget_failures(place, share)
            key, size = document["key"], document["shard_inputs"]
            job = _Job(prepared, place, share, key, size, work.locks, listener, progress, ahead, following)
            _run_models(job)
            state = standing(place, document)
            if not state.missing and not is_finished(place):
                finish(place, work.locks, wait=share.of == 1, say=listener.say, drawer=drawer)
            elif state.missing and share.of == 1 and not is_finished(place):
                raise Vanished(f"'{place}' lost what was measured", "run the same command again")
        except FileNotFoundError:
            if not is_finished(place):  # else another process has finished the run, and the shards are gone
                raise
    if is_finished(folder):
        clear(folder, PROBE, PROBE.work)
        with alone(folder):
            return with_figures(open_run(folder), plan.figures)
    listener.say(
        f"{share}: done; {state.done} of {state.total} shards are there. The last process writes the tables "
        f"(attnbias merge '{folder}' does, too)"
    )
    return None


def _document(prepared: Prepared) -> dict[str, Any]:
    """What the first process of a run writes about it, for all others and for the manifest."""
    return {
        "key": prepared.key,
        "plan": prepared.plan.model_dump(mode="json"),
        "command": command_line(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "shard_inputs": shard_inputs(prepared.plan),
        "inputs": {
            kind: {"source": found.source, "count": len(found), "sha256": found.digest, "stamp": found.stamp}
            for kind, found in prepared.inputs.items()
        },
    }


def _run_models(job: _Job) -> None:
    """Every model, one after the other. Raises the last one's error if all fail."""
    specs, failed = job.prepared.specs, 0
    for number, spec in enumerate(specs):
        if is_finished(job.folder):
            return
        try:
            _run_model(job, spec, number)
        except CannotWrite:
            raise
        except UserError as error:
            failed += 1
            write_json({"error": str(error)}, failure_file(job.folder, number, spec.given, job.share))
            if failed == len(specs):
                raise
            job.listener.say(f"{spec.given} failed: {error}")


def _run_model(job: _Job, spec: ModelSpec, number: int) -> None:
    """A model, and behind it its untrained twins. That it has any is tried before anything is measured."""
    prepared, seeds = job.prepared, job.prepared.plan.seeds
    where: dict[str, Any] = {"device": prepared.device, "dtype": prepared.dtype}
    if seeds:
        untrained_twin(spec, 0, {}, **where)
    variants = _measure_model(job, load(spec, **where), spec, number)
    for seed in range(seeds):
        if is_finished(job.folder):
            return
        twin = replace(job, prepared=replace(prepared, measurement=prepared.measurement.of_untrained()))
        _measure_model(twin, untrained_twin(spec, seed, variants, **where), spec, number, seed)


def _measure_model(
    job: _Job, model: Model, spec: ModelSpec, number: int, seed: int | None = None
) -> dict[str, str]:
    """Measures the towers of a model; what training changed in its attention. seed: of an untrained twin."""
    prepared, plan = job.prepared, job.prepared.plan
    behind = [*prepared.specs[number + 1 :], job.following][0]
    if seed is None and behind is not None:
        job.ahead.read(behind)
    said = f"{spec.given} → {model.resolved}" if seed is None else f"{spec.given}, untrained, seed {seed}"
    for line in (said, *(model.notes if seed is None else ())):
        job.listener.say(line)
    kinds = [kind for kind in prepared.inputs if model.takers(kind)]
    if not kinds:
        model.tower(next(iter(prepared.inputs)))
    named = {kind for kind, flag in (("vision", plan.images), ("text", plan.texts)) if flag is not None}
    if not named:
        kinds = kinds[:1]
    for line in unused(plan, kinds, spec.given) if seed is None else ():
        job.listener.say(line)
    towers = [(kind, tower) for kind in kinds for tower in model.takers(kind, plan.tokens)]
    failed = dict[str, str]()
    for kind, tower in towers:
        part = Part(job.folder, number, spec.given, tower.name, seed)
        try:
            _measure_tower(job, part, model, tower, kind, spec, [one.name for _, one in towers])
        except CannotWrite:
            raise
        except UserError as error:
            failed[tower.name] = f"the {tower.name} tower: {error}"
            if len(failed) == len(towers):
                raise
    if failed:
        why = "; ".join(failed.values())
        write_json({"error": why}, failure_file(job.folder, number, spec.given, job.share))
        job.listener.say(f"{spec.given} failed: {why}")
    return variants_in(model.module)


def _measure_tower(
    job: _Job, part: Part, model: Model, tower: Tower, kind: str, spec: ModelSpec, towers: Sequence[str]
) -> None:
    """Tests what a tower's calls mean, and measures this process's shards of it. towers: the model's."""
    prepared, plan = job.prepared, job.prepared.plan
    if not DIVERGENCE_METRICS.keys().isdisjoint(prepared.measurement.metrics):
        tower = replace(tower, prepare=None)  # the neutral twin is made of the image itself
    given = prepared.inputs[kind]
    # an untrained twin is compared input by input, with those whose samples are kept
    limit = plan.limit if part.seed is None else min(plan.limit, plan.keep_samples)
    samples = tower_samples(tower, given, limit=limit, seq_len=plan.seq_len)
    tower = understood(model, tower, samples, allow_random=plan.allow_random)
    shards = [samples[i : i + job.size] for i in range(0, len(samples), job.size)]
    entry = entry_of(model, tower, spec.given, len(samples))
    if len(samples) > plan.keep_samples:
        of_moments = "Student's t, of the moments of all inputs"
        entry |= {"samples_kept": plan.keep_samples, "interval": of_moments}
    note = {
        "towers": towers,
        "shards": len(shards),
        "source": given.source,
        "device": str(prepared.device),
        "entry": entry,
    }
    write_json(note, part.note)
    _run_tower(job, part, model, tower, shards, given.files if tower.frames is None else None)


def _run_tower(
    job: _Job,
    part: Part,
    model: Model,
    tower: Tower,
    shards: Sequence[Sequence[Sample]],
    files: Files | None,
) -> None:
    """Measures this process's shards that are not there, and those that cannot be told to be of this run.

    What another process has in hand is waited for. files: that samples are read from, if they are.
    """
    own = [place for place in range(len(shards)) if job.share.has(part.number, place)]
    job.progress.shards_total += len(own)
    if not own:
        return
    plan, on_gpu = job.prepared.plan, job.prepared.on_gpu
    token_sets = [name for name in plan.tokens or () if name in tower.token_sets]
    tower_job = TowerJob.of(model, tower, job.prepared.measurement, token_sets, plan.named)
    twin = "" if part.seed is None else f", untrained, seed {part.seed}"
    job.listener.start(f"{part.given} {part.tower}{twin}", sum(len(shards[place]) for place in own))
    missing = [place for place in own if part.problem(place, job.key) is not None]
    workers = workers_for(plan.workers, sum(len(shards[place]) for place in missing), on_gpu=on_gpu)
    with shards_ahead(tower, shards, missing, workers=workers, pin=on_gpu) as take:
        said, checked = False, False
        while own and not is_finished(job.folder):
            left = []
            for place in own:
                if part.problem(place, job.key) is not None and not job.locks.take(part.lock(place)):
                    left.append(place)
                    continue
                try:
                    problem = part.problem(place, job.key)  # another process may just have written it
                    if problem is None:
                        job.listener.advance(len(shards[place]))
                    else:
                        if problem:
                            job.listener.say(f"{part.shard(place).stem} is measured again: {problem}")
                        _write_shard(job, part, tower_job, shards, place, take(place), files)
                        if not checked:
                            _check_room(part, place, shards, plan.keep_samples)
                        checked = True
                finally:
                    job.locks.give(part.lock(place))
                job.progress.shards_done += 1
            if left == own:
                if not said:
                    job.listener.say(f"waiting for another process, which measures {part.shard(own[0]).stem}")
                said = True
                time.sleep(PATIENCE)
            own = left


def _write_shard(
    job: _Job,
    part: Part,
    tower_job: TowerJob,
    shards: Sequence[Sequence[Sample]],
    place: int,
    samples: Iterable[Sample],
    files: Files | None,
) -> None:
    """Measures one shard. What belongs to it is there before it is. samples: its own, at hand.

    Raises UserError if one of its inputs was replaced since the run began.
    """
    plan, ratios = job.prepared.plan, job.prepared.measurement.ratios
    began, incidents = time.time(), Incidents()
    first, keep = place * job.size, plan.keep_samples
    every, advance = [sample for shard in shards for sample in shard], job.listener.advance
    found = list(shard_values(tower_job, samples, incidents, first_input=first, order=every, advance=advance))
    if place == 0 and plan.save_activations and part.seed is None:
        kept = job.folder / "activations" / f"{_stem(plan, part.number)}-{part.tower}"
        first_ones = every[: plan.save_activations]
        save_activations(tower_job.tower, first_ones, kept, plan.layers)
    content = {} if files is None or part.seed is not None else _read_from(files, shards[place], first, keep)
    hashes = dict[str, str]()
    if found and sum(map(len, shards)) > keep:
        write(moments_of(found, ratios, tower_job.constants).frame(), part.cells(place))
        hashes[part.cells(place).name] = sha256_of(part.cells(place))
    kept_values = list(filter(None, (values.until(keep) for values in found)))
    frame = samples_frame(kept_values or found[:1], ratios, tower_job.constants) if found else pd.DataFrame()
    account = {**asdict(incidents), "run": job.key, "content": content, "seconds": time.time() - began}
    account["measured"] = len({name for values in found for name in values.ids})

    def with_its_account(temporary: Path) -> None:
        WRITERS[".parquet"](frame if kept_values else frame.iloc[:0], temporary)
        hashes[part.shard(place).name] = sha256_of(temporary)
        write_json(account | {"files": hashes}, part.account(place))

    atomically(part.shard(place), with_its_account)


def _read_from(files: Files, samples: Sequence[Sample], first: int, keep: int) -> dict[str, str]:
    """What the inputs of a shard are: id → SHA-256 of their bytes, of those whose samples are kept.

    Right behind the measurement, when a system still has in memory what was read.
    Raises UserError if one was replaced since the run began.
    """
    content = {}
    for number, sample in enumerate(samples, first):
        if number < keep:
            content[sample.id] = files.sha256(number)
        files.check(number)
    return content


def _stem(plan: ProbePlan, number: int) -> str:
    """A model's name as that of a file, which no other model of the plan has."""
    taken = set[str]()
    return [free_stem(file_stem(name), taken) for name in plan.models[: number + 1]][-1]


def _check_room(part: Part, place: int, shards: Sequence[Sequence[Sample]], keep: int) -> None:
    """Raises CannotWrite if the shards to come will not fit, as the first one tells; it is kept."""
    size, total = len(shards[0]), sum(map(len, shards))
    missing = sum(not part.shard(number).exists() for number in range(len(shards)))
    samples = part.shard(place).stat().st_size if place * size < keep else 0
    cells = part.cells(place).stat().st_size if part.cells(place).exists() else 0
    kept = min(total, keep) / size
    # the samples of all shards are written once more in the end
    check_room(part.folder, int(samples * (min(missing, kept) + kept) + cells * missing))
