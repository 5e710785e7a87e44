"""A user's own module that is a known model: its layers are found without running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from diag.models import known
from diag.models.base import Tower
from diag.models.families.from_module import from_module
from diag.models.hooks.layout import PLAIN

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PIXELS = {"image_size": 32, "patch_size": 8}


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **VIT).eval()


def gpt2(**more: Any) -> nn.Module:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=16, vocab_size=50, **more)
    return transformers.GPT2LMHeadModel(config).eval()


def ids() -> dict[str, Tensor]:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": torch.randint(2, 50, (3, 9)), "attention_mask": mask}


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32)


BUILT: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "timm": (vit, images),
    "GPT-2 with a head": (gpt2, ids),
    "Llama with a head": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **SIZES)).eval(),
        ids,
    ),
    "ViT with a head": (
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, **PIXELS)).eval(),
        images,
    ),
    "BERT alone": (
        lambda: transformers.BertModel(transformers.BertConfig(vocab_size=50, **SIZES)).eval(),
        ids,
    ),
}


def found(module: nn.Module, batch: Any) -> tuple[Tower, int]:
    """The tower of a module, and how often that was run to find it."""
    ran = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda each, _: ran.append(each is module))
    _, (tower,), _ = from_module(module, [batch], allow_random=True)
    handle.remove()
    return tower, sum(ran)


@pytest.mark.parametrize("name", BUILT)
def test_a_known_module_is_not_run_and_its_layers_are_those_of_the_tests(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    build, given = BUILT[name]
    module, batch = build(), given()
    tower, runs = found(module, batch)
    monkeypatch.setattr(known, "KNOWN", frozenset())
    tested, runs_of_tests = found(module, batch)
    assert (runs, runs_of_tests >= 2) == (0, True)
    assert tower.meaning == {"tested": False, "known": type(module).__name__, "rows": "one per input"}
    assert tested.meaning["tested"]
    for one in (tower, tested):
        assert [(layer.index, layer.name, layer.form.value_from) for layer in one.layers] == [
            (place.index, place.path, "own") for place in tested.places
        ]
        assert one.layers[1].module is module.get_submodule(one.layers[1].path)
        assert {layer.form.layout or PLAIN for layer in one.layers} == {PLAIN}
        real = one.encode([one_sample(module, batch)]).real
        assert (real is None) == isinstance(batch, Tensor)
        assert (one.name, one.skipped, one.joined, one.max_batch) == ("module", {}, {}, 1)
    assert tower.places == tested.places


def one_sample(module: nn.Module, batch: Any) -> Any:
    _, _, (sample,) = from_module(module, [batch], allow_random=True)
    return sample


class Own(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def wrapped() -> nn.Module:
    return Own(vit()).eval()


def with_a_part_of_ones_own() -> nn.Module:
    module = vit()
    module.blocks[1].mlp = Own(module.blocks[1].mlp)
    return module.eval()


def with_another_forward() -> nn.Module:
    module = vit()
    module.blocks[0].forward = module.blocks[0].forward
    return module


def hooked() -> nn.Module:
    module = vit()
    module.blocks[0].register_forward_pre_hook(lambda module, args: None)
    return module


def unfused() -> nn.Module:
    module = vit()
    module.blocks[0].attn.fused_attn = False
    return module


def partly_in_training_mode() -> nn.Module:
    module = vit()
    module.blocks[1].train()
    return module


def inherited() -> nn.Module:
    module = vit()
    module.__class__ = type("VisionTransformer", (type(module),), {"__module__": "mine"})
    return module


@pytest.mark.parametrize(
    "build",
    [
        wrapped,
        with_a_part_of_ones_own,
        with_another_forward,
        hooked,
        unfused,
        partly_in_training_mode,
        inherited,
        lambda: gpt2(attn_implementation="eager"),
        lambda: timm.create_model("vit_tiny_patch16_224", global_pool="map", class_token=False, **VIT).eval(),
    ],
)
def test_what_is_not_as_its_library_made_it_is_tested(build: Callable[[], nn.Module]) -> None:
    module = build()
    tower, runs = found(module, ids() if isinstance(module, transformers.PreTrainedModel) else images())
    assert tower.meaning["tested"]
    assert runs >= 2
