"""Whose y is, in one sentence: by name, also where it is the sink, and where it is said."""

from __future__ import annotations

from pathlib import Path

from made_runs import CURVES, made_run

from diag.results.collect import collect
from diag.results.profiles import profiles
from diag.show.report import page
from diag.show.terminal import result_table
from diag.show.words import comparison, summary
from diag.show.words.ledger import ledger_sentence

SHARES = {
    "output_from_self": [0.1, 0.1, 0.1],
    "output_from_sink": [0.2, 0.5, 0.3],
    "output_from_registers": [0.1, 0.2, 0.1],
    "output_from_sink_registers": [0.1, 0.4, 0.1],
    "output_from_rest": [0.6, 0.2, 0.5],
    "bias_from_self": [0.06, 0.05, 0.04],
}
REGISTERS = "In layer 1, 60 % of what comes back is the registers (n = 8); 33 % over all layers."


def test_a_sink_that_is_a_register_counts_as_one(tmp_path: Path) -> None:
    """20 % of registers and the 40 % that sinks have as registers."""
    run = made_run(tmp_path / "run", curves=CURVES | SHARES, noise=0.0)
    found = collect([run])
    assert ledger_sentence(found.layers) == REGISTERS
    assert REGISTERS in summary(found, profiles(found.samples), found.labels[0])
    table = result_table(found.layers)
    assert " ".join(REGISTERS.split()) in " ".join(table.split())


def test_the_bias_of_the_layer_is_told_beside_it(tmp_path: Path) -> None:
    own = {name: [0.8, 0.7, 0.6] if name.endswith("self") else [0.0] * 3 for name in SHARES}
    run = made_run(
        tmp_path / "run", curves=CURVES | own | {"bias_from_self": SHARES["bias_from_self"]}, noise=0.0
    )
    assert ledger_sentence(collect([run]).layers) == (
        "In layer 0, 80 % of what comes back is the token itself (n = 8); 70 % over all layers. Of the bias "
        "of 0.600 there, 0.060 is from the token itself."
    )


def test_neither_what_is_left_over_nor_a_run_without_a_ledger_says_anything(tmp_path: Path) -> None:
    only = {"output_from_rest": [0.9, 0.9, 0.9]}
    assert ledger_sentence(collect([made_run(tmp_path / "rest", curves=CURVES | only)]).layers) == ""
    plain = collect([made_run(tmp_path / "plain")])
    assert ledger_sentence(plain.layers) == ""
    assert 'id="ledger"' not in page(plain)


def test_each_line_of_a_comparison_and_the_lead_of_a_report_say_it(tmp_path: Path) -> None:
    runs = [
        made_run(tmp_path / name, model=f"demo:{name}", curves=CURVES | SHARES, noise=0.0) for name in "ab"
    ]
    found = collect(runs)
    text = "\n".join(comparison(found, profiles(found.samples)))
    assert f"demo:a: in{REGISTERS[2:]}\ndemo:b: in{REGISTERS[2:]}" in text
    html = page(found)
    first = [html.index(f'id="{name}"') for name in ("compared-cos_y_vself-t", "ledger", "models")]
    assert first == sorted(first)
    assert html.count(REGISTERS) == 2  # in the lead of each line, and not again in its summary
    assert html.count('class="sum"') == 4


def test_a_ledger_alone_is_told(tmp_path: Path) -> None:
    found = collect(
        [made_run(tmp_path / name, model=f"demo:{name}", curves=SHARES, noise=0.0) for name in "ab"]
    )
    text = "\n".join(comparison(found, profiles(found.samples)))
    assert text.startswith("The alignment bias was measured in none of the lines.\ndemo:a: in layer 1, 60 %")
