"""Models of which it is known what their attention calls mean, so that the tests of meaning need not run.

A model is known by the classes that it is made of; what its modules are called is not asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from diag.models.hooks.content import INPUTS
from diag.models.hooks.depth import Place, stacks_of
from diag.models.hooks.layers import Layer, attention_modules, has_closed

KNOWN = frozenset(
    {
        ("timm", "VisionTransformer", "Attention"),
        ("open_clip", "CLIP", "MultiheadAttention"),
        ("transformers", "BertModel", "BertSelfAttention"),
        ("transformers", "CLIPModel", "CLIPAttention"),
        ("transformers", "DINOv3ViTModel", "DINOv3ViTAttention"),
        ("transformers", "Dinov2WithRegistersModel", "Dinov2WithRegistersAttention"),
        ("transformers", "GPT2Model", "GPT2Attention"),
        ("transformers", "GPTNeoXModel", "GPTNeoXAttention"),
        ("transformers", "LlamaModel", "LlamaAttention"),
        ("transformers", "Qwen3Model", "Qwen3Attention"),
        ("transformers", "ViTModel", "ViTAttention"),
    }
)
"""Library, class of a model and class of its attention of which the tests find nothing unusual: each layer is
called once, over its own tokens, in the usual axes, one row per input, in every block. They are not tested
again; `tests/models/test_conformance.py` holds each line against the tests themselves."""


def is_known(root: nn.Module, layers: Sequence[Layer]) -> bool:
    """Whether the tests are known to find nothing unusual: by class, and as every block has its layer."""
    paths = [layer.path for layer in layers]
    if not kinds_of(root, layers) <= KNOWN or has_closed(root):
        return False
    stack, *others = stacks_of(root, dict.fromkeys(paths))
    return not others and [place.path for place in stack.places] == paths


def trusted(root: nn.Module) -> dict[str, Any]:
    """What stands in a manifest in place of the verdict of the tests, `diag.models.hooks.meaning.told`."""
    return {"tested": False, "known": type(root).__name__, "rows": INPUTS}


def kinds_of(root: nn.Module, layers: Sequence[Layer]) -> set[tuple[str, str, str]]:
    """Library, class of the model, and classes of its attention, as `KNOWN` has them."""
    library = _library(type(root).__module__)
    return {(library, type(root).__name__, type(layer.module).__name__) for layer in layers}


def known_layers(module: nn.Module) -> tuple[tuple[Layer, ...], tuple[Place, ...]] | None:
    """Layers and depth axis of a user's own module, where it is a known model as its library made it.

    Known is also what transformers puts a head on. None where it is not known: a module that anything was
    put into, hooked to or put in the place of is a user's own; and where it is in training mode, or attends
    by another route than those that are known.
    """
    path, base = "", module
    library = _library(type(module).__module__)
    if library == "transformers":
        path = getattr(module, "base_model_prefix", "")
        base = getattr(module, path, module) if path else module
        path = f"{path}." if base is not module else ""
        same_file = isinstance(base, nn.Module) and type(base).__module__ == type(module).__module__
        if not same_file or getattr(module.config, "_attn_implementation", None) != "sdpa":
            return None
    layers = attention_modules(base)
    if not layers or not is_known(base, layers) or not all(_is_as_made(x, library) for x in module.modules()):
        return None
    return (
        tuple(replace(layer, path=path + layer.path) for layer in layers),
        tuple(Place(layer.index, path + layer.path) for layer in layers),
    )


def _is_as_made(module: nn.Module, library: str) -> bool:
    """Whether nothing of a module was changed since its library made it, and it draws nothing at random."""
    own = {_library(type(module).__module__), _library(type(module).forward.__module__)} <= {library, "torch"}
    hooked = module._forward_hooks or module._forward_pre_hooks
    fused = getattr(module, "fused_attn", True)
    return own and fused and not hooked and not module.training and "forward" not in vars(module)


def _library(name: str) -> str:
    """The package that a module of Python is in."""
    return name.partition(".")[0]
