"""What probing costs: time and memory of ways to get such statistics, as ratios to the plain forward.

    python benchmarks/overhead.py                    # every model that takes seconds, every method
    python benchmarks/overhead.py --case gpt2-16384 --methods plain,probe
    python benchmarks/overhead.py --growth           # one layer, 1k to 16k tokens

Each measurement (`methods.py`) runs in a process of its own, so that no method inherits another one's
memory, and the processes of a round follow each other (plain, probe, dense, plain, …), so that a slow
moment of the machine hits all of them. This process never loads torch: a child would start with its peak.
With `--threads 1` time is that of the processor, which other programs on the machine hardly disturb; with
more threads it is the clock's, for a machine that does nothing else. Memory is the peak beyond the loaded
model. Weights are random: neither time nor memory depends on them. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from methods import HEADS, Cost, Shape

CASES = {
    "vit-196": "ViT-B/16, 196 patches, batch 8",
    "vit-4096": "ViT-B/16, 4,096 patches, batch 1",
    "vit-16384": "ViT-B/16, 16,384 patches, batch 1",
    "gpt2-1024": "GPT-2 small, 1,024 tokens, batch 1",
    "gpt2-4096": "GPT-2 small, 4,096 tokens, batch 1",
    "gpt2-16384": "GPT-2 small, 16,384 tokens, batch 1",
    "llama-4096": "Llama-shaped, 1.1 B weights, 4,096 tokens, batch 1",
    "gptj-1024": "GPT-J-shaped, 12 layers of 768, its own softmax, 1,024 tokens, batch 1",
    "gemma2-1024": "Gemma-2-shaped, 12 layers of 768, soft cap, 1,024 tokens, batch 1",
    "gptoss-1024": "gpt-oss-shaped, 12 layers of 768, sinks, 1,024 tokens, batch 1",
}
LONG = ("vit-16384", "gpt2-16384", "llama-4096")
METHODS = {
    "plain": "the model's forward, PyTorch's fused attention",
    "probe": "every metric of attnbias, beyond 2,048 tokens from 1,024 sampled query rows",
    "exact": "every metric of attnbias from every query row",
    "dense": "eager attention with patterns kept, token x token cosines, 4 statistics",
    "lens": "TransformerLens run_with_cache, then the same 4 statistics",
    "nnsight": "nnsight trace of the eager model, then the same 4 statistics",
}
MODELS_OF = {
    "dense": ("vit", "gpt2"),
    "lens": ("gpt2", "gptj", "gemma2", "gptoss"),
    "nnsight": ("vit", "gpt2"),
}
GROWTH = (1024, 2048, 4096, 8192, 16384)
MEBIBYTE = 1 << 20


def in_process(arguments: list[str], threads: int) -> Cost:
    """One measurement in a process of its own. Raises RuntimeError with the child's last words."""
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, str(Path(__file__).with_name("methods.py").resolve()), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        if done.returncode < 0:
            last = f"ended by signal {-done.returncode}; 9 is what too little memory looks like"
        raise RuntimeError(f"{' '.join(arguments[:2])}: {last}")
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def rounds(jobs: dict[str, list[str]], repeats: int, threads: int) -> dict[str, Cost]:
    """The medians of `repeats` interleaved rounds; a job that fails is told and left out."""
    costs: dict[str, list[Cost]] = {}
    for number in range(repeats):
        for name, arguments in list(jobs.items()):
            with telling(f"round {number + 1} of {repeats}: {' '.join(arguments[:2])}"):
                try:
                    costs.setdefault(name, []).append(in_process(arguments, threads))
                except RuntimeError as error:
                    print(f"\n{error}", file=sys.stderr)
                    del jobs[name]
    return {
        name: Cost(statistics.median(c.seconds for c in own), int(statistics.median(c.memory for c in own)))
        for name, own in costs.items()
        if own
    }


def compare(case: str, methods: list[str], repeats: int, threads: int) -> list[dict[str, Any]]:
    """One row per method of a case, with ratios to plain where plain was measured."""
    shape = Shape.of(case)
    runs = 3 if shape.tokens <= 1024 else 1
    jobs = {
        method: [case, method, str(runs)]
        for method in methods
        if shape.family in MODELS_OF.get(method, (shape.family,))
    }
    costs = rounds(jobs, repeats, threads)
    plain = costs.get("plain")
    return [
        {
            "case": case,
            "method": method,
            "seconds": cost.seconds,
            "times_plain": cost.seconds / plain.seconds if plain else None,
            "memory_mib": cost.memory / MEBIBYTE,
            "memory_times_plain": cost.memory / plain.memory if plain else None,
        }
        for method, cost in costs.items()
    ]


def growth(repeats: int, threads: int) -> list[dict[str, Any]]:
    """One row per length: what the statistics of one layer, from all rows or some, add to its attention."""
    rows = []
    for tokens in GROWTH:
        runs = "3" if tokens <= 4096 else "1"
        jobs = {
            method: ["layer", method, str(tokens), runs] for method in ("attention", "statistics", "sampled")
        }
        costs = rounds(jobs, repeats, threads)
        alone, both, sampled = (costs[name] for name in jobs)
        extra = max(both.memory, sampled.memory) - alone.memory
        rows.append(
            {
                "tokens": tokens,
                "attention_seconds": alone.seconds,
                "extra_seconds": both.seconds - alone.seconds,
                "extra_seconds_sampled": sampled.seconds - alone.seconds,
                "extra_mib": extra / MEBIBYTE,
                "extra_bytes_per_token": extra / tokens,
                "pattern_mib": HEADS * tokens**2 * 4 / MEBIBYTE,
            }
        )
    return rows


def show_case(rows: list[dict[str, Any]]) -> None:
    """A case as a plain table of 80 columns."""
    print(f"\n{CASES[rows[0]['case']]}")
    print(f"{'':8}{'seconds':>10}{'x plain':>10}{'peak MiB':>11}{'x plain':>10}")
    for row in rows:
        ratios = [row["times_plain"], row["memory_times_plain"]]
        time_ratio, memory_ratio = ("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        print(
            f"{row['method']:8}{row['seconds']:>10.3f}{time_ratio:>10}"
            f"{row['memory_mib']:>11,.0f}{memory_ratio:>10}",
            flush=True,
        )


def show_growth(rows: list[dict[str, Any]]) -> None:
    """The growth as a plain table of 80 columns; in brackets how many times the row before."""
    print(f"\nevery metric of one causal layer, {HEADS} heads: what it adds to the attention, in seconds")
    print(f"{'tokens':>7}{'attention':>16}{'all rows':>16}{'sampled':>16}{'MiB':>7}{'T x T MiB':>11}")
    names = ("attention_seconds", "extra_seconds", "extra_seconds_sampled")
    for last, row in zip([None, *rows], rows, strict=False):
        cells = "".join(_growing(row[name], last and last[name]) for name in names)
        print(f"{row['tokens']:>7,}{cells}{row['extra_mib']:>7,.0f}{row['pattern_mib']:>11,.0f}")


def _growing(seconds: float, last: float | None) -> str:
    return f"{seconds:>9.3f}" + (f"{f'({seconds / last:.1f})':>7}" if last else " " * 7)


@contextlib.contextmanager
def telling(what: str) -> Iterator[None]:
    """Says what is running, on a terminal only."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)
    yield
    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def main() -> None:
    """Reads the command line and prints tables."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="methods: " + "; ".join(f"{name}: {what}" for name, what in METHODS.items()),
    )
    parser.add_argument(
        "--case", choices=[*CASES, "all"], default="all", help="the model (default: all but the long ones)"
    )
    parser.add_argument(
        "--methods",
        default=",".join(METHODS),
        help="any of %(default)s (each where it can; dense and nnsight: ViT and GPT-2)",
    )
    parser.add_argument(
        "--growth", action="store_true", help="one layer at growing lengths, instead of models"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds of processes (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="(default: every core)")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    options = parser.parse_args()
    methods = options.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"unknown method '{unknown.pop()}'; methods are {', '.join(METHODS)}")
    found = []
    if options.growth:
        found = growth(options.repeats, options.threads)
        if not options.json:
            show_growth(found)
    else:
        for case in [name for name in CASES if name not in LONG] if options.case == "all" else [options.case]:
            rows = compare(case, methods, options.repeats, options.threads)
            found += rows
            if rows and not options.json:
                show_case(rows)
    if options.json:
        print(json.dumps({"threads": options.threads, "repeats": options.repeats, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
