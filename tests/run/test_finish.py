"""Several processes on one run: the same bytes however many there were, and what is missing is said."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from commands import Ended

from diag.errors import UserError
from diag.results import tables as records
from diag.results.writing import WRITERS
from diag.run import finish, run, shards
from diag.run import shard_ledger as ledger
from diag.run.plan import ProbePlan, shard_inputs
from diag.run.processes import Share
from diag.run.progress import Progress
from diag.run.run import run_probe, run_share

pytestmark = pytest.mark.usefixtures("undrawn")

Attnbias = Callable[..., Ended]
FILES = ("layers.csv", "heads.parquet", "samples.parquet")
METRICS = ("cos_y_vself", "self_specific_fraction", "attention_update_ratio")
COMMAND = ("probe", "-m", "demo:lm", "--texts", __file__, "--limit", 40, "--seq-len", 16)


def plan(**changes: Any) -> ProbePlan:
    given = {"models": ("demo:lm",), "texts": __file__, "limit": 75, "seq_len": 16, "metrics": METRICS}
    return ProbePlan.checked(**(given | {"layers": (0, 3)} | changes))


def contents(folder: Path) -> dict[str, bytes]:
    names = [*FILES, *(["quantiles.parquet"] if (folder / "quantiles.parquet").exists() else [])]
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs of one process: all samples kept, and 20 of 75."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diag.run.finish.draw", lambda *_: [])
        for keep in (4096, 20):
            run_probe(plan(keep_samples=keep), folder / str(keep))
    return {keep: folder / str(keep) for keep in (4096, 20)}


# --- how many, and in which order


@pytest.mark.parametrize("keep", [4096, 20])
@pytest.mark.parametrize("processes", [2, 5])
def test_the_result_does_not_depend_on_the_processes(
    tmp_path: Path, alone: dict[int, Path], processes: int, keep: int
) -> None:
    order = np.random.default_rng(processes + keep).permutation(processes)
    found = [run_share(plan(keep_samples=keep), tmp_path / "run", Share(int(i), processes)) for i in order]
    assert [one is not None for one in found] == [False] * (processes - 1) + [True]
    assert contents(tmp_path / "run") == contents(alone[keep])
    assert not (tmp_path / "run" / "shards").exists()
    same = ("inputs", "models", "status", "failed_inputs", "key", "device")
    told, expected = (records.read_manifest(folder) for folder in (tmp_path / "run", alone[keep]))
    assert {name: told[name] for name in same} == {name: expected[name] for name in same}


def test_models_and_towers_are_shared(tmp_path: Path, noise: Path) -> None:
    several = plan(
        models=("demo:vit-p16", "demo:lm", "demo:vit-p8"),
        images=str(noise),
        limit=20,
        metrics=("cos_y_vself",),
    )
    run_probe(several, tmp_path / "one")
    for rank in (2, 0, 1):
        run_share(several, tmp_path / "three", Share(rank, 3))
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_each_process_counts_its_own_shards(tmp_path: Path) -> None:
    told, done = [], []
    for rank in range(2):
        progress = Progress()
        ears = Ears()
        run_share(plan(), tmp_path / "run", Share(rank, 2), listener=ears, progress=progress)
        told.append(ears.lines[-1])
        done.append((progress.shards_done, progress.shards_total))
    assert done == [(3, 3), (2, 2)]
    assert told[0].startswith("process 1 of 2: done; 3 of 5 shards are there")


def test_many_inputs_and_large_batches_have_larger_shards() -> None:
    assert shard_inputs(plan(limit=16_384)) == 16
    assert shard_inputs(plan(limit=100_000)) == 128
    assert shard_inputs(plan(limit=10**9)) == 256
    assert shard_inputs(plan(batch_size=300)) == 300
    automatic = [shard_inputs(plan(batch_size=0, limit=limit)) for limit in (64, 1000, 100_000)]
    assert automatic == [16, 64, 256]


def test_a_folder_keeps_the_shards_that_it_began_with(tmp_path: Path, alone: dict[int, Path]) -> None:
    run_share(plan(), tmp_path / "run", Share(0, 2))
    assert run_share(plan(batch_size=64), tmp_path / "run", Share(1, 2)) is not None
    ours, theirs = (records.read_samples(folder) for folder in (tmp_path / "run", alone[4096]))
    by = ["layer", "head", "metric", "input_index"]
    ours, theirs = (part.sort_values(by, ignore_index=True) for part in (ours, theirs))
    assert ours["input"].tolist() == theirs["input"].tolist()
    np.testing.assert_allclose(ours["value"], theirs["value"], atol=1e-6)


# --- more inputs than are kept


def test_beyond_the_cap_tables_are_those_of_all_inputs(alone: dict[int, Path]) -> None:
    for read in (records.read_layers, records.read_heads):
        found, expected = read(alone[20]), read(alone[4096])
        by = [name for name in records.KEYS if name in found]
        found, expected = (table.sort_values(by, ignore_index=True) for table in (found, expected))
        assert list(found) == list(expected)
        pd.testing.assert_frame_equal(found[[*by, "n", "n_tokens"]], expected[[*by, "n", "n_tokens"]])
        np.testing.assert_allclose(found["mean"], expected["mean"], rtol=1e-9)
        np.testing.assert_allclose(found["std"], expected["std"], rtol=1e-9)
        widths = [(table["ci_high"] - table["ci_low"]).to_numpy() for table in (found, expected)]
        np.testing.assert_allclose(widths[0], widths[1], rtol=0.25)  # Student's t and the bootstrap


def test_the_first_inputs_are_kept_as_they_are(alone: dict[int, Path]) -> None:
    ours, theirs = (records.read_samples(alone[keep]) for keep in (20, 4096))
    theirs = theirs[theirs["input_index"] < 20].reset_index(drop=True)
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True, check_categorical=False)
    (entry,) = records.read_manifest(alone[20])["models"]
    assert (entry["inputs"], entry["samples_kept"]) == (75, 20)
    assert "moments" in entry["interval"]
    (entry,) = records.read_manifest(alone[4096])["models"]
    assert "interval" not in entry


def test_quantiles_are_of_all_inputs(alone: dict[int, Path]) -> None:
    assert not (alone[4096] / "quantiles.parquet").exists()
    table = pd.read_parquet(alone[20] / "quantiles.parquet")
    samples = records.read_samples(alone[4096])
    for (layer, head, metric), part in samples.groupby(["layer", "head", "metric"], observed=True):
        row = table[(table["layer"] == layer) & (table["head"] == head) & (table["metric"] == metric)].iloc[0]
        values = part["value"].dropna()
        assert (row["low"], row["high"], row["n"]) == (values.min(), values.max(), len(values))
        assert row["q75"] == pytest.approx(np.quantile(values, 0.75, method="lower"), rel=0.0051)


def test_a_model_within_the_cap_keeps_its_numbers_beside_one_beyond(tmp_path: Path, noise: Path) -> None:
    both = {"models": ("demo:lm", "demo:vit-p16"), "images": str(noise), "metrics": ("cos_y_vself",)}
    mixed = run_probe(plan(**both, keep_samples=20), tmp_path / "mixed")
    pure = run_probe(plan(**both), tmp_path / "pure")
    for name in ("layers", "heads"):
        ours, theirs = (getattr(found, name) for found in (mixed, pure))
        assert list(ours["model"].unique()) == list(both["models"])
        ours, theirs = (
            part[part["model"] == "demo:vit-p16"].reset_index(drop=True) for part in (ours, theirs)
        )
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True, check_dtype=False)
    assert [entry.get("samples_kept") for entry in mixed.manifest["models"]] == [20, None]


def test_unreadable_inputs_beyond_the_cap_are_left_out(tmp_path: Path, noise: Path) -> None:
    album = tmp_path / "album"
    shutil.copytree(noise, album)
    for number in (2, *range(16, 20)):
        (album / f"{number:02d}.png").write_bytes(b"broken")
    one = plan(
        models=("demo:vit-p16",), texts=None, images=str(album), keep_samples=4, metrics=("cos_y_vself",)
    )
    found = run_probe(one, tmp_path / "run")
    assert len(found.manifest["failed_inputs"]) == 5
    assert found.layers["n"].eq(15).all()
    assert records.read_samples(tmp_path / "run")["input_index"].nunique() == 4


# --- the verb


def test_merging_finishes_what_is_whole_and_says_what_is_missing(attnbias: Attnbias) -> None:
    given = (*COMMAND, "--metrics", "cos_y_vself", "--layers", 0)
    ended = attnbias(*given, "-o", "run", "--shard", "2/2")
    assert (ended.code, ended.out) == (0, "")
    assert "process 2 of 2: done; 1 of 3 shards are there" in ended.err
    ended = attnbias("merge", "run")
    assert ended.code == 2
    assert ended.lines[0] == "error: 'run' is not whole: 2 of 3 shards of 'demo:lm'"
    assert ended.lines[1].startswith("tip: run its command again: attnbias probe -m demo:lm")
    assert "--shard" not in ended.lines[1]
    assert attnbias(*given, "-o", "else", "--shard", "1/2").code == 0
    ended = attnbias("merge", "run", "else", "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["manifest"]["status"] == "complete"
    assert attnbias(*given, "-o", "alone", "-q").out == "alone\n"
    assert contents(Path("run")) == contents(Path("alone"))
    ended = attnbias("merge", "run", "-q")
    assert (ended.code, ended.out, ended.err) == (0, "run\n", "")
    assert attnbias("merge", "run").lines[0] == "already complete: run"


def test_merging_takes_shards_of_the_same_run_only(attnbias: Attnbias) -> None:
    given = (*COMMAND, "--metrics", "cos_y_vself", "--layers", 0)
    attnbias(*given, "-o", "run", "--shard", "1/2")
    attnbias(*given, "-o", "other", "--shard", "2/2", "--seed", 1)
    ended = attnbias("merge", "run", "other")
    assert (ended.code, ended.lines[0]) == (2, "error: 'other' holds another run than 'run'")
    Path("empty").mkdir()
    ended = attnbias("merge", "empty")
    assert (ended.code, ended.lines[0]) == (2, "error: 'empty' holds no run of attnbias probe")


def test_the_environment_of_torchrun_is_obeyed(attnbias: Attnbias, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in ("0", "1"):
        for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, value)
        ended = attnbias(*COMMAND, "--metrics", "cos_y_vself", "--layers", 0, "-o", "run", "--json")
        assert ended.code == 0
    assert json.loads(ended.out)["manifest"]["models"][0]["inputs"] == 40
    ended = attnbias(*COMMAND, "-o", "run", "--overwrite")
    assert ended.code == 2
    assert "--overwrite would remove" in ended.lines[0]
    assert Path("run/manifest.json").exists()


# --- what goes wrong


def test_a_model_that_fails_in_one_process_is_told_in_the_end(
    tmp_path: Path, noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = plan(
        models=("demo:vit-p16", "demo:vit-p8"),
        texts=None,
        images=str(noise),
        metrics=("cos_y_vself",),
        layers=(0,),
    )
    original = shards.measure

    def failing(tower: Any, samples: Any, **options: Any) -> Any:
        samples = list(samples)
        if tower.facts["patch_size"] == 16 and samples[0].id == "00.png":
            raise UserError("layer 'blocks.3.attn' gives values that are not finite", "…")
        return original(tower, samples, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "measure", failing)
        assert run_share(both, tmp_path / "run", Share(0, 2)) is None
        found = run_share(both, tmp_path / "run", Share(1, 2))
    assert found is not None
    assert found.manifest["failed_models"] == {
        "demo:vit-p16": "layer 'blocks.3.attn' gives values that are not finite"
    }
    assert list(found.layers["model"].unique()) == ["demo:vit-p8"]
    # noted once, tried again by the process that noted it: nothing is left of the failure
    with monkeypatch.context() as patch:
        patch.setattr(shards, "measure", failing)
        assert run_share(both, tmp_path / "again", Share(0, 2)) is None
    assert len(list((tmp_path / "again" / "shards").glob("*.failed-0-of-2.json"))) == 1
    assert run_share(both, tmp_path / "again", Share(0, 2)) is None
    found = run_share(both, tmp_path / "again", Share(1, 2))
    assert found is not None
    assert found.complete


def test_a_process_that_fails_leaves_the_others_their_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no layer 9"):
        run_share(plan(layers=(9,)), tmp_path / "run", Share(0, 2))
    assert ledger.read_plan(tmp_path / "run")["plan"]["layers"] == [9]
    with pytest.raises(UserError, match="no layer 9"):
        run_probe(plan(layers=(9,)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_shard_of_another_share_that_is_damaged_is_left_to_it(
    tmp_path: Path, alone: dict[int, Path]
) -> None:
    run_share(plan(), tmp_path / "run", Share(0, 2))
    file = tmp_path / "run" / "shards" / "00-demo-lm-text-00002.parquet"
    file.write_bytes(file.read_bytes()[:100])
    ears = Ears()
    assert run_share(plan(), tmp_path / "run", Share(1, 2), listener=ears) is None
    assert "4 of 5 shards are there" in ears.lines[-1]
    assert run_share(plan(), tmp_path / "run", Share(0, 2), listener=ears) is not None
    assert "00-demo-lm-text-00002 is measured again: it is not what was measured" in ears.lines
    assert contents(tmp_path / "run") == contents(alone[4096])


class Disk(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_without_room_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Disk(0, 0, 1_000_000))
    monkeypatch.setattr(run, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match="needs about 32 MB more, and 1 MB are free") as caught:
        run_probe(plan(), tmp_path / "run")
    assert "make room" in str(caught.value.tip)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("keep", [4096, 20])
def test_a_disk_that_will_not_hold_all_shards_is_told_after_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: dict[int, Path], keep: int
) -> None:
    one = plan(keep_samples=keep)
    with monkeypatch.context() as patch:
        patch.setattr(run, "ROOM", 0)
        patch.setattr(shutil, "disk_usage", lambda folder: Disk(0, 0, 10_000))
        with pytest.raises(UserError, match="MB more"):
            run_probe(one, tmp_path / "run")
    assert [file.name for file in (tmp_path / "run" / "shards").glob("*[0-9].parquet")] == [
        "00-demo-lm-text-00000.parquet"
    ]
    progress = Progress()
    run_probe(one, tmp_path / "run", progress=progress)
    assert contents(tmp_path / "run") == contents(alone[keep])


def test_a_folder_that_has_become_read_only_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root no mode forbids writing: the lock file cannot be opened, as on a file system mounted so."""
    import errno
    import os

    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    run_share(plan(), tmp_path / "run", Share(0, 2))
    before = sorted((tmp_path / "run").rglob("*"))
    monkeypatch.setattr("diag.run.locks.os.open", refuse)
    monkeypatch.setattr(run, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match="Read-only file system") as caught:
        run_probe(plan(), tmp_path / "run")
    assert "-o" in str(caught.value.tip)
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_a_full_disk_is_no_failure_of_the_model(
    tmp_path: Path, noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models that follow could not be written either."""
    import errno
    import os

    loaded: list[str] = []
    original = run.load

    def full(frame: pd.DataFrame, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(
        run, "load", lambda spec, **options: loaded.append(spec.given) or original(spec, **options)
    )
    monkeypatch.setitem(WRITERS, ".parquet", full)
    both = plan(models=("demo:vit-p16", "demo:vit-p8"), texts=None, images=str(noise), limit=1)
    with pytest.raises(UserError, match="No space left on device"):
        run_probe(both, tmp_path / "run")
    assert loaded == ["demo:vit-p16"]


# --- two processes at once

HOLD = """
import sys
from pathlib import Path
from diag.run.locks import Locks
with Locks(Path(sys.argv[1])) as locks:
    print(locks.take(int(sys.argv[2])), flush=True)
    sys.stdin.readline()
"""


class Ears(run.Silent):
    """Hears every line, and answers one of them."""

    def __init__(self, word: str = "", answer: Callable[[], object] = lambda: None) -> None:
        self.lines: list[str] = []
        self.word, self.answer = word, answer

    def say(self, text: str) -> None:
        self.lines.append(text)
        if self.word and self.word in text:
            self.answer()


@contextmanager
def holder(folder: Path, place: int) -> Iterator[subprocess.Popen[str]]:
    """Another process that has a lock of a run in hand."""
    file = folder / ledger.SHARDS_LOCK
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file), str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        yield other
        other.kill()


def test_a_shard_in_another_processs_hand_is_waited_for(tmp_path: Path, alone: dict[int, Path]) -> None:
    """It is measured once the other is gone; the rest is not held up."""
    folder = tmp_path / "run"
    run_share(plan(), folder, Share(0, 2))
    part = ledger.Part(folder, 0, "demo:lm", "text")
    with holder(folder, part.lock(1)) as other:
        seen: list[list[str]] = []

        def end() -> None:
            seen.append(sorted(file.name[-13:-8] for file in (folder / "shards").glob("*.parquet")))
            other.kill()
            other.wait()

        ears = Ears("waiting for another process", end)
        assert run_share(plan(), folder, Share(1, 2), listener=ears) is not None
    assert seen == [["00000", "00002", "00003", "00004"]]
    assert contents(folder) == contents(alone[4096])


def test_one_process_finishes(
    tmp_path: Path, alone: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another is at it, a process with a share leaves it alone, and one without waits."""
    folder = tmp_path / "run"
    run_share(plan(), folder, Share(0, 2))
    with holder(folder, ledger.MERGE) as other:
        assert run_share(plan(), folder, Share(1, 2)) is None
        assert len(list((folder / "shards").glob("*.parquet"))) == 5
        monkeypatch.setattr(finish.time, "sleep", lambda seconds: (other.kill(), other.wait()))
        assert run_probe(plan(), folder).complete
    assert contents(folder) == contents(alone[4096])


def test_a_run_that_another_process_finishes_meanwhile_is_read(
    tmp_path: Path, alone: dict[int, Path]
) -> None:
    folder = tmp_path / "run"
    run_share(plan(), folder, Share(0, 2))

    class Overtaken(run.Silent):
        def start(self, what: str, total: int) -> None:
            run_probe(plan(), folder)

    found = run_share(plan(), folder, Share(1, 2), listener=Overtaken())
    assert found is not None
    assert contents(folder) == contents(alone[4096])
    assert not (folder / "shards").exists()
