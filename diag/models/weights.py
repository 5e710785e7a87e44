"""Weights: fitting those of a file to a model, refusing what cannot be measured, hashing them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from diag.errors import UserError

SUMMED = (torch.float32, torch.bfloat16, torch.float16)
"""Formats of which any infinity or NaN stays one in a sum of float32."""


def fit(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Loads `tensors` into `module`, every one and no other.

    Raises UserError naming up to three tensors whose shape differs, are missing, or are not the model's,
    and for whole numbers in place of weights, which are a code for others.
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
    for name, value in expected.items():
        if value.is_floating_point() and not tensors[name].is_floating_point():
            raise UserError(
                f"{source}: '{name}' holds {str(tensors[name].dtype).removeprefix('torch.')}, no weights",
                "quantised models are not read: save the model in float32, bfloat16 or float16",
            )
    module.load_state_dict(dict(tensors))


def refuse_non_finite(module: nn.Module, source: str) -> None:
    """Raises UserError that names the first tensor of a model that holds NaN or infinity.

    Buffers are left out: masks hold infinities by design.
    """
    for name, parameter in module.named_parameters():
        if not all(_is_finite(plain) for _, plain in _plain(name, parameter)):
            raise UserError(f"{source}: the weights '{name}' hold NaN or infinity", "check the training run")


def _is_finite(numbers: Tensor) -> bool:
    """Whether no number is NaN or infinite. A sum that is finite tells so, in a small part of the time."""
    if numbers.dtype in SUMMED and bool(numbers.sum(dtype=torch.float32).isfinite()):
        return True
    return bool(numbers.isfinite().all())


def digest(module: nn.Module) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor of a model's state, as it was loaded."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):
            for part, plain in _plain(name, tensor):
                total.update(f"{part} {plain.dtype} {tuple(plain.shape)}\n".encode())
                data = plain.detach().to("cpu").contiguous().reshape(-1)
                total.update(data.view(torch.uint8).numpy().data if data.numel() else b"")
    return total.hexdigest()


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor by name; of one that is made of others, as quantised weights are, these."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{part}", getattr(tensor, part))


def up_to_three(items: Sequence[str], separator: str = ", ") -> str:
    """The first three of what is wrong, and how many more there are."""
    shown = separator.join(items[:3])
    return shown if len(items) <= 3 else f"{shown} and {len(items) - 3} more"
