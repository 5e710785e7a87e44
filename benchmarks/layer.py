"""What the statistics of one layer cost: every default metric of one attention call, in milliseconds.

    python benchmarks/layer.py                        # one and two threads, on the clock and of processors
    python benchmarks/layer.py --against CHECKOUT     # beside another checkout of the project, as "before"

Each measurement is a process of its own that computes the same call again and again; before and after follow
each other, and a ratio is that of two neighbours. Where other programs run, the clock tells what waiting for
them costs, and the time of processors what is computed. Queries, keys and values are random. Beside them is
the flash forward of the same call, as a measure of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

CASES = {"vit-197": (8, 197, False), "gpt2-1024": (1, 1024, True)}
"""Inputs, tokens, and whether the call is causal; 12 heads of 64."""

ROOT = Path(__file__).resolve().parents[1]


def measured(case: str, runs: int) -> dict[str, list[float]]:
    """Medians of milliseconds, on the clock and of processors, of a flash forward and of its statistics."""
    import torch

    from diag.attention.call import AttentionCall
    from diag.attention.kernels.flash import attention_with_normaliser
    from diag.attention.sampling import RowSampling
    from diag.measure.batch_readings import BatchReadings
    from diag.metrics.default import METRICS
    from diag.models.base import Batch, Tower

    batch, tokens, causal = CASES[case]
    torch.manual_seed(0)
    data = torch.randn(batch, tokens, 3, 12, 64)
    tower = Tower(
        name="text" if causal else "vision",
        layers=(),
        samples=lambda inputs, length: iter(()),
        encode=lambda samples: Batch((), data),
        forward=lambda batch: None,
        prefix=() if causal else ("cls",),
    )
    inputs = Batch(tuple(map(str, range(batch))), data)
    with torch.inference_mode():
        query, key, value = data.permute(2, 0, 3, 1, 4)

        def forward() -> tuple[torch.Tensor, torch.Tensor | None]:
            return attention_with_normaliser(query, key, value, None, 0.0, causal, None, False)

        output, normaliser = forward()

        def layer() -> None:
            call = AttentionCall(
                0, "layer", query, key, value, output, None, causal, 64**-0.5, log_normaliser=normaliser
            )
            BatchReadings(tuple(METRICS), ("all",), tower, inputs, RowSampling()).add(call)

        return {"flash": timed(forward, runs), "statistics": timed(layer, runs)}


def timed(run: Callable[[], object], runs: int) -> list[float]:
    """Median milliseconds of some runs after two: on the clock, and of processors."""
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs + 2):
        start = time.perf_counter(), time.process_time()
        run()
        for kept, clock, began in zip(found, (time.perf_counter, time.process_time), start, strict=True):
            kept.append((clock() - began) * 1e3)
    return [statistics.median(each[2:]) for each in found]


def in_process(checkout: Path, case: str, threads: int, runs: int) -> dict[str, list[float]]:
    """One measurement of a checkout in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(checkout)}
    command = [sys.executable, __file__, "--case", case, "--runs", str(runs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    """Prints one line per call, number of threads and checkout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout of the project")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=20, help="in each process")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measured(options.case, options.runs)))
        return
    checkouts = {"after": ROOT} | ({"before": options.against.resolve()} if options.against else {})
    print("medians over rounds: milliseconds on the clock (of processors)")
    for case in CASES:
        for threads in (1, 2):
            rounds = [
                {name: in_process(path, case, threads, options.runs) for name, path in checkouts.items()}
                for _ in range(options.rounds)
            ]
            for name in checkouts:
                of_name = [one[name] for one in rounds]
                told = "".join(f"   {what} {middle(of_name, what)}" for what in of_name[0])
                print(f"{case:10} {threads} threads  {name:7}{told}", flush=True)
            if options.against:
                print(f"{'':10} after / before: {ratio(rounds, 0):.2f} ({ratio(rounds, 1):.2f})", flush=True)


def middle(rounds: list[dict[str, list[float]]], what: str) -> str:
    """The medians over rounds, as told."""
    clock, processors = (statistics.median(times) for times in zip(*(r[what] for r in rounds), strict=True))
    return f"{clock:6.1f} ({processors:.1f})"


def ratio(rounds: list[dict[str, dict[str, list[float]]]], which: int) -> float:
    """The median over rounds of a round's statistics after over those before. which: clock or processors."""
    pairs = [(one["after"]["statistics"][which], one["before"]["statistics"][which]) for one in rounds]
    return statistics.median(after / before for after, before in pairs)


if __name__ == "__main__":
    main()
