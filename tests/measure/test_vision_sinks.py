"""Sinks of a vision tower followed into its language model, against a dense float64 reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import save_vision_language_model
from torch import Tensor, nn

import diag
from diag.errors import UserError
from diag.measure.vision_sinks import VisionSinks
from diag.metrics.catalogue import CATALOGUE
from diag.metrics.names import GROUPS, metric_names
from diag.models import load
from diag.models.base import Model
from diag.run.plan import ProbePlan, inputs_of, specs_of

SINK = 5
INPUTS = 3


def _attend_to(model: Any, patch: int) -> None:
    """Head 0 of the vision tower's first layer attends to one patch, whatever the image; head 1 to none."""
    tower = model.model.vision_tower
    attention = tower.encoder.layers[0].self_attn
    width = attention.head_dim
    with torch.no_grad():
        for norm in (tower.pre_layrnorm, tower.encoder.layers[0].layer_norm1):
            norm.reset_parameters()
        mark = torch.ones(attention.embed_dim)
        mark[::2] = -1
        tower.embeddings.position_embedding.weight[1 + patch] = 50 * mark
        attention.q_proj.weight[:width] = 0
        attention.q_proj.bias[:width] = 0
        attention.q_proj.bias[0] = 20
        attention.k_proj.weight[:width] = 0
        attention.k_proj.bias[:width] = 0
        attention.k_proj.weight[0] = mark


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_vision_language_model(tmp_path_factory.mktemp("followed") / "model", "llava")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    _attend_to(model, SINK)
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path) -> tuple[Model, list[Any]]:
    plan = ProbePlan(models=(f"hf:{folder}",), images="demo")
    model = load(specs_of(plan)[0], device="cpu", dtype=torch.float32)
    samples = list(model.tower("language").samples(inputs_of(plan)["vision"], None))
    return model, samples[:INPUTS]


def _is_sink(pattern: Tensor, rows: Tensor) -> Tensor:
    """The dominant key of each head with an event, -1 of the others; from the formula."""
    mean = pattern[:, rows].mean(1)  # [head, key]
    sink = mean.argmax(-1)
    given = pattern[:, rows].gather(-1, sink[:, None, None].expand(-1, len(rows), 1))[..., 0]
    return torch.where((given >= 0.5).double().mean(-1) >= 0.9, sink, -1)


def test_what_carriers_get_is_that_of_a_dense_reference(llava: Path) -> None:
    model, samples = loaded(llava)
    tower, dense = (
        model.tower("language"),
        transformers.LlavaForConditionalGeneration.from_pretrained(llava, attn_implementation="eager")
        .double()
        .eval(),
    )
    values: dict[int, Tensor] = {}
    for number, block in enumerate(dense.model.language_model.layers):

        def keep(module: Any, args: Any, output: Tensor, number: int = number) -> None:
            values[number] = output

        block.self_attn.v_proj.register_forward_hook(keep)
    expected: dict[tuple[str, int], list[Tensor]] = {}
    follow = VisionSinks(model, tower)
    for sample in samples:
        batch = tower.encode([sample])
        classes = follow.classes([sample], batch)
        data = {name: x.double() if x.is_floating_point() else x for name, x in batch.data.items()}
        with torch.inference_mode():
            seen = dense.model.vision_tower(data["pixel_values"], output_attentions=True).attentions[0][0]
            patterns = dense(**data, output_attentions=True, use_cache=False).attentions
        patches = torch.arange(1, seen.shape[-1])
        sinks = {int(s) - 1 for s in _is_sink(seen, patches) if s > 0}
        assert SINK in sinks
        image = batch.sets["image"][0].nonzero()[:, 0]
        carriers = torch.zeros(batch.sets["image"].shape[1], dtype=torch.bool)
        carriers[[int(image[patch]) for patch in sinks]] = True
        assert torch.equal(classes["carriers"][0], carriers)
        assert torch.equal(classes["other_image"][0], batch.sets["image"][0] & ~carriers)
        assert int(classes["random_image"].sum()) == int(carriers.sum())
        assert not bool((classes["random_image"][0] & ~classes["other_image"][0]).any())
        rows = [row for row in batch.sets["text"][0].nonzero()[:, 0].tolist() if row > int(image[-1])]
        for layer, pattern in enumerate(patterns):
            a = pattern[0]  # [head, token, token]
            v = values[layer][0].unflatten(-1, (-1, 8)).transpose(0, 1)
            v = v.repeat_interleave(len(a) // len(v), 0)
            y = a @ v
            share = a * (y @ v.mT) / y.square().sum(-1, keepdim=True)
            text = batch.sets["text"][0].nonzero()[:, 0]
            sink = _is_sink(a, text[text > 0])  # the first row sees itself alone
            for name, mask in classes.items():
                of = {
                    "attention_to": a[:, rows][..., mask[0]].mean((1, 2)),
                    "given_by": share[:, rows][..., mask[0]].mean((1, 2)),
                    "sink_among": torch.tensor([float(s >= 0 and bool(mask[0, s])) for s in sink.tolist()]),
                }
                for prefix, numbers in of.items():
                    expected.setdefault((f"{prefix}_{name}", layer), []).append(numbers.mean())
            expected.setdefault(("carriers", layer), []).append(carriers.sum().double())
    probe = diag.probe(f"hf:{llava}", "demo", limit=INPUTS, metrics=["followed"], tokens=["text"])
    table = probe.layers[probe.layers["tower"] == "language"].set_index(["metric", "layer"])["mean"]
    assert len(expected) == 2 * len(GROUPS["followed"])
    for key, numbers in expected.items():
        assert table[key] == pytest.approx(torch.stack(numbers).mean().item(), abs=2e-5), key
    alone = diag.probe(
        f"hf:{llava}", "demo", limit=INPUTS, metrics=["followed"], tokens=["text"], batch_size=1
    )
    by_one = alone.layers[alone.layers["tower"] == "language"].set_index(["metric", "layer"])["mean"]
    assert by_one.to_dict() == pytest.approx(table.to_dict(), abs=1e-6)


class Reversed(nn.Module):
    """A connector that hands its tokens on in another order, or each as the mean of two."""

    def __init__(self, inner: nn.Module, merged: bool) -> None:
        super().__init__()
        self.inner, self.merged = inner, merged

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x).flip(1)
        return (x + x.roll(1, 1)) / 2 if self.merged else x


def test_which_token_carries_which_patch_is_tried(llava: Path) -> None:
    model, samples = loaded(llava)
    follow = VisionSinks(model, model.tower("language"))
    batch = model.tower("language").encode(samples[:1])
    straight = follow.classes(samples[:1], batch)["carriers"]
    connector = model.module.multi_modal_projector
    for merged in (False, True):
        model.module.multi_modal_projector = Reversed(connector, merged)
        follow.paths.clear()
        if merged:
            with pytest.raises(UserError, match="an image token comes of several patches"):
                follow.classes(samples[:1], batch)
            continue
        turned = follow.classes(samples[:1], batch)["carriers"]
        image = batch.sets["image"]
        assert torch.equal(turned[image], straight[image].flip(0))
        assert not torch.equal(turned, straight)
        layers, patch = follow.paths[int(image.sum())]
        assert patch.tolist() == list(range(len(patch)))[::-1]
        assert layers == {0}  # LLaVA takes the states before the last layer


def test_patches_that_are_merged_and_models_without_images_are_refused_by_name(tmp_path: Path) -> None:
    folder = save_vision_language_model(tmp_path / "model", "qwen2_5_vl_whole")
    model, samples = loaded(folder)
    follow = VisionSinks(model, model.tower("language"))
    with pytest.raises(
        UserError, match="cannot be followed: an image token comes of several patches"
    ) as caught:
        follow.classes(samples[:1], model.tower("language").encode(samples[:1]))
    assert "leave the group 'followed' out" in str(caught.value.tip)
    with pytest.raises(UserError, match="'demo:lm' is none"):
        diag.probe("demo:lm", "demo", limit=1, seq_len=16, metrics=["followed"])


def test_they_have_to_be_named() -> None:
    assert not set(GROUPS["followed"]) & set(metric_names(["all"]))
    assert metric_names(["followed"]) == list(GROUPS["followed"])
    assert all(CATALOGUE[name].formula and CATALOGUE[name].unit for name in GROUPS["followed"])
