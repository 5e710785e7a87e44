"""What changing attention costs over the plain forward, and metric groups over the default probe.

    python benchmarks/interventions.py                  # a 12-layer ViT-B/16 shape (about two minutes)
    python benchmarks/interventions.py --layers 4 --batch 1 --rounds 3

Weights are random; time does not depend on them. One process, one thread, processor time, in interleaved
rounds (plain, xsa, mask_self, …, plain, xsa, …); medians are shown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

INTERVENTIONS = (
    "xsa",
    "gated_xsa=0.5",
    "random_direction",
    "mask_self",
    "uniform",
    "identity=0.5",
    "skip",
    "cb",
)
GROUPS = ("stream", "sinks", "distance", "nmi", "overlap", "position", "norms")


def runs_of(
    layers: int, batch: int
) -> tuple[dict[str, Callable[[], object]], dict[str, Callable[[], object]]]:
    """What is timed: forward passes by intervention, and probes by metric group."""
    import torch
    from PIL import Image

    from diag.measure.edited_model import edited
    from diag.measure.loop import measure
    from diag.metrics.names import GROUPS as NAMES
    from diag.models import load
    from diag.models.base import Sample
    from diag.models.hooks.block_parts import find_blocks
    from diag.models.hooks.interventions import parse
    from diag.models.names.resolve import parse as parse_name

    arguments = ["num_classes=0", f"depth={layers}"]
    spec = parse_name("timm:vit_base_patch16_224", model_args=arguments, random_init=True)
    model = load(spec, device="cpu", dtype=torch.float32)
    tower = model.tower("vision")
    blocks = find_blocks(model.module, tower.layers)
    samples = [Sample(str(i), lambda: Image.new("RGB", (224, 224), (90, 120, 60))) for i in range(batch)]
    data = tower.encode(samples)

    def forward(*texts: str) -> Callable[[], object]:
        edits = [parse(text) for text in texts]

        def run() -> object:
            with torch.inference_mode(), edited(tower, tower.layers, blocks, edits):
                return tower.forward(data)

        return run

    def probe(*groups: str) -> Callable[[], object]:
        names = [name for group in ("default", *groups) for name in NAMES[group]]
        return lambda: list(measure(tower, samples, metrics=names, blocks=blocks, batch_size=batch))

    forwards = {"plain forward": forward()} | {text: forward(text) for text in INTERVENTIONS}
    probes = {"default probe": probe()} | {f"default,{group}": probe(group) for group in GROUPS}
    return forwards, probes


def medians(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of processor time, medians over interleaved rounds; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def show(found: dict[str, float]) -> None:
    """A line each: seconds and the ratio to the first."""
    first = next(iter(found.values()))
    for name, seconds in found.items():
        print(f"{name:20} {seconds:8.3f} s   {seconds / first:5.2f} ×")


def main() -> None:
    """Prints both tables."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    forwards, probes = runs_of(given.layers, given.batch)
    print(f"ViT-B/16 shape, {given.layers} layers, 197 tokens, batch {given.batch}, one thread")
    show(medians(forwards, given.rounds))
    print()
    show(medians(probes, given.rounds))


if __name__ == "__main__":
    main()
