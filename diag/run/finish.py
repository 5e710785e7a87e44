"""A run finished from its shards: tables, figures and manifest, the same however many processes measured.

Shards are read in the order of the inputs, so that nothing depends on who wrote them, or when. No torch.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from pyarrow import ArrowInvalid

from diag.errors import UserError
from diag.inputs.items import content_digest
from diag.metrics.catalogue import FOLLOWED, OF_UNTRAINED, OVER_UNTRAINED, RATIOS, entry_of
from diag.metrics.names import metric_names
from diag.results.folder import HEADS, LAYERS, MANIFEST, QUANTILES, SAMPLES, SINK_PLACES, is_finished
from diag.results.hashes import hashes
from diag.results.left_out import emptied, left_out
from diag.results.manifest import FORMAT
from diag.results.moments import Moments, merged, moment_tables, quantiles
from diag.results.sinks import places as places_of
from diag.results.staging import remove, settle, sweep
from diag.results.tables import one_kind, tables
from diag.results.untrained import beside
from diag.results.writing import atomically, on_disk, write, write_json, writing
from diag.run.environment import environment
from diag.run.locks import PATIENCE, Locks
from diag.run.plan import seeds_in, what_differs
from diag.run.run_folder import PROBE
from diag.run.shard_ledger import MERGE, TOWERS, Part, Standing, read_plan, standing
from diag.show.figures import ENDINGS, figures_of
from diag.show.figures.drawer import Drawer, draw_all

Tables = tuple[pd.DataFrame, pd.DataFrame]
Saying = Callable[[str], object]


def draw(
    layers: pd.DataFrame,
    heads: pd.DataFrame,
    folder: Path,
    models: Sequence[Mapping[str, Any]] = (),
    endings: Sequence[str] = ENDINGS["all"],
    drawer: Drawer | None = None,
) -> list[Path]:
    """Every figure of a run, written as the pictures of `ENDINGS` and the CSV behind them.

    models: their entries. endings: the pictures; where there are none, nothing is drawn or written.
    drawer: who draws, if it was started; this process else.
    """
    if not endings:
        return []
    depths = {(entry["given"], entry["tower"]): entry["layers"] for entry in models}
    with writing(folder):
        return draw_all(figures_of(layers, heads, depths), folder, endings, drawer)


def finish(
    folder: Path,
    locks: Locks,
    *,
    wait: bool = True,
    say: Saying = lambda text: None,
    drawer: Drawer | None = None,
) -> bool:
    """Writes what a run ends in; False if another process is at it. Its shards can be removed then.

    wait: for that other process, if there is one. say: told what was left out. drawer: as in `draw`.
    Raises UserError if shards are missing or cannot be read, and if no input of any model could be.
    """
    while not locks.take(MERGE):
        if not wait:
            return False
        time.sleep(PATIENCE)
    try:
        if not is_finished(folder):
            _finish(folder, read_plan(folder), say, drawer)
    finally:
        locks.give(MERGE)
    return True


def check_whole(folder: Path, document: Mapping[str, Any]) -> Standing:
    """How far a run has come, if it can be finished. Raises UserError, saying what is missing, if not."""
    found = standing(folder, document)
    if found.missing:
        more = f", and {len(found.missing) - 1} more" if len(found.missing) > 1 else ""
        raise UserError(
            f"'{folder}' is not whole: {found.missing[0]}{more}",
            f"run its command again: {document['command']}",
        )
    return found


def gather(folder: Path, others: Sequence[Path], say: Saying = lambda text: None) -> None:
    """Copies shards of the same run that were measured in other folders, if they are as they were written.

    say: told which are not. Raises UserError if one holds another run, or was cut in other shards.
    """
    own = read_plan(folder)
    for other in others:
        theirs = read_plan(other)
        if any(theirs[name] != own[name] for name in ("key", "shard_inputs")):
            raise UserError(
                f"'{other}' holds another run than '{folder}'{what_differs(own, theirs)}",
                "measure with the same command, --shard and -o apart",
            )
        seeds = seeds_in(own["plan"].get("null"))
        for number, given in enumerate(own["plan"]["models"]):
            for tower in TOWERS:
                for part in Part(other, number, given.strip(), tower).and_twins(seeds):
                    _copy_part(part, folder, own["key"], say)
        for file in (other / "shards").glob("*.failed-*-of-*.json"):
            _copy(file, folder / "shards" / file.name)


def _copy_part(part: Part, folder: Path, key: str, say: Saying) -> None:
    """Copies what another folder has of one tower, in the order in which it was written."""
    if not part.note.is_file():
        return
    mine = replace(part, folder=folder)
    note = part.read_note("measure its shards again: run its command there again")
    if not mine.note.exists():
        _copy(part.note, mine.note)
    for name, problem in part.problems(os.listdir(part.note.parent), note["shards"], key).items():
        place = int(name.rpartition("-")[2])
        if problem:
            say(f"{name} of '{part.folder}' was left out: {problem}")
        elif mine.problem(place, key) is not None:
            for file in (part.cells(place), part.account(place), part.shard(place)):
                if file.exists():
                    _copy(file, folder / "shards" / file.name)


def _copy(file: Path, to: Path) -> None:
    atomically(to, partial(shutil.copyfile, file))


def _finish(folder: Path, document: Mapping[str, Any], say: Saying, drawer: Drawer | None) -> None:
    began = time.time()
    found = check_whole(folder, document)
    failed_models, failed_inputs = dict(found.failed), dict[str, str]()
    models, seconds, inputs = list[dict[str, Any]](), 0.0, dict(document["inputs"])
    parts = list[tuple[Part, dict[str, Any], pd.DataFrame]]()
    nothing = dict[str, UserError]()
    seeds = seeds_in(document["plan"].get("null"))
    for part, note in found.parts:
        if part.seed is not None:  # read beside the model that it is a twin of
            continue
        told = _told(part, note["shards"])
        failed_inputs |= told["failed"]
        seconds += told["seconds"]
        try:
            kept = _samples(part, note, told["failed"])
            twins = [(twin, its) for twin, its in found.parts if twin in part.and_twins(seeds)[1:]]
            if seeds and len(twins) == seeds:
                kept = beside(
                    kept, [_samples(*one, _told(one[0], one[1]["shards"])["failed"]) for one in twins]
                )
                note["entry"]["untrained"] = [its["entry"]["weights_sha256"] for _, its in twins]
                seconds += sum(_told(twin, its["shards"])["seconds"] for twin, its in twins)
        except _NoNumbers as error:
            if not _followed(document["plan"].get("metrics")):  # which a vision tower alone has none of
                nothing[part.given] = error
            # they hold nothing, and what the user mends is another run
            remove(folder, PROBE, (f"shards/{part.shard(place).name}" for place in range(note["shards"])))
            continue
        empty = emptied(told["unprojected"], told.get("sinks_unprojected", ()))
        models.append(note["entry"] | {"skipped_layers": told["skipped_layers"], "emptied": empty})
        for phrase in (*left_out(models[-1]), *empty):
            say(f"{part.given}: {phrase}")
        parts.append((part, note, kept))
        kind = note["entry"]["takes"]
        if told["content"] and isinstance(inputs.get(kind), dict):
            # what was measured: the ids of inputs and the hashes of their bytes, in order
            inputs[kind] = inputs[kind] | {"content": content_digest(told["content"])}
    failed_models |= {given: str(why) for given, why in nothing.items()}
    if not parts:
        first = next(iter(failed_models.values()), "no model was measured")
        again = f"mend it and run its command again: {document['command']}"
        raise next(iter(nothing.values()), UserError(first, again))
    for given, why in nothing.items():
        say(f"{given} failed: {why}")
    samples = one_kind(pd.concat([part for *_, part in parts], ignore_index=True))
    layers, heads = _tables(parts, samples, document, folder)
    write(samples, folder / SAMPLES)
    write(layers, folder / LAYERS)
    write(heads, folder / HEADS)
    remove(folder, PROBE, [SINK_PLACES])
    if len(places := places_of(samples)):
        write(places, folder / SINK_PLACES)
    endings = ENDINGS[document["plan"].get("figures", "all")]
    figures = draw(layers, heads, folder / "figures", models, endings, drawer)
    sweep(folder)
    taken = {entry["takes"] for entry in models}
    plain = {name: value for name, value in document.items() if name not in ("inputs", "shard_inputs")}
    settle(folder)
    write_json(
        {
            "format": FORMAT,
            "status": "partial" if failed_models or failed_inputs else "complete",
            **plain,
            "inputs": {kind: given for kind, given in inputs.items() if kind in taken},
            "models": models,
            "failed_models": failed_models,
            "failed_inputs": failed_inputs,
            "device": ", ".join(dict.fromkeys(note["device"] for _, note, _ in parts)),
            "seconds": round(seconds + time.time() - began, 3),
            "environment": environment(),
            "tables": hashes(folder, (SAMPLES, LAYERS, HEADS, QUANTILES, SINK_PLACES)),
            "figures": [str(path.relative_to(folder)) for path in figures],
        },
        folder / MANIFEST,
    )
    on_disk(folder)


def _told(part: Part, shards: int) -> dict[str, Any]:
    """What the shards of one tower tell beside their numbers; of layers, what the first one measured does."""
    accounts = [part.read_account(place) for place in range(shards)]
    first = next((account for account in accounts if account["measured"]), accounts[0])
    of_inputs = {
        name: {key: found for account in accounts for key, found in account[name].items()}
        for name in ("failed", "content")
    }
    return first | of_inputs | {"seconds": sum(account["seconds"] for account in accounts)}


def _followed(metrics: Sequence[str] | None) -> bool:
    """Whether all metrics that were asked for are of language models that follow a vision tower."""
    names = metric_names(metrics)
    return bool(names) and all(entry_of(name).place == FOLLOWED for name in names)


class _NoNumbers(UserError):  # noqa: N818  it says what is the matter
    """A tower of which nothing can be told: no input could be read, or none gave a number."""


def _samples(part: Part, note: Mapping[str, Any], failed: Mapping[str, str]) -> pd.DataFrame:
    """The samples of one tower, as many as are kept. Raises _NoNumbers where it has no number at all."""
    frames = [_read(part.shard(place)) for place in range(note["shards"])]
    # without rows, but with columns: measured, and beyond what is kept
    kept = [frame for frame in frames if len(frame)] or [frame for frame in frames if len(frame.columns)][:1]
    if not kept:
        why = next(iter(failed.values()), "there is none")
        raise _NoNumbers(
            f"no input of '{note['source']}' could be read: {why}", "give images in JPEG, PNG or WebP"
        )
    samples = pd.concat(kept, ignore_index=True)
    if samples["value"].notna().any():
        return samples
    cells = (_read(file) for file in map(part.cells, range(note["shards"])) if file.exists())
    if any((cell["n"] > 0).any() for cell in cells):
        return samples
    tokens = samples["n_tokens"].max() if len(samples) else "some"
    raise _NoNumbers(
        f"none of the metrics has a number in the {part.tower} tower of '{part.given}' ({tokens} "
        f"token{'' if tokens == 1 else 's'} per input)",
        "other --tokens or --metrics; of one token alone there is nothing to measure",
    )


def _read(file: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(file.absolute())  # what looks like `NAME:` is a file system to it
    except FileNotFoundError:
        raise
    except (ArrowInvalid, OSError) as error:
        raise UserError(
            f"'{file}' cannot be read: {error}", f"rm '{file}', then run the same command again"
        ) from error


def _tables(
    parts: Sequence[tuple[Part, Mapping[str, Any], pd.DataFrame]],
    samples: pd.DataFrame,
    document: Mapping[str, Any],
    folder: Path,
) -> Tables:
    """`(layers, heads)`: of samples where all are kept, else of the moments of all inputs, with quantiles."""
    seed = document["plan"]["seed"]
    remove(folder, PROBE, [QUANTILES])
    if all("interval" not in note["entry"] for _, note, _ in parts):
        return tables(samples, seed=seed)
    found, spread = list[Tables](), list[pd.DataFrame]()
    for part, note, own in parts:
        if "interval" not in note["entry"]:
            found.append(tables(own, seed=seed))
            continue
        # a shard of which nothing could be read has none
        files = [file for file in map(part.cells, range(note["shards"])) if file.exists()]
        cells = merged(Moments.from_frame(_read(file)) for file in files)
        found.append(moment_tables(cells, RATIOS))
        if (of_twins := own[own["metric"].isin([*OF_UNTRAINED.values(), OVER_UNTRAINED])]).size:
            found.append(tables(of_twins, seed=seed))
        spread.append(quantiles(cells))
    write(pd.concat(spread, ignore_index=True), folder / QUANTILES)
    layers, heads = (pd.concat(each, ignore_index=True) for each in zip(*found, strict=True))
    return one_kind(layers), one_kind(heads)
