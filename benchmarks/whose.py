"""What the ledger and sink events cost together, over the default probe; and their memory as tokens double.

    python benchmarks/whose.py                          # 196 and 1,024 patches, then memory (some minutes)
    python benchmarks/whose.py --layers 12 --rounds 9
    python benchmarks/whose.py --memory                 # only the peaks

Times are of whole probes of a ViT-B shape in one process with one thread, processor time, in turn (default,
ledger, …, default, ledger, …): a ratio is to the default probe of the same round, and medians over rounds are
shown. Weights are random, and some heads are given a sink, as asked (`--events`): what a sink does is
computed where there is an event. Memory is the peak of a process of its own beyond what it held before, of
one causal layer of 4 heads that share a KV head. Linux only.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from shape import LONG_HEADS, MEBIBYTE, call_of, held

CASES = {196: (224, 8), 1024: (512, 1)}
"""Patches: side of the image in pixels, and images in a batch."""
GROUPS = {
    "default": (),
    "default, ledger": ("ledger",),
    "default, sink events": ("sink_events",),
    "default, ledger, sink events": ("ledger", "sink_events"),
}
LENGTHS = (4096, 8192, 16384)


def probes(patches: int, layers: int, events: float) -> dict[str, Callable[[], object]]:
    """What is timed: a probe by its metrics. events: the share of heads that are given a sink."""
    import torch
    from PIL import Image

    from diag.measure.loop import measure
    from diag.metrics.names import GROUPS as NAMES
    from diag.models import load
    from diag.models.base import Sample
    from diag.models.hooks.block_parts import find_blocks
    from diag.models.names.resolve import parse

    side, batch = CASES[patches]
    arguments = ["num_classes=0", f"depth={layers}", f"img_size={side}"]
    spec = parse("timm:vit_base_patch16_224", model_args=arguments, random_init=True)
    model = load(spec, device="cpu", dtype=torch.float32)
    _give_sinks(model.module, events)
    tower = model.tower("vision")
    blocks = find_blocks(model.module, tower.layers)
    image = Image.effect_noise((side, side), 90).convert("RGB")
    samples = [Sample(str(number), lambda: image) for number in range(batch)]

    def probe(groups: tuple[str, ...]) -> Callable[[], object]:
        names = [name for group in ("default", *groups) for name in NAMES[group]]
        return lambda: list(measure(tower, samples, metrics=names, blocks=blocks, batch_size=batch))

    return {told: probe(groups) for told, groups in GROUPS.items()}


def _give_sinks(module: object, share: float) -> None:
    """In each layer, queries of the first heads have what the key of the class token has, and no others."""
    import torch

    with torch.no_grad():
        mark = torch.ones(768)
        mark[::2] = -1
        module.cls_token[:] = 100 * mark  # type: ignore[attr-defined]
        for block in module.blocks:  # type: ignore[attr-defined]
            heads = block.attn.num_heads
            for head in range(round(share * heads)):
                first = head * (768 // heads)
                block.attn.qkv.weight[first : first + 64] = 0
                block.attn.qkv.bias[first] = 4.0
                block.attn.qkv.weight[768 + first] = mark / 28


def timed(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time by round, the first one not counted."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if number:
                found[name].append(time.process_time() - start)
    return found


def peak(tokens: int, groups: str) -> float:
    """In a child: bytes that the statistics of one layer of so many tokens add."""
    from pathlib import Path

    import torch

    from diag.attention.sampling import RowSampling
    from diag.measure.batch_readings import BatchReadings
    from diag.metrics.names import GROUPS as NAMES
    from diag.models.base import Batch, Tower

    names = [name for group in groups.split(",") for name in NAMES[group]]

    def nothing(*given: object) -> object:
        return None

    tower = Tower("text", (), samples=nothing, encode=nothing, forward=nothing)  # type: ignore[arg-type]

    def layer(length: int) -> None:
        call = call_of(1, LONG_HEADS, 1, length, causal=True)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before.append(held("VmRSS"))
        BatchReadings(names, ("all",), tower, Batch(("0",), None), RowSampling()).add(call)

    before: list[float] = []
    with torch.inference_mode():
        layer(2304)  # the libraries' own buffers are no growth
        layer(tokens)
        return held("VmHWM") - before[-1]


def main() -> None:
    """Prints a line per probe and case, then one per length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--events", type=float, default=0.0, help="share of heads with a sink")
    parser.add_argument("--memory", action="store_true", help="only the peaks")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--groups", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak, options.groups))
        return
    if not options.memory:
        import torch

        torch.set_num_threads(1)
        for patches in CASES:
            seconds = timed(probes(patches, options.layers, options.events), options.rounds)
            print(f"\n{patches} patches, {options.layers} layers, heads with a sink: {options.events:.0%}")
            for name, own in seconds.items():
                pairs = [one / other for one, other in zip(own, seconds["default"], strict=True)]
                print(
                    f"{name:30}{statistics.median(own) * 1e3:10.0f} ms{statistics.median(pairs):8.2f} ×",
                    flush=True,
                )
    for groups in ("default", "default,ledger,sink_events"):
        found = []
        for tokens in LENGTHS:
            command = [sys.executable, __file__, "--peak", str(tokens), "--groups", groups]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(float(done.stdout) / MEBIBYTE)
        told = ", ".join(f"{tokens:,}: {peak:.0f} MiB" for tokens, peak in zip(LENGTHS, found, strict=True))
        print(f"memory of {groups} at {told}")


if __name__ == "__main__":
    main()
