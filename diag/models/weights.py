"""Weights: reading checkpoint files without running their code, fitting them to a model, hashing them."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from diag.errors import UserError
from diag.variants import METADATA

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training programs put the weights, beside the optimiser's state."""

PREFIXES = ("module.", "_orig_mod.")
"""What data-parallel and compiled training put before every name."""


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pt file that holds nothing but weights, on the CPU.

    A state dict inside a training checkpoint is unwrapped, and prefixes of parallel training removed.
    Raises UserError if the file is missing, damaged, or could run code on loading.
    """
    if not file.is_file():
        raise UserError(
            f"checkpoint '{file}' does not exist",
            "--checkpoint takes a .safetensors or a weights-only .pt file",
        )
    tensors = _state_dict(_safetensors(file) if file.suffix == ".safetensors" else _pickle(file))
    if not tensors:
        raise UserError(
            f"checkpoint '{file}' holds no named tensors", "save it with torch.save(model.state_dict(), FILE)"
        )
    return tensors


def read_variants(file: Path) -> dict[str, str]:
    """Path → variant of the modules that were changed when a checkpoint was saved (`diag.variants`).

    Read from the header of a safetensors file, or from the metadata of a state dict; empty where nothing
    was changed. The file is one that `read_checkpoint` has read.
    """
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            return json.loads((opened.metadata() or {}).get(METADATA, "{}"))
    loaded = _unwrapped(_pickle(file))
    said = {path: entry.get(METADATA) for path, entry in getattr(loaded, "_metadata", {}).items()}
    return {_without_prefixes(path): kind for path, kind in said.items() if kind}


def _without_prefixes(path: str) -> str:
    for prefix in PREFIXES:
        path = path.removeprefix(prefix)
    return path


def _safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from None


def _pickle(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise UserError(
                f"checkpoint '{file}' holds more than weights and could run code: not loaded",
                "save the weights alone: torch.save(model.state_dict(), FILE)",
            ) from None
        if "TorchScript" in str(error):
            raise UserError(
                f"checkpoint '{file}' is a TorchScript archive, not weights",
                "save the weights alone: torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)",
            ) from None
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
    return UserError(f"checkpoint '{file}' cannot be read: {reason}", "copy or download the file again")


def _unwrapped(loaded: Any) -> Any:
    """The state dict inside a training checkpoint."""
    for key in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            return loaded[key]
    return loaded


def _state_dict(loaded: Any) -> dict[str, Tensor]:
    loaded = _unwrapped(loaded)
    if not isinstance(loaded, Mapping):
        return {}
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def fit(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Loads `tensors` into `module`, every one and no other.

    Raises UserError naming up to three tensors whose shape differs, are missing, or are not the model's.
    """
    expected = module.state_dict()
    wrong = [
        f"'{name}' is {list(tensors[name].shape)}, the model's is {list(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if wrong:
        raise UserError(
            f"{source} does not fit the model: {up_to_three(wrong, '; ')}",
            "name the architecture it was trained with, or give its sizes with --model-arg key=value",
        )
    missing = [f"'{name}'" for name in expected if name not in tensors]
    extra = [f"'{name}'" for name in tensors if name not in expected]
    if missing or extra:
        parts = [f"it lacks {up_to_three(missing)}"] if missing else []
        parts += [f"the model has no {up_to_three(extra)}"] if extra else []
        raise UserError(
            f"{source} does not fit the model: {' and '.join(parts)}",
            "name the architecture it was trained with, or give its options with --model-arg key=value",
        )
    module.load_state_dict(dict(tensors))


def refuse_non_finite(module: nn.Module, source: str) -> None:
    """Raises UserError that names the first tensor of a model that holds NaN or infinity.

    Buffers are left out: masks hold infinities by design.
    """
    for name, parameter in module.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise UserError(f"{source}: the weights '{name}' hold NaN or infinity", "check the training run")


def digest(module: nn.Module) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor of a model's state, as it was loaded."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            data = tensor.detach().to("cpu").contiguous().reshape(-1)
            total.update(data.view(torch.uint8).numpy().data if data.numel() else b"")
    return total.hexdigest()


def up_to_three(items: Sequence[str], separator: str = ", ") -> str:
    """The first three of what is wrong, and how many more there are."""
    shown = separator.join(items[:3])
    return shown if len(items) <= 3 else f"{shown} and {len(items) - 3} more"
