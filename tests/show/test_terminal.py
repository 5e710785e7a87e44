"""The printed table, and progress that never touches stdout."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest

from diag.metrics.catalogue import OF_UNTRAINED, OVER_UNTRAINED, RATIOS
from diag.metrics.default import METRICS
from diag.metrics.divergence import DIVERGENCE_METRICS
from diag.metrics.followed import FOLLOWED_METRICS
from diag.metrics.ledger import LEDGER_METRICS
from diag.metrics.nulls import NULL_METRICS
from diag.metrics.pattern_shape import SHAPE_METRICS
from diag.metrics.sink_events import SINK_METRICS
from diag.metrics.stream import STREAM_METRICS
from diag.show import terminal
from diag.show.terminal import (
    COLUMNS,
    WIDTH,
    StderrListener,
    aligned,
    columns,
    result_table,
    text_width,
    width,
)

EVERY = [*METRICS, *RATIOS]


def layers(metrics: list[str] = EVERY, **constants: Any) -> pd.DataFrame:
    rows = [
        {
            **{
                "model": "demo:vit-p16",
                "tower": "vision",
                "layer": layer,
                "tokens": "patch",
                "metric": metric,
            },
            **{"mean": 0.1 * layer + 0.01 * place, "std": 0.1, "ci_low": -0.123, "ci_high": -0.045, "n": 14},
            **{"n_tokens": 17, "values": "as_computed", "first_token": "included"},
        }
        for layer in range(12)
        for place, metric in enumerate(metrics)
    ]
    return pd.DataFrame(rows).assign(**constants)


def test_every_metric_has_a_heading_of_its_own() -> None:
    optional = {*STREAM_METRICS, *SHAPE_METRICS, *SINK_METRICS, *DIVERGENCE_METRICS, *LEDGER_METRICS}
    optional |= {*NULL_METRICS, *FOLLOWED_METRICS, *OF_UNTRAINED.values(), OVER_UNTRAINED}
    assert set(COLUMNS) == {*EVERY, *optional}
    headings = [heading for heading, _ in COLUMNS.values()]
    assert len(set(headings)) == len(headings)


@pytest.mark.parametrize(
    "table",
    [
        layers(),
        layers(EVERY[8:]),
        layers(["entropy"]),
        layers(model="open_clip:ViT-B-16/datacomp_xl_s13b_b90k-with-a-very-long-name/" + "x" * 90),
        layers(first_token="excluded", tokens="registers", n=1_000_000, n_tokens=16_384),
        layers(mean=-12345.678, ci_low=-12345.678, ci_high=-12345.678),
        layers(mean=np.nan, ci_low=np.nan, ci_high=np.nan),
    ],
)
def test_no_line_is_wider_than_the_terminal(table: pd.DataFrame) -> None:
    lines = result_table(table).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert sum(line.strip().startswith(tuple(f"{i} " for i in range(12))) for line in lines) == 12


def test_all_metrics_show_the_eight_that_tell_most() -> None:
    heading = result_table(layers()).splitlines()[1]
    words = ["layer", "cos(y,v)", "95 % CI", "self", "context", "partner", "uniform", "v~v", "A_ii", "H/max"]
    assert heading.split() == " ".join(words).split()


@pytest.mark.parametrize("columns_", [40, 60, 79, 80, 100, 140, 200])
def test_a_table_has_as_many_metrics_as_the_terminal_has_room_for(
    columns_: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = result_table(layers()).splitlines()[1].split()
    monkeypatch.setenv("COLUMNS", str(columns_))
    lines = result_table(layers()).splitlines()
    table = [line for line in lines if line.split()[:1] in ([str(layer)] for layer in range(12))]
    heading = lines[lines.index(table[0]) - 1]
    assert max(map(len, lines)) <= columns_
    assert {len(line) for line in table} == {len(heading)}
    assert all(len(line.split()) == len(table[0].split()) for line in table)  # no number is cut
    shown = len(heading.split()) - len(usual)
    assert (shown > 0) - (shown < 0) == (columns_ > 90) - (columns_ < 70)
    if columns_ >= 140:
        assert shown >= 7


def test_columns_that_do_not_fit_stand_below_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = {"layer": ["0", "1"], **{f"metric {n}": [f"-0.12{n} [0.1, 0.2]", "0"] for n in range(5)}}
    whole = aligned(cells)
    monkeypatch.setenv("COLUMNS", "60")
    lines = aligned(cells)
    assert max(map(len, lines)) <= 60 < len(whole[0])
    blocks = [block.splitlines() for block in "\n".join(lines).split("\n\n")]
    assert [line.split()[0] for block in blocks for line in block] == ["layer", "0", "1"] * len(blocks)
    assert sorted(" ".join(lines).split()) == sorted(
        [*" ".join(whole).split(), *["layer", "0", "1"] * (len(blocks) - 1)]
    )
    row = {head: texts[0] for head, texts in cells.items()}
    assert max(map(len, columns([row]).splitlines())) <= 60
    assert len(columns([row], whole=True).splitlines()) == 2


def test_the_width_is_that_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (width(), text_width()) == (WIDTH, WIDTH)  # no terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)
    for told, found, text in ((150, 150, 80), (60, 60, 60), (3, 40, 40), (5000, 240, 80), (0, 80, 80)):
        monkeypatch.setattr("os.get_terminal_size", lambda descriptor, n=told: os.terminal_size((n, 24)))
        assert (width(), text_width()) == (found, text)
    monkeypatch.setenv("COLUMNS", "100")
    assert width() == 100


def test_where_inputs_are_from_stands_in_the_header() -> None:
    heading = result_table(layers(["entropy"]), {"vision": "'photos/'", "text": "demo"}).splitlines()[:2]
    assert " ".join(heading).split(" · ")[3] == "n = 14 of 'photos/'"


def test_what_was_asked_for_is_shown_in_place() -> None:
    table = layers(["first_weight", "excess"]).assign(layer=lambda t: t["layer"] + 95)
    lines = result_table(table).splitlines()
    assert lines[0] == "demo:vit-p16 · vision · patch tokens (T = 17) · n = 14 · values as_computed"
    assert lines[1].split() == ["layer", "excess", "A_i0"]
    assert lines[2].split() == ["95", "0.010", "0.000"]
    assert lines[-3].split() == ["106", "1.110", "1.100"]
    assert lines[-1] == "excess: cos(y,v) - partner; A_i0: weight on the first token"


def test_intervals_and_missing_numbers() -> None:
    table = layers(["cos_y_vself"])
    assert "-0.123…-0.045" in result_table(table)  # a dash would read as a minus
    without = result_table(table.assign(ci_low=np.nan, ci_high=np.nan))
    assert "CI" not in without
    assert "–" in result_table(layers(["entropy"], mean=np.nan)).splitlines()[2]


def test_each_model_tower_and_token_set_has_its_block() -> None:
    table = pd.concat([layers(), layers(tokens="cls"), layers(model="b", first_token="excluded")])
    text = result_table(table)
    assert [line for line in text.splitlines() if "n = 14" in line] == [
        "demo:vit-p16 · vision · patch tokens (T = 17) · n = 14 · values as_computed",
        "demo:vit-p16 · vision · cls tokens (T = 17) · n = 14 · values as_computed",
        "b · vision · patch tokens (T = 17) · n = 14 · values as_computed · t=0 excluded",
    ]
    assert text.count("H/max: entropy over its bound") == 1


def test_sizes_that_differ_are_a_range() -> None:
    table = layers(["entropy"])
    table["n_tokens"] = np.where(table["layer"] < 6, 9, 36)
    assert "(T = 9–36)" in result_table(table)


def test_columns_line_up() -> None:
    text = columns([{"name": "a", "note": None}, {"name": "long", "note": "x"}])
    assert text.splitlines() == ["name  note", "a", "long  x"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drive(listener: StderrListener) -> None:
    with listener:
        listener.say("a → b [not markup]")
        listener.start("model", 3)
        listener.advance(2)
        listener.advance(1)


def test_progress_is_a_bar_on_a_terminal_and_never_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    drive(StderrListener(quiet=False))
    assert "a → b [not markup]" in screen.getvalue()
    assert "\x1b[" in screen.getvalue()
    assert "model" in screen.getvalue()
    assert capsys.readouterr().out == ""


def test_progress_is_a_line_now_and_then_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 20.0, 20.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    drive(StderrListener(quiet=False))
    told = capsys.readouterr()
    assert told.err.splitlines() == ["a → b [not markup]", "model: 3/3"]
    assert told.out == ""


def test_a_name_is_neither_markup_nor_a_command_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with StderrListener(quiet=False) as listener:
        listener.start("[/]a\x07", 1)
        listener.say("b\x07")
        listener.advance(1)
    assert "[/]a\\u0007" in screen.getvalue()
    assert "\x07" not in screen.getvalue()
    table = result_table(layers(["entropy"], model="a\x1b[2J\n"))
    assert table.splitlines()[0].startswith("a\\u001b[2J\\u000a · vision")


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_quiet_says_nothing(monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]) -> None:
    screen = stream()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(terminal, "PLAIN_SECONDS", -1.0)
    drive(StderrListener(quiet=True))
    assert screen.getvalue() == ""
