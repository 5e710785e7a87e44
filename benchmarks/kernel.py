"""What the statistics of one layer cost next to its attention, and next to what the machine can do at all.

    python benchmarks/kernel.py                     # every case that fits, on CUDA where there is a device
    python benchmarks/kernel.py --case gpt2-4096 --format bfloat16
    python benchmarks/kernel.py --device cpu

Each row is one call of attention with random queries, keys and values: the time of the flash forward, and of
each kind of statistics as a ratio to it. On CUDA these are the fused kernels; on the CPU the route through
blocks of query rows, with the log-normaliser that the flash operator gave.

The roofline is the least time that the machine needs for the operations and bytes of the statistics: its
rates are measured here, by one large matrix product and one large copy, not taken from a data sheet.
Operations are the products of the scores, 2 · d for every pair of a query and a key that it sees; bytes are
queries and keys read once and five numbers per row written.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from diag.attention.call import AttentionCall
from diag.attention.kernels import fused_statistics
from diag.attention.kernels.flash import attention_with_normaliser
from diag.attention.softmax_statistics import softmax_statistics
from diag.metrics.default import Selection

RESULTS = 5  # numbers per row: lse, entropy, Σ A², self weight, first weight


@dataclass(frozen=True)
class Case:
    """The shape of one layer's attention."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    dim: int
    causal: bool

    @property
    def operations(self) -> int:
        """Products and sums of the scores."""
        pairs = self.tokens * (self.tokens + 1) // 2 if self.causal else self.tokens**2
        return 2 * self.dim * pairs * self.batch * self.heads

    def moved(self, itemsize: int) -> int:
        """Bytes that have to be read and written once."""
        vectors = self.batch * self.tokens * self.dim * (self.heads + self.kv_heads)
        return vectors * itemsize + RESULTS * 4 * self.batch * self.heads * self.tokens


CASES = {
    "vit-196": Case(256, 12, 12, 196, 64, False),
    "vit-4096": Case(4, 12, 12, 4096, 64, False),
    "vit-16384": Case(1, 12, 12, 16384, 64, False),
    "gpt2-1024": Case(16, 12, 12, 1024, 64, True),
    "gpt2-4096": Case(4, 12, 12, 4096, 64, True),
    "gpt2-16384": Case(1, 12, 12, 16384, 64, True),
    "llama-4096": Case(1, 32, 8, 4096, 128, True),
}
ON_CPU = {"vit-196": 8, "vit-4096": 1, "gpt2-1024": 1, "gpt2-4096": 1}
"""Cases that take seconds on a CPU -> inputs."""


def machine(device: torch.device) -> str:
    """What the numbers were measured on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    described = Path("/proc/cpuinfo")
    if described.exists():
        lines = described.read_text(encoding="utf-8").splitlines()
        model = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model
        )
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a run after two that warm up (compiling is one of them).

    On one thread of a CPU it is the processor's time, which other programs on the machine hardly disturb.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            start.record()
            run()
            stop.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(stop) / 1000)
        else:
            began = clock()
            run()
            times.append(clock() - began)
    return statistics.median(times)


def rates(device: torch.device, dtype: torch.dtype, repeats: int) -> tuple[float, float]:
    """Operations per second of a matrix product, and bytes per second of a copy, read and written."""
    side, numbers = (8192, 1 << 28) if device.type == "cuda" else (2048, 1 << 26)
    square = torch.randn(side, side, device=device, dtype=dtype)
    line = torch.empty(numbers, device=device, dtype=torch.float32)
    other = torch.empty_like(line)
    product = seconds(lambda: square @ square, device, repeats)
    copy = seconds(lambda: other.copy_(line), device, repeats)
    return 2 * side**3 / product, 8 * numbers / copy


def measure(name: str, device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Seconds of the forward and of each kind of statistics of a case."""
    case = CASES[name]
    batch = case.batch if device.type == "cuda" else ON_CPU[name]
    case = Case(batch, case.heads, case.kv_heads, case.tokens, case.dim, case.causal)
    generator = torch.Generator(device).manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        # as models hand it over: tokens before heads in memory
        shape = (case.batch, case.tokens, heads, case.dim)
        return torch.randn(shape, device=device, dtype=dtype, generator=generator).transpose(1, 2)

    query, key, value = draw(case.heads), draw(case.kv_heads), draw(case.kv_heads)
    grouped = case.heads != case.kv_heads

    def forward() -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=case.causal, enable_gqa=grouped)

    normaliser = attention_with_normaliser(query, key, value, None, 0.0, case.causal, None, grouped)[1]
    output = forward()
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], True):
        found: dict[str, Any] = {"flash": seconds(forward, device, repeats)}
    scale = case.dim**-0.5
    call = AttentionCall(
        0, "layer", query, key, value, output, None, case.causal, scale, log_normaliser=normaliser
    )
    found["statistics"] = seconds(lambda: softmax_statistics(call), device, repeats)
    found["route"] = "plain" if fused_statistics(call) is None else "fused"
    if found["route"] == "fused":
        found |= other_kernels(call, device, repeats)
    return {
        "case": name,
        "batch": batch,
        "operations": case.operations,
        "bytes": case.moved(dtype.itemsize),
        **found,
    }


def other_kernels(call: AttentionCall, device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of the kernels that are run on request, and of the values."""
    from diag.attention.kernels.triton_received import received
    from diag.attention.kernels.triton_statistics import row_statistics
    from diag.attention.kernels.triton_values import value_statistics

    lse = softmax_statistics(call).log_normaliser
    assert lse is not None
    first = torch.zeros(call.batch, 1, dtype=torch.long, device=device)
    givers = torch.ones(1, *lse.shape, device=device)
    on = Selection(call)
    return {
        "distance": seconds(lambda: row_statistics(call, first, distances=True), device, repeats),
        "received": seconds(lambda: received(call, lse, givers), device, repeats),
        "values": seconds(lambda: value_statistics(call, on.among, on.rows, 4e-6), device, repeats),
    }


def show(rows: list[dict[str, Any]], operations: float, moved: float) -> None:
    """A plain table; ratios to the flash forward, and the share of the roofline that is reached."""
    print(f"matrix product {operations / 1e12:,.2f} T operations/s, copy {moved / 1e9:,.1f} GB/s")
    print(f"{'':12}{'batch':>6}{'flash, ms':>11}{'statistics':>12}{'distance':>10}{'received':>10}", end="")
    print(f"{'values':>9}{'of roofline':>13}{'route':>8}")
    for row in rows:
        least = max(row["operations"] / operations, row["bytes"] / moved)
        print(f"{row['case']:12}{row['batch']:>6}{row['flash'] * 1000:>11.3f}", end="")
        for name, width in (("statistics", 10), ("distance", 8), ("received", 8), ("values", 7)):
            ratio = f"{row[name] / row['flash']:>{width}.2f} x" if name in row else f"{'':>{width + 2}}"
            print(ratio, end="")
        print(f"{least / row['statistics']:>12.0%}{row['route']:>9}", flush=True)


def main() -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--case", choices=[*CASES, "all"], default="all", help="the layer (default: all)")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="(default: cuda where there is one)")
    parser.add_argument(
        "--format", choices=["bfloat16", "float16", "float32"], help="(default: bfloat16, cpu: float32)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="runs of each (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    options = parser.parse_args()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu measures the route of the CPU")
    known = list(CASES) if device.type == "cuda" else list(ON_CPU)
    if options.case not in ("all", *known):
        parser.error(f"'{options.case}' takes too long on a CPU; cases there are {', '.join(known)}")
    dtype = getattr(torch, options.format or ("bfloat16" if device.type == "cuda" else "float32"))
    with torch.inference_mode():
        operations, moved = rates(device, dtype, options.repeats)
        names = known if options.case == "all" else [options.case]
        rows = [measure(name, device, dtype, options.repeats) for name in names]
    if options.json:
        print(
            json.dumps(
                {"machine": machine(device), "operations": operations, "bytes": moved, "rows": rows}, indent=1
            )
        )
        return
    print(f"{machine(device)}, {str(dtype).removeprefix('torch.')}")
    show(rows, operations, moved)


if __name__ == "__main__":
    main()
