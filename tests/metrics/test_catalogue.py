"""The catalogue and the registry list the same metrics; one line and one function are all of a new one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import diag
from diag.metrics import default, divergence, followed, ledger, nulls, pattern_shape, sink_events, stream
from diag.metrics.catalogue import (
    CATALOGUE,
    OF_UNTRAINED,
    OTHER,
    OVER_UNTRAINED,
    RATIOS,
    SAMPLING_ERROR,
    entry_of,
)
from diag.metrics.names import GROUPS
from diag.metrics.registry import REGISTRY, metric, registered

HOUSE = Path(diag.__file__).parent

NEW = "bias_magnitude"
LINE = f"""\
    MetricEntry(
        "{NEW}", BIAS, "|cos|", "the bias without its sign",
        "magnitude of the bias", "|cos(yᵢ, vᵢ)|", "How far along its own value, or against it.",
        "0 to 1", "a test", rank=0, axis="magnitude",
    ),
"""
FUNCTION = f"""\
@metric("call")
def {NEW}(on: Selection) -> Reading:
    return on.per_row(on.cosine.abs())


"""
LOOK = f"""
import json
from pathlib import Path
from commands import run_cli
from diag.metrics.names import metric_names
from diag.results.collect import collect
from diag.show.figures.depth import depth_profiles
from diag.show.figures.lengths import against
from diag.studies.writeup.tables import heading
from tools import metrics_page

found = dict(listed=run_cli("metrics").out, definitions=json.loads(run_cli("metrics", "--json").out))
given = ["-m", "demo:vit-p16", "--images", "demo", "--limit", 2, "--metrics", "{NEW},cos_y_vself"]
found |= dict(terminal=run_cli("probe", *given, "-o", "run").out, default=metric_names(None))
layers = collect([Path("run")]).layers
found["table"] = layers[["metric", "mean"]].to_dict("records")
figure = depth_profiles(layers, metrics=["{NEW}"])
found["legend"] = [text.get_text() for text in figure.legends[0].get_texts()]
rows = layers[layers["metric"] == "{NEW}"][:1]
ax = against(rows.assign(line="a line", against="patch_size", at=16)).axes[0]
found |= dict(panel=[ax.get_title(loc="left"), ax.get_ylabel()], heading=heading("{NEW}"))
run_cli("report", "run", "-o", "page.html")
found |= dict(report=Path("page.html").read_text(encoding="utf-8"))
found["page"] = metrics_page.written(metrics_page.PAGE.read_text(encoding="utf-8"))
Path("found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the package shows with one more line in its catalogue and one more function."""
    root = tmp_path_factory.mktemp("house")
    for folder in ("diag", "tools"):
        shutil.copytree(
            HOUSE.parent / folder,
            root / folder,
            ignore=shutil.ignore_patterns("__pycache__"),
            copy_function=os.symlink,
        )
    (root / "docs").mkdir()
    shutil.copy(HOUSE.parent / "docs" / "metrics.md", root / "docs")
    insert(root / "diag" / "metrics" / "catalogue.py", LINE, before="    # --- the residual stream\n")
    insert(root / "diag" / "metrics" / "default.py", FUNCTION, before='METRICS = registered("call")\n')
    path = os.pathsep.join([str(root), str(HOUSE.parent / "tests")])
    subprocess.run([sys.executable, "-c", LOOK], cwd=root, env=os.environ | {"PYTHONPATH": path}, check=True)
    return json.loads((root / "found.json").read_text())


def insert(file: Path, text: str, *, before: str) -> None:
    source = file.read_text(encoding="utf-8")
    assert source.count(before) == 1
    file.unlink()  # a link to the file of the package
    file.write_text(source.replace(before, text + before), encoding="utf-8")


class TestOneLineAndOneFunction:
    def test_are_listed(self, found: dict[str, Any]) -> None:
        assert f"\n{NEW}\n    |cos(yᵢ, vᵢ)| — How far along its own value" in found["listed"]
        definition = "|cos(yᵢ, vᵢ)| — How far along its own value, or against it. (0 to 1; a test)"
        assert found["definitions"][NEW] == definition
        assert len(found["definitions"]) == len(CATALOGUE) + 1

    def test_are_measured_by_name_and_by_default(self, found: dict[str, Any]) -> None:
        of = {
            name: [row["mean"] for row in found["table"] if row["metric"] == name]
            for name in (NEW, "cos_y_vself")
        }
        assert len(of[NEW]) == 6
        assert all(a >= abs(b) > 0 for a, b in zip(of[NEW], of["cos_y_vself"], strict=True))
        assert NEW in found["default"]

    def test_have_a_column_in_the_terminal(self, found: dict[str, Any]) -> None:
        title, *_ = lines = found["terminal"].splitlines()
        assert "demo:vit-p16" in title
        heads = next(line for line in lines if "layer" in line)
        assert heads.split() == ["layer", "cos(y,v)", "95", "%", "CI", "|cos|"]
        assert "|cos|: the bias without its sign" in found["terminal"]

    def test_are_defined_in_the_report(self, found: dict[str, Any]) -> None:
        assert f'<div id="about-{NEW}"><dt>magnitude of the bias' in found["report"]
        assert "How far along its own value, or against it." in found["report"]
        assert "No definition" not in found["report"]
        assert OTHER not in found["report"]

    def test_are_labelled_in_figures_and_tables(self, found: dict[str, Any]) -> None:
        assert found["legend"][0] == "magnitude of the bias"
        assert found["panel"] == ["Magnitude of the bias", "magnitude"]
        assert found["heading"] == "magnitude of the bias"

    def test_are_on_the_page_of_metrics(self, found: dict[str, Any]) -> None:
        row = (
            f"| `{NEW}` | \\|cos(yᵢ, vᵢ)\\| | How far along its own value, or against it | 0 to 1 | a test |"
        )
        assert row in found["page"].splitlines()


def test_every_line_has_a_function_or_is_a_ratio() -> None:
    of_other_models = {*OF_UNTRAINED.values(), OVER_UNTRAINED}
    assert REGISTRY.keys() | RATIOS.keys() | of_other_models == set(CATALOGUE)
    assert REGISTRY.keys().isdisjoint(RATIOS)
    tables = (
        default.METRICS,
        pattern_shape.SHAPE_METRICS,
        stream.STREAM_METRICS,
        sink_events.SINK_METRICS,
        divergence.DIVERGENCE_METRICS,
        ledger.LEDGER_METRICS,
        nulls.NULL_METRICS,
        followed.FOLLOWED_METRICS,
    )
    assert sum(map(len, tables)) == len(REGISTRY)
    assert [name for names in GROUPS.values() for name in names if name in default.METRICS] == list(
        registered("call")
    )


def test_a_function_without_a_line_is_refused() -> None:
    with pytest.raises(LookupError, match=r"'nowhere' has no line in diag/metrics/catalogue\.py"):

        @metric("call")
        def nowhere() -> None: ...

    assert "nowhere" not in REGISTRY


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_line_is_whole(name: str) -> None:
    entry = entry_of(name)
    assert entry is CATALOGUE[name]
    assert all([entry.column, entry.heading, entry.formula, entry.unit, entry.source])
    assert entry.sentence.endswith(".")
    assert entry.sentence[0].isupper()
    assert entry.definition.count("\n") == 0
    assert entry.label in entry.labelled
    assert entry.line.label or entry.line.colour == ""


def test_headings_are_told_apart() -> None:
    headings = [entry.heading for entry in CATALOGUE.values()]
    assert len(set(headings)) == len(headings)


def test_what_is_in_no_line_has_its_name() -> None:
    later = entry_of("later_metric")
    assert later.heading == later.label == "later metric"
    assert later.panel == ("later metric", "mean over layers")
    assert later.sentence == "No definition in this version."
    error = entry_of(f"entropy{SAMPLING_ERROR}")
    assert error.heading == "entropy sampling error"
    assert error.sentence.startswith("Standard error of entropy")
