"""The figure of nulls: drawn where an option measured one, with a line for each that there is."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from made_runs import CURVES, made_run

from diag.errors import UserError
from diag.results.tables import read_heads, read_layers
from diag.show.figures import draw_run
from diag.show.figures.nulls import null_curves

FURTHER = {"cos_y_vnear": [0.4, 0.4, 0.4], "excess_over_near": [0.2, 0.1, 0.0]}


def layers_of(folder: Path, **given: object) -> pd.DataFrame:
    return read_layers(made_run(folder, **given))  # type: ignore[arg-type]


@pytest.mark.usefixtures("sketched")
def test_a_run_has_it_where_an_option_measured_a_null(tmp_path: Path) -> None:
    stems = {}
    for name, curves in (("plain", CURVES), ("more", CURVES | FURTHER)):
        layers = layers_of(tmp_path / name, curves=curves)
        stems[name] = set(draw_run(layers, read_heads(tmp_path / name)))
    assert stems["more"] - stems["plain"] == {"nulls-demo-vit-p8-vision-patch"}
    assert len(stems["plain"]) == 2


def test_lines_are_those_that_were_measured(tmp_path: Path) -> None:
    layers = layers_of(tmp_path / "run", curves=CURVES | FURTHER)
    figure = null_curves(layers)
    upper, lower = figure.axes
    drawn = [{line.get_label(): line for line in ax.get_lines()} for ax in (upper, lower)]
    assert {"alignment bias", "partner null", "uniform null", "neighbourhood null"} <= drawn[0].keys()
    assert "uniform null" not in drawn[1]
    assert list(drawn[1]["neighbourhood null"].get_ydata()) == pytest.approx([0.2, 0.1, 0.0])
    assert list(drawn[0]["neighbourhood null"].get_ydata()) == pytest.approx([0.4, 0.4, 0.4])
    colours = [lines["neighbourhood null"].get_color() for lines in drawn]
    assert colours[0] == colours[1]
    assert "across-inputs null" not in drawn[0]


def test_several_lines_are_refused(tmp_path: Path) -> None:
    several = pd.concat(
        [layers_of(tmp_path / name, model=f"demo:{name}", curves=CURVES | FURTHER) for name in ("a", "b")]
    )
    with pytest.raises(UserError, match="nulls"):
        null_curves(several)
