"""Attention calls as files: what `attnbias probe --save-activations N` leaves for other programs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from diag.attention.pattern import pattern_rows
from diag.measure.loop import capture, run_batches
from diag.models.base import Batch, Sample, Tower
from diag.results.writing import atomically

PATTERN_TOKENS = 1024
"""Saved activations hold the whole pattern up to this many tokens."""


def save_activations(
    tower: Tower, samples: Sequence[Sample], folder: Path, layers: Sequence[int] | None = None
) -> None:
    """Writes the calls of each sample as `NNNNN.safetensors`: query, key, value, output, pattern per layer.

    Keys are `layer.NN.value` (and `.1`, `.2` … for a layer's further calls); scale, causality and
    module paths are in the file's metadata. The pattern is left out above `PATTERN_TOKENS` tokens;
    a layer without softmax has none, and no query and key.
    Samples that cannot be read are left out.
    """

    def write(samples: Sequence[Sample], batch: Batch, number: int) -> None:
        tensors: dict[str, Tensor] = {}
        told = {"id": samples[0].id, "tower": tower.name}
        for call in capture(tower, batch, layers):
            name = stem = f"layer.{call.layer:02d}"
            again = itertools.count(1)
            while f"{name}.value" in tensors:
                name = f"{stem}.{next(again)}"
            found = {part: getattr(call, part) for part in ("query", "key", "value", "output", "mask")}
            if call.outside is not None:  # without these the pattern is not to be had from queries and keys
                found |= {"outside": call.outside, "log_normaliser": call.log_normaliser}
            if call.has_pattern and call.tokens <= PATTERN_TOKENS:
                found["pattern"] = pattern_rows(call)
            there = {f"{name}.{part}": x for part, x in found.items() if x is not None}
            tensors |= {key: x.detach().cpu().contiguous().clone() for key, x in there.items()}
            told[name] = json.dumps({"module": call.module, "scale": call.scale, "causal": call.causal})
        atomically(folder / f"{number:05d}.safetensors", partial(save_file, tensors, metadata=told))

    for _ in run_batches(tower, samples, write, batch_size=1):
        pass
