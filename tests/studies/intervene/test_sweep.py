"""The sweep on real models: what no edit names stays bit for bit, losses are the library's own."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from commands import Ended
from matplotlib.figure import Figure

from diag.attention.call import AttentionCall
from diag.attention.pattern import pattern_rows
from diag.errors import UserError
from diag.inputs.images import demo_images
from diag.inputs.items import content_digest
from diag.inputs.labels import labels
from diag.inputs.texts import texts
from diag.measure.batch_readings import Incidents
from diag.measure.batch_size import BatchSize
from diag.measure.edited_model import edited, heads_return
from diag.measure.held_out import held_out, held_out_samples
from diag.measure.loop import capture
from diag.models import load
from diag.models.base import Batch, Model, Sample, Tower
from diag.models.families.demo import EMBEDDED
from diag.models.hooks.block_parts import find_blocks
from diag.models.hooks.interventions import GATE, INTERVENTIONS, parse
from diag.models.names.resolve import parse as parse_name
from diag.results.caveats import BY_DEFAULT
from diag.run.progress import Silent
from diag.run.shards import tower_samples
from diag.studies.intervene.costs import costs, spared
from diag.studies.intervene.plan import IntervenePlan
from diag.studies.intervene.run import run_intervene
from diag.studies.intervene.sweep import Case, cases, predicted_bytes, sweep
from diag.studies.intervene.tables import relations, sensitivity

ALL = [
    {"window": "window=4", "random_window": "random_window=4"}.get(name, name)
    for name, entry in INTERVENTIONS.items()
    if entry.where != GATE and not entry.of_others and "redistribute" not in name
]
"""Those that need no other inputs; redistribution finds no sinks in noise. Sizes change something."""
for name in ("neighbourhood", "random_neighbourhood", "top_keys", "random_keys"):
    ALL[ALL.index(name)] = f"{name}=2"

LM = ("demo:lm", "text")
VIT = ("demo:vit-p16", "vision")


@pytest.fixture(scope="module")
def loaded() -> dict[str, Model]:
    names = ("demo:lm", "demo:vit-p16")
    return {name: load(parse_name(name), device="cpu", dtype=torch.float32) for name in names}


def windows(tower: Tower, count: int = 2) -> Batch:
    return tower.encode(tower_samples(tower, texts("demo"), limit=count, seq_len=24))


def pictures(tower: Tower) -> Batch:
    return Batch(("a", "b"), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


def batch_of(name: str, tower: Tower) -> Batch:
    return windows(tower) if name == "demo:lm" else pictures(tower)


def outputs(tower: Tower, batch: Batch, around: Callable[[], object]) -> dict[int, torch.Tensor]:
    """What the heads of each layer return before an edit, while the model runs with it."""
    seen: dict[int, torch.Tensor] = {}

    def on_call(call: AttentionCall) -> None:
        seen[call.layer] = call.output.clone()

    with torch.inference_mode(), around(), tower.capture(tower.layers, on_call):  # type: ignore[attr-defined]
        tower.forward(batch)
    return seen


@pytest.mark.parametrize(("name", "kind"), [LM, VIT])
@pytest.mark.parametrize("text", ["xsa:3", "mask_self:3", "uniform:3", "skip:3", "cb:3", "cb_s=0.5:3"])
def test_layers_before_an_edit_are_bit_identical(
    name: str, kind: str, text: str, loaded: dict[str, Model]
) -> None:
    model = loaded[name]
    tower = model.tower(kind)
    batch, blocks, edit = batch_of(name, tower), find_blocks(model.module, tower.layers), parse(text)
    untouched = outputs(tower, batch, lambda: edited(tower, tower.layers, blocks, ()))

    seen: dict[int, torch.Tensor] = {}

    def on_call(call: AttentionCall) -> torch.Tensor:
        seen[call.layer] = call.output.clone()
        return heads_return([edit], call)

    with torch.inference_mode(), edited(tower, (), blocks, (edit,)), tower.capture(tower.layers, on_call):
        tower.forward(batch)
    for layer in range(4):
        assert torch.equal(seen[layer], untouched[layer]), layer
    assert not torch.equal(seen[4], untouched[4])  # a negative control


@pytest.mark.parametrize(("name", "kind"), [LM, VIT])
@pytest.mark.parametrize("text", ALL)
def test_the_model_is_left_as_it_was(name: str, kind: str, text: str, loaded: dict[str, Model]) -> None:
    model = loaded[name]
    tower = model.tower(kind)
    batch, blocks = batch_of(name, tower), find_blocks(model.module, tower.layers)
    weights = {key: tensor.clone() for key, tensor in model.module.state_dict().items()}

    def run(edits: tuple) -> torch.Tensor:
        with torch.inference_mode(), edited(tower, tower.layers, blocks, edits):
            result = tower.forward(batch)
        return result if isinstance(result, torch.Tensor) else result.last_hidden_state

    before = run(())
    changed = run((parse(text),))
    assert not torch.equal(before, changed)
    assert torch.equal(before, run(()))
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.module.state_dict().items())
    with pytest.raises(RuntimeError, match="stop"), edited(tower, tower.layers, blocks, (parse(text),)):
        raise RuntimeError("stop")
    assert torch.equal(before, run(()))


def test_skip_is_a_model_whose_attention_adds_nothing(loaded: dict[str, Model]) -> None:
    model = loaded["demo:vit-p16"]
    tower, batch = model.tower("vision"), pictures(model.tower("vision"))
    blocks = find_blocks(model.module, tower.layers)
    with torch.inference_mode(), edited(tower, tower.layers, blocks, (parse("skip:2"),)):
        found = tower.forward(batch)
    projection = model.module.get_submodule("blocks.2.attn.proj")
    kept = {name: parameter.clone() for name, parameter in projection.named_parameters()}
    try:
        with torch.inference_mode():
            for parameter in projection.parameters():
                parameter.zero_()
            expected = tower.forward(batch)
    finally:
        with torch.no_grad():
            for name, parameter in projection.named_parameters():
                parameter.copy_(kept[name])
    torch.testing.assert_close(found, expected)


def test_the_loss_is_the_librarys_own(loaded: dict[str, Model]) -> None:
    model = loaded["demo:lm"]
    tower = model.tower("text")
    batch = windows(tower, 1)
    whole = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED / "lm", dtype=torch.float32).eval()
    assert tower.language_head is not None
    with torch.inference_mode():
        logits = tower.language_head()(tower.forward(batch).last_hidden_state)
        theirs = whole(input_ids=batch.data, labels=batch.data)
    torch.testing.assert_close(logits, theirs.logits, atol=1e-4, rtol=1e-4)
    from diag.studies.intervene.effect import next_token_loss

    assert next_token_loss(logits, batch.data).item() == pytest.approx(theirs.loss.item(), rel=1e-5)


def test_a_gate_of_nothing_changes_nothing_at_all(loaded: dict[str, Model]) -> None:
    model = loaded["demo:lm"]
    tower = model.tower("text")
    samples = tower_samples(tower, texts("demo"), limit=3, seq_len=24)
    todo = cases([parse("gated_xsa=0")], tower.layers, ("one",))
    rows = sweep(model, tower, samples, todo, batch_size=2)
    assert (rows.loc[rows["effect"] == "loss_change", "value"] == 0).all()
    assert len(rows) == 6 * 3 * rows["effect"].nunique()


@pytest.mark.parametrize(("name", "kind"), [LM, VIT])
@pytest.mark.parametrize("fails", ["untouched", "changed"])
def test_what_does_not_fit_is_run_in_halves(
    name: str, kind: str, fails: str, loaded: dict[str, Model]
) -> None:
    """Memory runs out in the middle of a batch: all of its cases are run anew, and no row is there twice."""
    model, seen = loaded[name], list[int]()
    tower = model.tower(kind)

    def forward(batch: Batch) -> object:
        seen.append(len(batch.ids))
        result = tower.forward(batch)
        if len(batch.ids) > 2 and (fails == "untouched" or len(seen) == 3):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return result

    given = texts("demo") if kind == "text" else demo_images()
    samples = list(islice(tower.samples(given, 24), 5))
    todo = cases([parse("xsa"), parse("skip")], tower.layers[:2], ("one",))
    short, done = replace(tower, forward=forward), list[int]()
    with pytest.warns(RuntimeWarning, match="5 inputs at once do not fit into memory; going on with 2"):
        halved = sweep(model, short, samples, todo, batch_size=5, advance=done.append)
    assert seen == [5] * (1 if fails == "untouched" else 3) + [2] * 10 + [1] * 5
    assert done == [2, 2, 1]
    pd.testing.assert_frame_equal(halved, sweep(model, tower, samples, todo, batch_size=2))
    whole = sweep(model, tower, samples, todo, batch_size=5)
    by = ["intervention", "layer", "effect", "input_index"]
    ours, theirs = (rows.sort_values(by, ignore_index=True) for rows in (halved, whole))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4, atol=1e-6)
    table, expected = (sensitivity(rows, seed=0) for rows in (ours, theirs))
    pd.testing.assert_frame_equal(table, expected, rtol=1e-4, atol=1e-6)
    assert not np.allclose(ours["value"], theirs["value"].iloc[::-1], rtol=1e-4, atol=1e-6)


def test_a_size_that_follows_the_memory_changes_no_number(loaded: dict[str, Model]) -> None:
    model, done = loaded["demo:vit-p16"], list[int]()
    tower, todo = model.tower("vision"), cases([parse("xsa")], model.tower("vision").layers[:2], ("one",))
    samples = list(islice(tower.samples(demo_images(), None), 4))
    size = BatchSize.of(0, model.module)
    grown = sweep(model, tower, samples, todo, batch_size=size, advance=done.append)
    assert done == [1, 2, 1]
    whole = sweep(model, tower, samples, todo, batch_size=4)
    by = ["layer", "effect", "input_index"]
    ours, theirs = (rows.sort_values(by, ignore_index=True) for rows in (grown, whole))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("place", [0, 3])
def test_an_input_that_is_not_finite_is_listed_and_has_no_effect(
    place: int, loaded: dict[str, Model]
) -> None:
    model = loaded["demo:vit-p16"]
    tower, todo = model.tower("vision"), cases([parse("xsa")], model.tower("vision").layers[:2], ("one",))
    samples = list(islice(tower.samples(demo_images(), None), 4))
    bad = Sample("bad", lambda: torch.full((3, 64, 64), torch.nan))
    incidents = Incidents()
    given = [*samples[:place], bad, *samples[place:]]
    found = sweep(model, tower, given, todo, batch_size=2, incidents=incidents)
    pd.testing.assert_frame_equal(found, sweep(model, tower, samples, todo, batch_size=2))
    assert incidents.failed == {"bad": "the block of layer 'blocks.5.attn' gives values that are not finite"}
    with pytest.raises(UserError, match="values that are not finite"):
        sweep(model, tower, [bad], todo)


def test_one_input_that_does_not_fit_is_an_error(loaded: dict[str, Model]) -> None:
    model = loaded["demo:vit-p16"]
    tower = replace(model.tower("vision"), forward=lambda batch: (_ for _ in ()).throw(MemoryError()))
    samples = list(islice(tower.samples(demo_images(), None), 2))
    with (
        pytest.warns(RuntimeWarning, match="going on with 1"),
        pytest.raises(UserError, match="a single input does not fit into memory: none is left"),
    ):
        sweep(model, tower, samples, cases([parse("xsa")], tower.layers, ("one",)), batch_size=2)


def test_cases() -> None:
    from diag.models.hooks.layers import Layer

    layers = [Layer(i, f"blocks.{i}", torch.nn.Identity()) for i in range(3)]
    found = cases([parse("xsa"), parse("skip:1-2")], layers, ("one", "first", "last"))
    spelled = [(c.edit.name, c.scope, c.layer, sorted(c.edit.layers or ())) for c in found]
    assert spelled == [
        ("xsa", "one", 0, [0]),
        ("xsa", "one", 1, [1]),
        ("xsa", "one", 2, [2]),
        ("xsa", "first", 0, [0]),
        ("xsa", "first", 1, [0, 1]),
        ("xsa", "first", 2, [0, 1, 2]),
        ("xsa", "last", 0, [0, 1, 2]),
        ("xsa", "last", 1, [1, 2]),
        ("xsa", "last", 2, [2]),
        ("skip", "one", 1, [1]),
        ("skip", "one", 2, [2]),
        ("skip", "first", 1, [1]),
        ("skip", "first", 2, [1, 2]),
        ("skip", "last", 1, [1, 2]),
        ("skip", "last", 2, [2]),
    ]
    by_head = cases([parse("xsa:0/1"), parse("skip")], layers[:1], ("one",), heads=3)
    assert [(c.edit.name, c.head) for c in by_head] == [("xsa", -1), ("skip", -1), ("xsa", 1)]


def test_every_projection_has_its_control_beside_it() -> None:
    plan = IntervenePlan.checked(models=("demo:lm",), interventions=("xsa", "gated_xsa=0.3", "skip"))
    assert [(e.name, e.strength) for e in plan.edits()] == [
        ("xsa", 1.0),
        ("gated_xsa", 0.3),
        ("skip", 1.0),
        ("matched_direction", 1.0),
        ("matched_direction", 0.3),
        ("random_skip", 1.0),
    ]
    plan = IntervenePlan.checked(
        models=("demo:lm",), interventions=("zero", "window=8:1", "sink_zero", "sink_mean=0.5"), seed=3
    )
    controls = plan.edits()[4:]
    assert [(e.name, e.strength, e.layers, e.seed) for e in controls] == [
        ("mean", 1.0, None, 3),
        ("random_window", 8.0, {1}, 3),
        ("random_zero", 0.0, None, 3),
        ("random_zero", 0.5, None, 3),
    ]


def test_one_change_on_two_layers_is_one_with_both_and_so_is_its_control() -> None:
    def edits(*texts: str) -> list[tuple[str, object, object]]:
        plan = IntervenePlan.checked(models=("demo:lm",), interventions=texts)
        return [(e.name, e.strength, e.layers) for e in plan.edits()]

    assert edits("xsa:0", "xsa:2-3") == [("xsa", 1.0, {0, 2, 3}), ("matched_direction", 1.0, {0, 2, 3})]
    assert edits("xsa:0", "xsa") == [("xsa", 1.0, None), ("matched_direction", 1.0, None)]
    assert edits("sink_zero:0", "sink_mean:1")[2:] == [("random_zero", 0.0, {0, 1})]
    with pytest.raises(UserError, match="xsa:0/0 and xsa:0/1: the tables tell two such changes not apart"):
        edits("xsa:0/0", "xsa:0/1")


def test_strengths_of_heads_have_their_control_too(tmp_path: Path) -> None:
    file = tmp_path / "alpha.csv"
    file.write_text("layer,head,strength\n1,0,0.5\n")
    plan = IntervenePlan.checked(models=("demo:lm",), interventions=(f"gated_xsa={file}:1",))
    gated, matched = plan.edits()
    assert (matched.name, matched.strength, matched.layers) == ("matched_direction", {(1, 0): 0.5}, {1})
    assert matched.text == f"matched_direction={file}"
    assert gated.strength == matched.strength
    table = of_costs("loss_increase", {"gated_xsa": [0.03], "matched_direction": [0.02]})
    assert costs(table.assign(strength=float("nan")))["control_cost"].tolist() == [0.02]


def test_bytes_of_the_predicted_tokens() -> None:
    ids = torch.tensor([[0, 1, 2], [0, 3, 3]])
    words = {1: "ab", 2: "é", 3: "x"}
    assert predicted_bytes(lambda row: "".join(words[i] for i in row), ids).tolist() == [4, 2]


def test_tables_are_those_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    base = pd.DataFrame(
        [(layer, f"i{i}", i, rng.normal()) for layer in range(6) for i in range(5)],
        columns=["layer", "input", "input_index", "value"],
    )
    rows = base.assign(intervention="xsa", strength=1.0, scope="one", head=-1, effect="loss_change")
    table = sensitivity(rows, seed=0)
    expected = base.groupby("layer")["value"].agg(["mean", "std"])
    np.testing.assert_allclose(table["mean"], expected["mean"])
    np.testing.assert_allclose(table["std"], expected["std"])
    probed = base.assign(metric="cos_y_vself", value=2 * base["value"] + 1)
    (row,) = relations(rows, probed, seed=0).to_dict("records")
    assert (row["predictor"], row["level"], row["rho"], row["places"], row["n"]) == (
        "cos_y_vself",
        "layer",
        1.0,
        6,
        5,
    )


# --- held-out inputs, sinks, and what a layer costs


def test_held_out_inputs_give_means_and_donors(loaded: dict[str, Model]) -> None:
    """Each mean and value against the calls of each input alone, whatever the batch."""
    tower = loaded["demo:vit-p16"].tower("vision")
    samples = list(islice(tower.samples(demo_images(), None), 5))
    found = held_out(tower, samples, tower.layers[2:4], batch_size=2, seed=1)
    assert found.ids == tuple(sample.id for sample in samples)
    assert set(found.layers) == {2, 3}
    for number, sample in enumerate(samples):
        (call,) = capture(tower, tower.encode([sample]), [3])
        layer, pattern = found.layers[3], pattern_rows(call)[0].double()
        torch.testing.assert_close(layer.output[number], call.output[0].mean(1), atol=1e-5, rtol=1e-5)
        sinks = pattern.sum(1).argmax(-1)
        each = torch.arange(call.heads)
        torch.testing.assert_close(layer.sink[number], call.value[0, each, sinks], atol=1e-5, rtol=1e-5)
        others = (layer.ordinary[number][:, None] - call.value[0]).norm(dim=-1).argmin(-1)
        assert (others != sinks).all()
    whole = held_out(tower, samples, tower.layers[2:4], batch_size=5, seed=1)
    torch.testing.assert_close(whole.layers[2].ordinary, found.layers[2].ordinary)
    means = found.mean(found.layers[2].sink, (samples[1].id, "another"))
    torch.testing.assert_close(means[0], found.layers[2].sink[[0, 2, 3, 4]].mean(0))
    torch.testing.assert_close(means[1], found.layers[2].sink.mean(0))
    donors = [found.donors((sample.id,), 0).item() for sample in samples]
    assert all(number != donor for number, donor in enumerate(donors))
    assert found.donors(found.ids, 0).tolist() == donors


def test_held_out_inputs_are_those_behind_the_measured_ones() -> None:
    samples = [Sample(str(number), lambda: None) for number in range(40)]
    assert [sample.id for sample in held_out_samples(samples)] == [str(number) for number in range(24, 40)]
    assert held_out_samples(samples[:5]) == samples[:5]
    with pytest.raises(UserError, match="there is one alone") as caught:
        held_out_samples(samples[:1])
    assert caught.value.tip == "give two inputs or more"


def keep(states: list[torch.Tensor], module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
    states.append(output)


def itself(output: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    return output


def test_the_change_of_final_patches_leaves_out_the_sink(loaded: dict[str, Model]) -> None:
    """√(mean ‖P′−P‖²)/√(mean ‖P‖²), against a pass with the sink's value changed by hand."""
    model = loaded["demo:vit-p16"]
    tower = model.tower("vision")
    samples = list(islice(tower.samples(demo_images(), None), 2))
    todo = [Case(parse("sink_zero:4/1"), "one", 4, 1), Case(parse("random_zero:4/1"), "one", 4, 1)]
    rows = sweep(model, tower, samples, todo, batch_size=2)
    norm = find_blocks(model.module, tower.layers)[-1].module
    for number, sample in enumerate(samples):
        states, batch = list[torch.Tensor](), tower.encode([sample])
        (call,) = capture(tower, batch, [4])
        pattern, value = pattern_rows(call), call.value.clone()
        sink = int(pattern[0, 1].sum(0).argmax())
        value[0, 1, sink] = 0
        handle = norm.register_forward_hook(partial(keep, states))
        with torch.inference_mode():
            tower.forward(batch)
            with tower.capture(tower.layers[4:5], partial(itself, pattern @ value)):
                tower.forward(batch)
        handle.remove()
        kept = [place for place in range(1, states[0].shape[1]) if place != sink]  # 0 is the class token
        before, after = (x[0, kept].double() for x in states)
        expected = ((after - before).square().sum() / before.square().sum()).sqrt().item()
        mine = rows[(rows["input_index"] == number) & (rows["effect"] == "state_change")].set_index(
            "intervention"
        )
        assert mine.loc["sink_zero", "value"] == pytest.approx(expected, rel=1e-3)
        assert mine.loc["random_zero", "value"] != pytest.approx(expected, rel=1e-3)


def of_costs(effect: str, values: dict[str, list[float]], n: int = 20) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"intervention": name, "strength": 8.0, "scope": "one", "layer": layer, "head": -1}
            | {"effect": effect, "mean": x, "std": 0.0, "ci_low": x - 0.001, "ci_high": x + 0.001, "n": n}
            for name, each in values.items()
            for layer, x in enumerate(each)
        ]
    )


def test_layers_are_ranked_by_what_they_cost() -> None:
    table = of_costs("loss_increase", {"window": [0.03, 0.004, 0.0095], "random_window": [0.1, 0.2, 0.3]})
    found = costs(table)
    assert found["layer"].tolist() == [1, 2, 0]
    assert found["rank"].tolist() == [1, 2, 3]
    assert found["control_cost"].tolist() == [0.2, 0.3, 0.1]
    assert found["control"].unique().tolist() == ["random_window"]
    first, second = spared(found, 1)
    assert first == (
        "Layer 1 can be windowed (|i−j| < 8) at under 1 % of the loss; its control, random window 8, costs "
        "20.00 %."
    )
    assert "upper end" in second
    (several, _) = spared(found, 2)
    assert several.startswith("Layers 1-2 can be windowed (|i−j| < 8) at under 2 % of the loss each, alone; ")
    (none, _) = spared(found, 0.1)
    assert none == (
        "No layer can be windowed (|i−j| < 8) at under 0.1 % of the loss; the cheapest is layer 1: 0.40 %, "
        "up to 0.50 %."
    )


def test_one_input_spares_no_layer() -> None:
    table = of_costs("loss_increase", {"window": [0.03, 0.004]}, n=1).assign(ci_low=np.nan, ci_high=np.nan)
    said, _ = spared(costs(table), 1)
    assert said.endswith("at under 1 % of the loss is not judged: one input has no interval.")


def test_none_of_few_inputs_is_no_proof() -> None:
    """Not one of 20 inputs changes its class: the true share may well be 3/20."""
    found = costs(of_costs("same_class", {"skip": [1.0, 0.5]}))
    assert found["cost"].tolist() == [0.0, 0.5]
    assert found["cost_high"].tolist() == pytest.approx([0.15, 0.501])
    assert found["control"].isna().all()
    assert costs(of_costs("token_norm", {"skip": [1.0]})).empty


def test_seeds_reach_what_is_drawn(loaded: dict[str, Model]) -> None:
    tower = loaded["demo:vit-p16"].tower("vision")
    batch, blocks = pictures(tower), find_blocks(loaded["demo:vit-p16"].module, tower.layers)

    def run(text: str, seed: int) -> torch.Tensor:
        with torch.inference_mode(), edited(tower, tower.layers, blocks, (parse(text, seed),)):
            return tower.forward(batch)

    for name in ("random_direction:2", "random_skip:2", "random_keys=3:2"):
        assert torch.equal(run(name, 0), run(name, 0))
        assert not torch.equal(run(name, 0), run(name, 1)), name


def test_labels() -> None:
    ids = ["cat/1.png", "cat/2.png", "dog/1.png"]
    assert labels(ids, 2) == {"cat/1.png": 0, "cat/2.png": 0, "dog/1.png": 1}
    assert labels(ids, 2, named=True) == labels(ids, 2)
    assert labels(["7/a.png", "3/b.png"], 10) == {"7/a.png": 7, "3/b.png": 3}
    assert labels(["n01440764/a.png"], 1000) == {"n01440764/a.png": 0}
    with pytest.raises(UserError, match="which is which is unclear"):
        labels(ids, 5)
    for name in ("a.png", "00000.tar/cat/a.png"):  # a tar is no class
        with pytest.raises(UserError, match="lies in no class folder"):
            labels([name], 1)


# --- the folder and the command line ----------------------------------------------------------------


@pytest.mark.usefixtures("sketched")
def test_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = IntervenePlan.checked(
        models=("demo:lm",), texts="demo", seq_len=24, limit=3, heads=True, layers=(0, 1, 2, 3)
    )
    found = run_intervene(plan)
    assert found.folder.name.startswith("intervene-")
    names = {path.name for path in found.folder.rglob("*") if path.is_file()}
    assert {"sensitivity.csv", "relations.csv", "samples.parquet", "manifest.json"} <= names
    assert {"sensitivity-loss_change.png", "relation-xsa-loss_change.pdf"} <= names
    assert set(found.relations["level"]) == {"layer", "head"}
    by_head = found.sensitivity[found.sensitivity["head"] >= 0]
    assert set(zip(by_head["layer"], by_head["head"], strict=True)) == {
        (a, b) for a in range(4) for b in range(3)
    }
    control = found.sensitivity[found.sensitivity["intervention"] == "matched_direction"]
    assert len(control) == len(found.sensitivity) / 2
    stamp = (found.folder / "manifest.json").stat().st_mtime_ns
    heard = Heard()
    again = run_intervene(plan, listener=heard)
    assert (again.folder / "manifest.json").stat().st_mtime_ns == stamp
    pd.testing.assert_frame_equal(again.sensitivity, found.sensitivity)
    assert heard.said == []
    assert found.manifest["tables"].keys() == {"sensitivity.csv", "relations.csv", "samples.parquet"}
    with (found.folder / "relations.csv").open("a") as file:
        file.write("\n")
    run_intervene(plan, listener=heard)
    assert heard.said == [f"relations.csv of '{found.folder}' is not as the run wrote it"]


class Heard(Silent):
    """Keeps what is said; `when` something is said, something may be done."""

    def __init__(self, when: Callable[[str], object] = lambda text: None) -> None:
        self.said: list[str] = []
        self.when = when

    def say(self, text: str) -> None:
        self.said.append(text)
        self.when(text)


@pytest.mark.usefixtures("undrawn", "sketched")
def test_images_that_are_replaced_meanwhile_are_told(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(noise, "album")
    given: dict[str, Any] = {"images": "album", "limit": 2, "layers": (0,), "metrics": ("cos_y_vself",)}
    plan = IntervenePlan.checked(models=("demo:vit-p16",), **given)

    def replace(text: str) -> None:
        if "changes of" in text:
            Path("album", "00.png").touch()

    with pytest.raises(UserError, match=r"'album/00\.png' was replaced while it was measured"):
        run_intervene(plan, listener=Heard(replace))
    found = run_intervene(plan)
    assert found.manifest["inputs"]["content"] == content_digest(
        {name: hashlib.sha256(Path("album", name).read_bytes()).hexdigest() for name in ("00.png", "01.png")}
    )


def test_the_command(attnbias: Callable[..., Ended]) -> None:
    given = (
        "-m",
        "demo:vit-p16",
        "--images",
        "demo",
        "--limit",
        4,
        "--intervene",
        "xsa",
        "--intervene",
        "skip",
    )
    done = attnbias("intervene", *given, "--scope", "one", "-o", "out")
    assert done.code == 0, done.err
    assert "class_divergence" in done.out
    assert "matched direction" in done.out
    assert "does it predict the effect?" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert done.lines[-1] == "folder: out"
    assert attnbias("intervene", *given, "--scope", "one", "-o", "out", "-q").out == "out\n"


def test_caveats_stand_in_table_columns_titles_and_manifest(
    attnbias: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, titles = "demo:vit-p16,img_size=48", []

    def kept(figure: Figure, data: pd.DataFrame, folder: Path, stem: str) -> list[Path]:
        titles.append(figure.get_suptitle().replace("\n", " · "))
        return []

    monkeypatch.setattr("diag.show.figures.write.save", kept)
    given = ("-m", model, "--limit", 2, "--intervene", "skip", "--layers", "0-3")
    done = attnbias("intervene", *given, "-o", "out")
    assert done.code == 0, done.err
    assert " ".join(done.out.split()).startswith(
        f"{model} · vision · n = 2 · interpolated positions · demo inputs"
    )
    assert max(map(len, done.out.splitlines())) <= 80
    assert titles == [f"{model} · interpolated positions · demo inputs"] * 3
    for name in ("sensitivity.csv", "relations.csv", "samples.parquet"):
        file = Path("out", name)
        table = pd.read_csv(file) if file.suffix == ".csv" else pd.read_parquet(file)
        assert set(table["positions"]) == {"interpolated"}, name
        assert set(table["inputs"]) == {BY_DEFAULT}
    assert json.loads(Path("out", "manifest.json").read_text())["model"]["inputs"] == BY_DEFAULT


def test_several_models_are_swept_one_after_the_other(attnbias: Callable[..., Ended]) -> None:
    given = (
        "intervene",
        "-m",
        "demo:vit-p16",
        "--images",
        "demo",
        "--limit",
        2,
        "--scope",
        "one",
        "--layers",
        0,
    )
    done = attnbias(*given, "-m", "demo:vit-p8", "-o", "out")
    assert done.code == 0, done.err
    *folders, beside = sorted(Path("out").iterdir())
    assert [line for line in done.lines if line.startswith(("folder: ", "together: "))] == [
        *(f"folder: {folder}" for folder in folders),
        f"together: {beside}",
    ]
    assert [block.split(" ")[0] for block in done.out.split("\n\ndemo:")] == ["demo:vit-p16", "vit-p8"]
    table = pd.read_csv(beside / "sensitivity.csv")
    alone = [pd.read_csv(folder / "sensitivity.csv") for folder in folders]
    pd.testing.assert_frame_equal(table, pd.concat(alone, ignore_index=True))
    assert (
        set(table["model"])
        == {"demo:vit-p16", "demo:vit-p8"}
        == set(pd.read_csv(beside / "costs.csv")["model"])
    )
    assert {path.name for path in (beside / "figures").iterdir()} == {"costs.csv", "costs.pdf", "costs.png"}
    assert "what one layer costs" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    again = attnbias(*given, "-m", "demo:vit-p8", "-o", "out", "--json")
    assert {document["folder"] for document in json.loads(again.out)} == set(map(str, folders))
    partly = attnbias(*given, "-m", "demo:lm", "-o", "out", "-q")
    assert (partly.code, partly.out) == (3, f"{folders[0]}\n")
    assert partly.lines == ["1 failed:", "  demo:lm: model 'demo:lm' has no vision tower"]
    none = attnbias(*given[:1], "-m", "demo:lm", *given[3:], "-m", "demo:nothing")
    assert (none.code, len(none.lines)) == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--intervene", "xsb"), "there is no intervention 'xsb'"),
        (("--intervene", "xsa:9"), "there is no layer 9"),
        (("--intervene", "xsa:0/7"), "layer 0 has no head 7"),
        (("--scope", "all"), "--scope is one of"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str, attnbias: Callable[..., Ended]) -> None:
    done = attnbias("intervene", "-m", "demo:vit-p16", "--images", "demo", "--limit", 1, *arguments)
    assert done.code == 2
    assert message in done.err
    assert len([line for line in done.lines if line.startswith(("error:", "tip:"))]) == 2


def test_a_probe_has_no_other_inputs(attnbias: Callable[..., Ended]) -> None:
    done = attnbias("probe", "-m", "demo:vit-p16", "--images", "demo", "--intervene", "sink_mean:2")
    assert (done.code, done.lines) == (
        2,
        [
            "error: --intervene sink_mean:2: 'sink_mean' takes what held-out inputs gave: a probe has none",
            "tip: attnbias intervene -m MODEL --intervene sink_mean:2",
        ],
    )


@pytest.mark.usefixtures("sketched")
def test_which_layers_can_be_spared(attnbias: Callable[..., Ended]) -> None:
    given = ("-m", "demo:lm", "--texts", "demo", "--seq-len", 24, "--limit", 3, "--layers", "0-3")
    done = attnbias(
        "intervene", *given, "--intervene", "zero", "--intervene", "top_keys=4", "--within", 1, "-o", "out"
    )
    assert done.code == 0, done.err
    assert max(map(len, done.out.splitlines())) <= 80
    words = " ".join(done.out.split())
    assert "what one layer costs, % of the loss" in words
    assert "from this layer up to the last" not in words
    assert re.search(r"zero: [+−-][0-9.]+ in the mean over layers, its control mean", words)
    assert re.search(r"top keys 4: .* its control random keys 4 .*; \d+ % of the attention stays", words)
    manifest = json.loads(Path("out", "manifest.json").read_text())
    assert len(manifest["held_out"]["ids"]) == 16
    assert manifest["held_out"]["measured_as_well"] == 0
    assert Path("out", "figures", "costs.csv").exists()
    one = attnbias("intervene", "--images", "demo")
    assert (one.code, len(one.lines)) == (2, 2)
    assert "name what to change with -m/--model NAME or --series NAME" in one.err


def test_a_corrected_command_can_have_the_folder(attnbias: Callable[..., Ended]) -> None:
    given = (
        "-m",
        "demo:vit-p16",
        "--images",
        "demo",
        "--limit",
        1,
        "--layers",
        0,
        "--scope",
        "one",
        "-o",
        "out",
    )
    assert attnbias("intervene", *given, "--intervene", "xsa:0/7").code == 2
    assert not Path("out").exists()
    assert attnbias("intervene", *given, "--intervene", "xsa:0/2").code == 0


def test_what_is_measured_under_an_intervention(attnbias: Callable[..., Ended]) -> None:
    given = ("-m", "demo:lm", "--texts", "demo", "--limit", 2, "--seq-len", 24)
    done = attnbias("probe", *given, "--intervene", "xsa:2-5", "-o", "changed")
    assert done.code == 0, done.err
    assert attnbias("probe", *given, "-o", "plain").code == 0
    changed, plain = (pd.read_csv(Path(name) / "layers.csv") for name in ("changed", "plain"))
    assert set(changed["intervention"]) == {"xsa:2-5"}
    bias = [table[table["metric"] == "cos_y_vself"].set_index("layer")["mean"] for table in (changed, plain)]
    assert bias[0][[2, 3, 4, 5]].abs().max() < 1e-6
    assert bias[0][[0, 1]].equals(bias[1][[0, 1]])
    assert bias[1].min() > 0.05  # a negative control
    assert "with xsa:2-5" in done.out


def test_listing(attnbias: Callable[..., Ended]) -> None:
    done = attnbias("interventions")
    names = [line.partition("=")[0] for line in done.out.splitlines() if not line.startswith(" ")]
    assert names == list(INTERVENTIONS)
    assert max(map(len, done.out.splitlines())) <= 80
