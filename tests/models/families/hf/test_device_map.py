"""Models over several devices: what `from_pretrained` is told, what is refused, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import TEXT

from diag.errors import UserError
from diag.inputs.items import Inputs, Item
from diag.measure.loop import measure
from diag.metrics.default import METRICS
from diag.metrics.stream import STREAM_METRICS
from diag.models import load
from diag.models.base import Model
from diag.models.families.hf import device_map
from diag.models.family import SPREAD
from diag.models.hooks.block_parts import find_blocks
from diag.models.names.resolve import parse

TEXTS = Inputs("texts", "cats", [Item("long", lambda: TEXT)], "0")


def numbers(model: Model, kind: str, inputs: Inputs, **options: Any) -> list[np.ndarray]:
    tower = model.towers[kind]
    samples = [sample for sample, _ in zip(tower.samples(inputs, None), range(3), strict=False)]
    return [layer.values for batch in measure(tower, samples, **options) for layer in batch]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "vit", "clip", "siglip", "dinov2"])
def test_without_a_gpu_everything_lies_on_the_cpu(
    folder_of: Callable[[str], Path], photographs: Inputs, kind: str
) -> None:
    spec = parse(f"hf:{folder_of(kind)}")
    once = load(spec, device="cpu", dtype=torch.float32)
    again = load(spec, device=SPREAD, dtype=torch.float32)
    assert list(again.towers) == list(once.towers)
    for tower in once.towers:
        inputs = TEXTS if tower == "text" else photographs
        pairs = zip(numbers(once, tower, inputs), numbers(again, tower, inputs), strict=True)
        assert all(np.array_equal(one, other, equal_nan=True) for one, other in pairs)


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_what_finds_no_room_is_refused(
    folder_of: Callable[[str], Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_map, "room", lambda: {"cpu": 20_000})
    with pytest.raises(UserError, match=r"does not fit: 0.0 of 0.0 GB would stay on disk") as caught:
        load(parse(f"hf:{folder_of(kind)}"), device=SPREAD, dtype=torch.float32)
    assert "more GPUs" in str(caught.value.tip)


def test_the_memory_of_the_processor_is_for_machines_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {0: 5, 1: 6, "cpu": 7}
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: free)
    assert device_map.room() == {0: 5, 1: 6}
    assert device_map.placement() == {"device_map": "auto", "max_memory": {0: 5, 1: 6}}
    free.clear()
    free["cpu"] = 7
    assert device_map.room() == {"cpu": 7}


def test_other_families_and_random_weights_are_refused(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="only hf: models can be spread") as caught:
        load(parse("demo:vit-p16"), device=SPREAD, dtype=torch.float32)
    assert caught.value.tip == "--device auto or cuda:0"
    spec = parse(f"hf:{folder_of('llama')}", random_init=True)
    with pytest.raises(UserError, match="does not go with --random-init"):
        load(spec, device=SPREAD, dtype=torch.float32)


@pytest.mark.parametrize("device", ["cpu", SPREAD])
def test_rotary_frequencies_keep_their_precision(folder_of: Callable[[str], Path], device: str) -> None:
    """In bfloat16 they are wrong by up to 0.4 %: at token 1,000 by several radians."""
    model = load(parse(f"hf:{folder_of('llama')}"), device=device, dtype=torch.bfloat16)
    buffers = dict(model.module.named_buffers())
    assert buffers["rotary_emb.inv_freq"].dtype == torch.float32
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.bfloat16}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit"])
def test_layers_on_two_gpus_give_the_numbers_of_one(
    folder_of: Callable[[str], Path], photographs: Inputs, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = parse(f"hf:{folder_of(kind)}")
    tower, inputs = ("vision", photographs) if kind == "vit" else ("text", TEXTS)
    once = load(spec, device="cuda:0", dtype=torch.float32)
    size = sum(parameter.nbytes for parameter in once.module.parameters())
    monkeypatch.setattr(device_map, "room", lambda: {0: int(0.7 * size), 1: size})
    over_two = load(spec, device=SPREAD, dtype=torch.float32)
    assert {parameter.device.index for parameter in over_two.module.parameters()} == {0, 1}
    for one, other in zip(numbers(once, tower, inputs), numbers(over_two, tower, inputs), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit"])
def test_what_accelerate_hangs_on_every_module_is_not_in_the_way(
    folder_of: Callable[[str], Path], photographs: Inputs, kind: str
) -> None:
    """Its hooks replace each module's `forward`: attention, blocks and projections must still be seen."""
    from accelerate import dispatch_model

    spec = parse(f"hf:{folder_of(kind)}")
    tower, inputs = ("vision", photographs) if kind == "vit" else ("text", TEXTS)
    once, hooked = (load(spec, device="cpu", dtype=torch.float32) for _ in range(2))
    parts = {name: "cpu" for name, _ in hooked.module.named_children()}
    dispatch_model(hooked.module, parts, main_device="cpu", force_hooks=True)
    assert "forward" in vars(hooked.towers[tower].layers[0].module)  # a hook is there
    found = []
    for model in (once, hooked):
        blocks = find_blocks(model.module, model.towers[tower].layers)
        options = {"metrics": [*METRICS, *STREAM_METRICS], "blocks": blocks, "value_constants": None}
        found.append(numbers(model, tower, inputs, **options))
    assert len(found[0]) == 4  # two layers, each with numbers of heads and of the stream
    assert all(np.array_equal(one, other, equal_nan=True) for one, other in zip(*found, strict=True))
