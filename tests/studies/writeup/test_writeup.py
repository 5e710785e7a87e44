"""Writeups: plans read, or refused with their line; drawn twice alike, checked, and drawn without torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import Ended, run_cli
from made_runs import made_run
from matplotlib.figure import Figure
from PIL import Image

import diag
from diag.errors import UserError
from diag.models.names.series import members
from diag.results import tables as records
from diag.results.bootstrap import summary
from diag.results.caveats import BY_DEFAULT
from diag.results.collect import collect
from diag.results.writing import write, write_json
from diag.show.figures.style import style
from diag.studies.attend import against_complexity
from diag.studies.writeup import needs_of, read_plans, schema, shows
from diag.studies.writeup.captions import caption
from diag.studies.writeup.drawing import CurvesFigure, LengthsFigure, _per_line
from diag.studies.writeup.material import Material, overlay, points, published_name
from diag.studies.writeup.needs import runs_of
from diag.studies.writeup.produce import portable
from diag.studies.writeup.schema import read_plan
from diag.studies.writeup.tables import ReproductionTable

ROOT = Path(__file__).parents[3]
CONFIGS = sorted(
    file for file in (ROOT / "configs").glob("*.yaml") if not file.stem.startswith(("train-", "clip-"))
)
"""Plans of figures; the others are plans of training."""

SMALL = """\
title: A small one
about: Two models, four photographs.
probes:
  eyes: {models: [demo:vit-p16, demo:vit-p8], images: demo, limit: 4}
  words: {models: demo:lm, texts: demo, seq_len: [16, 32], limit: 3}
figures:
  - {kind: depth, probe: eyes, caption: "The bias of {models}, n = {n}."}
  - {kind: lengths, probe: words, metrics: [cos_y_vself]}
  - kind: similarity-map
    name: map
    attend: {models: [demo:vit-p16], image: demo:astronaut, layer: 2, patch: [1, 2]}
tables:
  - {kind: layers, probe: eyes, metrics: [cos_y_vself, value_similarity]}
  - {kind: differences, probe: eyes}
  - {kind: profiles, probe: eyes}
  - {kind: reproduction, probe: eyes, published: {demo:vit-p8: made-up}, reference: reference.csv}
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the small plan carried out once, of which tests draw again what they need."""
    folder = tmp_path_factory.mktemp("writeup")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("diag.run.finish.draw", lambda *tables: [])
        (folder / "small.yaml").write_text(SMALL)
        # made up from a first measurement: one value is right, one is off by more than anything allows
        run_cli("probe", "-m", "demo:vit-p8", "--images", "demo", "--limit", 4, "-o", "first")
        rows = records.read_layers(folder / "first").query("metric == 'cos_y_vself' and layer in (0, 3)")
        values = [rows["mean"].iloc[0], rows["ci_high"].iloc[1] + 0.2]
        pd.DataFrame(
            {
                "model": "made-up",
                "metric": "cos_y_vself",
                "layer": [0, 3],
                "value": values,
                "uncertainty": 0.001,
                "source": "nobody",
            }
        ).to_csv(folder / "reference.csv", index=False)
        (folder / "ended.json").write_text(json.dumps(vars(run_cli("figures", "small.yaml"))))
        yield folder


@pytest.fixture
def there(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the current folder."""
    monkeypatch.chdir(workplace)
    return workplace


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for a plan of the test's own."""
    monkeypatch.chdir(tmp_path)
    return Path("plan.yaml")


def refused(plan: Path, text: str) -> Ended:
    """How a plan ends that is refused: exit 2, two lines on stderr, nothing written."""
    plan.write_text(text)
    ended = run_cli("figures", plan)
    assert ended.code == 2, ended.err
    assert ended.out == ""
    assert len([line for line in ended.lines if not line.endswith("not measured yet")]) == 2, ended.err
    assert not Path("figures").exists()
    return ended


class TestShippedPlans:
    def test_they_are_there(self) -> None:
        assert {path.stem for path in CONFIGS} == {
            *("demo", "patch-sizes", "gpt2-depth", "vision-post", "context-broadcasting", "sequence-length"),
            "reproduce-gpt2",
        }

    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
    def test_each_resolves(self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def unasked(source: str, columns: object) -> None:
            pytest.fail(f"a dry run asked for {source}")

        monkeypatch.setattr("diag.inputs.items.data_set", unasked)
        ((found, document),) = read_plans([path])
        needs = needs_of(found, document, tmp_path)
        assert needs
        assert {need.state for need in needs} <= {"missing", "unknown"}
        assert all(resolved for need in needs for resolved in need.models.values())
        assert len(shows(found)) == len(found.figures) + len(found.tables)

    def test_the_series_are_whole(self) -> None:
        ((found, document),) = read_plans([ROOT / "configs" / "patch-sizes.yaml"])
        runs = runs_of(found, document)
        for name in ("augreg-s", "augreg-b", "dino-s", "dino-b", "flexivit-b"):
            assert [run.model for run in runs[name]] == members(name)

    def test_the_reproduction_has_the_published_settings(self) -> None:
        ((found, document),) = read_plans([ROOT / "configs" / "reproduce-gpt2.yaml"])
        plans = [run.plan for run in runs_of(found, document)["gpt2"]]
        assert [(p.limit, p.seq_len, p.values) for p in plans] == [(32, 128, "bias_free")] * 3
        assert "wikitext-2-raw-v1,split=test" in str(plans[0].texts)

    def test_the_demo_is_drawn_offline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With few inputs, without the largest model and without PDFs, which take the time."""

        def sketch(
            figure: Figure, data: pd.DataFrame, folder: Path, stem: str, *endings: object
        ) -> list[Path]:
            with style():
                figure.draw_without_rendering()
            folder.mkdir(parents=True, exist_ok=True)
            data.to_csv(folder / f"{stem}.csv", index=False)
            return [folder / f"{stem}.csv"]

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("diag.show.figures.write.save", sketch)
        monkeypatch.setattr("diag.run.finish.draw", lambda *tables: [])
        text = (ROOT / "configs" / "demo.yaml").read_text()
        text = text.replace("limit: 32", "limit: 2").replace("images: demo}", "images: demo, limit: 2}")
        text = text.replace("series: demo", "models: [demo:vit-p16, demo:vit-p8]").replace(
            ", demo:vit-p4]", "]"
        )
        text = text.replace("[64, 128, 256]", "[64, 128]")
        Path("demo.yaml").write_text(text)
        ended = run_cli("figures", "demo.yaml", "--json")
        assert ended.code == 0, ended.err
        (outcome,) = json.loads(ended.out)["plans"]
        assert outcome["failed"] == {}
        assert {entry["kind"] for entry in outcome["shown"]} == {
            *(
                "curves",
                "comparison",
                "heads",
                "depth",
                "lengths",
                "entropy",
                "similarity-map",
                "most-attended",
            ),
            *("layers", "profiles", "differences"),
        }
        for entry in outcome["shown"]:
            assert all((Path("figures/demo") / name).stat().st_size > 50 for name in entry["files"])


class TestDrawing:
    def test_what_is_written(self, there: Path) -> None:
        ended = Ended(**json.loads((there / "ended.json").read_text()))
        assert ended.code == 0, ended.err
        folder = there / "figures" / "small"
        stems = {"depth-eyes", "lengths-words", "map"}
        tables = {"layers-eyes", "differences-eyes", "profiles-eyes", "reproduction-eyes"}
        names = {f"{stem}.{end}" for stem in stems for end in ("pdf", "png", "csv")}
        names |= {f"{stem}.{end}" for stem in tables for end in ("csv", "tex", "md")}
        assert {path.name for path in folder.iterdir()} == names | {"captions.md", "plan.json"}
        assert ended.out.startswith("figures/small: 23 files, 23 written; 5 runs measured, 0 reused")
        assert max(map(len, ended.out.splitlines())) <= 80

    def test_the_answer_comes_last(self, there: Path) -> None:
        ended = Ended(**json.loads((there / "ended.json").read_text()))
        last = " ".join(ended.out.splitlines()[-5:])
        assert "demo:vit-p8: 1 of 2 published values are within uncertainty and interval" in last
        assert "(cos_y_vself, layer 3)" in last
        assert "demo:vit-p16: nothing is published here" in last
        table = pd.read_csv("figures/small/reproduction-eyes.csv")
        assert list(table["within"]) == [True, False]
        assert table["difference"].iloc[0] == pytest.approx(0, abs=1e-6)

    def test_again_into_another_folder_without_torch_is_the_same_bytes(self, there: Path) -> None:
        program = (
            "import sys; sys.argv = ['attnbias', 'figures', 'small.yaml', '-o', 'again', '-q']\n"
            "from diag.cli import main\n"
            "try: main()\n"
            "except SystemExit as ended: print(ended.code, 'torch' in sys.modules, 'timm' in sys.modules)\n"
        )
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False
        )
        assert done.stdout.splitlines() == ["again/small", "0 False False"], done.stderr
        first, second = (sorted((there / out / "small").iterdir()) for out in ("figures", "again"))
        assert [path.name for path in first] == [path.name for path in second]
        for one, other in zip(first, second, strict=True):
            assert one.read_bytes() == other.read_bytes(), one.name

    def test_captions_say_what_was_measured(self, there: Path) -> None:
        text = (there / "figures/small/captions.md").read_text()
        assert text.startswith("# A small one\n\nTwo models, four photographs.\n")
        blocks = dict(re.findall(r"## (.+)\n\n(.+)", text))
        assert blocks["depth-eyes"].startswith("The bias of demo:vit-p16, demo:vit-p8, n = 4. demo:vit-p16, ")
        for said in (
            "patch tokens",
            "T = 17–65",
            "n = 4 images (demo)",
            "values as computed",
            "95 % bootstrap",
        ):
            assert said in blocks["depth-eyes"]
        assert "T = 16–32; n = 3 texts (demo); values as computed; t = 0 excluded" in blocks["lengths-words"]
        assert "layer 2, patch 1, 2 of 4 × 4; mean over heads" in blocks["map"]
        assert "widened by the uncertainty" in blocks["reproduction-eyes"]

    def test_the_resolved_plan(self, there: Path) -> None:
        text = (there / "figures/small/plan.json").read_text()
        found = json.loads(text)
        assert str(there) not in text
        assert not re.search(r"\d\d:\d\d|20\d\d-\d\d", text)  # no time
        runs = found["probes"]["words"]
        assert [run["plan"]["seq_len"] for run in runs] == [16, 32]
        assert {len(run["key"]) for run in runs} == {64}
        assert runs[0]["models"] == {"demo:lm": "demo:lm"}
        assert found["looks"][0]["plan"]["patch"] == [1, 2]
        assert sorted(found["files"]) == sorted(path.name for path in (there / "figures/small").iterdir())

    def test_means_over_layers_are_of_inputs(self, there: Path) -> None:
        """The points of `lengths` against a plain computation: within an input first, then over inputs."""
        folders = [path.parent for path in sorted(there.glob("runs/demo-lm-*/manifest.json"))]
        samples = collect(folders).samples
        lines = dict.fromkeys(samples["run"], "lm")
        found = points(samples, lines, metrics=("excess", "cos_y_vself"), against="n_tokens").set_index(
            ["metric", "at"]
        )
        assert list(found.index.get_level_values("metric").unique()) == ["excess", "cos_y_vself"]
        part = samples.query("metric == 'excess' and n_tokens == 32")
        within = np.array([part[part["input_index"] == index]["value"].mean() for index in range(3)])
        expected = summary(within[:, None], seed=0).iloc[0]
        row = found.loc[("excess", 32.0)]
        for name in ("mean", "ci_low", "ci_high", "n"):
            assert row[name] == pytest.approx(expected[name]), name
        only = points(samples, lines, metrics=("excess",), against="n_tokens", layers=(5,))
        assert only["mean"].iloc[0] != found.loc["excess"]["mean"].iloc[0]
        with pytest.raises(UserError, match="layer 77 was not measured"):
            points(samples, lines, metrics=("excess",), against="n_tokens", layers=(5, 77))
        with pytest.raises(UserError, match="'demo:lm' has no image_size"):
            points(samples, lines, metrics=("excess",), against="patch_tokens")
        with pytest.raises(UserError, match="'demo:lm' does not say its training step"):
            points(samples, lines, metrics=("excess",), against="step")


class TestOwnPairs:
    @pytest.mark.usefixtures("sketched")
    def test_pairs_of_a_probe_and_token_sets(self, there: Path) -> None:
        """A class token alone has no pairs: its value similarity is no number and makes no second line."""
        (there / "pairs.yaml").write_text(
            "title: t\nprobes:\n  p: {models: [demo:vit-p16, demo:vit-p8], images: demo, limit: 4,"
            " tokens: [patch, cls], metrics: [value_similarity, cos_y_vself, entropy]}\n"
            "figures:\n  - kind: trained-similarity\n    name: own\n    probe: p\n"
            "    pairs: [{name: a pair, baseline: demo:vit-p16, trained: demo:vit-p8}]\n"
            "tables:\n  - {kind: layers, probe: p, tokens: cls, metrics: cos_y_vself}\n"
            "  - {kind: layers, name: none, probe: p, tokens: clss, metrics: cos_y_vself}\n"
        )
        ended = run_cli("figures", "pairs.yaml", "--json")
        assert ended.code == 3
        (outcome,) = json.loads(ended.out)["plans"]
        assert outcome["failed"] == {"none": "probe 'p' has no tokens 'clss'"}
        rows = pd.read_csv("figures/pairs/own.csv")
        assert list(rows.groupby("side").size()) == [6, 6]
        assert rows["mean"].notna().all()
        table = pd.read_csv("figures/pairs/layers-p.csv")
        assert set(table["tokens"]) == {"cls"}


class TestComplexity:
    @pytest.mark.usefixtures("sketched")
    def test_a_figure_per_line_with_the_correlations_behind_it(self, there: Path) -> None:
        """The same numbers as from Python; the images are those that the probe was given."""
        probes = SMALL[SMALL.index("probes:") : SMALL.index("  words:")]
        (there / "seen.yaml").write_text(
            f"title: t\n{probes}figures:\n  - {{kind: complexity, probe: eyes, width: column}}\n"
            "  - {kind: complexity, name: none, probe: eyes, metric: entropi}\n"
        )
        ended = run_cli("figures", "seen.yaml", "--json")
        (outcome,) = json.loads(ended.out)["plans"]
        assert "no metric 'entropi'" in outcome["failed"]["none"]
        rows = pd.read_csv("figures/seen/complexity-eyes-demo-vit-p8.csv")
        assert rows["input"].nunique() == 4
        found = against_complexity(diag.probe("demo:vit-p8", "demo", limit=4), diag.images("demo"))
        np.testing.assert_allclose(rows["rho"].dropna(), found.correlations["rho"], atol=1e-6)


class TestDocs:
    """docs/figures.md shows what comes."""

    @pytest.mark.usefixtures("sketched")
    def test_the_commands_of_the_page(self, there: Path) -> None:
        page = (ROOT / "docs" / "figures.md").read_text()
        (plan,) = re.findall(r"```yaml\n([\s\S]*?)```", page)
        folder = there / "docs"
        folder.mkdir()
        (folder / "paper.yaml").write_text(plan)
        shown = re.findall(r"```text\n\$ attnbias figures paper.yaml(.*)\n([\s\S]*?)```", page)
        assert [options.split() for options, _ in shown] == [["--dry-run"], [], ["--check"]]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr("diag.run.finish.draw", lambda *tables: [])
            for options, output in shown:
                ended = run_cli("figures", "paper.yaml", *options.split())
                assert ended.code == 0, ended.err
                assert ended.out.splitlines()[: len(output.splitlines())] == output.splitlines()
            Path("paper.yaml").write_text(plan.replace("layers, probe: eyes", "layers, prob: eyes"))
            ended = run_cli("figures", "paper.yaml")
        assert ended.err in page

    def test_every_kind_and_table_is_named(self) -> None:
        page = (ROOT / "docs" / "figures.md").read_text()
        kinds = [kind for union in (schema.AnyFigure, schema.AnyTable) for kind in schema.kinds(union)]
        assert len(kinds) == 19
        for kind in kinds:
            assert f"`{kind}`" in page, kind
        for key in {*schema.keys_of(schema.WriteupProbe)} - {"trust_remote_code", "random_init"}:
            assert f"`{key}`" in page or f"`{key}:`" in page, key
        for field in schema.PLACEHOLDERS:
            assert f"`{{{field}}}`" in page, field


class TestCheck:
    def copied(self, there: Path, name: str) -> Path:
        shutil.rmtree(there / name, ignore_errors=True)
        shutil.copytree(there / "figures", there / name)
        return there / name / "small"

    def test_nothing_changed(self, there: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in (there / "figures/small").iterdir()}
        ended = run_cli("figures", "small.yaml", "--check")
        assert ended.code == 0, ended.err
        assert "23 files, 0 differ; 0 runs measured, 5 reused" in ended.out
        assert {path: path.stat().st_mtime_ns for path in (there / "figures/small").iterdir()} == before

    def test_changed_missing_and_extra_files_are_named(self, there: Path) -> None:
        folder = self.copied(there, "touched")
        (folder / "depth-eyes.csv").write_text("other")
        (folder / "layers-eyes.tex").unlink()
        (folder / "mine.txt").write_text("mine")
        ended = run_cli("figures", "small.yaml", "-o", "touched", "--check")
        assert ended.code == 1
        assert ended.lines == [
            "3 files are not as drawn now:",
            "  touched/small/depth-eyes.csv: changed",
            "  touched/small/layers-eyes.tex: missing",
            "  touched/small/mine.txt: extra",
            "tip: attnbias figures small.yaml -o touched   # draws them again",
        ]
        assert (folder / "depth-eyes.csv").read_text() == "other"  # a check writes nothing

    def test_what_a_plan_no_longer_has_goes_and_what_is_not_ours_stays(self, there: Path) -> None:
        folder = self.copied(there, "fewer")
        (folder / "mine.txt").write_text("mine")
        small = there / "fewer-plan"
        small.mkdir(exist_ok=True)
        text = re.sub(r"  - kind: similarity-map[\s\S]*?(?=tables:)", "", SMALL)
        text = re.sub(r"tables:[\s\S]*", "", text).replace(", caption:", ", name: renamed, caption:")
        (small / "small.yaml").write_text(text)
        ended = run_cli("figures", "fewer-plan/small.yaml", "-o", "fewer")
        assert ended.code == 0, ended.err
        assert {path.name for path in folder.iterdir()} == {
            *(f"{stem}.{end}" for stem in ("renamed", "lengths-words") for end in ("pdf", "png", "csv")),
            *("captions.md", "plan.json", "mine.txt"),
        }


class TestFailures:
    def test_one_model_that_fails_is_named_and_the_rest_is_drawn(self, there: Path) -> None:
        text = SMALL.replace("[demo:vit-p16, demo:vit-p8]", "[demo:vit-p16, hf:nobody/nothing, demo:vit-p8]")
        text = re.sub(r"figures:[\s\S]*?tables:", "tables:", text)
        (there / "broken.yaml").write_text(text.replace("reference.csv", "none.csv"))
        ended = run_cli("figures", "broken.yaml")
        assert ended.code == 3
        assert "layers-eyes" in ended.out
        assert "demo:vit-p16" in (there / "figures/broken/layers-eyes.md").read_text()
        at = ended.lines.index("2 failed:")
        assert ended.lines[at + 1].startswith("  broken.yaml: eyes: hf:nobody/nothing: ")
        assert ended.lines[at + 2].startswith(
            "  broken.yaml: reproduction-eyes: cannot read published values"
        )

    def test_an_image_that_no_model_could_read_is_one_line(self, there: Path) -> None:
        (there / "album").mkdir()
        for name in ("a.png", "b.png"):
            Image.new("RGB", (64, 64), "red" if name == "a.png" else "blue").save(there / "album" / name)
        (there / "album" / "c.png").write_bytes(b"no image")
        plan = {
            "title": "t",
            "probes": {"eyes": {"models": ["demo:vit-p16", "demo:vit-p8"], "images": "album"}},
            "tables": [{"kind": "layers", "probe": "eyes", "metrics": ["cos_y_vself"]}],
        }
        (there / "album.yaml").write_text(json.dumps(plan))
        ended = run_cli("figures", "album.yaml")
        assert ended.code == 3
        assert ended.lines[-2:] == [
            "1 failed:",
            "  album.yaml: eyes: c.png: cannot read image 'c.png': it is no JPEG, PNG or WebP image",
        ]

    def test_what_was_drawn_before_stays_where_something_failed(self, there: Path) -> None:
        (there / "figures/broken").mkdir(exist_ok=True)
        document = {"files": ["old.pdf", "../small/map.pdf"]}
        (there / "figures/broken/plan.json").write_text(json.dumps(document))
        (there / "figures/broken/old.pdf").write_text("old")
        (there / "broken.yaml").write_text(
            "title: t\nprobes:\n  p: {models: [demo:vit-p16, hf:nobody/nothing], images: demo, limit: 4}\n"
            "tables:\n  - {kind: layers, probe: p}\n"
        )
        assert run_cli("figures", "broken.yaml").code == 3
        assert (there / "figures/broken/old.pdf").exists()
        assert (there / "figures/small/map.pdf").exists()

    def test_nothing_that_can_be_drawn_is_an_error(self, plan: Path) -> None:
        ended = refused(
            plan,
            "title: t\nprobes:\n  p: {models: hf:nobody/nothing, texts: demo}\n"
            "figures:\n  - {kind: depth, probe: p}\n",
        )
        assert "nobody/nothing" in ended.lines[1]
        assert ended.lines[1].startswith("error: ")

    def test_metrics_that_were_not_measured(self, there: Path) -> None:
        (there / "less.yaml").write_text(
            "title: t\nprobes:\n  p: {models: demo:vit-p16, images: demo, limit: 4, metrics: [self_weight]}\n"
            "figures:\n  - {kind: depth, probe: p}\n"
            "  - {kind: depth, name: one, probe: p, metrics: self_weight}\n"
        )
        ended = run_cli("figures", "less.yaml")
        assert ended.code == 3
        assert "less.yaml: depth-p: the runs of probe 'p' have no metric 'cos_y_vself'" in ended.lines[-1]
        dry = run_cli("figures", "less.yaml", "--dry-run")
        assert dry.code == 2
        assert dry.lines[0] == (
            "error: less.yaml, line 5: probe 'p' does not measure 'cos_y_vself' or 'value_similarity'"
        )


HEAD = "title: t\nprobes:\n  p: {models: demo:lm, texts: demo, seq_len: 64}\n"


class TestRefusedPlans:
    @pytest.mark.parametrize(
        ("text", "line", "message", "tip"),
        [
            (
                HEAD + "figures:\n  - {kind: depth, prob: p}\n",
                5,
                "unknown key 'prob'",
                "did you mean 'probe'?",
            ),
            (
                HEAD + "figure:\n  - {kind: depth, probe: p}\n",
                4,
                "unknown key 'figure'",
                "did you mean 'figures'?",
            ),
            (
                HEAD.replace("seq_len", "seqlen") + "figures:\n  - {kind: depth, probe: p}\n",
                3,
                "unknown key 'seqlen'",
                "did you mean 'seq_len'?",
            ),
            (
                HEAD + "figures:\n  - kind: depth\n    probe: p\n    publshed: true\n",
                7,
                "unknown key 'publshed'",
                "did you mean 'published'?",
            ),
            (
                HEAD + "figures:\n  - {kind: dept, probe: p}\n",
                5,
                "unknown kind 'dept'",
                "did you mean 'depth'?",
            ),
            (
                HEAD + "tables:\n  - {kind: layer, probe: p}\n",
                5,
                "unknown kind 'layer'",
                "did you mean 'layers'?",
            ),
            (
                HEAD + "figures:\n  - kind: strip\n    attend: {models: [demo:vit-p8], image: demo:astronaut,"
                " layer: 0, patch: [0, 0], trust_remote_code: true}\n",
                6,
                "trust_remote_code is not for a writeup",
                "on the command line only",
            ),
            (HEAD + "figures:\n  - {probe: p}\n", 5, "'kind' is missing", "kind: 'curves'"),
            (HEAD + "figures:\n  - {kind: depth, probe: q}\n", 5, "there is no probe 'q'", "probes are 'p'"),
            (HEAD + "figures:\n  - {kind: depth}\n", 5, "'probe' is missing", "give probe:"),
            (HEAD, 1, "the plan shows nothing", "give figures: or tables:"),
            ("probes: {}\nfigures:\n  - {kind: effect}\n", 1, "'title' is missing", "give title:"),
            (
                HEAD.replace("64", "-1") + "figures:\n  - {kind: depth, probe: p}\n",
                3,
                "seq_len is above 0",
                "given: -1",
            ),
            (
                HEAD.replace("seq_len: 64", "series: gpt2") + "figures:\n  - {kind: depth, probe: p}\n",
                3,
                "probe 'p' names both models and series",
                "give one of them",
            ),
            (
                "title: t\nprobes:\n  p: {series: gpt3}\nfigures:\n  - {kind: depth, probe: p}\n",
                3,
                "there is no series 'gpt3'",
                "did you mean 'gpt2'",
            ),
            (
                HEAD.replace("seq_len: 64", "values: raw") + "figures:\n  - {kind: depth, probe: p}\n",
                3,
                "values is as-computed or bias-free",
                "given: 'raw'",
            ),
            (
                HEAD + "figures:\n  - {kind: curves, probe: p, model: demo:ln}\n",
                5,
                "probe 'p' has no model 'demo:ln'",
                "did you mean 'demo:lm'?",
            ),
            (
                HEAD + "figures:\n  - {kind: depth, probe: p}\n  - {kind: depth, probe: p}\n",
                6,
                "'depth-p' is the name of two things, the first on line 5",
                "give one a name: of its own",
            ),
            (
                HEAD + "figures:\n  - {kind: depth, probe: p, name: a/b}\n",
                5,
                "'a/b' is no file name",
                "name: a-b",
            ),
            (
                HEAD + "figures:\n  - {kind: depth, probe: p, caption: 'of {model}'}\n",
                5,
                "a caption knows no '{model}'",
                "did you mean 'models'",
            ),
            (
                HEAD + "figures:\n  - {kind: depth, probe: p, caption: 'of {'}\n",
                5,
                "Single '{' encountered",
                "write {{ for a brace",
            ),
            (
                "title: t\nfigures:\n  - kind: similarity-map\n    attend:\n      models: [demo:lm]\n"
                "      imag: demo:astronaut\n      layer: 1\n",
                6,
                "unknown key 'imag'",
                "did you mean 'image'?",
            ),
            (
                "title: t\nfigures:\n  - kind: similarity-map\n    attend: {models: [demo:lm], layer: 1}\n",
                4,
                "no input is given",
                "give --image FILE",
            ),
            (
                "title: t\nfigures:\n  - kind: strip\n    attend: {models: [demo:vit-p8], layer: 1,"
                " image: demo:astronaut, patch: [1, 1]}\n",
                3,
                "'strip' is not for an image",
                "kind: similarity-map or most-attended",
            ),
            (
                HEAD + "figures:\n  - {kind: trained-similarity, probe: p}\n",
                5,
                "pairs: and probe: belong together",
                "give both",
            ),
            (
                "title: t\nprobes:\n  p: {models: demo:lm, metrics: 'default, entropi'}\n"
                "figures:\n  - {kind: depth, probe: p}\n",
                3,
                "metrics: unknown metric 'entropi'",
                "",
            ),
            ("title: t\ntitle: u\n", 2, "'title' is given again", "it is already on line 1"),
            ("title: [t\n", 2, "expected ',' or ']'", "needs quotes"),
        ],
        ids=lambda value: value[:30] if isinstance(value, str) and "\n" not in value else "",
    )
    def test_file_line_and_nearest_key(
        self, plan: Path, text: str, line: int, message: str, tip: str
    ) -> None:
        ended = refused(plan, text)
        assert ended.lines[0].startswith(f"error: plan.yaml, line {line}: {message}"), ended.lines[0]
        assert tip in ended.lines[1]

    def test_a_file_that_is_not_there(self, plan: Path) -> None:
        assert (
            run_cli("figures", "none.yaml").lines[0]
            == "error: cannot read plan 'none.yaml': No such file or directory"
        )

    def test_a_list_is_no_plan(self, plan: Path) -> None:
        assert "a plan is a mapping" in refused(plan, "- a\n").lines[0]

    def test_two_plans_of_one_name(self, plan: Path) -> None:
        Path("other").mkdir()
        for file in (plan, Path("other/plan.yaml")):
            file.write_text("title: t\nfigures:\n  - {kind: effect}\n")
        ended = run_cli("figures", plan, "other/plan.yaml")
        assert ended.code == 2
        assert "would write into the same folder" in ended.lines[0]

    def test_unknown_names_in_a_dry_run(self, plan: Path) -> None:
        plan.write_text(HEAD.replace("demo:lm", "demo:ln") + "figures:\n  - {kind: depth, probe: p}\n")
        ended = run_cli("figures", plan, "--dry-run")
        assert ended.code == 2
        assert ended.lines[0].startswith("error: plan.yaml, line 3: probe 'p': model 'demo:ln' not found")
        plan.write_text(HEAD + "figures:\n  - {kind: lengths, probe: p, metrics: [cos_y_vsel]}\n")
        ended = run_cli("figures", plan, "--dry-run")
        assert ended.lines[0] == "error: plan.yaml, line 5: unknown metric 'cos_y_vsel'"


class TestPlans:
    def test_a_run_for_every_model_and_length(self, plan: Path) -> None:
        plan.write_text(
            "title: t\nprobes:\n"
            "  sizes: {models: [vit-b-14, 'timm:x,a=false'], image_size: [224, 448], layers: '0,2-3'}\n"
            "  steps: {models: [pythia-70m@step0, pythia-70m@step64], seq_len: [8, 16]}\n"
            "  idle: {models: demo:lm}\n"
            "figures:\n  - {kind: depth, probe: sizes}\n  - {kind: lengths, probe: steps, against: step}\n"
        )
        runs = runs_of(*read_plan(plan))
        assert [(run.model, run.line) for run in runs["sizes"]] == [
            ("vit-b-14,img_size=224", "vit-b-14"),
            ("vit-b-14,img_size=448", "vit-b-14"),
            ("timm:x,a=False,img_size=224", "timm:x"),
            ("timm:x,a=False,img_size=448", "timm:x"),
        ]
        assert runs["sizes"][0].plan.layers == (0, 2, 3)
        assert [(run.words, run.line) for run in runs["steps"]] == [
            ("pythia-70m@step0, T = 8", "pythia-70m"),
            ("pythia-70m@step0, T = 16", "pythia-70m"),
            ("pythia-70m@step64, T = 8", "pythia-70m"),
            ("pythia-70m@step64, T = 16", "pythia-70m"),
        ]
        assert "idle" not in runs  # nothing shows it

    @pytest.mark.parametrize("content", [None, "[]", '{"plan": 3, "files": 3}'])
    def test_plans_that_are_none_are_passed_over(self, plan: Path, content: str | None) -> None:
        """Of runs in the folder, and of what was drawn before; without content it is a pipe."""
        plan.write_text(
            "title: t\nprobes:\n  p: {models: demo:lm, texts: 'hf:nobody/nothing'}\n"
            "figures:\n  - {kind: depth, probe: p}\n"
        )
        for folder in (Path("runs/other"), Path("figures") / plan.stem):
            folder.mkdir(parents=True)
            os.mkfifo(folder / "plan.json") if content is None else (folder / "plan.json").write_text(content)
        Path("runs/other/manifest.json").write_text("{}")
        assert run_cli("figures", plan, "--dry-run").code == 0
        ended = run_cli("figures", plan)
        assert (ended.code, "not expected" in ended.err) == (2, False)

    def test_a_dry_run_finds_what_is_there(self, there: Path) -> None:
        ended = run_cli("figures", "small.yaml", "--dry-run")
        assert ended.code == 0
        assert ended.out.splitlines() == [
            "small.yaml: 5 runs, 5 measured",
            "  eyes: at most 4 of demo",
            "    measured  demo:vit-p16",
            "    measured  demo:vit-p8",
            "  words: at most 3 of demo",
            "    measured  demo:lm, T = 16",
            "    measured  demo:lm, T = 32",
            "  attend: demo:astronaut, layer 2",
            "    measured  demo:vit-p16",
            "  draws depth-eyes, lengths-words, map, layers-eyes, differences-eyes,",
            "    profiles-eyes, reproduction-eyes",
        ]
        document = json.loads(run_cli("figures", "small.yaml", "--dry-run", "--json").out)
        assert [need["state"] for need in document["plans"][0]["needs"]] == ["measured"] * 5

    def test_runs_on_hub_data_are_found_by_their_plan(self, plan: Path) -> None:
        plan.write_text(
            "title: t\nprobes:\n  p: {models: demo:lm, texts: 'hf:nobody/texts', seq_len: [8, 16]}\n"
            "figures:\n  - {kind: depth, probe: p}\n"
        )
        ((found, document),) = read_plans([plan])
        states = [need.state for need in needs_of(found, document, Path("runs"))]
        assert states == ["unknown", "unknown"]
        run = runs_of(found, document)["p"][1]
        folder = Path("runs/some")
        write_json({"plan": run.plan.model_dump(mode="json")}, folder / "plan.json")
        write_json({}, folder / "manifest.json")
        assert [need.state for need in needs_of(found, document, Path("runs"))] == ["unknown", "measured"]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("demo", "demo"),
            ("hf:openai-community/gpt2", "hf:openai-community/gpt2"),
            ("/data/me/photos", "…/photos"),
            ("hf:/data/me/models/x@main", "hf:…/x@main"),
            (
                "open_clip:ViT-B-14,checkpoint=/home/me/b14.pt,img_size=224",
                "open_clip:ViT-B-14,checkpoint=…/b14.pt,img_size=224",
            ),
            ("weights/b14.pt", "weights/b14.pt"),
        ],
    )
    def test_no_folder_of_this_machine_in_a_resolved_plan(self, text: str, said: str) -> None:
        assert portable(text) == said

    def test_published_names_behind_short_ones(self) -> None:
        assert published_name("gpt2-small") == "gpt2"
        assert published_name("pythia-70m") is None
        assert published_name("no-such-model") is None
        table = pd.DataFrame({"label": ["a", "b"], "model": ["gpt2", "demo:lm"]})
        assert overlay(table, False) is None
        known = overlay(table, True)
        assert known is not None
        assert set(known["label"]) == {"a"}
        own = overlay(table, {"demo:lm": "gpt2-medium"})
        assert own is not None
        assert set(own["label"]) == {"b"}
        with pytest.raises(UserError, match="nothing is published here for 'nobody'"):
            overlay(table, {"demo:lm": "nobody"})

    def test_captions_of_many_models_name_the_first_and_last(self) -> None:
        rows = pd.DataFrame(
            {"model": [f"m{i}" for i in range(9)], "n": 3, "n_tokens": 8, "values": "as_computed"}
        )
        assert caption("{models}: {T}", "", rows, ["texts (x)"]) == (
            "9 models from m0 to m8: 8 9 models from m0 to m8; T = 8; n = 3 texts (x); values as computed."
        )

    def test_tables_and_what_has_no_labels_say_caveats(self, tmp_path: Path) -> None:
        """Where a table or figure shows a model's name, or the name of a run, and no label."""
        found = collect([made_run(tmp_path / "a", weights="random", inputs=BY_DEFAULT)])
        material = Material(collections={"p": found}, lines={"p": {"a": "a line"}})
        known = {"model": "x", "metric": "cos_y_vself", "layer": [0], "value": 0.6, "uncertainty": 0.1}
        pd.DataFrame(known | {"source": "nobody"}).to_csv(tmp_path / "known.csv", index=False)
        given = {"published": {"demo:vit-p8": "x"}, "reference": tmp_path / "known.csv"}
        (table,) = ReproductionTable(kind="reproduction", probe="p", **given).made("r", material)
        said = "demo:vit-p8 · random weights · demo inputs"
        assert set(table.shown["model"]) == {said}
        assert table.verdicts[0].startswith(said)
        (figure,) = LengthsFigure(kind="lengths", probe="p", metrics=("cos_y_vself",)).made("l", material)
        assert "as computed · random weights · demo inputs" in figure.figure.subfigs[0].get_suptitle()
        assert "; random weights; demo inputs" in caption(None, "", figure.rows, [])

    def test_captions_say_caveats_and_of_which_models(self) -> None:
        rows = pd.DataFrame({"model": ["a", "b", "c"], "tower": "text", "n": 3, "inputs": BY_DEFAULT})
        rows["weights"] = ["random", "random", "loaded"]
        assert caption("", "Means.", rows, []) == (
            "Means. a, b, c; n = 3; random weights: a, b; demo inputs."
        )


# --- LaTeX and Markdown

TABLE = pd.DataFrame(
    {
        "model_name": ["vit_b#16 & 50 %", "a{b}~c^d$e\\f", "p|q"],
        "± of x": ["−0.1 to 0.2", "1 × 2 → 3 …", "–"],
        "value": [0.12345, np.nan, -2.0],
        "layer": [0, 10, 2],
    }
)


def latex_rows(text: str) -> list[list[str]]:
    """Cells of a tabular that would compile: balanced, nothing special left bare. Raises AssertionError."""
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    begun, ended = (re.findall(rf"\\{word}{{(\w+)}}", body) for word in ("begin", "end"))
    assert begun == ["adjustbox", "tabular"]
    assert ended == begun[::-1]
    spec = re.search(r"\\begin{tabular}{((?:l|S\[[^]]+\])+)}", body)
    assert spec
    body = re.sub(r"\\shortstack{((?:[^{}]|\\[{}])*)}", lambda heading: heading[1].replace(r"\\", " "), body)
    count = len(re.sub(r"\[[^]]*\]", "", spec[1]))
    spec = re.search(re.escape(spec[0]), body)
    assert spec
    inner = body[spec.end() : body.index(r"\end{tabular}")]
    assert re.findall(r"\\(\w+rule)", inner) == ["toprule", "midrule", "bottomrule"]
    inner = re.sub(r"\\\w+rule", "", inner)
    commands = r"\\(?:[%&_#${}]|textbackslash|textasciitilde|textasciicircum|pm|times|rightarrow|cdot|dots)"
    bare = re.sub(commands, "", inner.replace(r"\\", "\n"))
    assert not re.search(r"[\\%_#^~]", bare), bare
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert bare.isascii()
    rows = [re.split(r"(?<!\\)&", row) for row in inner.split(r"\\") if row.strip()]
    assert {len(row) for row in rows} == {count}
    return [[re.sub(r"^{(.*)}$", r"\1", cell.strip()) for cell in row] for row in rows]


class TestWriters:
    def test_latex(self, tmp_path: Path) -> None:
        write(TABLE, tmp_path / "t.tex")
        text = (tmp_path / "t.tex").read_text()
        rows = latex_rows(text)
        assert text.startswith("% needs \\usepackage{booktabs}\\usepackage{siunitx}\\usepackage{adjustbox}\n")
        assert r"\begin{tabular}{llS[table-format=-1.3]S[table-format=2.0]}" in text
        assert r"\begin{adjustbox}{max width=\linewidth}" in text
        assert rows[0] == [r"model\_name", r"$\pm$ of x", "value", "layer"]
        assert rows[1] == [r"vit\_b\#16 \& 50 \%", "$-$0.1 to 0.2", "0.123", "0"]
        assert rows[2][2:] == ["--", "10"]

    def test_the_checker_finds_what_would_not_compile(self, tmp_path: Path) -> None:
        write(TABLE, tmp_path / "t.tex")
        text = (tmp_path / "t.tex").read_text()
        for good, bad in (
            (r"\_", "_"),
            (r"\%", "%"),
            (r"50 \%", "50 & 1"),
            ("$-$", "−"),
            (r"\end{tabular}", ""),
        ):
            assert good in text
            with pytest.raises((AssertionError, ValueError)):
                latex_rows(text.replace(good, bad))

    def test_markdown(self, tmp_path: Path) -> None:
        write(TABLE, tmp_path / "t.md")
        lines = (tmp_path / "t.md").read_text().splitlines()
        assert len(lines) == 5
        assert [cell.strip() for cell in lines[0].strip("|").split("|")] == list(TABLE.columns)
        assert r"p\|q" in lines[4]
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {5}

    def test_the_tables_of_a_writeup(self, there: Path) -> None:
        for name in ("layers-eyes", "differences-eyes", "profiles-eyes", "reproduction-eyes"):
            rows = latex_rows((there / f"figures/small/{name}.tex").read_text())
            markdown = (there / f"figures/small/{name}.md").read_text().splitlines()
            assert len(rows) == len(markdown) - 1
            assert len(rows) > 1
        layers = latex_rows((there / "figures/small/layers-eyes.tex").read_text())
        assert layers[0] == ["model", "layer", "cos(y,v)", r"95 \% interval", "value similarity"]
        assert [row[1] for row in layers[1:7]] == ["0", "1", "2", "3", "4", "5"]


def test_images_that_were_replaced_are_measured_again_and_a_touch_changes_nothing(
    plan: Path, noise: Path, undrawn: None
) -> None:
    """What was drawn says which bytes were measured, not when their files were written."""
    shutil.copytree(noise, "album")
    probe = "{models: demo:vit-p16, images: album, limit: 2}"
    plan.write_text(f"title: t\nprobes:\n  eyes: {probe}\ntables:\n  - {{kind: layers, probe: eyes}}\n")
    assert run_cli("figures", plan).code == 0
    (known,) = json.loads(Path("figures/plan/plan.json").read_text())["probes"]["eyes"]
    assert known["run"] == "demo-vit-p16"
    assert set(known["inputs"]["vision"]) == {"source", "count", "sha256", "content"}
    for file in Path("album").iterdir():
        os.utime(file, ns=(0, 0))
    assert run_cli("figures", plan, "--check").code == 0
    assert len(list(Path("runs").iterdir())) == 2
    first, second = sorted(Path("album").iterdir())[:2]
    shutil.copyfile(second, first)
    assert run_cli("figures", plan, "--check").code == 1
    assert len(list(Path("runs").iterdir())) == 3


def test_images_replaced_by_others_of_one_size_and_time_are_told(
    plan: Path, undrawn: None, sketched: None
) -> None:
    """By the hashes of what was measured: a key has no more than names, sizes and times."""
    Path("album").mkdir()
    colours = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    for number, colour in enumerate(colours):
        Image.fromarray(colour).save(f"album/{number}.webp", lossless=True, exact=True)
    sizes = [Path(f"album/{number}.webp").stat().st_size for number in range(2)]
    for number, size in enumerate(sizes):
        with Path(f"album/{number}.webp").open("ab") as file:
            file.write(bytes(max(sizes) - size))  # behind the image: one size for both
    probe = "{models: demo:vit-p16, images: album}"
    plan.write_text(f"title: t\nprobes:\n  eyes: {probe}\ntables:\n  - {{kind: layers, probe: eyes}}\n")
    assert run_cli("figures", plan).code == 0
    assert run_cli("figures", plan, "--check").code == 0
    first, second = Path("album/0.webp"), Path("album/1.webp")
    written = first.stat()
    shutil.copyfile(second, first)
    os.utime(first, ns=(written.st_atime_ns, written.st_mtime_ns))
    now = first.stat()
    assert (now.st_size, now.st_mtime_ns) == (written.st_size, written.st_mtime_ns)
    ended = run_cli("figures", plan, "--check")
    assert ended.code not in (0, 3)
    said = "is of other images than lie in 'album' now, though of the same names, sizes and times"
    assert said in ended.err
    again = run_cli("probe", "-m", "demo:vit-p16", "--images", "album")
    assert "already complete" in again.err
    assert said in again.err
    compared = run_cli("compare", "-m", "demo:vit-p16", "--images", "album")
    assert said in compared.err


def test_lines_whose_labels_read_alike_as_files_have_figures_of_their_own() -> None:
    table = pd.DataFrame({"label": ["a b", "a-b", "A:b"], "metric": "cos_y_vself", "mean": 0.5})
    item = CurvesFigure(kind="curves", probe="eyes")
    assert [stem for stem, _ in _per_line(item, table, "curves")] == [
        "curves-a-b",
        "curves-a-b-2",
        "curves-A-b-3",
    ]
