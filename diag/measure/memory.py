"""How much memory a probe takes: predicted from the shapes of a model's matrices, and measured.

Predicted peak = the process with its weights + the plain forward + what the probe needs beyond it, of n
inputs of T tokens, in numbers of the model's format (the probe's are float32):

    plain forward    n T (2 D + max(in + 2 out))   the stream and its norm; of the widest linear layer its
                                                   input, its output and what is made of the output
    attention        n T (3 D + 2 Y + 2 K)         the stream, and queries, outputs, keys and values
    probe            n T · 45 Y / 64               the statistics of each row, heads taken as 64 wide
                     9 L                           float32 values and outputs of the heads that are read at
                                                   once, running sums and the like; L numbers each
                     4 blocks of pattern rows

The probe runs during attention, while a layer's widest tensors are not there yet: but for its blocks, only
what both take beyond the plain forward counts. D is the width of the stream, K that of all values side by
side, Y that of all heads' outputs. L is n T Y, but at most what `diag.attention.call.head_chunks` reads at
once. A CPU's allocator keeps about as much again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from diag.attention.call import TENSOR_ELEMENTS, of_threads
from diag.attention.pattern import BLOCK_ELEMENTS

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

KEPT_BY_ALLOCATOR = {"cpu": 2.0, "cuda": 1.1}
"""Memory taken over memory in use: freed blocks of other sizes stay with the process."""

HEAD, NUMBERS_PER_ROW = 64, 45
"""Channels of a head, as most have; numbers kept of each row of a head's pattern until its layer is done."""

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
"""What Linux tells of processes and memory; elsewhere psutil asks the system."""


class Widths(NamedTuple):
    """What of a model's shapes decides its memory: numbers per token.

    stream: of the residual stream. widest: the largest in + 2 out of a linear layer (in + out of a language
    model's head). heads: of all heads' outputs side by side. kv_heads: of all values side by side.
    """

    stream: int
    widest: int
    heads: int
    kv_heads: int

    @staticmethod
    def of(module: nn.Module, attention: nn.Module) -> Widths:
        """Read off the matrices of a model and of one of its attention layers."""
        head_of = getattr(module, "get_output_embeddings", None)
        head = head_of() if callable(head_of) else None
        wide = [
            found[0] + (1 if one is head else 2) * found[1]  # nothing is made of a head's logits
            for one in module.modules()
            if (found := _ends(one))
        ]
        own = [found for one in attention.modules() if (found := _ends(one))]
        if not own:
            wide, own = [3], [(1, 1)]
        stream = own[0][0]
        heads = own[-1][0]  # what the output projection reads
        projected = sum(out for _, out in own[:-1]) if len(own) > 1 else 3 * heads
        kv_heads = max(1, (projected - heads) // 2)
        return Widths(stream, max(wide), heads, min(kv_heads, heads))


class Prediction(NamedTuple):
    """Bytes: of the process with its weights, of the plain forward, and of what the probe adds to it."""

    loaded: int
    forward: int
    probe: int

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(self)


def predicted(
    widths: Widths, *, tokens: int, inputs: int, loaded: int, device: torch.device, dtype: torch.dtype
) -> Prediction:
    """The peak of a forward pass of `inputs` × `tokens` with the probe.

    loaded: bytes that the device holds once the model is there.
    """
    kept = KEPT_BY_ALLOCATOR[device.type]
    forward = inputs * tokens * (2 * widths.stream + widths.widest) * dtype.itemsize
    one_head = tokens * HEAD * widths.heads // widths.kv_heads  # with the query heads that share it
    at_once = min(inputs * tokens * widths.heads, max(of_threads(TENSOR_ELEMENTS, device), one_head))
    probe = (inputs * tokens * widths.heads * NUMBERS_PER_ROW // HEAD + 9 * at_once) * 4
    # the probe runs while the layer's wide tensors are not there yet: only what goes beyond them counts
    during_attention = inputs * tokens * (3 * widths.stream + 2 * widths.heads + 2 * widths.kv_heads)
    extra = max(0, during_attention * dtype.itemsize + probe - forward) + 4 * BLOCK_ELEMENTS[device.type]
    return Prediction(loaded, int(kept * forward), int(kept * extra))


def resident() -> int:
    """Bytes of memory that this process holds now."""
    try:
        pages = int((PROC / "self/statm").read_text().split()[1])
    except OSError:
        return int(_process().memory_info().rss)
    return pages * os.sysconf("SC_PAGE_SIZE")


def restart_peak(device: torch.device) -> int:
    """Forgets the peak so far, where the system allows it, and returns what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        (PROC / "self/clear_refs").write_text("5")
    except OSError:
        return peak(device)
    return resident()


def peak(device: torch.device) -> int:
    """The most bytes held since `restart_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return _kilobytes(PROC / "self/status", "VmHWM")
    except (OSError, KeyError):
        if resource is None:
            return int(_process().memory_info().peak_wset)
        # survives exec: what the process that started this one held counts too
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024  # macOS counts bytes


def available(device: torch.device) -> int:
    """Bytes that can still be had: of the device, or of the machine and the container around this process."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    try:
        free = _kilobytes(PROC / "meminfo", "MemAvailable")
    except (OSError, KeyError):
        import psutil

        return int(psutil.virtual_memory().available)
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, int(limit) - used)


def _kilobytes(file: Path, name: str) -> int:
    """Bytes of a line `NAME: 123 kB`. Raises OSError without the file, KeyError without the line."""
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def _process() -> Any:
    """This process, as psutil sees it."""
    import psutil

    return psutil.Process()


def _ends(module: nn.Module) -> tuple[int, int] | None:
    """Numbers in and out of a linear layer, also of transformers' Conv1D; None for anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        inner, out = module.weight.shape  # type: ignore[union-attr, misc]
        return int(inner), int(out)
    return None
