"""A Hugging Face model that is larger than one GPU: its layers over all of them, `--device spread`.

Accelerate places the layers and moves what flows between them; statistics are taken where a layer lies.
What would not fit on the GPUs, and be fetched from memory or disk in every pass, is refused.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from diag.errors import UserError, need


def placement() -> dict[str, Any]:
    """What `from_pretrained` is told: every GPU is used, the CPU's memory only where there is no GPU."""
    return {"device_map": "auto", "max_memory": room()}


def room() -> dict[int | str, int]:
    """Free bytes of each device that layers may lie on. Raises UserError without accelerate."""
    need("--device spread", "accelerate")
    from accelerate.utils import get_max_memory

    free: dict[int | str, int] = get_max_memory()
    return {device: size for device, size in free.items() if device != "cpu"} or free


def refuse_offloaded(module: nn.Module, source: str) -> None:
    """Raises UserError if part of a model found no room."""
    parameters = list(module.parameters())
    bytes_of = [parameter.nbytes for parameter in parameters if parameter.is_meta]
    if bytes_of:
        raise UserError(
            f"{source} does not fit: {sum(bytes_of) / 1e9:.1f} of "
            f"{sum(parameter.nbytes for parameter in parameters) / 1e9:.1f} GB would stay on disk",
            "use more GPUs, or --dtype bfloat16; --device cpu is slow and needs memory only",
        )
