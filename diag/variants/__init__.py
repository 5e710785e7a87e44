"""Trainable attention variants as changes to existing models: no fork, same parameters, names and seeds.

    from diag.variants import apply, parse
    model = timm.create_model("vit_small_patch16_224")
    apply(model, parse("xsa:6-11"))          # before the optimiser, DDP or torch.compile

`sa` is the model as it is. A model says what it is in its state dict's metadata (`variants_in`), and
`restore` makes another model the same, so that a checkpoint can be loaded.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diag.errors import UserError
from diag.variants import attention, branch
from diag.variants.formulas import BASELINE, BROADCASTS, CHANGES, Broadcast, Change, GatedExclusive
from diag.variants.text import NAMES, Variant, parse

__all__ = [
    "BASELINE",
    "METADATA",
    "NAMES",
    "Variant",
    "alphas",
    "apply",
    "described",
    "parse",
    "restore",
    "variants_in",
]

METADATA = "attnbias_variant"
"""Under which a module's state dict, a safetensors header and an HF config say what was changed."""

CHANGEABLE = "timm ViTs, nn.MultiheadAttention (open_clip) and transformers models with sdpa can be"


def apply(model: nn.Module, variant: Variant, *, seed: int = 0) -> tuple[str, ...]:
    """Changes a model in place and returns the paths of the changed modules, in depth order.

    seed: of what a variant draws (random directions, gates' weights); the model's own weights and the
        global generator are left alone, so that variants of one seed start from the same weights.
    Raises UserError where no layer is understood, a layer is not there, or one is changed already.
    """
    if variant.name == BASELINE:
        return ()
    layers = attention_layers(model)
    if not layers:
        raise UserError(f"{type(model).__name__} has no attention that could be changed", CHANGEABLE)
    numbers = layer_numbers(model, layers)
    for layer in sorted(variant.layers or ()):
        if layer not in numbers.values():
            known = ", ".join(map(str, sorted(set(numbers.values()))))
            raise UserError(
                f"variant {variant.name}: there is no layer {layer} whose attention can be changed",
                f"layers are {known}",
            )
    chosen = [path for path in layers if variant.layers is None or numbers[path] in variant.layers]
    paths = [branch.mlp_beside(model, path) for path in chosen] if variant.name in BROADCASTS else chosen
    for path in paths:
        _change(model, path, variant.kind, seed)
    return tuple(paths)


def restore(model: nn.Module, kinds: Mapping[str, str]) -> None:
    """Changes a model as `variants_in` says another was changed; the weights are the caller's.

    Raises UserError where a path is not there or cannot be changed.
    """
    for path, kind in kinds.items():
        try:
            model.get_submodule(path)
        except AttributeError:
            raise UserError(
                f"the checkpoint changes '{path}', which the model does not have",
                "name the architecture it was trained with",
            ) from None
        _change(model, path, kind, 0)


def variants_in(model: nn.Module) -> dict[str, str]:
    """Path → `NAME[=FORM]` of every changed module; empty for a model as its library built it."""
    return {path: module.variant_kind for path, module in model.named_modules() if _is_changed(module)}


def described(model: nn.Module) -> tuple[str, ...]:
    """A line for each variant in a model, for people: `trained with xsa in 6 modules`."""
    counts = Counter(variants_in(model).values())
    return tuple(f"trained with {kind} in {count} modules" for kind, count in counts.items())


def alphas(model: nn.Module) -> dict[int, torch.Tensor]:
    """The learned α of each layer, `[head]`, by the model's own number; of layers that have one."""
    numbers, found = layer_numbers(model, attention_layers(model)), {}
    for path, module in model.named_modules():
        change = getattr(module, "change", None)
        if isinstance(change, GatedExclusive):
            found[numbers[path]] = change.alpha.detach().float().cpu()
    return found


def attention_layers(model: nn.Module) -> tuple[str, ...]:
    """Paths of the self-attention modules that can be, or are, changed, in depth order; pooling is none."""
    return tuple(
        path
        for path, module in model.named_modules()
        if "pool" not in path
        and ((_is_changed(module) and isinstance(module.change, Change)) or attention.can_be_changed(module))
    )


def layer_numbers(model: nn.Module, paths: Sequence[str]) -> dict[str, int]:
    """The model's own number of each attention module, as a probe counts them.

    Blocks of one kind have one each, whatever mixes tokens there; several towers are numbered through.
    """
    block_of = {path: _block(path, paths) for path in paths}
    kinds = {_unnumbered(block) for block in block_of.values()}
    blocks = [path for path, _ in model.named_modules() if _unnumbered(path) in kinds]
    return {path: blocks.index(block) for path, block in block_of.items()}


def _block(path: str, others: Sequence[str]) -> str:
    """It ends in the last number that differs among its like; without a number it is the path."""
    parts = path.split(".")
    like = [other.split(".") for other in others if _unnumbered(other) == _unnumbered(path)]
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    varying = [place for place in numbers if len({other[place] for other in like}) > 1]
    return ".".join(parts[: (varying or numbers[:1] or [len(parts)])[-1] + 1])


def _unnumbered(path: str) -> str:
    return ".".join("#" if part.isdigit() else part for part in path.split("."))


def _is_changed(module: nn.Module) -> Any:
    return isinstance(getattr(module, "change", None), Change | Broadcast)


def _change(model: nn.Module, path: str, kind: str, seed: int) -> None:
    variant = parse(kind)
    module: Any = model.get_submodule(path)
    if _is_changed(module):
        raise UserError(f"'{path}' is changed already, to {module.variant_kind}", "build the model again")
    if variant.name in BROADCASTS:
        branch.swap(model, path, scaled=variant.name == "cb_s")
    elif not attention.can_be_changed(module):
        raise UserError(f"'{path}' is a {type(module).__name__}, which cannot be changed", CHANGEABLE)
    else:
        # torch's generator on the CPU looks at the low 32 bits of a seed only
        generator = torch.Generator().manual_seed(zlib.crc32(path.encode(), seed))
        attention.swap(module, path, lambda sizes: CHANGES[variant.name](sizes, variant.form, generator))
    module.variant_kind = variant.kind
    module._register_state_dict_hook(_remember)


def _remember(module: Any, tensors: Any, prefix: str, metadata: dict[str, Any]) -> None:
    """A state dict hook: what a module is travels with its weights, beside them."""
    metadata[METADATA] = module.variant_kind
