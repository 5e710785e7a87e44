"""timm's architectures, small: one of each kind in model files that compute attention, else one a file."""

from __future__ import annotations

import inspect
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import _hub, _registry
from torch import nn

from zoo.case import Case, NotBuiltError, lively

SIZE = re.compile(
    r"^(tiny|small|base|large|huge|giant|gigantic|nano|pico|femto|atto|medium|mediumd|little|betwixt|wee|x+large|"
    r"enormous|so\d+m\d?|x+small|x*s|x+t|t|m|b|l|h|g|e|xl|n|\d+[mbk]?|\d+(ts|t|d|px)?|[bstmlxmwdvfpc]\d+|ti|x+tiny|"
    r"patch\d+|window\d+|pm|rw|tf|in21k|ma\d+|sa\d+|mci\d|x+|[a-z]*net[a-z]*\d+[a-z]?)$"
)
SMALLEST = [
    "test",
    "zepto",
    "atto",
    "femto",
    "pico",
    "nano",
    "xxt",
    "xxtiny",
    "xxs",
    "xtiny",
    "xt",
    "ti",
    "tiny",
    "wee",
    "xs",
    "xsmall",
    "t",
    "pwee",
    "little",
    "s",
    "small",
]
EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_tiny_patch16_224 (attn_layer=diff)": ("vit_tiny_patch16_224", {"attn_layer": "diff"}),
    "vit_tiny_patch16_224 (class_token=False)": (
        "vit_tiny_patch16_224",
        {"class_token": False, "global_pool": "avg"},
    ),
    "xcit_nano_12_p16_224 (fused)": ("xcit_nano_12_p16_224", {}),
    "swin_tiny_patch4_window7_224 (fused)": ("swin_tiny_patch4_window7_224", {}),
}
SMALLER: tuple[dict[str, Any], ...] = (
    {"depth": 2, "embed_dim": 96, "num_heads": 3},
    {"depth": 2},
    {"depths": (1, 1, 2, 1)},
    {},
)
"""What is tried to make a model smaller, in turn."""

SIDES = (64, 96, 112, 128, 224, 256, 384)
LEAST = {"lowformer": 224}
"""Sides below which the tokens of the last stage are too few: a convolution would reach over half of them."""


def names() -> list[str]:
    """One architecture of each kind that timm's model files hold, the smallest of its sizes."""
    files: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in timm.list_models():
        module = _registry._model_entrypoints[name].__module__
        kind = "_".join(word for word in name.split("_") if not SIZE.match(word))
        files[module][kind].append(name)
    chosen: list[str] = []
    for module, kinds in files.items():
        source = inspect.getsource(sys.modules[module])
        attends = "softmax" in source or "scaled_dot_product" in source
        found = [min(of_kind, key=_size) for of_kind in kinds.values()]
        chosen += found if attends else [min(found, key=_size)]
    return sorted(chosen) + list(EXTRA)


def _size(name: str) -> tuple[int, str]:
    words = re.split(r"[_\d]+", name)
    return min((SMALLEST.index(word) for word in words if word in SMALLEST), default=99), name


def build(name: str, folder: Path | None) -> Case:
    """The architecture at the smallest size that runs. Raises NotBuiltError with the last reason."""
    architecture, arguments = EXTRA.get(name, (name, {}))
    config = timm.models.get_pretrained_cfg(architecture)
    native = config.input_size[-1] if config else 224
    least = next((side for kind, side in LEAST.items() if architecture.startswith(kind)), 0)
    sides = [side for side in SIDES if least <= side < native] + [native]
    fixed = bool(config and config.fixed_input_size)
    trials = [
        less | ({"img_size": side} if fixed else {}) for less in SMALLER for side in (sides if fixed else [0])
    ]
    trials += [{}] if fixed else []
    why = "nothing was tried"
    for trial in trials:
        try:
            torch.manual_seed(0)
            module = timm.create_model(architecture, pretrained=False, num_classes=7, **arguments, **trial)
        except (
            TypeError,
            ValueError,
            AssertionError,
            RuntimeError,
            IndexError,
            KeyError,
            AttributeError,
            StopIteration,
        ) as error:
            why = f"{type(error).__name__}: {error}"
            continue
        lively(module).requires_grad_(False)
        if name.endswith("(fused)"):
            for part in module.modules():
                if hasattr(part, "fused_attn"):
                    part.fused_attn = True
        for side in [trial.get("img_size", native)] if fixed else sides:
            batch = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
            try:
                with torch.no_grad():
                    module(batch)
            except (TypeError, ValueError, AssertionError, RuntimeError, IndexError) as error:
                why = f"{type(error).__name__}: {error}"
                continue
            case = Case("timm", name, module, batch, prefix=prefix_of(module, architecture))
            if folder is not None:
                arguments_of = {**arguments, **trial, "num_classes": 7}
                case.folder = saved(module, folder, side, arguments_of)
            return case
    raise NotBuiltError(why.splitlines()[0][:200])


def saved(module: nn.Module, folder: Path, side: int, arguments: dict[str, Any]) -> Path:
    """The model as timm saves it, with preprocessing to images of `side` pixels."""
    arguments.pop("num_classes", None)
    plain = {
        key: value for key, value in arguments.items() if isinstance(value, int | str | bool | float | tuple)
    }
    size = {"input_size": (3, side, side)}
    _hub.save_config_for_hf(module, str(folder / "config.json"), model_args=plain, data_config=size)
    state = {key: value.clone().contiguous() for key, value in module.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def prefix_of(module: nn.Module, architecture: str) -> int:
    """How many tokens stand before the patches: knowledge of the architectures, not read as attnbias does."""
    if architecture.startswith(("pit_", "crossvit", "tnt", "coat_")):
        return 2 if "distilled" in architecture else 1
    if architecture.startswith(
        ("cait", "xcit", "volo", "convit")
    ):  # class tokens come after layers of patches
        return 0
    parameters = dict(module.named_parameters())
    count = 0
    for path, parameter in parameters.items():
        last = path.rpartition(".")[2]
        if (
            last in ("cls_token", "dist_token", "reg_token", "register_tokens", "class_token")
            and path.count(".") < 2
        ):
            count += parameter.shape[-2] if parameter.ndim > 1 else 1
    return count
