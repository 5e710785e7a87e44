"""What a trainable variant costs: time of a whole training step over that of the baseline.

    python benchmarks/variants.py                        # ViT-B/14 shape, 4 layers, on the CPU (two minutes)
    python benchmarks/variants.py --device cuda --layers 12 --batch 64 --compile

Weights and data are random; time does not depend on them. A step is forward, backward and AdamW, on a GPU
under bf16 autocast. Interleaved rounds (sa, xsa, …, sa, xsa, …), medians. On the CPU one thread and
processor time, on a GPU wall time after a synchronisation.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

VARIANTS = ("sa", "xsa", "gated_xsa", "random_direction", "gated", "gated=headwise", "cb", "cb_s")


def step_of(variant: str, given: argparse.Namespace) -> Callable[[], object]:
    """One training step of a ViT-B/14 shape with a variant, as a function."""
    import timm
    import torch
    import torch.nn.functional as F

    from diag.variants import apply, parse

    torch.manual_seed(0)
    model: Any = timm.create_model(
        "vit_base_patch16_224", patch_size=14, img_size=224, num_classes=1000, depth=given.layers
    )
    apply(model, parse(variant))
    model.to(given.device)
    optimiser = torch.optim.AdamW(model.parameters(), fused=given.device == "cuda")
    images = torch.randn(given.batch, 3, 224, 224, device=given.device)
    labels = torch.randint(0, 1000, (given.batch,), device=given.device)
    run = torch.compile(model) if given.compile else model

    def step() -> object:
        with torch.autocast(given.device, torch.bfloat16, enabled=given.device == "cuda"):
            loss = F.cross_entropy(run(images), labels)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if given.device == "cuda":
            torch.cuda.synchronize()
        return loss

    return step


def main() -> None:
    """Prints a line per variant: seconds and the ratio to `sa`."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    clock = time.process_time if given.device == "cpu" else time.perf_counter
    steps = {variant: step_of(variant, given) for variant in VARIANTS}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(given.rounds + 1):
        for variant, step in steps.items():
            started = clock()
            step()
            times[variant].append(clock() - started)
    print(f"ViT-B/14 shape, {given.layers} layers, 257 tokens, batch {given.batch}, {given.device}")
    for variant, found in times.items():
        ratios = [mine / base for mine, base in zip(found[1:], times["sa"][1:], strict=True)]
        print(f"{variant:18} {statistics.median(found[1:]):8.3f} s   {statistics.median(ratios):6.3f} ×")


if __name__ == "__main__":
    main()
