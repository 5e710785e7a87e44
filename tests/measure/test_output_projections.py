"""What sinks of whole models do: contributions through W_O and layer scale, against dense float64 ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import save_language_model
from reference import Array, dense_pattern, float64
from torch import Tensor, nn

from diag.inputs import images as inputs
from diag.inputs.texts import texts
from diag.measure.batch_readings import Incidents
from diag.measure.loop import capture, measure
from diag.metrics import sink_events
from diag.metrics.sink_events import OF_PROJECTION
from diag.models import load
from diag.models.base import Model, Sample, Tower
from diag.models.hooks.block_parts import understood_blocks
from diag.models.names.resolve import parse

NAMES = ["sink_event", *OF_PROJECTION, "sink_index", "sink_on_cls", "sink_on_registers", "sink_on_image"]


@pytest.fixture(autouse=True)
def every_head_has_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights give none."""
    monkeypatch.setattr(sink_events, "LEAST_WEIGHT", 0.0)


def loaded(name: str) -> tuple[Model, Tower, list[Sample]]:
    model = load(parse(name, random_init="timm:" in name), device="cpu", dtype=torch.float32)
    tower = next(iter(model.towers.values()))
    given = inputs.demo_images() if tower.name == "vision" else texts("demo")
    found = list(itertools.islice(tower.samples(given, 9 if tower.name == "text" else None), 3))
    return model, tower, [Sample.holding(sample.id, sample.read()) for sample in found]


def run(
    model: Model, tower: Tower, samples: Sequence[Sample], incidents: Incidents | None = None, **options: Any
) -> dict[str, Array]:
    """`[layer, input, head]` of each metric, of all tokens."""
    blocks = understood_blocks(model.module, tower.layers)
    given = {"metrics": NAMES, "token_sets": ["all"], "blocks": blocks, "incidents": incidents} | options
    parts = [np.stack([layer.values[0] for layer in batch]) for batch in measure(tower, samples, **given)]
    found = np.concatenate(parts, 2)
    return {name: found[:, number] for number, name in enumerate(NAMES)}


def dense(call: Any, weight: Tensor) -> tuple[Array, Array]:
    """Value norm ratio and stable rank with U as it stands. weight: `[width, head · dim]`, scaled."""
    pattern, value = dense_pattern(call), float64(call.value)
    ratio, rank = np.zeros((2, *call.output.shape[:2]))
    rows = [i for i in range(call.tokens) if i or not call.causal]
    for b, h in np.ndindex(*call.output.shape[:2]):
        of_head = float64(weight).T.reshape(call.heads, -1, len(weight))[h]
        contributions = value[b, h // call.group] @ of_head
        norms, attention = np.linalg.norm(contributions, axis=-1), pattern[b, h, rows]
        sink = attention.sum(0).argmax()
        ratio[b, h] = norms[sink] / np.delete(norms, sink).mean()
        singular = np.linalg.svd(attention @ contributions, compute_uv=False)
        rank[b, h] = (singular**2).sum() / singular[0] ** 2
    return ratio, rank


def scaled(block: nn.Module) -> Tensor:
    """W_O with layer scale, of a timm block."""
    weight: Any = block.attn.proj.weight
    scale: Any = getattr(block.ls1, "gamma", getattr(block, "gamma_1", None))
    return weight if scale is None else weight * scale[:, None]


TIMM = "timm:vit_small_patch14_reg4_dinov2,img_size=56,depth=2"


def test_layer_scale_is_part_of_what_a_value_adds() -> None:
    model, tower, samples = loaded(TIMM)
    with torch.no_grad():
        for block in model.module.blocks:
            block.ls1.gamma.uniform_(-2, 2)
    incidents = Incidents()
    found = run(model, tower, samples, incidents)
    assert not incidents.sinks_unprojected
    for number, call in enumerate(capture(tower, tower.encode(samples))):
        ratio, rank = dense(call, scaled(model.module.blocks[number]))
        np.testing.assert_allclose(found["value_norm_ratio_out"][number], ratio, rtol=1e-4)
        np.testing.assert_allclose(found["stable_rank"][number], rank, rtol=1e-4)
    kinds = found["sink_on_cls"] + found["sink_on_registers"] + found["sink_on_image"]
    np.testing.assert_array_equal(kinds, 1)
    np.testing.assert_array_equal(found["sink_on_cls"] == 1, found["sink_index"] == 0)
    registers = (found["sink_index"] > 0) & (found["sink_index"] < 5)
    np.testing.assert_array_equal(found["sink_on_registers"] == 1, registers)


def test_grouped_heads_have_the_values_of_their_group(tmp_path: Path) -> None:
    model, tower, samples = loaded(f"hf:{save_language_model(tmp_path, 'llama')}")
    found = run(model, tower, samples)
    calls = capture(tower, tower.encode(samples))
    assert calls[0].group > 1
    for number, call in enumerate(calls):
        ratio, rank = dense(call, model.module.layers[number].self_attn.o_proj.weight)
        np.testing.assert_allclose(found["value_norm_ratio_out"][number], ratio, rtol=1e-4)
        np.testing.assert_allclose(found["stable_rank"][number], rank, rtol=1e-4)


@pytest.mark.parametrize("name", ["demo:vit-p16", "demo:lm"])
def test_streamed_equals_one_shot(name: str) -> None:
    model, tower, samples = loaded(name)
    whole, parts = (run(model, tower, samples, batch_size=size) for size in (3, 1))
    for metric in NAMES:
        np.testing.assert_allclose(parts[metric], whole[metric], rtol=1e-5, err_msg=metric)


def test_a_projection_outside_of_the_attention_module_is_seen(tmp_path: Path) -> None:
    """BERT's lies beside it."""
    model, tower, samples = loaded(f"hf:{save_language_model(tmp_path, 'bert')}")
    incidents = Incidents()
    found = run(model, tower, samples, incidents)
    assert not incidents.sinks_unprojected
    assert not np.isnan(found["stable_rank"]).any()


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_what_comes_between_heads_and_projection_leaves_the_classes_empty() -> None:
    model, tower, samples = loaded(TIMM)
    model.module.blocks[1].attn.norm = Doubled()
    incidents = Incidents()
    found = run(model, tower, samples, incidents, batch_size=2)
    assert incidents.sinks_unprojected == [tower.layers[1].path]
    for name in OF_PROJECTION:
        assert not np.isnan(found[name][0]).any()
        assert np.isnan(found[name][1]).all()
    assert not np.isnan(found["sink_event"]).any()


def test_a_block_that_is_not_understood_is_named() -> None:
    model, tower, samples = loaded(TIMM)
    incidents = Incidents()
    found = run(model, tower, samples, incidents, blocks=())
    assert incidents.sinks_unprojected == [layer.path for layer in tower.layers]
    assert np.isnan(found["stable_rank"]).all()
    assert not np.isnan(found["sink_event"]).any()
