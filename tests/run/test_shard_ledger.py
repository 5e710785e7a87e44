"""Which shards count: whole, as measured, of this run. What is damaged is measured again, or named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from commands import Ended

from diag.errors import UserError
from diag.results.tables import read_manifest
from diag.run import shard_ledger as ledger
from diag.run.finish import gather
from diag.run.plan import ProbePlan
from diag.run.processes import Share
from diag.run.progress import Silent
from diag.run.run import run_probe, run_share

pytestmark = pytest.mark.usefixtures("undrawn")

Attnbias = Callable[..., Ended]
FILES = ("layers.csv", "heads.parquet", "samples.parquet")
SHARD = "00-demo-lm-text-00001"


def plan(**changes: Any) -> ProbePlan:
    given = {"models": ("demo:lm",), "texts": __file__, "limit": 40, "seq_len": 8, "layers": (0,)}
    return ProbePlan.checked(**(given | {"metrics": ("cos_y_vself",)} | changes))


class Ears(Silent):
    """Hears every line."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three shards, of which the second is there. Only to be copied."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    run_share(plan(), folder, Share(1, 2))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diag.run.finish.draw", lambda *_: [])
        run_probe(plan(), folder)
    return folder


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


def edited(file: Path) -> None:
    table = pd.read_parquet(file)
    table.assign(value=table["value"] + 1).to_parquet(file)


def of_another_run(account: Path) -> None:
    account.write_text(json.dumps(json.loads(account.read_text()) | {"run": "another"}))


def without(name: str) -> Callable[[Path], object]:
    def remove(account: Path) -> None:
        told = json.loads(account.read_text())
        del told[name]
        account.write_text(json.dumps(told))

    return remove


@pytest.mark.parametrize(
    ("suffix", "damage", "why"),
    [
        ("parquet", lambda file: file.write_bytes(b""), "it is not what was measured"),
        ("parquet", lambda file: file.write_bytes(file.read_bytes()[:100]), "it is not what was measured"),
        ("parquet", edited, "it is not what was measured"),
        ("json", Path.unlink, "its account is missing or damaged"),
        ("json", lambda file: file.write_bytes(b""), "its account is missing or damaged"),
        ("json", lambda file: file.write_text("[]"), "its account is missing or damaged"),
        ("json", without("files"), "its account is missing or damaged"),
        ("json", of_another_run, "it belongs to another run"),
    ],
)
def test_a_shard_that_its_account_does_not_vouch_for_is_measured_again(
    run: Path, whole: Path, suffix: str, damage: Callable[[Path], object], why: str
) -> None:
    damage(run / "shards" / f"{SHARD}.{suffix}")
    with pytest.raises(UserError, match=f"3 of 3 shards of 'demo:lm' .{SHARD}: {why}"):
        _merge(run)
    ears = Ears()
    run_probe(plan(), run, listener=ears)
    assert f"{SHARD} is measured again: {why}" in ears.lines
    for name in FILES:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def _merge(run: Path) -> None:
    from diag.run.finish import check_whole

    document = ledger.read_plan(run)
    note = next((run / "shards").glob("00-demo-lm-text.json"))
    assert json.loads(note.read_text())["shards"] == 3
    check_whole(run, document)


def test_moments_belong_to_a_shard(tmp_path: Path) -> None:
    for name in ("run", "again"):
        run_share(plan(keep_samples=1), tmp_path / name, Share(1, 2))
    (tmp_path / "run" / "shards" / f"{SHARD}.cells.parquet").write_bytes(b"PAR1")
    ears = Ears()
    run_probe(plan(keep_samples=1), tmp_path / "run", listener=ears)
    assert f"{SHARD} is measured again: it is not what was measured" in ears.lines
    run_probe(plan(keep_samples=1), tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_merging_copies_what_verifies(tmp_path: Path, run: Path, whole: Path) -> None:
    other = tmp_path / "other"
    run_share(plan(), other, Share(0, 2))
    edited(run / "shards" / f"{SHARD}.parquet")
    told: list[str] = []
    gather(other, [run], told.append)
    assert told == [f"{SHARD} of '{run}' was left out: it is not what was measured"]
    assert not (other / "shards" / f"{SHARD}.parquet").exists()
    run_share(plan(), run, Share(1, 2))
    edited(other / "shards" / "00-demo-lm-text-00000.parquet")
    gather(run, [other], told.append)
    assert len(told) == 2
    run_share(plan(), other, Share(0, 2))
    gather(run, [other], told.append)
    run_probe(plan(), run)
    for name in FILES:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is empty"),
        ("{", "it is not JSON"),
        ("[]", "it holds no mapping"),
        ('{"shard_inputs": 16, "key": 1}', "'key' is not text"),
        ('{"shard_inputs": -1, "key": "", "command": ""}', "'shard_inputs' is not a whole number"),
        (
            '{"shard_inputs": 1, "key": "", "command": "", "inputs": {}}',
            "'plan.models' is not a list of text",
        ),
        (
            '{"shard_inputs": 1, "key": "", "command": "", "inputs": {}, "plan": {"models": [1]}}',
            "'plan.models'",
        ),
    ],
)
def test_a_damaged_plan_is_named(attnbias: Attnbias, text: str, words: str) -> None:
    Path("run").mkdir()
    Path("run/plan.json").write_text(text)
    ended = attnbias("merge", "run")
    assert ended.code == 2
    assert words in ended.lines[0]
    assert "run/plan.json" in ended.lines[0]
    assert [line.startswith("tip: if it is a run of attnbias probe") for line in ended.lines[1:]] == [True]
    ended = attnbias("probe", "-m", "demo:lm", "--texts", __file__, "--limit", 1, "-o", "run")
    assert (ended.code, len(ended.lines)) == (2, 2)
    assert "not expected" not in ended.err
    assert os.listdir("run") == ["plan.json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is empty"),
        ('{"towers": "text"}', "'towers' is not a list of text"),
        ('{"towers": ["x"], "shards": 3, "source": "", "device": "", "entry": {"takes": ""}}', "'towers'"),
        ('{"towers": ["text"], "shards": 0, "source": "", "device": "", "entry": {"takes": ""}}', "'shards'"),
        ('{"towers": ["text"], "shards": 1e9, "source": "", "device": "", "entry": {}}', "'shards'"),
    ],
)
def test_a_damaged_note_is_named_and_written_again(
    attnbias: Attnbias, run: Path, text: str, words: str
) -> None:
    note = run / "shards" / "00-demo-lm-text.json"
    note.write_text(text)
    ended = attnbias("merge", run)
    assert ended.code == 2
    assert words in ended.lines[0]
    assert str(note) in ended.lines[0]
    assert ended.lines[1].startswith("tip: run its command again: ")
    assert run_probe(plan(), run).complete


def test_a_damaged_note_of_a_failure_is_named(attnbias: Attnbias, run: Path) -> None:
    file = run / "shards" / "00-demo-lm.failed-0-of-2.json"
    file.write_text("[]")
    (run / "shards" / "00-demo-lm.failed-x-of-y.json").write_text("[]")
    ended = attnbias("merge", run)
    assert (ended.code, len(ended.lines)) == (2, 2)
    assert str(file) in ended.lines[0]
    assert ended.lines[1] == f"tip: rm '{file}', then run the same command again"
    assert run_probe(plan(), run).complete


def test_tables_of_a_finished_run_have_hashes(whole: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    assert list(read_manifest(copy)["tables"]) == ["samples.parquet", "layers.csv", "heads.parquet"]
    ears = Ears()
    run_probe(plan(), copy, listener=ears)
    assert len(ears.lines) == 1
    table = copy / "layers.csv"
    table.write_text(table.read_text().replace("0.", "1."))
    run_probe(plan(), copy, listener=ears)
    assert ears.lines[2:] == [f"layers.csv of '{copy}' is not as the run wrote it"]


def test_nothing_is_removed_behind_a_link(run: Path, tmp_path: Path) -> None:
    (run / "shards").rename(tmp_path / "elsewhere")
    (run / "shards").symlink_to(tmp_path / "elsewhere")
    file = ledger.failure_file(run, 0, "demo:lm", Share(0, 1))
    file.write_text("{}")
    ledger.forget_failures(run, Share(0, 1))
    assert file.exists()
    (run / "shards").unlink()
    (tmp_path / "elsewhere").rename(run / "shards")
    ledger.forget_failures(run, Share(0, 1))
    assert not file.exists()
