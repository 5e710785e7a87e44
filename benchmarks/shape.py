"""What the optional attention-shape metrics cost: each group over the default metrics and over the attention.

    python benchmarks/shape.py                 # a text and an image layer, then memory (about a minute)
    python benchmarks/shape.py --tokens 4096 --repeats 5
    python benchmarks/shape.py --memory        # only the peak at 16,384 tokens, one head group

Times of one case are of one process, in interleaved rounds (attention, default, sinks, distance, …,
attention, …); medians are shown. The default metrics and each group start from the same attention call,
with the log-normaliser that the fused kernel gave. Memory is the peak of a process of its own beyond
what it held before the pass. With one thread, time is that of the processor. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diag.attention.call import AttentionCall
    from diag.attention.positions import Geometry

HEAD_DIM = 64
GROUPS = ("sinks", "distance", "nmi", "overlap", "position", "norms")
LONG = 16384
LONG_HEADS = 4
"""Query heads that share one KV head: the head group of the memory measurement."""
MEBIBYTE = 1 << 20


def call_of(batch: int, heads: int, kv_heads: int, tokens: int, *, causal: bool) -> AttentionCall:
    """A random attention call with the output and the log-normaliser of PyTorch's fused attention."""
    import torch

    from diag.attention.call import AttentionCall

    torch.manual_seed(0)
    query = torch.randn(batch, heads, tokens, HEAD_DIM)
    key, value = torch.randn(2, batch, kv_heads, tokens, HEAD_DIM)
    output, normaliser = attend(query, key, value, causal=causal)
    return AttentionCall(0, "layer", query, key, value, output, None, causal, HEAD_DIM**-0.5, normaliser)


def attend(query, key, value, *, causal: bool):  # type: ignore[no-untyped-def]
    """The attention as the probe runs it."""
    from diag.attention.kernels.flash import attention_with_normaliser

    grouped = query.shape[1] != key.shape[1]
    return attention_with_normaliser(query, key, value, None, 0.0, causal, None, grouped)


def runs_of(call: AttentionCall, geometry: Geometry) -> dict[str, Callable[[], object]]:
    """What is timed, by name; no run knows what another has computed."""
    from dataclasses import replace

    from diag.metrics.default import Selection, per_input
    from diag.metrics.pattern_shape import GROUPS, SHAPE_METRICS, Neighbour, shape_readings

    def neighbour() -> Neighbour:
        """As it stands when the layer before was measured."""
        found = Neighbour(call.batch)
        shape_readings([Selection(replace(call, layer=-1))], GROUPS["overlap"], neighbour=found)
        return found

    before = neighbour()
    layer, top = before.layer, before.top

    def shape(names: tuple[str, ...]) -> object:
        before.layer, before.top = layer, top
        return shape_readings([Selection(call)], names, geometry=geometry, neighbour=before)

    runs: dict[str, Callable[[], object]] = {
        "attention": lambda: attend(call.query, call.key, call.value, causal=call.causal),
        "default": lambda: per_input(call),
    }
    for group, names in GROUPS.items():
        runs[group] = lambda names=names: shape(names)  # type: ignore[misc]
    runs["all groups"] = lambda: shape(tuple(SHAPE_METRICS))
    return runs


def timed(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each run over interleaved rounds, after one round to warm up."""
    clock = time.process_time if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if number:
                seconds[name].append(clock() - start)
    return {name: statistics.median(own) for name, own in seconds.items()}


def show(title: str, seconds: dict[str, float]) -> None:
    """A plain table of 80 columns."""
    print(f"\n{title}")
    print(f"{'':12}{'ms':>10}{'x attention':>14}{'x default':>12}")
    for name, own in seconds.items():
        ratios = f"{own / seconds['attention']:>14.2f}{own / seconds['default']:>12.2f}"
        print(f"{name:12}{own * 1e3:>10.1f}{ratios}", flush=True)


def peak(group: str) -> tuple[float, float]:
    """In a child: seconds and bytes that one group (or `all`) adds at 16,384 tokens, one head group."""
    import torch

    from diag.metrics.default import Selection
    from diag.metrics.pattern_pass import Neighbour
    from diag.metrics.pattern_shape import GROUPS, SHAPE_METRICS, shape_readings

    names = tuple(SHAPE_METRICS) if group == "all" else GROUPS[group]
    with torch.inference_mode():
        small = call_of(1, LONG_HEADS, 1, 256, causal=True)
        # the libraries' own buffers are no growth
        shape_readings([Selection(small)], names, neighbour=Neighbour(1))
        call = call_of(1, LONG_HEADS, 1, LONG, causal=True)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before = held("VmHWM")
        start = time.process_time()
        shape_readings([Selection(call)], names, neighbour=Neighbour(1))
        seconds = time.process_time() - start
    return seconds, held("VmHWM") - before


def held(what: str) -> int:
    """Bytes of resident memory now (`VmRSS`) or at the peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def times(tokens: int, repeats: int) -> None:
    """In a child: the two cases, one after the other."""
    import torch

    from diag.attention.positions import TEXT, Geometry

    side = max(2, round((tokens / 5) ** 0.5))
    with torch.inference_mode():
        text = call_of(1, 12, 12, tokens, causal=True)
        show(f"text: {tokens:,} tokens, causal, 12 heads, batch 1", timed(runs_of(text, TEXT), repeats))
        image = call_of(4, 12, 12, side**2 + 1, causal=False)
        grid = Geometry(1, side, side, 16.0)
        title = f"image: {side} x {side} patches and a class token, 12 heads, batch 4"
        show(title, timed(runs_of(image, grid), repeats))


# --- in the parent process, which never loads torch: what it holds would be in every child's peak


def memory(groups: Sequence[str], threads: int) -> None:
    """Runs `peak` for each group in a process of its own and prints it beside the pattern's size."""
    pattern = LONG_HEADS * LONG**2 * 4 / MEBIBYTE
    print(f"\n{LONG:,} tokens, causal, {LONG_HEADS} query heads on one KV head; T x T: {pattern:,.0f} MiB")
    print(f"{'':12}{'seconds':>10}{'extra MiB':>14}", flush=True)
    for group in groups:
        seconds, extra = json.loads(in_process(["--child", group], threads, capture=True))
        print(f"{group:12}{seconds:>10.2f}{extra / MEBIBYTE:>14,.0f}", flush=True)


def in_process(arguments: list[str], threads: int, *, capture: bool) -> str:
    """Runs this file with other arguments; ends with the child's exit status if it fails."""
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed with {done.returncode}")
    return done.stdout or ""


def main() -> None:
    """Reads the command line; with --child, measures and prints what one child has found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=1024, help="of the text (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of the times (default: %(default)s)")
    parser.add_argument("--memory", action="store_true", help="only the memory, of every group")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="(default: every core)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "times":
        times(options.tokens, options.repeats)
    elif options.child:
        print(json.dumps(peak(options.child)))
    elif options.memory:
        memory([*GROUPS, "all"], options.threads)
    else:
        arguments = ["--child", "times", "--tokens", str(options.tokens), "--repeats", str(options.repeats)]
        in_process(arguments, options.threads, capture=False)
        memory(["all"], options.threads)


if __name__ == "__main__":
    main()
