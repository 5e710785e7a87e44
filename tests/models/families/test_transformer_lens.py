"""transformer-lens is an independent route: for one checkpoint it must give the table of `hf:`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from diag.attention.call import AttentionCall
from diag.attention.pattern import pattern_rows
from diag.attention.softmax_statistics import softmax_statistics
from diag.errors import MeasurementError, UserError
from diag.inputs.items import Inputs
from diag.measure.loop import capture
from diag.metrics.default import per_input, selections_of
from diag.metrics.pattern_shape import SHAPE_METRICS, shape_readings
from diag.metrics.readings import reduce
from diag.models import load
from diag.models.base import Tower
from diag.models.families.from_module import from_module
from diag.models.names.resolve import parse
from diag.models.names.spec import ModelSpec

CPU = {"device": "cpu", "dtype": torch.float32}
Folders = Callable[[str], Path]


def calls_of(tower: Tower, texts: Inputs) -> list[AttentionCall]:
    batch = tower.encode([sample for sample, _ in zip(tower.samples(texts, 14), range(3), strict=False)])
    calls: list[AttentionCall] = []
    with torch.inference_mode(), tower.capture(tower.layers, calls.append):
        tower.forward(batch)
    return calls


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox", "qwen3"])
def test_both_routes_see_the_same_attention(kind: str, folder_of: Folders, texts: Inputs) -> None:
    ours = calls_of(load(parse(f"hf:{folder_of(kind)}"), **CPU).tower("text"), texts)
    theirs = calls_of(load(parse(f"tl:{folder_of(kind)}"), **CPU).tower("text"), texts)
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        assert b.query is None
        assert a.value.shape == b.value.shape
        torch.testing.assert_close(a.value, b.value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a.output, b.output, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pattern_rows(a), pattern_rows(b), rtol=1e-5, atol=1e-5)
        one, other = softmax_statistics(a), softmax_statistics(b)
        torch.testing.assert_close(one.entropy, other.entropy, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.self_weight, other.self_weight, rtol=1e-4, atol=1e-5)
        assert torch.equal(a.visibility.count, b.visibility.count)
        assert a.output.abs().mean() > 1e-3  # not all zeros on both sides


@pytest.mark.parametrize("kind", ["gemma2", "gpt-oss"])
def test_soft_caps_and_sinks_give_the_numbers_of_the_model_as_a_module(
    kind: str, folder_of: Folders, texts: Inputs
) -> None:
    tower = load(parse(f"tl:{folder_of(kind)}"), **CPU).tower("text")
    theirs = calls_of(tower, texts)
    ids = tower.encode([sample for sample, _ in zip(tower.samples(texts, 14), range(3), strict=False)]).data

    def of_module(**config: object) -> list[AttentionCall]:
        model = AutoModelForCausalLM.from_pretrained(folder_of(kind), attn_implementation="eager", **config)
        _, (own,), samples = from_module(model.eval(), [{"input_ids": ids}])
        return capture(own, own.encode(samples))

    ours = of_module()
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(pattern_rows(a), pattern_rows(b), rtol=1e-5, atol=1e-6)
        measured, other = (both_kinds(call) for call in (a, b))
        for name, numbers in measured.items():
            torch.testing.assert_close(numbers, other[name], rtol=1e-5, atol=1e-6, equal_nan=True, msg=name)
        sums = measured["row_sum"]
        assert (sums < 0.97).all() if kind == "gpt-oss" else (sums - 1).abs().max() < 1e-5
    if kind == "gemma2":  # negative control: without its cap the model attends to other tokens
        without = pattern_rows(of_module(attn_logit_softcapping=None)[0])
        assert (without - pattern_rows(ours[0])).abs().max() > 0.05


def both_kinds(call: AttentionCall) -> dict[str, Tensor]:
    """The default metrics and those of the shape of attention, but for the layer before."""
    (found,) = shape_readings(selections_of(call, [None]), [n for n in SHAPE_METRICS if "top" not in n])
    return per_input(call) | {name: reduce([one], call.batch, "mean") for name, one in found.items()}


def test_no_hook_outlives_the_capture(folder_of: Folders, texts: Inputs) -> None:
    model = load(parse(f"tl:{folder_of('gpt2')}"), **CPU)
    tower = model.tower("text")
    attention = tower.layers[0].module

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in attention.modules())

    batch = tower.encode([next(tower.samples(texts, 8))])
    tower.forward(batch)  # transformers installs hooks of its own at the first forward pass
    before = hooks()
    with tower.capture(tower.layers, lambda call: None):
        assert hooks() > before
    assert hooks() == before
    with pytest.raises(KeyError), tower.capture(tower.layers, lambda call: {}["no"]):
        tower.forward(batch)
    assert hooks() == before


def test_a_layer_that_shows_nothing_is_named(folder_of: Folders, texts: Inputs) -> None:
    tower = load(parse(f"tl:{folder_of('gpt2')}"), **CPU).tower("text")
    batch = tower.encode([next(tower.samples(texts, 8))])
    with tower.capture(tower.layers, lambda call: None):
        tower.layers[0].module.hook_pattern.remove_hooks()
        with pytest.raises(MeasurementError, match=r"layer 'blocks\.0\.attn' finished without"):
            tower.forward(batch)


@pytest.mark.parametrize(
    ("file", "held"), [("adapter_config.json", "an adapter"), ("q4.gguf", "a model in GGUF")]
)
def test_what_only_the_other_route_reads_is_told(tmp_path: Path, file: str, held: str) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(UserError) as error:
        load(ModelSpec("x", "tl", str(tmp_path)), **CPU)
    assert str(error.value) == f"folder '{tmp_path}' holds {held}, which tl: names do not read"
    assert error.value.tip == f"-m hf:{tmp_path} reads it"


def test_errors(folder_of: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'config\.json' of 'openai-community/gpt2' is not on this machine"):
        load(parse("tl:gpt2"), **CPU)
    with pytest.raises(UserError, match="takes the weights of its folder only"):
        load(ModelSpec("x", "tl", str(folder_of("gpt2")), random_init=True), **CPU)
    with pytest.raises(UserError) as error:
        load(parse(f"tl:{folder_of('vit')}"), **CPU)
    assert "\n" not in str(error.value)


def test_a_folder_is_not_taken_for_a_name_of_the_library(
    folder_of: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformer-lens knows a model of a hub as `neox`."""
    shutil.copytree(folder_of("neox"), tmp_path / "neox")
    monkeypatch.chdir(tmp_path)
    assert len(load(parse("tl:./neox"), **CPU).tower("text").layers) == 2
