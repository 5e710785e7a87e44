"""What a dry run says of memory: the predicted peak of each model that a plan names, before anything runs."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch

from diag.errors import UserError
from diag.inputs.items import Inputs
from diag.measure.memory import Widths, predicted, resident
from diag.models import load
from diag.models.base import Model, Tower
from diag.run.prepared import Prepared
from diag.run.shards import tower_samples


def forecast(prepared: Prepared) -> dict[str, str]:
    """By model and tower: the predicted peak in words, or why there is none.

    Models are loaded on the CPU to see their shapes, from what is on this machine: nothing is downloaded,
    as `HF_HUB_OFFLINE` is set for this process. A model that is spread over GPUs counts as one.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = {}
    for spec in prepared.specs:
        try:
            model = load(spec, device="cpu", dtype=prepared.dtype)
        except UserError as error:
            found[spec.given] = f"not predicted: {error}"
            continue
        for kind, inputs in prepared.inputs.items():
            for tower in model.takers(kind, prepared.plan.tokens):
                found[f"{spec.given} {tower.name}"] = _of_tower(model, tower, inputs, prepared)
        del model
    return found


def _of_tower(model: Model, tower: Tower, given: Inputs, prepared: Prepared) -> str:
    """The peak and its parts in one line."""
    size = prepared.plan.batch_size or 1
    device = torch.device("cuda") if isinstance(prepared.device, str) else prepared.device
    tokens = tokens_of(tower, given, prepared.plan.seq_len)
    if tokens is None:
        return "not predicted: the number of tokens depends on the input"
    inputs = min(size, tower.max_batch or size)
    weights = sum(x.numel() * x.element_size() for x in model.module.parameters())
    prediction = predicted(
        Widths.of(model.module, tower.layers[0].module),
        tokens=tokens,
        inputs=inputs,
        loaded=weights if device.type == "cuda" else resident(),
        device=device,
        dtype=prepared.dtype,
    )
    peak, loaded, forward, probe = (f"{x / 2**30:.2f}" for x in (prediction.peak, *prediction))
    return f"{peak} GiB at {inputs} × {tokens:,} tokens (loaded {loaded}, forward {forward}, probe {probe})"


def tokens_of(tower: Tower, given: Inputs, seq_len: int | None) -> int | None:
    """Tokens of one input; None where they differ between inputs."""
    if tower.name == "text":
        content = tower_samples(tower, given, limit=1, seq_len=seq_len)[0].read()
        return len(content) if isinstance(content, Sequence) else None
    sizes = [tower.facts.get(name) for name in ("image_size", "patch_size")]
    sides = [size if isinstance(size, list | tuple) else (size, size) for size in sizes]
    if not all(isinstance(side, int) for pair in sides for side in pair):
        return None
    patches = math.prod(image // patch for image, patch in zip(*sides, strict=True))
    return len(tower.prefix) + patches + len(tower.suffix)
