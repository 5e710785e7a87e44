"""Runs: shards that survive, folders that are whole or resumable, and numbers that depend on neither."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoints import save_vision_model
from safetensors import safe_open

from diag.errors import UserError
from diag.inputs import images
from diag.models.families import demo
from diag.results import tables as records
from diag.results.collect import collect
from diag.results.writing import WRITERS
from diag.run import run, shards
from diag.run.cache import folder_of, is_measured
from diag.run.plan import SHARD_INPUTS, ProbePlan
from diag.run.progress import Progress, Silent
from diag.run.run import open_run, run_probe

pytestmark = pytest.mark.usefixtures("undrawn")

FAST = ("cos_y_vself", "excess", "self_specific_fraction")
LM = {"models": ("demo:lm",), "texts": __file__, "limit": 40, "seq_len": 16, "metrics": FAST}
"""Three shards of windows of this very text."""


class Ears:
    """Hears everything; raises when so many inputs are done."""

    def __init__(self, stop_at: int | None = None, error: BaseException | None = None) -> None:
        self.lines: list[str] = []
        self.started: list[tuple[str, int]] = []
        self.inputs = 0
        self.stop_at, self.error = stop_at, error or KeyboardInterrupt()

    def say(self, text: str) -> None:
        self.lines.append(text)

    def start(self, what: str, total: int) -> None:
        self.started.append((what, total))

    def advance(self, inputs: int) -> None:
        self.inputs += inputs
        if self.stop_at is not None and self.inputs >= self.stop_at:
            raise self.error


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the inputs that are really measured, as they are."""
    seen: list[str] = []
    original = shards.measure

    def counting(tower: Any, samples: Iterable[Any], **options: Any) -> Any:
        listed = list(samples)
        seen.extend(sample.id for sample in listed)
        return original(tower, listed, **options)

    monkeypatch.setattr(shards, "measure", counting)
    return seen


def plan(**changes: Any) -> Any:
    return ProbePlan.checked(**(LM | changes))


def vision(noise: Path, **changes: Any) -> Any:
    given = {"models": ("demo:vit-p16",), "images": str(noise), "metrics": FAST}
    return ProbePlan.checked(**(given | changes))


def tables_of(folder: Path) -> list[pd.DataFrame]:
    return [read(folder) for read in (records.read_layers, records.read_heads, records.read_samples)]


def assert_same(one: Path, other: Path) -> None:
    for a, b in zip(tables_of(one), tables_of(other), strict=True):
        pd.testing.assert_frame_equal(a, b, check_exact=True, check_categorical=False)
    assert (one / "layers.csv").read_bytes() == (other / "layers.csv").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diag.run.finish.draw", lambda *_: [])
        run_probe(plan(), folder)
    return folder


@pytest.fixture(scope="module")
def in_fours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in batches of four, whose numbers may differ in the last bit."""
    folder = tmp_path_factory.mktemp("in-fours") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diag.run.finish.draw", lambda *_: [])
        run_probe(plan(batch_size=4), folder)
    return folder


# --- what a run tells


def test_a_run_is_told_as_it_goes(tmp_path: Path) -> None:
    ears, progress = Ears(), Progress()
    found = run_probe(plan(limit=20), tmp_path / "run", listener=ears, progress=progress)
    assert ears.lines == ["demo:lm → demo:lm"]
    assert ears.started == [("demo:lm text", 20)]
    assert ears.inputs == 20
    assert (progress.shards_done, progress.shards_total) == (2, 2)
    assert found.complete
    assert found.folder == tmp_path / "run"
    assert found.layers["n"].eq(20).all()


def test_a_run_can_be_opened_again(undisturbed: Path) -> None:
    found = open_run(undisturbed)
    assert found.complete
    assert len(found.layers) == 18
    assert len(found.heads) == 54
    assert found.manifest["models"][0]["given"] == "demo:lm"
    with pytest.raises(UserError, match="is not a finished run"):
        open_run(undisturbed.parent)


def test_the_default_folder_carries_name_and_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    found = run_probe(vision(noise, limit=2))
    assert found.folder == Path("runs") / f"demo-vit-p16-{found.manifest['key'][:8]}"


# --- batches and shards


def test_the_table_does_not_depend_on_the_batch_size(tmp_path: Path, noise: Path) -> None:
    plans = [vision(noise, batch_size=size, metrics=None, tokens=("patch", "cls", "all")) for size in (1, 5)]
    found = [run_probe(plan, tmp_path / str(place)) for place, plan in enumerate(plans)]
    for one, other in zip(tables_of(found[0].folder)[:2], tables_of(found[1].folder)[:2], strict=True):
        numbers = ["mean", "std", "ci_low", "ci_high"]
        np.testing.assert_allclose(one[numbers], other[numbers], rtol=1e-6, atol=1e-6)
        pd.testing.assert_frame_equal(one.drop(columns=numbers), other.drop(columns=numbers))
    layers = found[0].layers
    assert layers[layers["metric"] == "cos_y_vself"]["n"].eq(20).all()


@pytest.mark.parametrize("name", ["tiny.v1.2", "tiny"])
def test_every_shard_counts_whatever_the_models_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.symlink_to(demo.EMBEDDED / "lm")
    found = run_probe(plan(models=(str(folder),)), tmp_path / "run")
    assert found.layers["n"].eq(40).all()
    samples = records.read_samples(tmp_path / "run")
    assert samples["input_index"].nunique() == 40
    assert not samples.duplicated(["layer", "head", "metric", "input"]).any()


def test_models_whose_names_read_alike_as_files_stay_apart(tmp_path: Path) -> None:
    for name in ("a b", "a-b"):
        (tmp_path / name).symlink_to(demo.EMBEDDED / "lm")
    names = tuple(str(tmp_path / name) for name in ("a-b", "a b"))
    found = run_probe(plan(models=names, limit=2), tmp_path / "run")
    assert list(found.layers["model"].unique()) == list(names)
    assert found.layers["n"].eq(2).all()


def test_tables_follow_the_order_of_the_models(tmp_path: Path, noise: Path) -> None:
    names = ("demo:vit-p8", "demo:vit-p4", "demo:vit-p16")
    found = run_probe(vision(noise, models=names, limit=1, layers=(0,)), tmp_path / "run")
    assert list(found.layers["model"].unique()) == list(names)
    assert [entry["given"] for entry in found.manifest["models"]] == list(names)


def test_both_kinds_of_models_fit_into_one_run(tmp_path: Path, noise: Path) -> None:
    both = vision(noise, models=("demo:vit-p16", "demo:lm"), texts=__file__, limit=2, seq_len=16)
    found = run_probe(both, tmp_path / "run")
    assert found.layers.groupby("tower")["n_tokens"].unique().map(list).to_dict() == {
        "vision": [17],
        "text": [16],
    }
    assert set(found.manifest["inputs"]) == {"vision", "text"}
    back = records.read_samples(tmp_path / "run")
    assert set(back["patch_size"].dropna()) == {16}


def test_images_need_not_be_square(tmp_path: Path, noise: Path) -> None:
    tall = vision(
        noise,
        models=("timm:vit_tiny_patch16_224",),
        random_init=True,
        model_args=("img_size=(64,32)", "depth=1"),
        limit=2,
    )
    found = run_probe(tall, tmp_path / "run")
    assert set(found.layers["image_size"]) == {"64x32"}
    assert set(found.layers["patch_size"]) == {16}
    assert set(found.layers["n_tokens"]) == {9}


# --- interruptions


@pytest.mark.parametrize("stop_at", [1, SHARD_INPUTS + 1, 2 * SHARD_INPUTS + 1, 40])
def test_an_interrupted_run_goes_on_where_it_was(
    tmp_path: Path, undisturbed: Path, in_fours: Path, measured: list[str], stop_at: int
) -> None:
    folder, progress = tmp_path / "run", Progress()
    with pytest.raises(KeyboardInterrupt):
        run_probe(plan(batch_size=4), folder, listener=Ears(stop_at), progress=progress)
    finished = (stop_at - 1) // SHARD_INPUTS
    assert (progress.shards_done, progress.shards_total) == (finished, 3)
    assert len(list((folder / "shards").glob("*.parquet"))) == finished
    assert not (folder / "manifest.json").exists()
    measured.clear()
    run_probe(plan(batch_size=4), folder, progress=progress)
    assert len(measured) == 40 - finished * SHARD_INPUTS
    assert len(set(measured)) == len(measured)
    assert_same(folder, in_fours)
    for one, other in zip(tables_of(folder)[:2], tables_of(undisturbed)[:2], strict=True):
        np.testing.assert_allclose(one["mean"], other["mean"], atol=1e-6)
    assert not (folder / "shards").exists()


def test_an_interruption_between_tables_and_manifest_is_mended(
    tmp_path: Path, undisturbed: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> list[Path]:
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("diag.run.finish.draw", stop)
        with pytest.raises(KeyboardInterrupt):
            run_probe(plan(), folder)
    assert not (folder / "manifest.json").exists()
    measured.clear()
    run_probe(plan(), folder)
    assert measured == []
    assert_same(folder, undisturbed)


def test_half_written_files_are_not_read(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_probe(plan(), folder, listener=Ears(SHARD_INPUTS + 1))
    (whole,) = (folder / "shards").glob("*.parquet")
    for name in (".00-demo-lm-text-00001.parquet.17.tmp", ".00-demo-lm-text-00001.json.17.tmp"):
        (folder / "shards" / name).write_bytes(whole.read_bytes()[:100])
    (folder / ".manifest.json.17.tmp").write_text("{")
    run_probe(plan(), folder)
    assert_same(folder, undisturbed)


def test_a_finished_run_returns_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    run_probe(plan(limit=2), folder)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a finished run loads no model")

    monkeypatch.setattr(run, "load", refuse)
    ears = Ears()
    found = run_probe(plan(limit=2, batch_size=1, device="cpu"), folder, listener=ears)
    assert found.complete
    assert ears.lines == [f"already complete: {folder} (measure again with --overwrite)"]
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before
    with pytest.raises(AssertionError):
        run_probe(plan(limit=2), folder, overwrite=True)


@pytest.mark.parametrize("change", [{"limit": 3}, {"seed": 1}, {"seq_len": 17}, {"metrics": ("entropy",)}])
def test_another_plan_is_refused_and_can_overwrite(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    run_probe(plan(limit=2), folder)
    before = (folder / "layers.csv").read_bytes()
    with pytest.raises(UserError, match="holds another run") as caught:
        run_probe(plan(**({"limit": 2} | change)), folder)
    assert "--overwrite" in str(caught.value.tip)
    assert (folder / "layers.csv").read_bytes() == before
    found = run_probe(plan(**({"limit": 2} | change)), folder, overwrite=True)
    assert found.complete
    assert (folder / "layers.csv").read_bytes() != before


def test_inputs_that_changed_are_another_run(tmp_path: Path, noise: Path) -> None:
    album = tmp_path / "album"
    album.mkdir()
    for file in sorted(noise.iterdir())[:3]:
        (album / file.name).write_bytes(file.read_bytes())
    run_probe(vision(album), tmp_path / "run")
    (album / "02.png").unlink()
    with pytest.raises(UserError, match="holds another run"):
        run_probe(vision(album), tmp_path / "run")


def test_images_that_were_replaced_are_another_run(tmp_path: Path, noise: Path) -> None:
    """Of the same names and sizes, at another time: neither mixed into what is there, nor served stale."""
    album = tmp_path / "album"
    shutil.copytree(noise, album)
    with pytest.raises(KeyboardInterrupt):
        run_probe(vision(album), tmp_path / "run", listener=Ears(17))
    run_probe(vision(album, limit=2), tmp_path / "finished")
    assert is_measured(vision(album, limit=2)) is False
    there = folder_of(vision(album, limit=2))
    for file in album.iterdir():
        os.utime(file, ns=(0, 0))
    assert folder_of(vision(album, limit=2)) != there
    for folder, limit in ((tmp_path / "run", 64), (tmp_path / "finished", 2)):
        with pytest.raises(UserError, match="holds another run: its inputs were replaced since") as caught:
            run_probe(vision(album, limit=limit), folder)
        assert "--overwrite" in str(caught.value.tip)


def test_an_image_that_is_replaced_while_it_is_measured_ends_the_run(
    tmp_path: Path, noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    album = tmp_path / "album"
    shutil.copytree(noise, album)
    original = shards.measure

    def replacing(*arguments: Any, **options: Any) -> Any:
        yield from original(*arguments, **options)
        os.utime(album / "01.png", ns=(0, 0))

    monkeypatch.setattr(shards, "measure", replacing)
    with pytest.raises(UserError, match=r"01\.png' was replaced while it was measured"):
        run_probe(vision(album, limit=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_no_plain_file_is_listed_and_the_others_are_measured(tmp_path: Path, noise: Path) -> None:
    album = tmp_path / "album"
    album.mkdir()
    shutil.copy(noise / "00.png", album)
    os.mkfifo(album / "pipe.png")
    found = run_probe(vision(album), tmp_path / "run")
    assert found.manifest["failed_inputs"] == {"pipe.png": "no plain file"}
    assert set(found.layers["n"]) == {1}


def test_inputs_of_two_runs_are_the_same_by_their_bytes(tmp_path: Path, noise: Path) -> None:
    """A copy of a folder pairs; images of the same names and sizes that differ do not."""
    for name in ("album", "copy", "other"):
        shutil.copytree(noise, tmp_path / name)
    for file in ("copy", "other"):
        os.utime(tmp_path / file / "00.png", ns=(0, 0))
    changed = tmp_path / "other" / "01.png"
    changed.write_bytes(changed.read_bytes()[:-1] + b"\0")  # of its last chunk
    for name in ("album", "copy", "other"):
        run_probe(vision(tmp_path / name, limit=3), tmp_path / f"run-{name}")
    found = collect(tmp_path / f"run-{name}" for name in ("album", "copy", "other"))
    sources = list(found.samples.groupby("run", sort=False)["source"].first())
    assert sources[0] == sources[1]
    assert sources[2] == f"{sources[0]}~2"


# --- what goes wrong on the way


def full_after(written: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full after so many Parquet files, in the middle of the next."""
    original, count = WRITERS[".parquet"], [0]

    def writer(frame: pd.DataFrame, path: Path) -> None:
        if count[0] >= written:
            path.write_bytes(b"PAR1")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count[0] += 1
        original(frame, path)

    monkeypatch.setitem(WRITERS, ".parquet", writer)


@pytest.mark.parametrize("written", [0, 1, 3, 4])
def test_a_full_disk_loses_nothing_that_was_written(
    tmp_path: Path, undisturbed: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        full_after(written, patch)
        with pytest.raises(UserError, match="No space left on device") as caught:
            run_probe(plan(), folder)
    assert "run the same command again" in str(caught.value.tip)
    assert not list(tmp_path.rglob("*.tmp"))
    assert not (folder / "manifest.json").exists()
    assert folder.exists() == (written > 0)
    measured.clear()
    run_probe(plan(), folder)
    assert len(measured) == max(40 - written * SHARD_INPUTS, 0)
    assert_same(folder, undisturbed)


def test_a_run_ends_in_the_figures_that_its_last_command_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[str]
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr("diag.run.finish.draw", lambda *given: (asked.append(given[4]), [])[1])
    with pytest.raises(KeyboardInterrupt):
        run_probe(plan(figures="none"), tmp_path / "run", listener=Ears(stop_at=SHARD_INPUTS + 1))
    found = run_probe(plan(figures="png"), tmp_path / "run")
    assert asked == [(), ("png",)]
    assert (
        found.manifest["plan"]["figures"] == open_run(tmp_path / "run").manifest["plan"]["figures"] == "png"
    )
    assert len({*measured}) == 40
    assert run_probe(plan(figures="none"), tmp_path / "run").manifest == found.manifest


def test_a_disk_that_fills_up_while_figures_are_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: Path
) -> None:
    def full(*_: object) -> list[Path]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.undo()
    monkeypatch.setattr("diag.show.figures.write.save", full)
    with pytest.raises(UserError, match="figures': No space left on device"):
        run_probe(vision(noise, limit=1), tmp_path / "run")
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize(
    "mistake", [{"layers": (9,)}, {"tokens": ("cls",)}, {"seq_len": 999}, {"models": ("hf:nobody/nothing",)}]
)
def test_a_run_that_could_not_begin_leaves_its_folder_free(tmp_path: Path, mistake: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        run_probe(plan(**mistake), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert run_probe(plan(limit=1), tmp_path / "run").complete


def broken(names: str, noise: Path, album: Path, count: int) -> Path:
    """Copies of the first images; those whose numbers are in `names` cannot be read."""
    album.mkdir()
    for number, file in enumerate(sorted(noise.iterdir())[:count]):
        (album / file.name).write_bytes(b"broken" if str(number) in names.split() else file.read_bytes())
    return album


def test_unreadable_inputs_are_counted_and_the_rest_is_measured(tmp_path: Path, noise: Path) -> None:
    album = broken("1 17", noise, tmp_path / "album", 18)
    found = run_probe(vision(album), tmp_path / "run")
    assert not found.complete
    assert found.manifest["status"] == "partial"
    assert set(found.manifest["failed_inputs"]) == {"01.png", "17.png"}
    assert "cannot read image '01.png'" in found.manifest["failed_inputs"]["01.png"]
    assert found.layers["n"].eq(16).all()
    for name in ("01.png", "17.png"):
        (album / name).unlink()
    clean = run_probe(vision(album), tmp_path / "clean")
    np.testing.assert_allclose(found.layers["mean"], clean.layers["mean"], atol=1e-6)
    np.testing.assert_allclose(found.layers["ci_low"], clean.layers["ci_low"], atol=1e-6)


def test_a_shard_without_any_readable_input_is_no_trouble(tmp_path: Path, noise: Path) -> None:
    album = broken(" ".join(map(str, range(16))), noise, tmp_path / "album", 18)
    ears = Ears(17, KeyboardInterrupt())
    found = run_probe(vision(album), tmp_path / "run", listener=ears)
    assert found.layers["n"].eq(2).all()
    assert len(found.manifest["failed_inputs"]) == 16


def test_only_unreadable_inputs_are_an_error(tmp_path: Path, noise: Path) -> None:
    album = broken("0 1 2", noise, tmp_path / "album", 3)
    with pytest.raises(UserError, match=r"no input of .* could be read: cannot read image '00\.png'"):
        run_probe(vision(album), tmp_path / "run")
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize("keep", [0, 4])
def test_inputs_beyond_those_kept_count_though_none_of_the_kept_could_be_read(
    tmp_path: Path, noise: Path, keep: int
) -> None:
    album = broken(" ".join(map(str, range(16))), noise, tmp_path / "album", 20)
    found = run_probe(vision(album, keep_samples=keep), tmp_path / "run")
    assert found.layers["n"].eq(4).all()
    assert len(found.manifest["failed_inputs"]) == 16
    samples = records.read_samples(tmp_path / "run")
    assert len(samples) == 0
    assert {"input", "value", "metric", "layer", "head"} <= set(samples)


def test_a_model_of_which_nothing_can_be_measured_has_failed(tmp_path: Path, noise: Path) -> None:
    """One class token has no partner, and one token nothing to attend to."""
    alone = vision(noise, tokens=("cls",), metrics=("cos_y_vpartner",), limit=2)
    with pytest.raises(UserError, match="none of the metrics has a number in the vision tower") as caught:
        run_probe(alone, tmp_path / "run")
    assert "other --tokens or --metrics" in str(caught.value.tip)
    assert not (tmp_path / "run").exists()


def test_failed_inputs_are_known_after_resuming(tmp_path: Path, noise: Path) -> None:
    album = broken("1", noise, tmp_path / "album", 20)
    with pytest.raises(KeyboardInterrupt):
        run_probe(vision(album), tmp_path / "run", listener=Ears(16))
    found = run_probe(vision(album), tmp_path / "run")
    assert list(found.manifest["failed_inputs"]) == ["01.png"]
    assert found.layers["n"].eq(19).all()


def test_a_model_that_fails_does_not_take_the_others_along(tmp_path: Path, noise: Path) -> None:
    ears = Ears()
    names = ("demo:vit-p16", "demo:lm", "hf:nobody/nothing", "demo:vit-p8")
    found = run_probe(vision(noise, models=names, limit=3), tmp_path / "run", listener=ears)
    assert list(found.manifest["failed_models"]) == ["demo:lm", "hf:nobody/nothing"]
    assert found.manifest["status"] == "partial"
    assert list(found.layers["model"].unique()) == ["demo:vit-p16", "demo:vit-p8"]
    assert sum("failed" in line for line in ears.lines) == 2
    alone = run_probe(vision(noise, models=("demo:vit-p8",), limit=3), tmp_path / "alone")
    mine = found.layers[found.layers["model"] == "demo:vit-p8"].reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, alone.layers, check_exact=True)


@pytest.mark.parametrize(("fails", "stays", "shard"), [("text", "vision", 1), ("vision", "text", 2)])
def test_a_tower_that_fails_does_not_take_the_other_along(
    tmp_path: Path, noise: Path, monkeypatch: pytest.MonkeyPatch, fails: str, stays: str, shard: int
) -> None:
    """Whatever it had measured before; all of them failing is the model's failure."""
    original, begun = shards.measure, list[str]()

    def failing(tower: Any, *arguments: Any, **options: Any) -> Any:
        begun.append(tower.name)
        if "neither" in begun or (tower.name == fails and begun.count(fails) == shard):
            raise UserError("layer 'layers.1' cannot be rebuilt", "…")
        return original(tower, *arguments, **options)

    folder = save_vision_model(tmp_path / "clip", "clip")
    both = vision(noise, models=(str(folder),), texts="demo", limit=20)
    expected = run_probe(both, tmp_path / "whole").layers.query("tower == @stays").reset_index(drop=True)
    monkeypatch.setattr(shards, "measure", failing)
    ears = Ears()
    found = run_probe(both, tmp_path / "run", listener=ears)
    why = f"the {fails} tower: layer 'layers.1' cannot be rebuilt"
    assert found.manifest["failed_models"] == {str(folder): why}
    assert (found.complete, ears.lines.count(f"{folder} failed: {why}")) == (False, 1)
    # where texts have no patches, the size of those of images is no whole number
    pd.testing.assert_frame_equal(found.layers, expected, check_exact=True, check_dtype=False)
    begun.append("neither")
    with pytest.raises(UserError, match=r"(?m)^layer 'layers\.1' cannot be rebuilt$"):
        run_probe(both, tmp_path / "none")


def test_inputs_that_are_not_finite_are_listed_and_all_others_measured(
    tmp_path: Path, noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them the only input of the last shard, and one in the batch on which layers are checked."""
    decoded = images._decoded
    folder = tmp_path / "images"
    shutil.copytree(noise, folder)
    for number in range(20, 33):
        shutil.copy(noise / "00.png", folder / f"{number}.png")
    bad = ("00.png", "05.png", "32.png")

    def wild(source: Path, what: str) -> Any:
        size = (3, 64, 64)
        return torch.full(size, torch.nan) if source.name in bad else decoded(source, what)

    monkeypatch.setattr(images, "_decoded", wild)
    found = run_probe(vision(folder, limit=33), tmp_path / "run")
    assert list(found.manifest["failed_inputs"]) == list(bad)
    for why in found.manifest["failed_inputs"].values():
        assert why.startswith("layer 'blocks.0.attn' gives values that are not finite")
    assert found.manifest["status"] == "partial"
    assert found.layers["n"].eq(30).all()
    for name in bad:
        (folder / name).write_bytes(b"")
    monkeypatch.setattr(images, "_decoded", decoded)
    unread = run_probe(vision(folder, limit=33), tmp_path / "unread")
    for mine, other in zip(tables_of(tmp_path / "run"), tables_of(tmp_path / "unread"), strict=True):
        pd.testing.assert_frame_equal(mine, other, check_exact=True)
    assert list(unread.manifest["failed_inputs"]) == list(bad)


def test_a_model_that_fails_half_way_leaves_no_rows(
    tmp_path: Path, noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = shards.measure, [0]

    def failing(tower: Any, *arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise UserError("layer 'blocks.3.attn' gives values that are not finite", "…")
        return original(tower, *arguments, **options)

    monkeypatch.setattr(shards, "measure", failing)
    both = vision(noise, models=("demo:vit-p16", "demo:vit-p8"), layers=(0,))
    found = run_probe(both, tmp_path / "run")
    assert list(found.manifest["failed_models"]) == ["demo:vit-p16"]
    assert list(found.layers["model"].unique()) == ["demo:vit-p8"]
    assert found.layers["n"].eq(20).all()


# --- saved activations


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., dict[str, torch.Tensor]]:
    def load(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118

    return load  # type: ignore[return-value]


def test_saved_calls_rebuild_the_output_and_the_pattern(tmp_path: Path, saved: Callable) -> None:
    run_probe(plan(limit=3, save_activations=2, layers=(1, 4)), tmp_path / "run")
    files = sorted((tmp_path / "run" / "activations").rglob("*.*"))
    assert [file.name for file in files] == ["00000.safetensors", "00001.safetensors"]
    seen = []
    for number, file in enumerate(files):
        tensors, told = saved(file)
        assert told["id"] == f"test_run.py:{number:05d}"
        assert {name.rpartition(".")[0] for name in tensors} == {"layer.01", "layer.04"}
        for layer in ("layer.01", "layer.04"):
            call = json.loads(told[layer])
            q, k, v, y, a = (
                tensors[f"{layer}.{part}"] for part in ("query", "key", "value", "output", "pattern")
            )
            assert y.shape == (1, 3, 16, 32)
            assert torch.allclose(a @ v, y, atol=1e-5)
            scores = q @ k.transpose(-1, -2) * call["scale"]
            hidden = torch.ones(16, 16).triu(1).bool()
            assert call["causal"]
            assert torch.allclose(scores.masked_fill(hidden, -torch.inf).softmax(-1), a, atol=1e-5)
            assert call["module"] == f"h.{int(layer[-2:])}.attn"
        seen.append(tensors["layer.01.value"])
    assert not torch.equal(*seen)


def test_activations_of_two_models_stay_apart(tmp_path: Path, noise: Path, saved: Callable) -> None:
    both = vision(noise, models=("demo:vit-p16", "demo:vit-p8"), limit=1, save_activations=5)
    run_probe(both, tmp_path / "run")
    files = sorted((tmp_path / "run" / "activations").rglob("*.safetensors"))
    assert [saved(file)[0]["layer.00.value"].shape[2] for file in files] == [17, 65]


def test_activations_of_models_whose_names_read_alike_as_files_stay_apart(
    tmp_path: Path, noise: Path
) -> None:
    names = ("a b", "a-b", "A-b", "a:b")
    for name in names:
        (tmp_path / name).symlink_to(demo.EMBEDDED / "lm")
    models = tuple(str(tmp_path / name) for name in names)
    run_probe(plan(models=models, limit=2, layers=(0,), save_activations=1), tmp_path / "run")
    folders = sorted(file.name for file in (tmp_path / "run" / "activations").iterdir())
    assert len(folders) == 4
    assert len(list((tmp_path / "run" / "activations").rglob("*.safetensors"))) == 4


def test_activations_are_saved_though_every_shard_was_there(tmp_path: Path, noise: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_probe(vision(noise, save_activations=1, limit=17), tmp_path / "run", listener=Ears(17))
    run_probe(vision(noise, save_activations=1, limit=17), tmp_path / "run")
    assert len(list((tmp_path / "run" / "activations").rglob("*.safetensors"))) == 1


def test_silence_is_a_listener() -> None:
    silent = Silent()
    assert (silent.say("a"), silent.start("a", 1), silent.advance(1)) == (None, None, None)


@pytest.mark.parametrize(
    ("name", "stem"),
    [("hf:org/name@rev", "hf-org-name-rev"), ("/tmp/a b/", "tmp-a-b"), ("vit.tag_1", "vit.tag_1")],
)
def test_names_as_file_names(name: str, stem: str) -> None:
    assert run.file_stem(name) == stem
