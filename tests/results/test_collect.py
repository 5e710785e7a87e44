"""Several run folders as one collection: labels, counts, sources, and folders that cannot be read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from commands import Ended
from made_runs import CURVES, Make, made_run

from diag.errors import UserError
from diag.results.collect import collect
from diag.results.hashes import hashes
from diag.results.manifest import FORMAT


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda name="run", **given: made_run(tmp_path / name, **given)


def test_lines_follow_each_other_in_the_order_given(make: Make) -> None:
    found = collect([make("b", model="demo:b"), make("a", model="demo:a")])
    assert found.labels == ["demo:b", "demo:a"]
    assert list(found.folders) == ["b", "a"]
    assert set(found.samples["run"]) == {"a", "b"}
    assert found.problems == {}
    # mean over heads within each input
    assert len(found.samples) == 2 * len(CURVES) * 3 * 8


@pytest.mark.parametrize(
    ("one", "other", "labels"),
    [
        ({"n_tokens": 64}, {"n_tokens": 128}, ["demo:vit-p8 · T = 64", "demo:vit-p8 · T = 128"]),
        ({"image_size": 64}, {"image_size": 96}, ["demo:vit-p8 · 64 px", "demo:vit-p8 · 96 px"]),
        ({}, {"tokens": "cls"}, ["demo:vit-p8 · patch", "demo:vit-p8 · cls"]),
        ({}, {"values": "bias_free"}, ["demo:vit-p8 · as computed", "demo:vit-p8 · bias free"]),
        ({}, {"intervention": "xsa"}, ["demo:vit-p8 · none", "demo:vit-p8 · xsa"]),
        ({}, {"seed": 1}, ["demo:vit-p8 · one", "demo:vit-p8 · other"]),
        (
            {"n_tokens": 64, "dtype": "bfloat16"},
            {"n_tokens": 64},
            ["demo:vit-p8 · bfloat16", "demo:vit-p8 · float32"],
        ),
    ],
)
def test_a_label_says_what_tells_lines_of_one_model_apart(
    make: Make, one: dict[str, Any], other: dict[str, Any], labels: list[str]
) -> None:
    found = collect([make("one", **one), make("other", **other)])
    assert found.labels == labels
    assert set(found.heads["label"]) == set(found.samples["label"]) == set(labels)


def test_runs_of_one_name_in_different_places(make: Make) -> None:
    found = collect([make("here/run"), make("there/run")])
    assert list(found.folders) == ["run", "run-2"]
    assert found.labels == ["demo:vit-p8 · run", "demo:vit-p8 · run-2"]


@pytest.mark.parametrize("model", ["001", "NA", "null", "1e5", "=1+1", "'=1+1", "-x"])
def test_models_and_folders_called_like_something_else(make: Make, model: str) -> None:
    found = collect([make("NA", model=model), make("001", model="demo:b")])
    assert found.labels == [model, "demo:b"]
    assert list(found.folders) == ["NA", "001"]
    for table in (found.layers, found.heads, found.samples):
        assert list(table["label"].unique()) == [model, "demo:b"]
        assert table["layer_count"].notna().all()


def test_a_label_has_no_control_characters(make: Make) -> None:
    assert collect([make(model="a\x1b[31m\nb")]).labels == ["a\\u001b[31m\\u000ab"]


def test_a_folder_given_twice_is_read_once(make: Make) -> None:
    folder = make()
    (folder.parent / "link").symlink_to(folder)
    found = collect([folder, folder, Path(os.path.relpath(folder)), folder.parent / "link"])
    assert len(found.layers) == len(collect([folder]).layers)


def test_towers_with_different_constants(make: Make) -> None:
    text = make("text", model="demo:lm", tower="text", tokens="all", patch_size=np.nan, image_size=np.nan)
    found = collect([make("vision"), text])
    assert found.labels == ["demo:vit-p8", "demo:lm"]


def test_depth_is_the_models_also_where_some_layers_were_measured(make: Make) -> None:
    two = {"cos_y_vself": [0.5, 0.4]}
    some = make("some", model="demo:a", curves=two, entry={"layers": 12})
    unsaid = make("unsaid", model="demo:b", curves=two, entry={"layers": None})
    found = collect([some, unsaid]).layers.groupby("label")["layer_count"].unique()
    assert found["demo:a"].tolist() == [12]
    assert found["demo:b"].tolist() == [2]


class TestSources:
    def sources(self, *folders: Path) -> list[str]:
        return list(collect(folders).samples.groupby("label", sort=False)["source"].first())

    def test_images_of_one_content_are_the_same_inputs_for_every_model(self, make: Make) -> None:
        one, other = self.sources(make("a", model="demo:a"), make("b", model="demo:b", n_tokens=17))
        assert one == other

    def test_another_content_is_another_source(self, make: Make) -> None:
        one, other = self.sources(make("a", model="demo:a"), make("b", model="demo:b", sha256="others"))
        assert one != other

    @pytest.mark.parametrize(
        ("told", "names"),
        [
            ([("s", "c"), ("s", "d")], ["", ""]),  # more of one folder
            ([("s", "c"), ("t", "c")], ["", ""]),  # a copy
            ([("s", "c"), ("t", "d")], ["", "~2"]),  # replaced since, of the same names and sizes
            ([("s", "c"), ("t", "d"), ("t", "e"), ("s", "f")], ["", "~2", "~2", ""]),
            ([("s", "c"), ("t", "c"), ("s", "e"), ("t", "f")], ["", "", "~2", "~3"]),  # never by hearsay
            ([("s", "c"), None], ["", ""]),  # of an older version, which tells no more
        ],
    )
    def test_images_of_one_digest_are_the_same_by_stamp_or_bytes(
        self, make: Make, told: list[tuple[str, str] | None], names: list[str]
    ) -> None:
        runs = []
        for number, known in enumerate(told):
            given = {} if known is None else {"stamp": known[0], "content": known[1]}
            inputs = {"vision": {"sha256": "photos", "count": 8, **given}}
            runs.append(make(str(number), model=f"demo:{number}", manifest={"inputs": inputs}))
        assert self.sources(*runs) == [f"photos{name}" for name in names]

    def test_without_a_digest_every_run_is_its_own_source(self, make: Make) -> None:
        nothing = {"manifest": {"inputs": {}}}
        one, other = self.sources(make("a", model="demo:a", **nothing), make("b", model="demo:b", **nothing))
        assert one != other

    @pytest.mark.parametrize(
        ("one", "other", "same"),
        [
            ({"n_tokens": 64}, {"n_tokens": 128}, False),
            ({"model": "hf:gpt2"}, {"model": "hf:pythia"}, False),
            ({"model": "hf:gpt2"}, {"model": "hf:gpt2-xl"}, False),
            (
                {"model": "hf:gpt2", "entry": {"tokenizer": "abc"}},
                {"model": "hf:gpt2-xl", "entry": {"tokenizer": "abc"}},
                True,
            ),
            ({"model": "hf:pythia@step1"}, {"model": "hf:pythia@step9"}, True),
            ({"dtype": "float32"}, {"dtype": "bfloat16"}, True),
        ],
    )
    def test_windows_of_a_text_are_the_same_if_they_are_cut_alike(
        self, make: Make, one: dict[str, Any], other: dict[str, Any], same: bool
    ) -> None:
        found = self.sources(make("a", tower="text", **one), make("b", tower="text", **other))
        assert (found[0] == found[1]) is same


class TestProblems:
    def test_a_bad_folder_is_named_and_the_rest_goes_on(self, make: Make, tmp_path: Path) -> None:
        good, bad = make("good"), make("bad")
        (bad / "manifest.json").unlink()
        found = collect([tmp_path / "nowhere", good, bad])
        assert list(found.folders) == ["good"]
        assert list(found.problems) == [str(tmp_path / "nowhere"), str(bad)]
        assert all("not a finished run" in why for why in found.problems.values())

    @pytest.mark.parametrize("file", ["layers.csv", "heads.parquet", "samples.parquet"])
    def test_a_missing_or_broken_table(self, make: Make, file: str) -> None:
        good, bad, broken = make("good"), make("bad"), make("broken")
        (bad / file).unlink()
        (broken / file).write_text("")
        found = collect([good, bad, broken])
        assert list(found.folders) == ["good"]
        assert set(found.problems) == {str(bad), str(broken)}

    def test_a_table_that_holds_something_else(self, make: Make) -> None:
        good, bad = make("good"), make("bad")
        table = pd.read_csv(bad / "layers.csv").astype({"mean": object})
        table.loc[3, "mean"] = "many"
        table.to_csv(bad / "layers.csv", index=False)
        found = collect([good, bad])
        assert found.problems == {
            str(
                bad
            ): f"cannot read table '{bad / 'layers.csv'}': column 'mean' holds 'many' in line 5, where a "
            "finite number is due"
        }
        heads = pd.read_parquet(bad / "heads.parquet").assign(head=5_000_000)
        heads.to_parquet(bad / "heads.parquet")
        shutil.copy(good / "layers.csv", bad / "layers.csv")
        assert "column 'head' holds 5000000 in row 0" in collect([good, bad]).problems[str(bad)]

    def test_a_broken_manifest(self, make: Make) -> None:
        bad = make("bad")
        (bad / "manifest.json").write_text("{")
        with pytest.raises(UserError) as caught:
            collect([bad])
        assert caught.value.tip == f"measure it again: attnbias probe … -o {bad} --overwrite"

    @pytest.mark.parametrize("number", [None, 0, FORMAT + 1])
    def test_another_format(self, make: Make, number: int | None) -> None:
        old = make(manifest={"format": number})
        with pytest.raises(UserError, match=f"has format {number}; this version reads {FORMAT}") as caught:
            collect([old])
        assert "--overwrite" in str(caught.value.tip)

    def test_a_folder_of_another_verb(self, make: Make) -> None:
        with pytest.raises(UserError, match="was made by attnbias attend") as caught:
            collect([make(manifest={"kind": "attend"})])
        assert caught.value.tip == "give folders of attnbias probe"

    def test_nothing_readable_raises_the_first_reason(self, make: Make, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="nowhere"):
            collect([tmp_path / "nowhere", tmp_path / "neither"])

    def test_nothing_given(self) -> None:
        with pytest.raises(UserError, match="no run was given"):
            collect([])


def test_a_table_that_was_edited_is_noted(make: Make) -> None:
    folder = make()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tables"] = hashes(folder, ("layers.csv", "heads.parquet", "samples.parquet", "none.csv"))
    assert list(manifest["tables"]) == ["layers.csv", "heads.parquet", "samples.parquet"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert collect([folder]).notes == []
    with (folder / "layers.csv").open("a") as table:
        table.write("\n")
    assert collect([folder]).notes == [f"layers.csv of '{folder}' is not as the run wrote it"]


def test_a_real_run(finished: tuple[Path, Ended], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy, ignore=shutil.ignore_patterns("figures"))
    found = collect([copy])
    assert found.labels == ["demo:vit-p16 · patch", "demo:vit-p16 · cls"]
    assert set(found.layers["layer_count"]) == {6}
    manifest = json.loads((copy / "manifest.json").read_text())
    assert manifest["inputs"]["vision"]["sha256"].startswith(found.samples["source"].iloc[0])
