"""Which device and which format a name stands for."""

from __future__ import annotations

import warnings

import torch

from diag.errors import UserError, say
from diag.models.family import SPREAD

REFUSALS = (RuntimeError, AssertionError, ImportError, ValueError, AttributeError)
"""What torch raises for devices that it does not know, was not built for, or cannot use."""


def device_of(name: str, local_rank: int | None = None) -> torch.device | str:
    """`auto` is the first CUDA device, else the CPU. Raises UserError for a device that is not there.

    local_rank: which of several processes on this machine asks; each gets a device of its own from `auto`.
    `spread` stays what it is: whoever loads the model chooses the devices of its layers. `mps`, Apple's GPU,
    is taken for the CPU of the same memory, and that is said: it has no float64, in which tokens are summed.
    """
    if name == SPREAD:
        if local_rank is not None:
            raise UserError("--device spread takes every GPU of a machine", "start one process per machine")
        return name
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if local_rank is None:
            return torch.device("cuda")
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)  # kernels are started on the current device
        return device
    try:
        with warnings.catch_warnings(action="ignore"):  # of types that are no more
            device = torch.device(name)
            torch.zeros(1, device=device).cpu()  # "meta" makes tensors and has nothing in them
    except REFUSALS as error:
        raise UserError(f"device '{name}' is not available", "--device auto, cpu or cuda:0") from error
    if device.type == "cpu":
        if device.index:
            raise UserError(f"device '{name}' is not available", "there is one CPU: --device cpu")
        return torch.device("cpu")  # "cpu:0" would count as another one
    if device.type == "mps":
        say(f"--device {name}: it has no float64, in which tokens are summed; the CPU measures instead")
        return torch.device("cpu")
    return device


def dtype_of(name: str) -> torch.dtype:
    """`bfloat16` → torch.bfloat16; a plan has seen to it that the name is one."""
    return getattr(torch, name)
