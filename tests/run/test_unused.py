"""Options for another kind of model are named in one line each, and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Ended

from diag.run.plan import ProbePlan
from diag.run.unused import unused


@pytest.mark.parametrize(
    ("given", "kinds", "said"),
    [
        ({"images": "demo", "texts": "demo"}, ["vision"], ["--texts is left out: 'm' takes images"]),
        ({"images": "demo", "texts": "demo"}, ["text"], ["--images is left out: 'm' takes texts"]),
        ({"images": "demo", "texts": "demo", "seq_len": 8}, ["vision", "text"], []),
        ({"seq_len": 8}, ["vision"], ["--seq-len is left out: it is for texts, and 'm' takes images"]),
        ({"seq_len": 8}, ["text"], []),
        (
            {"exact": True, "sampled_rows": 64},
            ["text"],
            ["--sampled-rows is left out: with --exact every row is computed"],
        ),
        ({"exact": True}, ["text"], []),
    ],
)
def test_an_option_for_others_is_named(given: dict[str, Any], kinds: list[str], said: list[str]) -> None:
    assert list(unused(ProbePlan(models=("m",), **given), kinds, "m")) == said


def test_a_run_says_what_it_leaves_out(attnbias: Callable[..., Ended]) -> None:
    given = ("demo:vit-p16", "demo:lm", "--images", "demo", "--texts", "demo", "--limit", 1, "--layers", 0)
    ended = attnbias(*given, "--metrics", "cos_y_vself", "--seq-len", 8, "-o", "run")
    assert [line for line in ended.lines if "left out" in line] == [
        "--texts is left out: 'demo:vit-p16' takes images",
        "--seq-len is left out: it is for texts, and 'demo:vit-p16' takes images",
        "--images is left out: 'demo:lm' takes texts",
    ]
    assert ended.code == 0
    alone = attnbias("demo:vit-p16", *given[2:4], *given[6:], "--metrics", "cos_y_vself", "-o", "alone")
    assert "left out" not in alone.err
    kept = [Path(folder, "layers.csv").read_text().splitlines()[1] for folder in ("run", "alone")]
    assert kept[0] == kept[1]
    heads = [line for line in ended.out.splitlines() if "n = 1" in line]
    assert [head.split(" · ")[3].rstrip(" ·") for head in heads] == ["n = 1 of demo"] * 2
