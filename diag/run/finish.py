"""A run finished from its shards: tables, figures and manifest, the same however many processes measured.

Shards are read in the order of the inputs, so that nothing depends on who wrote them, or when. No torch.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from pyarrow import ArrowInvalid

from diag.errors import UserError
from diag.metrics.catalogue import RATIOS
from diag.results.folder import HEADS, LAYERS, MANIFEST, QUANTILES, SAMPLES, is_finished
from diag.results.moments import Moments, merged, moment_tables, quantiles
from diag.results.staging import settle, sweep
from diag.results.tables import FORMAT, one_kind, tables
from diag.results.writing import atomically, on_disk, write, write_json, writing
from diag.run.environment import environment
from diag.run.locks import PATIENCE, Locks
from diag.run.shard_ledger import MERGE, Part, Standing, read_plan, standing

Tables = tuple[pd.DataFrame, pd.DataFrame]
Saying = Callable[[str], object]


def draw(layers: pd.DataFrame, heads: pd.DataFrame, folder: Path) -> list[Path]:
    """Every figure of a run, written as PDF, PNG and the CSV behind it."""
    from diag.show.figures import draw_run
    from diag.show.figures.write import save_all

    with writing(folder):
        return save_all(draw_run(layers, heads), folder)


def finish(folder: Path, locks: Locks, *, wait: bool = True, say: Saying = lambda text: None) -> bool:
    """Writes what a run ends in; False if another process is at it. Its shards can be removed then.

    wait: for that other process, if there is one. say: told what was left out.
    Raises UserError if shards are missing or cannot be read, and if no input of any model could be.
    """
    while not locks.take(MERGE):
        if not wait:
            return False
        time.sleep(PATIENCE)
    try:
        if not is_finished(folder):
            _finish(folder, read_plan(folder), say)
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


def gather(folder: Path, others: Sequence[Path]) -> None:
    """Copies shards of the same run that were measured in other folders.

    Raises UserError if one holds another run, or was cut in other shards.
    """
    own = read_plan(folder)
    for other in others:
        theirs = read_plan(other)
        if any(theirs[name] != own[name] for name in ("key", "shard_inputs")):
            raise UserError(
                f"'{other}' holds another run than '{folder}'",
                "measure with the same command, --shard and -o apart",
            )
        # notes and accounts before shards: a shard counts as done when it is there
        files = (other / "shards").glob("[!.]*")
        for file in sorted(files, key=lambda file: (file.suffix == ".parquet", ".cells" not in file.name)):
            if not (folder / "shards" / file.name).exists():
                atomically(folder / "shards" / file.name, partial(shutil.copyfile, file))


def _finish(folder: Path, document: Mapping[str, Any], say: Saying) -> None:
    began = time.time()
    found = check_whole(folder, document)
    failed_models, failed_inputs = dict(found.failed), dict[str, str]()
    models, seconds = list[dict[str, Any]](), 0.0
    parts = list[tuple[Part, dict[str, Any], pd.DataFrame]]()
    for part, note in found.parts:
        told = _told(part, note["shards"])
        kept = [frame for place in range(note["shards"]) if len(frame := _read(part.shard(place)))]
        failed_inputs |= told["failed"]
        seconds += told["seconds"]
        if not kept:
            failed_models[part.given] = _nothing_read(part, note, told["failed"])
            say(f"{part.given} failed: {failed_models[part.given]}")
            continue
        _say_told(part.given, told, say)
        models.append(note["entry"] | {"skipped_layers": told["skipped_layers"]})
        parts.append((part, note, pd.concat(kept, ignore_index=True)))
    if not parts:
        raise UserError(next(iter(failed_models.values())), "give images in JPEG, PNG or WebP")
    samples = one_kind(pd.concat([part for *_, part in parts], ignore_index=True))
    layers, heads = _tables(parts, samples, document, folder)
    write(samples, folder / SAMPLES)
    write(layers, folder / LAYERS)
    write(heads, folder / HEADS)
    figures = draw(layers, heads, folder / "figures")
    sweep(folder)
    taken = {entry["takes"] for entry in models}
    plain = {name: value for name, value in document.items() if name not in ("inputs", "shard_inputs")}
    settle(folder)
    write_json(
        {
            "format": FORMAT,
            "status": "partial" if failed_models or failed_inputs else "complete",
            **plain,
            "inputs": {kind: given for kind, given in document["inputs"].items() if kind in taken},
            "models": models,
            "failed_models": failed_models,
            "failed_inputs": failed_inputs,
            "device": ", ".join(dict.fromkeys(note["device"] for _, note, _ in parts)),
            "seconds": round(seconds + time.time() - began, 3),
            "environment": environment(),
            "figures": [str(path.relative_to(folder)) for path in figures],
        },
        folder / MANIFEST,
    )
    on_disk(folder)


def _told(part: Part, shards: int) -> dict[str, Any]:
    """What the shards of one tower tell beside their numbers; of layers, what the first one does."""
    accounts = [json.loads(part.account(place).read_text(encoding="utf-8")) for place in range(shards)]
    failed = {name: why for account in accounts for name, why in account["failed"].items()}
    return accounts[0] | {"failed": failed, "seconds": sum(account["seconds"] for account in accounts)}


def _say_told(given: str, told: Mapping[str, Any], say: Saying) -> None:
    for path, why in told["skipped_layers"].items():
        say(f"{given}: {path} left out, {why}")
    if unprojected := told["unprojected"]:
        more = f" and {len(unprojected) - 1} more" if len(unprojected) > 1 else ""
        say(
            f"{given}: value_stream_cosine and output_value_cosine are empty where the way from "
            f"heads to the stream is not understood: {unprojected[0]}{more}"
        )


def _nothing_read(part: Part, note: Mapping[str, Any], failed: Mapping[str, str]) -> str:
    """Why a tower has no row; its shards, which hold nothing, are removed: inputs may be mended."""
    for place in range(note["shards"]):
        part.shard(place).unlink(missing_ok=True)
    why = next(iter(failed.values()), "there is none")
    return f"no input of '{note['source']}' could be read: {why}"


def _read(file: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(file)
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
    (folder / QUANTILES).unlink(missing_ok=True)
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
        spread.append(quantiles(cells))
    write(pd.concat(spread, ignore_index=True), folder / QUANTILES)
    layers, heads = (pd.concat(each, ignore_index=True) for each in zip(*found, strict=True))
    return one_kind(layers), one_kind(heads)
