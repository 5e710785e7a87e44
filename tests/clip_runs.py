"""What tests of CLIP training run on: a tiny model, WebDataset shards and a CSV file, made on the spot."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TINY = "tiny-clip"
CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
CHANGED = {f"visual.transformer.resblocks.{layer}.attn": "xsa" for layer in (0, 1)}
"""The modules of the tiny model that `--attention xsa` changes."""

PAIRS = 32
BATCH = 16

ON_CPU = """
import sys, torch, open_clip
from torch.nn.parallel import DistributedDataParallel
from diag.cli import main

class OnCpu(DistributedDataParallel):
    # open_clip_train names a device, which DDP takes on GPUs only
    def __init__(self, module, device_ids=None, **settings):
        super().__init__(module, **settings)

open_clip.add_model_config(sys.argv.pop(1))
if "cpu" in sys.argv:
    torch.nn.parallel.DistributedDataParallel = OnCpu
main()
"""
"""What a process of a run with several processes executes: the command line, with the tiny model known."""


def save_data(folder: Path) -> Path:
    """Two shards of images with captions, and the same pairs as images beside a CSV file."""
    rng = np.random.default_rng(0)
    (folder / f"{TINY}.json").write_text(json.dumps(CONFIG))
    rows = ["filepath\ttitle"]
    for shard in range(2):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as archive:
            for number in range(PAIRS // 2):
                image, caption = io.BytesIO(), f"a photo of number {shard} {number}"
                Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(image, "PNG")
                for ending, data in (("png", image.getvalue()), ("txt", caption.encode())):
                    entry = tarfile.TarInfo(f"{shard:02d}{number:04d}.{ending}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
                file = folder / f"{shard:02d}{number:04d}.png"
                file.write_bytes(image.getvalue())
                rows.append(f"{file}\t{caption}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    return folder


def arguments(data: Path, logs: Path, name: str, *more: str, shards: bool = True) -> list[str]:
    """open_clip_train's arguments for an epoch of two steps on the CPU."""
    source = f"{data}/{{0000..0001}}.tar" if shards else str(data / "pairs.csv")
    return [
        *("--train-data", source, "--train-num-samples", str(PAIRS), "--model", TINY, "--epochs", "1"),
        *("--batch-size", str(BATCH), "--lr", "1e-3", "--warmup", "1", "--log-every-n-steps", "1"),
        *("--workers", "0", "--device", "cpu", "--precision", "fp32"),
        *("--logs", str(logs), "--name", name, *more),
    ]
