"""What the tests of meaning cost: a whole probe with them and without, side by side.

    python benchmarks/meaning.py
    python benchmarks/meaning.py --model timm:swin_tiny_patch4_window7_224 --images 64 --rounds 3

Each probe is a process of its own, as users run it: imports, loading, 64 images, every default metric.
The two ways take turns, so that a slow moment of the machine hits both. Of a family that is known the tests
are skipped (`KNOWN` in `diag/models/known.py`); here they are run for it all the same. Weights are random:
time does not depend on them. With `--threads 1` time is that of the processor, else the clock's.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

WAYS = ("with", "without")
MODELS = ("timm:vit_small_patch16_224", "timm:swin_tiny_patch4_window7_224")


def main() -> None:
    """Prints seconds and ratios."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--model", action="append")
    options.add_argument("--images", type=int, default=64)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.one:
        probe(given.model[0], given.images, given.one)
        return
    for model in given.model or MODELS:
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(given.rounds):
            for way in WAYS:
                seconds[way].append(in_process(model, given.images, way, given.threads))
        each = {way: statistics.median(seconds[way]) for way in WAYS}
        ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
        print(
            f"{model}, {given.images} images: with the tests {each['with']:.1f} s, "
            f"without {each['without']:.1f} s, ratio {ratio:.3f}"
        )


def in_process(model: str, images: int, way: str, threads: int) -> float:
    """Seconds of one probe in a process of its own."""
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": str(threads),
    }
    command = [sys.executable, __file__, "--model", model, "--images", str(images), "--one", way]
    clock = _of_processes if threads == 1 else time.perf_counter
    began = clock()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return clock() - began


def _of_processes() -> float:
    """Processor time of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def probe(model: str, images: int, way: str) -> None:
    """One probe, in this process."""
    import numpy as np
    from PIL import Image

    from diag.measure import meaning
    from diag.run import api

    # the tests are run for every family, or for none
    meaning.is_known = lambda root, layers: way == "without"  # type: ignore[assignment]
    generator = np.random.default_rng(0)
    pictures = [
        Image.fromarray(generator.integers(0, 256, (224, 224, 3), dtype=np.uint8)) for _ in range(images)
    ]
    api.probe(model, pictures, limit=images, random_init=True)


if __name__ == "__main__":
    main()
