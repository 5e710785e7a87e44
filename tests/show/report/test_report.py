"""The report: what the page says, that nothing breaks or leaves it; the same runs give the same bytes."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import Ended
from made_runs import CURVES, made_run
from PIL import Image

from diag.errors import UserError
from diag.metrics.catalogue import (
    CATALOGUE,
    OF_UNTRAINED,
    OTHER,
    OVER_UNTRAINED,
    RATIOS,
    DrawnAs,
    entry_of,
)
from diag.metrics.default import METRICS
from diag.metrics.divergence import DIVERGENCE_METRICS
from diag.metrics.followed import FOLLOWED_METRICS
from diag.metrics.ledger import LEDGER_METRICS
from diag.metrics.nulls import NULL_METRICS
from diag.metrics.pattern_shape import SHAPE_METRICS
from diag.metrics.sink_events import SINK_METRICS
from diag.metrics.stream import STREAM_METRICS
from diag.results.caveats import BY_DEFAULT
from diag.results.collect import Collection, collect
from diag.results.hashes import sha256_of
from diag.show.figures.style import OKABE_ITO
from diag.show.report import default_title, page, write_report
from diag.show.report.attended import read_attended
from diag.show.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, ChartLine, chart, limits_of
from diag.show.report.content import grouped, lines_of, packed_heads
from diag.show.report.maps import head_maps, number
from diag.show.report.palette import CONTRAST, PAPER, compared_colours, contrast, readable, variables
from diag.show.report.provenance import source
from diag.show.report.render import lead

NASTY = """<b>&"'</script><script>alert(1)</script>{{ 7 * 7 }}"""
LIMIT = 5_000_000


class Page(HTMLParser):
    """The page's elements as `(tag, attributes)`, the text of each kind of element, and the embedded data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()
        self.data = json.loads("".join(self.texts["script#data"]))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        name = f"{tag}#{found['id']}" if tag == "script" and "id" in found else tag
        if tag not in ("meta", "link", "img", "path", "rect", "circle"):
            self.open.append(name)
            self.texts.setdefault(name, []).append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop().split("#")[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for name in dict.fromkeys(self.open):
            self.texts[name][-1] += data

    def tags(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def ids(self) -> list[str]:
        return [str(attributes["id"]) for _, attributes in self.elements if "id" in attributes]


def made_up(
    layers: int, heads: int, model: str = "made-up", inputs: int = 3, patch: float = 16.0
) -> Collection:
    """A collection of one line with every metric, its numbers drawn at random."""
    rng = np.random.default_rng(layers * heads)
    metrics = [*METRICS, *RATIOS]
    grid = [(layer, head) for layer in range(layers) for head in range(heads)]

    def table(places: list[tuple[int, int]]) -> pd.DataFrame:
        frame = pd.DataFrame(
            [(layer, head, metric) for metric in metrics for layer, head in places],
            columns=["layer", "head", "metric"],
        )
        mean = rng.uniform(0, 1, len(frame))
        constants = {
            "model": model,
            "tower": "vision",
            "tokens": "patch",
            "n_tokens": 50,
            "patch_size": patch,
        }
        constants |= {"values": "as_computed", "dtype": "float32", "run": "run", "label": model}
        return frame.assign(
            mean=mean, std=0.1, ci_low=mean - 0.1, ci_high=mean + 0.1, n=inputs, module="attn", **constants
        )

    per_layer = table([(layer, 0) for layer in range(layers)]).drop(columns="head")
    samples = pd.concat(
        [
            per_layer.drop(columns=["mean", "std", "ci_low", "ci_high", "n"]).assign(
                input=f"i{index}", input_index=index, value=per_layer["mean"] + 0.01 * index
            )
            for index in range(inputs)
        ],
        ignore_index=True,
    )
    manifest = {"status": "complete", "command": f"attnbias probe -m {model}", "plan": {}, "models": []}
    return Collection(per_layer, table(grid), samples, {"run": Path("run")}, {"run": manifest}, {})


@pytest.fixture(scope="module")
def collected(finished: tuple[Path, Ended]) -> Collection:
    return collect([finished[0]])


@pytest.fixture(scope="module")
def text(collected: Collection) -> str:
    return page(collected)


@pytest.fixture(scope="module")
def read(text: str) -> Page:
    return Page(text)


def attend_folder(folder: Path, width: int = 300) -> Path:
    """A folder as `attnbias attend` leaves it, made by hand."""
    (folder / "figures").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (width, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "figures" / "similarity-map.png")
    columns = {"model": ["m", "m"], "layer": [5, 5], "head": ["0", "mean"]}
    numbers = {"cos_y_vself": [0.4, 0.3], "self_part": [0.1, 0.05], "context_part": [0.3, 0.25]}
    pd.DataFrame(columns | numbers).to_csv(folder / "decomposition.csv", index=False)
    pd.DataFrame({"model": ["m"], "token": [1], "weight": [0.2]}).to_parquet(folder / "tokens.parquet")
    plan = {"image": "demo:astronaut", "layer": 5, "head": None, "patch": [2, 3]}
    manifest = {
        "kind": "attend",
        "format": 1,
        "plan": plan,
        "command": "attnbias attend <x>",
        "status": "complete",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


# ---- what the page holds


def test_the_page_begins_as_a_page(text: str) -> None:
    assert text.startswith("<!doctype html>\n")


def test_sections_come_in_the_order_of_a_reader(read: Page) -> None:
    sections = [
        a["id"]
        for a in read.tags("section")
        if str(a.get("id"))
        in {"summary", "ledger", "comparison", "models", "looks", "studies", "glossary", "provenance"}
    ]
    assert sections == ["summary", "models", "glossary", "provenance"]  # two metrics are compared, and lead


def test_headings_are_in_order_and_landmarks_are_there(read: Page) -> None:
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert [len(read.tags(tag)) for tag in ("main", "nav", "header", "footer")] == [1, 1, 1, 1]
    assert {"class": "skip", "href": "#content"} in read.tags("a")
    assert read.tags("html")[0]["lang"] == "en"


def test_ids_are_unique_and_every_reference_has_its_target(read: Page) -> None:
    ids = read.ids()
    assert len(ids) == len(set(ids))
    wanted = [a["href"] for a in read.tags("a") if str(a["href"]).startswith("#")]
    wanted += [
        f"#{name}"
        for _, a in read.elements
        for key in ("aria-labelledby", "aria-describedby")
        for name in str(a.get(key) or "").split()
        if name != "head-h"
    ]
    assert wanted
    assert set(wanted) <= {f"#{name}" for name in ids}


def test_every_number_of_the_layers_is_in_a_table(text: str, collected: Collection) -> None:
    rows = collected.layers
    assert rows["metric"].nunique() == len(METRICS) + len(RATIOS)
    known = rows[rows["mean"].notna()]
    assert 0 < len(known) < len(rows)  # one class token has no other to be compared with
    for row in known.itertuples():
        interval = f"{number(row.ci_low)} to {number(row.ci_high)}"
        assert f">{number(row.mean)}<small>{interval}</small></td>" in text, row


def test_tables_have_captions_and_scopes(read: Page) -> None:
    assert len(read.tags("caption")) == len(read.tags("table")) > 6
    assert all(a.get("scope") in ("col", "row") for a in read.tags("th"))
    sorted_by = [a["aria-sort"] for a in read.tags("th") if "aria-sort" in a]
    assert sorted_by.count("ascending") == len(
        [a for a in read.tags("table") if a.get("class") == "sortable"]
    )


def test_pictures_drawn_from_data_are_described(read: Page, collected: Collection) -> None:
    svgs = [a for a in read.tags("svg") if a.get("role") == "img"]
    # patches: four panels and four maps; one class token: no pairs, so three and two; both: two compared
    assert len(svgs) == 4 + 4 + 3 + 2 + 2
    assert len(read.texts["desc"]) == len(svgs)
    rows = collected.layers
    bias = rows[(rows["label"] == collected.labels[0]) & (rows["metric"] == "cos_y_vself")]
    first = bias.loc[bias["layer"].idxmin(), "mean"]
    assert read.texts["desc"][0].startswith(f"demo:vit-p16 · patch: from {first:.3f} in layer 0")


def test_hover_values_are_those_of_the_tables(read: Page, collected: Collection) -> None:
    rows = collected.layers
    bias = rows[(rows["label"] == collected.labels[0]) & (rows["metric"] == "cos_y_vself")]
    drawn = next(chart for chart in read.data["charts"].values() if chart["exact"])["curves"][0]
    assert drawn["layer"] == bias["layer"].tolist()
    assert drawn["mean"] == pytest.approx(bias["mean"].tolist(), abs=1e-4)
    assert drawn["low"] == pytest.approx(bias["ci_low"].tolist(), abs=1e-4)


def test_heads_hold_every_number(read: Page, collected: Collection) -> None:
    heads = collected.heads[collected.heads["label"] == collected.labels[0]]
    packed = next(iter(read.data["heads"].values()))
    assert packed["label"] == collected.labels[0]
    assert set(packed["metrics"]) == {*METRICS, *RATIOS}
    row = heads[(heads["metric"] == "excess") & (heads["layer"] == 2) & (heads["head"] == 1)].iloc[0]
    found = packed["metrics"]["excess"]
    assert found["mean"][2 * packed["heads"] + 1] / found["scale"] == pytest.approx(row["mean"], abs=6e-4)
    assert found["high"][2 * packed["heads"] + 1] / found["scale"] == pytest.approx(row["ci_high"], abs=6e-4)


def test_provenance_says_where_numbers_come_from(text: str, collected: Collection) -> None:
    manifest = next(iter(collected.manifests.values()))
    for said in (
        manifest["models"][0]["weights_sha256"],
        manifest["inputs"]["vision"]["sha256"],
        manifest["environment"]["packages"]["torch"],
        "seed of the bootstrap",
        "preprocessing",
        "values as_computed: biases are in the values.",
    ):
        assert said in text, said


def test_failures_are_listed_and_announced() -> None:
    collection = made_up(2, 2)
    manifest = {**collection.manifests["run"], "status": "partial", "failed_inputs": {"a.png": "is broken"}}
    failed = Collection(collection.layers, collection.heads, collection.samples, {}, {"run": manifest}, {})
    found = page(failed)
    assert "run is partial." in found
    assert "is broken" in found
    assert source("run", manifest).failures == (("a.png", "is broken"),)


# ---- nothing breaks it, nothing leaves it


def test_text_is_escaped() -> None:
    found = page(made_up(2, 2, model=NASTY), title=NASTY, problems={NASTY: NASTY})
    read = Page(found)
    assert "b" not in {tag for tag, _ in read.elements}
    assert len(read.tags("script")) == 2
    assert read.texts["h1"] == [NASTY]
    assert read.texts["title"][0] == NASTY
    assert next(iter(read.data["heads"].values()))["label"] == NASTY
    assert "49" not in read.texts["h1"][0]


def test_no_request_leaves_the_page(read: Page, text: str) -> None:
    addresses = [
        (tag, str(a[name]))
        for tag, a in read.elements
        for name in ("src", "href", "srcset", "poster")
        if name in a
    ]
    outward = [(tag, address) for tag, address in addresses if not address.startswith(("#", "data:"))]
    assert outward == [("a", "https://arxiv.org/abs/2603.09078")]
    style = read.texts["style"][0]
    assert "@import" not in style
    assert "url(" not in style
    assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)\)", text))
    policy = next(str(a["content"]) for a in read.tags("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none';")


def test_a_large_model_stays_small_enough() -> None:
    found = page(made_up(48, 25))
    assert len(found.encode()) < LIMIT
    packed = next(iter(Page(found).data["heads"].values()))
    assert len(packed["metrics"]["cos_y_vself"]["mean"]) == 48 * 25
    assert None not in packed["metrics"]["cos_y_vself"]["mean"]


def test_the_same_runs_give_the_same_bytes(finished: tuple[Path, Ended], tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / finished[0].name
    shutil.copytree(finished[0], copy)
    first = write_report([finished[0]], tmp_path / "a.html").path.read_bytes()
    assert write_report([copy], tmp_path / "b.html").path.read_bytes() == first
    other = write_report([copy], tmp_path / "c.html", title="Other").path.read_bytes()
    assert other != first


def test_one_layer_one_head_one_input_and_no_interval() -> None:
    collection = made_up(1, 1, inputs=1)
    blank = {"ci_low": np.nan, "ci_high": np.nan}
    alone = Collection(
        collection.layers.assign(**blank),
        collection.heads.assign(**blank),
        collection.samples,
        {},
        collection.manifests,
    )
    read = Page(page(alone))
    assert all("low" not in found for found in read.data["heads"]["made-up"]["metrics"].values())
    assert read.texts["h1"] == ["Attention bias in made-up"]
    assert "comparison" not in read.ids()


def test_metrics_that_this_version_does_not_know_are_shown() -> None:
    collection = made_up(2, 2)
    layers = collection.layers.replace({"metric": {"entropy": "later_metric"}})
    heads = collection.heads.replace({"metric": {"entropy": "later_metric"}})
    found = Page(page(Collection(layers, heads, collection.samples, {}, collection.manifests)))
    assert "Other metrics" in "".join(found.texts["summary"])
    assert found.data["metrics"]["later_metric"]["heading"] == "later metric"


# ---- the verb


def test_the_verb_writes_a_page_and_says_where(
    finished: tuple[Path, Ended], attnbias: Callable[..., Ended]
) -> None:
    ended = attnbias("report", finished[0])
    assert (ended.code, ended.out) == (0, "report.html\n")
    assert re.fullmatch(r"2 lines, 0\.\d MB; open it in a browser\n", ended.err)
    again = attnbias("report", finished[0], "-o", "report.html", "--title", "A <title>", "-q")
    assert (again.code, again.out, again.err) == (0, "report.html\n", "")
    assert Page(Path("report.html").read_text("utf-8")).texts["h1"] == ["A <title>"]


def test_an_incomplete_folder_is_named_and_the_rest_goes_on(
    finished: tuple[Path, Ended], attnbias: Callable[..., Ended]
) -> None:
    Path("half").mkdir()
    ended = attnbias("report", "half", finished[0])
    assert ended.code == 3
    assert ended.lines[0] == "left out: half: 'half' is not a finished run (no manifest.json)"
    found = Path("report.html").read_text("utf-8")
    assert "Left out." in found
    assert "is not a finished run" in found


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("manifest.json", '{"kind": "attend", "format": 1, "failed_models": [1]}', "'failed_models' is [1]"),
        ("decomposition.csv", "model,layer\nm,5\n", "it has no column 'head'"),
        ("tokens.parquet", "", "cannot read table"),
        ("figures/similarity-map.png", "", "cannot read image 'similarity-map.png'"),
    ],
)
def test_a_damaged_look_is_left_out_and_the_rest_goes_on(
    finished: tuple[Path, Ended], attnbias: Callable[..., Ended], name: str, content: str, why: str
) -> None:
    attend_folder(Path("look"))
    (Path("look") / name).write_text(content)
    ended = attnbias("report", finished[0], "look")
    assert ended.code == 3
    assert ended.lines[0].startswith("left out: look: ")
    assert why in ended.lines[0]


def test_a_run_without_a_number(attnbias: Callable[..., Ended]) -> None:
    made_run(Path("none"), model="a\x1bb", curves=dict.fromkeys(CURVES, [math.nan] * 2))
    made_run(Path("some"))
    assert attnbias("report", "none", "some").code == 0
    text = Path("report.html").read_text("utf-8")
    assert "The alignment bias was not measured here." in text
    assert "nothing could be measured" in text
    assert "a\\u001bb" in text
    assert "\x1b" not in text


def test_nothing_readable_is_an_error(attnbias: Callable[..., Ended], tmp_path: Path) -> None:
    Path("half").mkdir()
    ended = attnbias("report", "half")
    assert ended.code == 2
    assert ended.lines[0] == "error: 'half' is not a finished run (no manifest.json)"
    (attend_folder(tmp_path / "look") / "tokens.parquet").write_text("")
    ended = attnbias("report", "look")
    assert ended.code == 2
    assert ended.lines[0].startswith("error: cannot read table 'look")
    assert not Path("report.html").exists()


def test_only_a_report_is_overwritten(finished: tuple[Path, Ended], attnbias: Callable[..., Ended]) -> None:
    Path("mine.html").write_text("<p>mine</p>")
    ended = attnbias("report", finished[0], "-o", "mine.html")
    assert ended.code == 2
    assert ended.lines == [
        "error: 'mine.html' exists and was not made by attnbias report",
        "tip: choose another name with -o, or remove the file",
    ]
    assert Path("mine.html").read_text() == "<p>mine</p>"
    os.mkfifo("pipe")  # reading it would wait for a writer
    ended = attnbias("report", finished[0], "-o", "pipe")
    assert ended.lines[0] == "error: 'pipe' exists and was not made by attnbias report"
    Path("folder").mkdir()
    ended = attnbias("report", finished[0], "-o", "folder")
    assert ended.lines == [
        "error: 'folder' is a folder",
        "tip: give a file with -o, for example -o report.html",
    ]


def test_attend_folders_bring_pictures_and_their_words(finished: tuple[Path, Ended], tmp_path: Path) -> None:
    look = attend_folder(tmp_path / "look")
    broken = attend_folder(tmp_path / "broken")
    (broken / "tokens.parquet").unlink()
    done = write_report([look, finished[0], broken], tmp_path / "report.html")
    assert list(done.problems) == [str(broken)]
    read = Page(done.path.read_text("utf-8"))
    (image,) = read.tags("img")
    assert str(image["src"]).startswith("data:image/png;base64,")
    assert image["alt"] == (
        "similarity map: demo:astronaut · layer 5 · mean over heads · patch in row 2, column 3. "
        "m: cosine of output and own value 0.300, of which 0.050 self part and 0.250 context part."
    )
    assert "attnbias attend <x>" in "".join(read.texts["code"])


def study_folder(folder: Path, kind: str, tables: dict[str, str], manifest: dict[str, object]) -> Path:
    """A folder as `attnbias compare`, `intervene` or `train` leaves it, made by hand."""
    (folder / "figures").mkdir(parents=True)
    for name in "abc":
        Image.new("RGB", (30, 20), "white").save(folder / "figures" / f"picture-{name}.png")
    for name, text in tables.items():
        (folder / name).write_text(text)
    written = {"kind": kind, "command": f"attnbias {kind} <x>"} | manifest
    (folder / "manifest.json").write_text(json.dumps(written))
    return folder


COMPARED = {
    "verdict.txt": "A has\nmore.\n\nTwo.\n\nThree.\n\nFour.\n",
    "differences.csv": "a,b,quantity,difference,ci_low,ci_high\n"
    "A,B,bias,-0.1,-0.2,-0.05\nA,B,self_share,0.3,,\n",
}
SWEPT = {
    "sensitivity.csv": "intervention,strength,scope,layer,head,effect,mean,ci_low,ci_high,n\n"
    "xsa,1,one,0,-1,loss_change,0.01,0,0.02,6\n"
    "xsa,1,one,1,-1,loss_change,0.31,0.2,0.4,6\n"
    "xsa,1,one,1,0,loss_change,9,8,10,6\n"
    "xsa,1,one,1,-1,top1_change,-0.9,-1,-0.8,6\n"
    "matched_direction,1,one,0,-1,loss_change,0.5,0.4,0.6,6\n"
    "matched_direction,1,one,1,-1,loss_change,0.02,,,6\n"
}
TRAINED = {
    "outcomes.csv": "task,patch_size,variant,n,accuracy,accuracy_gain,accuracy_gain_low,"
    "accuracy_gain_high,loss\n"
    "crops,16,sa,2,14.75,,,,\ncrops,16,xsa,2,16.5,1.75,-3,6.5,\n"
}
READ_OUT = {
    "readout.csv": "readout,measure,layer,mean,std,ci_low,ci_high,n\n"
    "mean,accuracy,0,0.6,0.1,0.5,0.7,6\nmean,loss,0,9,0.1,8,10,6\n"
    "mean,accuracy,1,0.7,0.1,,,6\nattentive,accuracy,1,0.8,0.1,,,6\n"
}


@pytest.mark.parametrize(
    ("kind", "tables", "manifest", "said", "cells"),
    [
        (
            "compare",
            COMPARED,
            {"labels": ["A", "B"]},
            ["A has more.", "1 more sentence", "Comparison of 2 lines"],
            ["−0.100 (−0.200 to −0.050)"],
        ),
        (
            "intervene",
            SWEPT,
            {"model": {"given": "gpt2", "weights": "random"}, "tower": "text"},
            [
                "xsa in one layer: most in layer 1, 0.310 (0.200 to 0.400), n = 6; its control, matched "
                "direction, 0.020 (loss, after − before (nats per token)).",
                "Interventions on gpt2 · random weights",
            ],
            [
                "one layer",
                "1",
                "0.310 (0.200 to 0.400)",
                "6",
                "one layer",
                "0",
                "0.500 (0.400 to 0.600)",
                "6",
            ],
        ),
        (
            "train",
            TRAINED,
            {"tables": ["outcomes"], "words": ["Gains: <none>."], "plan": {"title": "A grid"}},
            ["Gains: <none>.", "Training: A grid"],
            ["16", "sa", "2", "14.750", "–", "16", "xsa", "2", "16.500", "1.750 (−3.000 to 6.500)"],
        ),
        (
            "readout",
            READ_OUT,
            {"model": {"given": "demo:vit"}, "words": ["attentive: <best>."], "classes": 3, "chance": 0.5},
            [
                "attentive: <best>.",
                "3 classes; the largest holds 0.500 of the images.",
                "Classes read from demo:vit",
            ],
            ["0.600 (0.500 to 0.700)", "–", "0.700", "0.800"],
        ),
        (
            "audit",
            {},
            {"models": [], "verdicts": {"gpt2 · text": {"hooks": "v_proj is <V>"}}},
            ["Audit of hooks and batches"],
            ["v_proj is <V>", "–"],
        ),
    ],
)
def test_what_was_asked_of_models_has_a_section(
    tmp_path: Path,
    kind: str,
    tables: dict[str, str],
    manifest: dict[str, object],
    said: list[str],
    cells: list[str],
) -> None:
    """Also without a run beside it: sentences, key figures, pictures, and where it is from."""
    folder = study_folder(tmp_path / kind, kind, tables, manifest)
    done = write_report([folder], tmp_path / "report.html")
    assert (done.lines, done.problems) == (0, {})
    read = Page(done.path.read_text("utf-8"))
    words = ["".join(read.texts[tag]) for tag in ("li", "summary", "h3")]
    assert all(any(sentence in part for part in words) for sentence in said)
    assert read.texts["td"] == cells
    assert len(read.tags("img")) == 3
    assert "1 more figure" in read.texts["summary"]
    assert "summary" not in read.ids()
    assert f"attnbias {kind} <x>" in read.texts["code"]


def test_a_damaged_study_is_left_out_and_one_of_another_verb_is_named(
    finished: tuple[Path, Ended], tmp_path: Path
) -> None:
    study = study_folder(tmp_path / "study", "compare", {"verdict.txt": "A."}, {"labels": ["A"]})
    other = study_folder(tmp_path / "other", "monitor", {}, {})
    done = write_report([finished[0], study, other], tmp_path / "report.html")
    assert "differences.csv" in done.problems[str(study)]
    assert "made by attnbias monitor" in done.problems[str(other)]
    whole = study_folder(tmp_path / "whole", "compare", COMPARED, {"labels": ["A", "B"]})
    alone = write_report([other, tmp_path / "none", whole], tmp_path / "report.html")
    assert list(alone.problems) == [str(other), str(tmp_path / "none")]
    assert "Left out." in alone.path.read_text("utf-8")


def test_a_folder_that_only_holds_those_of_verbs_stands_for_them(tmp_path: Path) -> None:
    """As `intervene` of several models writes; what is of no verb of the page in it is left alone."""
    made_run(tmp_path / "all" / "run")
    study_folder(tmp_path / "all" / "cmp", "compare", COMPARED, {"labels": ["A", "B"]})
    study_folder(tmp_path / "all" / "together", "intervene-together", {}, {})
    done = write_report([tmp_path / "all"], tmp_path / "report.html")
    assert (done.lines, done.problems) == (1, {})
    assert "attnbias compare" in done.path.read_text("utf-8")


def test_above_five_lines_no_bands_are_drawn_and_the_page_says_so(tmp_path: Path) -> None:
    runs = [made_run(tmp_path / f"run-{place}", model=f"demo:{place}") for place in range(6)]
    few, many = (page(collect(runs[:count])) for count in (5, 6))
    assert [text.count("their bands are left out") for text in (few, many)] == [0, 1]
    drawn = [sum(found.get("class") == "band" for found in Page(text).tags("path")) for text in (few, many)]
    compared = sum(name.startswith("compared-") for name in Page(many).data["charts"])
    of_each_line = drawn[1] // 6
    assert drawn == [5 * (of_each_line + compared), 6 * of_each_line]
    assert Page(many).data["charts"]["compared-cos_y_vself"]["curves"][0]["low"][0] is not None


def test_a_look_is_on_the_page_once_and_its_edited_tables_are_told(
    finished: tuple[Path, Ended], tmp_path: Path
) -> None:
    look = attend_folder(tmp_path / "look")
    manifest = json.loads((look / "manifest.json").read_text())
    told = {name: sha256_of(look / name) for name in ("tokens.parquet", "decomposition.csv")}
    (look / "manifest.json").write_text(json.dumps(manifest | {"tables": told}))
    twice = [finished[0], look, tmp_path / "x" / ".." / "look"]
    (tmp_path / "x").mkdir()
    assert write_report(twice, tmp_path / "report.html").notes == []
    assert len(Page((tmp_path / "report.html").read_text("utf-8")).tags("img")) == 1
    with (look / "decomposition.csv").open("a") as file:
        file.write("\n")
    done = write_report(twice, tmp_path / "report.html")
    assert done.notes == [f"decomposition.csv of '{look}' is not as the run wrote it"]
    assert str(done.notes[0]).partition(" of ")[0] in done.path.read_text("utf-8")


def test_many_large_pictures_are_made_smaller(tmp_path: Path) -> None:
    attended, problems = read_attended([attend_folder(tmp_path / "look", width=1500)])
    assert not problems
    pictures = [picture for found in attended for picture in found.pictures]
    assert {picture.address.partition(";")[0] for picture in pictures} == {"data:image/webp"}
    assert {picture.width for picture in pictures} == {1400}


def test_writing_a_report_does_not_load_torch(finished: tuple[Path, Ended], tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from diag.show.report import write_report; "
        f"write_report([Path({str(finished[0])!r})], Path({str(tmp_path / 'r.html')!r})); "
        "print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_titles_name_models_while_that_is_short(collected: Collection) -> None:
    lines = lines_of(collected, {})
    assert default_title(lines) == "Attention bias in demo:vit-p16"
    many = [
        line for place in range(3) for line in lines_of(made_up(1, 1, f"family:a-long-name-of-{place}"), {})
    ]
    assert default_title(many) == "Attention bias in 3 models"
    name = f"family:{'long-' * 20}name"
    assert default_title(lines_of(made_up(1, 1, name), {})) == f"Attention bias in {name}"


def test_title_and_lead_of_one_model_say_its_caveats(tmp_path: Path) -> None:
    lines = lines_of(collect([made_run(tmp_path / "a", weights="random", inputs=BY_DEFAULT)]), {})
    said = "demo:vit-p8 · random weights · demo inputs"
    assert default_title(lines) == f"Attention bias in {said}"
    assert f"Measured in {said}, layer by layer" in lead(lines)


# ---- parts


def test_every_metric_has_a_meaning_and_a_table() -> None:
    every = {*METRICS, *RATIOS, *STREAM_METRICS, *SHAPE_METRICS, *SINK_METRICS, *DIVERGENCE_METRICS}
    every |= {*LEDGER_METRICS, *NULL_METRICS, *FOLLOWED_METRICS, *OF_UNTRAINED.values(), OVER_UNTRAINED}
    assert set(CATALOGUE) == every
    groups = grouped(every)
    assert OTHER not in groups
    assert sorted(name for names in groups.values() for name in names) == sorted(every)
    assert grouped(["entropy", "new", "excess"]) == {
        "Alignment bias, its parts and its nulls": ["excess"],
        "Where attention goes": ["entropy"],
        "Other metrics": ["new"],
    }
    assert entry_of("some_new").heading == "some new"


def test_points_lie_where_their_numbers_say() -> None:
    points = pd.DataFrame(
        {"layer": [0.0, 10.0], "mean": [0.0, 1.0], "ci_low": [0.0, 0.9], "ci_high": [0.1, 1.0]}
    )
    drawn = chart(
        "c",
        [ChartLine(points.assign(x=points["layer"]), DrawnAs("a", "blue"))],
        title="t",
        hint="",
        y_label="y",
        limits=(0.0, 1.0),
    )
    ((x0, y0), (x1, y1)) = drawn.curves[0].marks
    assert (y0, y1) == (HEIGHT - BOTTOM, TOP)
    wide = (WIDTH - RIGHT - LEFT) / 1.06
    assert (x1 - x0) == pytest.approx(wide, abs=0.2)
    assert drawn.rule == HEIGHT - BOTTOM
    assert drawn.description == (
        "a: from 0.000 in layer 0 to 1.000 in layer 10; lowest 0.000 in layer 0, highest 1.000 in layer 10."
    )
    texts = [said for _, said in drawn.y_ticks]
    assert texts == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]


def test_lines_break_where_layers_are_not_measured() -> None:
    numbers = [1.0, 2.0, 5.0]
    points = pd.DataFrame({"layer": numbers, "x": numbers, "mean": 0.5, "ci_low": 0.4, "ci_high": 0.6})
    look = DrawnAs("a", "blue", "-", "")
    drawn = chart("c", [ChartLine(points, look)], title="", hint="", y_label="", limits=(0, 1), layers=[0, 7])
    assert [text for _, text in drawn.x_ticks][:: len(drawn.x_ticks) - 1] == ["0", "7"]
    (curve,) = drawn.curves
    (x1, y), (x2, _), (x5, _) = curve.marks  # each is marked
    assert curve.path == f"M{x1} {y}L{x2} {y}"
    assert curve.between == f"M{x2} {y}L{x5} {y}"
    assert curve.band.count("M") == 1
    assert curve.band.count("L") == 3
    assert curve.bars.startswith(f"M{x5} ")
    assert curve.bars.count("M") == 1


def test_limits_hold_every_interval_and_zero() -> None:
    points = pd.DataFrame({"layer": [0.0], "mean": [0.5], "ci_low": [-0.25], "ci_high": [0.75], "x": [0.0]})
    low, high = limits_of([ChartLine(points, DrawnAs("a", "blue"))])
    assert low == pytest.approx(-0.29)
    assert high == pytest.approx(0.79)
    assert limits_of([ChartLine(points.assign(ci_low=0.4), DrawnAs("a", "blue"))])[0] == 0


def test_maps_fill_each_place_once_and_leave_gaps() -> None:
    heads = made_up(3, 4).heads
    bias = heads["metric"] == "cos_y_vself"
    heads = heads[~(bias & (heads["layer"] == 1) & (heads["head"] == 2))]
    found = {drawn.metric: drawn for drawn in head_maps(heads, "m")}
    cells = {metric: sum(path.count("z") for _, path in drawn.shades) for metric, drawn in found.items()}
    assert cells == {"cos_y_vself": 11, "excess": 12, "self_weight": 12, "value_similarity": 12}
    assert [drawn.blank for drawn in found.values()] == [True, False, False, False]
    assert found["excess"].ends[1] == "0.000"
    packed = packed_heads(heads, made_up(3, 4).layers)["metrics"]["cos_y_vself"]["mean"]
    assert [place for place, value in enumerate(packed) if value is None] == [1 * 4 + 2]


def test_numbers_are_read_as_in_the_terminal() -> None:
    assert [number(value) for value in (0.5, -0.25, -0.0001, 123.456, float("nan"))] == [
        "0.500",
        "−0.250",
        "0.000",
        "123.5",
        "–",
    ]


@pytest.mark.parametrize("scheme", PAPER)
def test_lines_stand_out_from_the_page(scheme: str) -> None:
    colours = [*OKABE_ITO.values(), "#000000", "#ffffff"]
    for colour in variables(colours, scheme).values():
        assert contrast(colour, PAPER[scheme]) >= CONTRAST[scheme]
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast(OKABE_ITO["yellow"], "#ffffff") < 2  # it has to be made darker
    assert readable(OKABE_ITO["blue"], "#ffffff", 3.0) == OKABE_ITO["blue"].lower()


def test_patch_sizes_go_from_dark_to_light() -> None:
    coarse, fine, none = compared_colours([32.0, 8.0, None])
    assert contrast(coarse, "#ffffff") > contrast(fine, "#ffffff")
    assert none == OKABE_ITO["vermillion"]
    assert compared_colours([16.0, 16.0]) == [OKABE_ITO["blue"], OKABE_ITO["vermillion"]]


def test_a_file_that_is_free_may_be_taken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run was given") as caught:
        write_report([], tmp_path / "new.html")
    assert caught.value.tip == "give at least one run folder, for example: attnbias report runs/demo-vision"
