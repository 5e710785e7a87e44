"""The README and docs cannot drift: their commands run, their output is what comes, their names exist."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Ended, run_cli

from diag.metrics.catalogue import OF_UNTRAINED, OVER_UNTRAINED, RATIOS
from diag.metrics.default import METRICS
from diag.metrics.divergence import DIVERGENCE_METRICS
from diag.metrics.followed import FOLLOWED_METRICS
from diag.metrics.ledger import LEDGER_METRICS
from diag.metrics.nulls import NULL_METRICS
from diag.metrics.pattern_shape import SHAPE_METRICS
from diag.metrics.sink_events import SINK_METRICS
from diag.metrics.stream import STREAM_METRICS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}
CONSOLE = re.compile(r"```console\n\$ (.+)\n([\s\S]*?)```")
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d+\.\d+(?![\w.])|(?<=–)\d+\.\d+")
COMMANDS = re.findall(r"^    (attnbias .+?)(?:  +#.*)?$", README, re.MULTILINE)
PYTHON = re.findall(r"```python\n([\s\S]*?)```", README)


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sketched: None) -> Callable[[str], Ended]:
    """`typed("attnbias …")` runs the command in a folder of its own, inside this process."""
    monkeypatch.chdir(tmp_path)
    return lambda command: run_cli(*shlex.split(command)[1:])


def test_the_readme_shows_what_the_tests_expect_to_find() -> None:
    assert len(CONSOLE.findall(README)) >= 2
    assert len(COMMANDS) >= 6
    assert len(PYTHON) == 2
    assert "make demo" in README
    assert "make test" in README


@pytest.mark.filterwarnings("default")  # as for a reader
@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if CONSOLE.search(text)])
def test_shown_output_is_what_comes(
    page: str, typed: Callable[[str], Ended], request: pytest.FixtureRequest
) -> None:
    """The commands of a page run one after the other in one folder, as a reader would type them.

    Probes lay out their figures for the README alone: no page shows what comes of that.
    """
    if page != "README.md":
        request.getfixturevalue("undrawn")
    for command, shown in CONSOLE.findall(PAGES[page]):
        done = typed(command)
        assert done.code == 0, f"{command}\n{done.err}"
        # another Python brings other help topics, other versions other last digits
        assert_alike(shown, done.out, 0.05 if "text" in command or "lm" in command else 0.011)


def assert_alike(shown: str, found: str, tolerance: float) -> None:
    """The same words in the same places, numbers within the tolerance; a line `…` stands for any lines."""
    theirs = iter(found.splitlines())
    skipping = False
    for ours in shown.splitlines():
        if ours.strip() == "…":
            skipping = True
            continue
        for line in theirs:
            if same_words(ours, line) or not skipping:
                break
        else:
            raise AssertionError(f"not in the output: {ours}")
        skipping = False
        assert same_words(ours, line), f"shown: {ours}\nfound: {line}"
        numbers = [[float(x.replace("−", "-")) for x in NUMBER.findall(text)] for text in (ours, line)]
        # two layers that are alike change places with the last digit, and a rank correlation with them
        allowed = 0.4 if "p = " in ours else tolerance
        assert numbers[0] == pytest.approx(numbers[1], abs=allowed, rel=0.02), f"{ours}\n{line}"
    assert skipping or not list(theirs), "more came than is shown"


def same_words(one: str, other: str) -> bool:
    return NUMBER.sub("#", one).split() == NUMBER.sub("#", other).split()


def test_shown_output_is_really_compared() -> None:
    """A negative control."""
    assert_alike("a 0.50\n…\nc 3", "a 0.51\nb 1.00\nc 3", 0.02)
    for shown in ("a 0.60\n…", "b 0.50\n…", "a 0.50", "a 0.50\n…\nd 3"):
        with pytest.raises(AssertionError):
            assert_alike(shown, "a 0.51\nb 1.00\nc 3", 0.02)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command: str, typed: Callable[[str], Ended], tmp_path: Path) -> None:
    """Model names resolve and options exist; what needs the hub is not fetched."""
    from PIL import Image

    (tmp_path / "FILE.txt").write_text("some text " * 50)
    (tmp_path / "DIR").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "DIR" / "a.png")
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FOLDER" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "my_clip.pt").write_bytes(b"")
    here = command.replace("hf:Salesforce/wikitext,config=wikitext-2-raw-v1", "demo")
    here = here.replace("configs/", f"{ROOT}/configs/")
    if here.split()[1] in ("probe", "compare", "figures"):
        here += " --dry-run"
    elif here.split()[1] == "intervene":
        here = re.sub(r"--limit \d+", "--limit 1", here)
    done = typed(here)
    assert done.code == 0, done.err


def test_the_python_examples_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in PYTHON:
        exec(block, names)
    assert len(names["calls"]) == 1  # type: ignore[arg-type]


def test_the_monitor_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n([\s\S]*?)```", PAGES["monitor.md"]):
        exec(block, names)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["0", "10", "20"]
    assert "attention_stream_cosine" in set(names["monitor"].history["metric"])


def test_the_metrics_page_lists_every_metric_and_no_other() -> None:
    listed = set(re.findall(r"^\| `(\w+)`", PAGES["metrics.md"], re.MULTILINE))
    measured = {*METRICS, *RATIOS, *STREAM_METRICS, *SHAPE_METRICS, *DIVERGENCE_METRICS, *NULL_METRICS}
    measured |= {*SINK_METRICS, *LEDGER_METRICS, *FOLLOWED_METRICS}
    assert listed == measured | {*OF_UNTRAINED.values(), OVER_UNTRAINED}


def test_every_option_that_is_mentioned_exists(tmp_path: Path) -> None:
    from typer.main import get_command

    from diag.cli import app
    from diag.studies.train.clip_arguments import known_flags

    verbs = get_command(app).commands.values()  # type: ignore[attr-defined]
    known = {
        option
        for verb in verbs
        for parameter in verb.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    # of other programs, as are all of the pages of benchmarks and of coverage
    known |= {
        "--tries",
        "--kills",
        "--debug",
        "--version",
        "--help",
        "--out",
        "--methods",
        "--nproc-per-node",
        *known_flags(),
    }
    for page, text in PAGES.items():
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text):
            assert option in known or page in ("benchmarks.md", "coverage.md"), f"{page}: {option}"


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_exist(page: str) -> None:
    for path in re.findall(r"`((?:docs|benchmarks|configs|diag)/[\w./*-]+)`", PAGES[page]):
        assert list(ROOT.glob(path)), path


@pytest.mark.parametrize(
    "module",
    [
        *("diag.errors", "diag.models.names.resolve", "diag.inputs.csv_injection", "diag.run.api"),
        "diag.studies.from_python",
    ],
)
def test_examples_in_docstrings(module: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert tried > 0
    assert failed == 0


def test_what_the_vision_page_says_is_what_the_published_data_say() -> None:
    from diag.results.published import curves

    text = PAGES["vision-post.md"]
    table = curves()
    wide = table.pivot_table(index="layer", columns=["metric", "model"], values="value")
    names = {size: f"clip-vit-b-{size}-cc12m" for size in (32, 16, 14)}
    bias = {size: wide["cos_y_vself", name] for size, name in names.items()}
    alike = {size: wide["value_similarity", name] for size, name in names.items()}
    highest = max(curve.max() for curve in bias.values())
    assert f"{highest:.3f} (B/14, layer 6)" in text
    assert bias[14].idxmax() == 6
    assert f"at most {highest**2:.0%}".replace("%", " %") in text
    for size, curve in bias.items():
        assert f"B/{size} {curve.iloc[0]:.3f} → {curve[11]:.3f}" in text
    lowest, last = alike[14].idxmin(), alike[14][11]
    assert f"{alike[14].min():.3f} at layer {lowest} → {last:.3f} at layer 11" in text
    for layer in (9, 10, 11):
        rho, seen = alike[14][layer], bias[14][layer]
        assert f"| {layer} | {rho:.3f} | {rho**0.5:.2f} | {seen:.3f} |" in text
        assert seen < rho**0.5
    for size, name in names.items():
        changed = wide["value_similarity", f"{name}-xsa"].mean()
        assert f"{alike[size].mean():.3f} → {changed:.3f}" in text
    means, gains = [alike[size].mean() for size in (32, 16, 14)], [-7.47, -2.35, 3.44]
    assert f"r = {np.corrcoef(means, gains)[0, 1]:.2f}" in text
    assert f"r = {np.corrcoef(np.log([32, 16, 14]), gains)[0, 1]:.2f}".replace("-", "−") in text
