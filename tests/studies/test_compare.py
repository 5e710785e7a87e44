"""`compare`: the folder, the screen, and the verb with runs, models, sweeps and bad folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from commands import Ended
from made_runs import CURVES, Make, made_run

from diag.cli.compare import numbers
from diag.errors import UserError
from diag.results.caveats import BY_DEFAULT
from diag.results.collect import collect
from diag.results.hashes import edited
from diag.results.tables import read_samples
from diag.results.writing import write
from diag.show.figures import ENDINGS
from diag.show.words.control import series_control
from diag.studies import compare as module
from diag.studies.compare import compare, default_folder, published_for, screen, write_comparison
from diag.studies.comparisons import TABLES

Attnbias = Callable[..., Ended]
LOW = CURVES | {"cos_y_vself": [0.4, 0.3, 0.35]}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda name="run", **given: made_run(tmp_path / name, **given)


@pytest.fixture
def two(make: Make) -> tuple[Path, Path]:
    return make("one", model="demo:vit-p16", patch_size=16, n_tokens=17), make("two", curves=LOW)


@pytest.fixture
def undrawn_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "draw_comparison", lambda *_: [])


class TestFolder:
    @pytest.mark.usefixtures("sketched")
    def test_holds_tables_verdict_figures_and_what_was_compared(
        self, two: tuple[Path, Path], tmp_path: Path
    ) -> None:
        found = compare(collect(two))
        folder = tmp_path / "out"
        figures = write_comparison(found, folder, command="attnbias compare one two")
        names = {path.name for path in folder.iterdir()}
        assert names == {
            "comparison.csv",
            "profiles.csv",
            "differences.csv",
            "nulls.csv",
            "nulls.tex",
            "verdict.txt",
            "manifest.json",
            "figures",
        }
        assert {path.stem for path in figures} == {"comparison", "profiles"}
        assert all(path.is_file() for path in figures)
        layers = pd.read_csv(folder / "comparison.csv")
        assert set(layers["label"]) == {"demo:vit-p16", "demo:vit-p8"}
        written = pd.read_csv(folder / "profiles.csv")
        assert len(written) == len(found.profiles)
        assert written["value"].tolist() == pytest.approx(found.profiles["value"].tolist(), nan_ok=True)
        assert len(pd.read_csv(folder / "differences.csv")) == 6
        verdict = (folder / "verdict.txt").read_text()
        assert "Strongest mean bias: demo:vit-p16" in verdict
        assert max(map(len, verdict.splitlines())) <= 80
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["kind"] == "compare"
        assert list(manifest["runs"]) == ["one", "two"]
        assert manifest["command"] == "attnbias compare one two"
        assert manifest["control"].startswith("Identical recipe")

    def test_twice_gives_the_same_bytes(self, two: tuple[Path, Path], tmp_path: Path) -> None:
        for name in ("a", "b"):
            write_comparison(compare(collect(two)), tmp_path / "out" / name)
        files = [sorted(p for p in (tmp_path / "out" / name).rglob("*") if p.is_file()) for name in "ab"]
        assert [p.name for p in files[0]] == [p.name for p in files[1]]
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))

    @pytest.mark.usefixtures("sketched")
    @pytest.mark.parametrize(("figures", "endings"), ENDINGS.items())
    def test_draws_what_is_asked_for(
        self, figures: str, endings: tuple[str, ...], two: tuple[Path, Path], tmp_path: Path
    ) -> None:
        written = write_comparison(compare(collect(two)), tmp_path / "out", figures=figures)
        suffixes = {f".{ending}" for ending in endings} | ({".csv"} if endings else set())
        assert {path.suffix for path in written} == suffixes
        there = {path.suffix for path in (tmp_path / "out" / "figures").glob("*")}
        assert there == suffixes
        named = json.loads((tmp_path / "out" / "manifest.json").read_text())["figures"]
        assert [tmp_path / "out" / name for name in named] == written

    @pytest.mark.usefixtures("undrawn_comparison")
    def test_takes_the_place_of_a_comparison_and_of_nothing_else(
        self, two: tuple[Path, Path], tmp_path: Path
    ) -> None:
        found, folder = compare(collect(two)), tmp_path / "out"
        write_comparison(found, folder)
        write_comparison(found, folder)
        with pytest.raises(UserError, match="is not empty and holds no comparison"):
            write_comparison(found, two[0])
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="is a file"):
            write_comparison(found, tmp_path / "file")

    @pytest.mark.usefixtures("sketched")
    def test_figures_of_an_earlier_comparison_are_removed(
        self, two: tuple[Path, Path], tmp_path: Path
    ) -> None:
        folder = tmp_path / "out"
        write_comparison(compare(collect(two)), folder)
        assert (folder / "figures" / "comparison.png").exists()
        write_comparison(compare(collect(two[:1])), folder)
        assert {path.name for path in (folder / "figures").iterdir()} == {
            "profiles.png",
            "profiles.pdf",
            "profiles.csv",
        }

    def test_nothing_but_its_own_figures_is_removed(self, two: tuple[Path, Path], tmp_path: Path) -> None:
        """A manifest may have been edited, and a figures folder may hold links."""
        folder, kept = tmp_path / "out", [tmp_path / "precious.txt", tmp_path / "linked.png"]
        write_comparison(compare(collect(two)), folder)
        kept.append(folder / "figures" / "notes.txt")
        for file in kept:
            file.write_text("mine")
        (folder / "figures" / "link.png").symlink_to(tmp_path / "linked.png")
        manifest = json.loads((folder / "manifest.json").read_text())
        named = ["../precious.txt", str(tmp_path / "linked.png"), "figures/link.png", "figures/notes.txt"]
        (folder / "manifest.json").write_text(json.dumps(manifest | {"figures": manifest["figures"] + named}))
        write_comparison(compare(collect(two[:1])), folder)
        assert [file.read_text() for file in kept] == ["mine"] * 3
        assert not (folder / "figures" / "comparison.png").exists()

    def test_the_manifest_knows_the_tables(self, two: tuple[Path, Path], tmp_path: Path) -> None:
        folder = tmp_path / "out"
        write_comparison(compare(collect(two)), folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["tables"].keys() == {*TABLES}
        assert edited(folder, manifest) == []
        (folder / "profiles.csv").write_text("x")
        assert edited(folder, manifest) == [f"profiles.csv of '{folder}' is not as the run wrote it"]

    def test_the_name_follows_from_the_content(self, two: tuple[Path, Path]) -> None:
        found = compare(collect(two))
        assert default_folder(found).name == f"compare-one+two-{found.key[:8]}"
        assert compare(collect(two)).key == found.key
        assert compare(collect(two), growth=(0, 1)).key != found.key
        assert compare(collect(two[::-1])).key != found.key

    def test_without_anything_to_draw(self, make: Make, tmp_path: Path) -> None:
        found = compare(collect([make(curves={"entropy": [1.0, 2.0]})]))
        assert write_comparison(found, tmp_path / "out") == []
        assert "was not measured" in (tmp_path / "out" / "verdict.txt").read_text()
        assert "alignment bias was not measured" in screen(found)


class TestScreen:
    def test_shows_every_line_once_and_what_follows(self, two: tuple[Path, Path]) -> None:
        text = screen(compare(collect(two), growth=(1, 2)))
        lines = text.splitlines()
        assert lines[0] == "A demo:vit-p16 · T = 17 · n = 8 · patch"
        assert lines[1] == "B demo:vit-p8 · T = 65 · n = 8 · patch"
        assert "A 0.500 0." in text
        assert "0.400 @2 1.00" in text
        assert "growth: layer 1 to 2" in text
        assert "1.67" in text
        assert "falling 100%" in text
        assert "(B - A above 0: B has more)" in text
        assert "\nB - A -0.1" in text
        assert "yes" in text
        assert "Strongest mean bias: demo:vit-p16, 0.500" in text
        assert "Controlled series: Identical recipe" in text

    @pytest.mark.parametrize("count", [1, 3, 30])
    def test_is_at_most_80_columns_wide(self, make: Make, count: int) -> None:
        name = "hf:/data/checkpoints/experiments/a-rather-long-name-of-a-model/continued/step-{}"
        minus = {metric: [-0.111 * value for value in curve] for metric, curve in CURVES.items()}
        folders = [
            make(str(i), model=name.format(i), curves=minus if i % 2 else CURVES, noise=0.4, n_tokens=16384)
            for i in range(count)
        ]
        text = screen(compare(collect(folders)))
        assert max(map(len, text.splitlines())) <= 80
        assert "nan" not in text
        assert ("Differences" in text) == (count > 1)
        if count == 30:
            assert "30 hf:/data" in text
            assert len([line for line in text.splitlines() if " - 1 " in line]) == 29  # each less the first

    def test_columns_are_aligned_under_their_headings(self, two: tuple[Path, Path]) -> None:
        lines = screen(compare(collect(two))).splitlines()
        start = lines.index("of it that is the token attending to itself")
        head, first, second = lines[start + 1 : start + 4]
        for heading in ("bias", "over partner", "over uniform"):
            place = head.index(heading)
            for row in (first, second):
                assert row[place - 1] == " "
                assert "…" in row[place : place + 22]
        assert head.endswith("self")
        assert len(first) == len(head)

    def test_random_weights_are_called_so(self, make: Make) -> None:
        text = screen(compare(collect([make("a", entry={"weights": "random"}), make("b", model="demo:b")])))
        assert text.splitlines()[0] == "A demo:vit-p8 · random weights · T = 65 · n = 8 · patch"
        assert "random" not in text.splitlines()[1]

    def test_a_long_name_makes_room_for_its_caveats(self, make: Make) -> None:
        long = f"timm:{'a-long-name-' * 8}end"
        caveated = {"weights": "random", "positions": "interpolated", "inputs": BY_DEFAULT}
        folders = [make("a", model=long, **caveated), make("b", model="demo:b")]
        found = compare(collect(folders))
        lines = screen(found).splitlines()
        assert max(map(len, lines)) <= 80
        first = " ".join(lines[: next(i for i, line in enumerate(lines) if line.startswith("B "))])
        said = " ".join(first.split())
        assert said.startswith("A timm:a-long-")
        assert "…" in said
        assert "-end · random weights · interpolated positions · demo inputs · T = 65 · n = 8 · patch" in said

    def test_unclear_shapes_have_a_reason(self, make: Make) -> None:
        curves = CURVES | {"cos_y_vself": [0.6, 0.4, 0.55]}
        text = screen(compare(collect([make("a", curves=curves, noise=0.15), make("b", model="demo:b")])))
        assert "unclear: U" in text
        assert "Unclear bias: the dip may be noise (A)." in text
        assert "Unclear" not in screen(compare(collect([make("c")])))

    def test_one_input(self, make: Make) -> None:
        text = screen(compare(collect([make("a", n=1), make("b", model="demo:b", n=1, curves=LOW)])))
        assert "nan" not in text
        assert "…" not in text
        assert "unclear" in text

    @pytest.mark.parametrize("metric", list(CURVES))
    def test_whatever_was_measured(self, make: Make, metric: str) -> None:
        lacking = {name: curve for name, curve in CURVES.items() if name != metric}
        both = [make("a", curves=lacking), make("b", model="demo:b", curves={metric: CURVES[metric]})]
        found = compare(collect(both))
        assert "nan" not in screen(found)
        assert set(found.missing) == {"demo:vit-p8", "demo:b"} - (
            {"demo:vit-p8"} if metric == "excess" else set()
        )


class TestControl:
    def test_a_series_that_holds_all_models(self, two: tuple[Path, Path]) -> None:
        assert str(series_control(collect(two))).startswith("Identical recipe")
        assert series_control(collect(two[:1])) is None

    def test_no_series_holds_these(self, two: tuple[Path, Path], make: Make) -> None:
        assert series_control(collect([*two, make("lm", model="demo:lm")])) is None

    def test_what_a_name_resolves_to_counts(self, make: Make) -> None:
        entry = {"resolved": "demo:vit-p4"}
        short = make("short", model="p4", patch_size=4, entry=entry)
        assert series_control(collect([make("full"), short])) is not None


def test_published_curves_of_the_lines(make: Make) -> None:
    text = {"tower": "text", "tokens": "all", "n_tokens": 64}
    folders = [make("gpt2", model="gpt2", **text), make("other", model="demo:lm", **text)]
    table, notes = published_for(collect(folders))
    assert set(table["label"]) == {"gpt2"}
    assert {"model", "metric", "layer", "value", "uncertainty", "source"} < set(table)
    assert "demo:lm: nothing is published here" in notes
    assert any(note.startswith("gpt2, ") and "T 64 (published: 128)" in note for note in notes)
    nothing, _ = published_for(collect(folders[1:]))
    assert nothing.empty
    assert "label" in nothing


@pytest.mark.usefixtures("undrawn_comparison")
class TestVerb:
    def test_compares_run_folders(self, attnbias: Attnbias, two: tuple[Path, Path]) -> None:
        ended = attnbias("compare", *two)
        assert ended.code == 0
        assert "Strongest mean bias: demo:vit-p16" in ended.out
        folder = Path(ended.lines[-1].removeprefix("folder: "))
        assert folder.parent == Path("runs")
        assert (folder / "verdict.txt").is_file()

    def test_quiet_prints_the_folder(self, attnbias: Attnbias, two: tuple[Path, Path]) -> None:
        ended = attnbias("compare", *two, "-q", "-o", "out")
        assert (ended.code, ended.out, ended.err) == (0, "out\n", "")

    def test_json_is_one_document(self, attnbias: Attnbias, two: tuple[Path, Path]) -> None:
        ended = attnbias("compare", *two, "--json", "--growth", "0,2")
        document = json.loads(ended.out)
        assert document["labels"] == ["demo:vit-p16", "demo:vit-p8"]
        assert document["settings"]["growth"] == [0, 2]
        assert document["difference"] == "b - a: above 0, b has more"
        bias = next(row for row in document["differences"] if row["quantity"] == "bias")
        assert (bias["a"], bias["b"]) == ("demo:vit-p16", "demo:vit-p8")
        assert bias["difference"] < 0
        assert {row["quantity"] for row in document["differences"]} >= {"bias", "self_share"}
        assert any(row["quantity"] == "onset" for row in document["profiles"])
        assert document["verdict"][0].startswith("Strongest")

    def test_measures_models_that_have_no_run_and_finds_those_that_have(
        self, attnbias: Attnbias, noise: Path
    ) -> None:
        given = (
            "--images",
            noise,
            "--limit",
            6,
            "--metrics",
            "cos-y-vself,cos-y-vuniform",
            "--layers",
            "0,5",
        )
        first = attnbias("compare", "--series", "demo", *given)
        assert first.code == 0
        assert "→ demo:vit-p16" in first.err
        assert "C demo:vit-p4 · T = 257 · n = 6 · patch" in first.out
        assert "Controlled series" in first.out
        assert "demo:vit-p8: not measured: value_similarity, self_weight" in first.err
        assert len([path for path in Path("runs").iterdir() if path.name.startswith("demo-")]) == 3
        again = attnbias("compare", "-m", "demo:vit-p16", "-m", "demo:vit-p8", *given)
        assert again.code == 0
        assert "→" not in again.err

    def test_lengths_and_sizes_are_lines_of_their_own(self, attnbias: Attnbias) -> None:
        plain = ("--limit", 2, "--metrics", "cos_y_vself", "--layers", "0", "-q")
        assert attnbias("compare", "-m", "demo:lm", "--texts", "demo", "--seq-len", "16,32", *plain).code == 0
        sizes = ("--image-size", "64,96", "--images", "demo")
        ended = attnbias("compare", "-m", "demo:vit-p8", *sizes, "-o", "sizes", *plain)
        assert ended.code == 0
        assert "Off the training distribution" in Path("sizes/verdict.txt").read_text().replace("\n", " ")
        layers = pd.read_csv("sizes/comparison.csv")
        assert set(layers["image_size"]) == {64, 96}
        assert len(set(layers["label"])) == 2

    def test_a_dry_run_lists_a_folder_once_however_it_is_spelled(
        self, attnbias: Attnbias, two: tuple[Path, Path], tmp_path: Path
    ) -> None:
        (tmp_path / "link").symlink_to(two[0])
        done = attnbias("compare", two[0], "one", "./one/", "link", two[1], "--dry-run")
        assert done.out.splitlines() == [f"there   {two[0]}", f"there   {two[1]}"]

    def test_dry_run_says_what_is_there_and_measures_nothing(
        self, attnbias: Attnbias, two: tuple[Path, Path]
    ) -> None:
        ended = attnbias(
            "compare", *two, "nowhere", "-m", "demo:lm", "--texts", "demo", "--seq-len", "16,32", "--dry-run"
        )
        lines = ended.out.splitlines()
        assert ended.code == 0
        assert lines[0] == f"there   {two[0]}"
        assert lines[2] == "missing nowhere"
        assert lines[3].startswith("measure runs/demo-lm-")
        assert lines[4].endswith("← demo:lm · T = 32")
        assert not Path("runs").exists()
        as_json = json.loads(
            attnbias("compare", "-m", "demo:vit-p8", "--images", "demo", "--dry-run", "--json").out
        )
        assert [(row["model"], row["measured"], row["seq_len"]) for row in as_json] == [
            ("demo:vit-p8", False, None)
        ]

    def test_a_bad_run_is_named_and_the_rest_goes_on(
        self, attnbias: Attnbias, two: tuple[Path, Path], make: Make
    ) -> None:
        old = make("old", manifest={"format": 0})
        ended = attnbias("compare", *two, "nowhere", old)
        assert ended.code == 3
        assert "Strongest mean bias" in ended.out
        assert "2 failed:" in ended.err
        assert "nowhere: 'nowhere' is not a finished run" in ended.err
        assert f"'{old}' has format 0" in ended.err

    def test_a_table_that_was_edited_is_said(self, attnbias: Attnbias, two: tuple[Path, Path]) -> None:
        manifest = json.loads((two[0] / "manifest.json").read_text())
        (two[0] / "manifest.json").write_text(json.dumps(manifest | {"tables": {"layers.csv": "0"}}))
        for given in (("compare", *two, "-o", "out"), ("report", *two, "-o", "page.html")):
            ended = attnbias(*given)
            assert ended.code == 0
            assert f"layers.csv of '{two[0]}' is not as the run wrote it" in ended.lines
        assert "is not as the run wrote it" in Path("page.html").read_text()

    def test_a_run_without_samples(self, attnbias: Attnbias, two: tuple[Path, Path]) -> None:
        samples = read_samples(two[0])
        write(samples[:0], two[0] / "samples.parquet")
        for runs in (two, two[:1]):
            ended = attnbias("compare", *runs, "-o", "out")
            assert (ended.code, len(ended.lines)) == (2, 2)
            assert ended.lines[0].startswith("error: no samples of 'demo:vit-p16' were kept, and")
            assert ended.lines[1] == "tip: measure it again with --keep-samples 64, or leave it out"
            assert not Path("out").exists()
        assert attnbias("report", *two, "-o", "page.html").code == 0

    def test_no_usable_run(self, attnbias: Attnbias) -> None:
        ended = attnbias("compare", "nowhere", "neither")
        assert ended.code == 2
        assert ended.lines[0] == "error: 'nowhere' is not a finished run (no manifest.json)"
        assert len(ended.lines) == 2

    def test_a_model_that_fails_beside_runs(self, attnbias: Attnbias, two: tuple[Path, Path]) -> None:
        ended = attnbias(
            "compare", *two, "-m", "demo:lm", "-m", "demo:vit-p16", "--images", "demo", "--limit", 1
        )
        assert ended.code == 3
        assert "demo:lm: " in ended.err
        assert "demo:lm" not in ended.out
        assert "n = 1 · patch" in ended.out

    @pytest.mark.parametrize(
        ("arguments", "error", "tip"),
        [
            ([], "name what to compare: run folders, -m/--model NAME or --series NAME", "--series demo"),
            (["run", "--growth", "5"], "--growth takes two layers, not '5'", "--growth 5,11"),
            (["run", "--growth", "5,5"], "--growth takes two layers, not '5,5'", "--growth 5,11"),
            (["-m", "demo:lm", "--seq-len", "64,x"], "--seq-len does not understand 'x'", "--seq-len 64,128"),
            (["-m", "demo:lm", "--seq-len", "0"], "--seq-len does not understand '0'", "--seq-len 64,128"),
            (["run", "--seq-len", "64"], "are for models to be measured", "runs are compared as they are"),
            (["--series", "dem"], "there is no series 'dem'", "did you mean"),
            (["-m", "demo:vit-p7", "--images", "demo"], "demo:vit-p7", "demo:vit-p"),
            (["-m", "demo:vit-p8", "--images", "nowhere"], "nowhere", "--images"),
        ],
    )
    def test_mistakes_are_two_lines(
        self, attnbias: Attnbias, arguments: list[str], error: str, tip: str
    ) -> None:
        ended = attnbias("compare", *arguments)
        assert ended.code == 2
        assert len(ended.lines) == 2
        assert ended.lines[0].startswith("error: ")
        assert error in ended.lines[0]
        assert ended.lines[1].startswith("tip: ")
        assert tip in ended.lines[1]
        assert ended.out == ""

    def test_growth_that_was_not_measured_is_said(self, attnbias: Attnbias, two: tuple[Path, Path]) -> None:
        ended = attnbias("compare", *two, "--growth", "1,11")
        assert ended.code == 0
        assert "demo:vit-p8: no growth from layer 1 to 11: layer 11 was not measured" in ended.err


def test_numbers() -> None:
    assert numbers(None, "--x") == ()
    assert numbers("64, 128,64", "--x") == (64, 128)
