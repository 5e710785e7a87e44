"""Good files of every kind that the tool reads: made when they are first asked for, and then only copied."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable
from contextlib import chdir
from functools import partial
from pathlib import Path

import numpy as np
import torch
from checkpoints import OPEN_CLIP_SIZES, TEXT, save_language_model, save_vision_model
from commands import run_cli
from PIL import Image
from safetensors.torch import save_file

from diag.models.families.demo import EMBEDDED

VIT = ("-m", "demo:vit-p16", "--images", "images", "--limit", "2", "--layers", "0,3,5", "-q")
PAIR = (
    "-m",
    "demo:vit-p16",
    "-m",
    "demo:vit-p8",
    "--images",
    "images",
    "--limit",
    "3",
    "--layers",
    "0,5",
    "--metrics",
    "cos_y_vself,excess",
)
FEW = (*PAIR, "--keep-samples", "1", "-q")
"""What the unfinished runs measure; the same words resume them."""

PLAN = """\
title: Two models
about: Words about it, with {n} inputs.
probes:
  sizes: {models: [demo:vit-p16], images: images, limit: 2, layers: [0, 3, 5]}
figures:
  - {kind: depth, probe: sizes, metrics: [cos_y_vself]}
  - {kind: comparison, probe: sizes, caption: "of {n} photographs"}
  - kind: similarity-map
    name: map
    attend: {models: [demo:vit-p16], image: images/b.png, layer: 1, patch: [1, 1]}
tables:
  - {kind: layers, probe: sizes}
  - {kind: profiles, probe: sizes}
"""
TRAIN = """\
title: Two cells
about: Words about it.
task: crops
patch_sizes: [16]
variants: [sa, xsa]
seeds: [0]
model: {img_size: 32, embed_dim: 24, depth: 2, num_heads: 3}
recipe: {steps: 2, batch_size: 4, learning_rate: 0.001, warmup: 1, held_out: 14}
monitor_every: 1
probe_limit: 2
"""
CLIP = """\
model: tiny-clip
train-data: nowhere/{0000..0001}.tar
train-num-samples: 32
epochs: 1
batch-size: 16
lr: 1.0e-3
device: cpu
workers: 0
local-loss: true
"""


class Stock:
    """Parts by name: folders under one root, where commands find them by the same words as in a copy.

    `stock.part("run")` makes what is missing, with what it stands on, and gives its path.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: set[str] = set()
        root.mkdir(parents=True)

    def part(self, name: str) -> Path:
        """The path of a part, which is made now if it is not there."""
        if name not in self.made:
            needs, make = PARTS[name]
            for need in needs:
                self.part(need)
            with chdir(self.root):
                make()
            self.made.add(name)
        return self.root / name

    def ready(self, names: Iterable[str]) -> None:
        """Makes parts, and measures each as it is: it is good, and no try has to import what that imports."""
        for name in names:
            self.part(name)
            if name in PROVED:
                self.part(PROVED[name])


def _run(*words: str, code: int = 0) -> None:
    ended = run_cli(*words)
    assert ended.code == code, ended.err


def _probed(name: str, given: tuple[str, ...]) -> None:
    """A good model is measured as it is; what that imports, no try need import again."""
    _run("probe", *given, "--limit", "2", "-q", "-o", f"probed-{name}")


def _images() -> None:
    rng = np.random.default_rng(0)
    Path("images").mkdir()
    for name in ("a.jpg", "b.png", "c.webp"):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6
        coarse.resize((40, 32)).save(Path("images", name), exif=exif)


def _labelled() -> None:
    for number, name in enumerate(("a.jpg", "b.png", "c.webp")):
        for kind in ("0", "1"):  # numbers are classes of any model
            Path("labelled", kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(Path("images", name), Path("labelled", kind, f"{number}-{name}"))


def _tar() -> None:
    Path("tars").mkdir()
    with tarfile.open("tars/photos.tar", "w") as archive:
        for file in sorted(Path("images").iterdir()):
            entry, content = tarfile.TarInfo(file.name), file.read_bytes()
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def _texts() -> None:
    Path("texts").mkdir()
    Path("texts", "notes.txt").write_text(TEXT, encoding="utf-8")
    Path("texts", "more.txt").write_text(TEXT[::-1], encoding="utf-8")


def _attend() -> None:
    _run("attend", "-m", "demo:vit-p16", *LOOK, "-o", "attend")
    for file in Path("attend", "figures").glob("*.png"):  # reports take it up
        Image.new("RGB", (4, 3)).save(file)


def _unfinished() -> None:
    for folder, share in (("unfinished", "1/2"), ("rest", "2/2")):
        _run("probe", *FEW, "--shard", share, "-o", folder)


def _plans() -> None:
    Path("plans").mkdir()
    for name, text in (("figures", PLAN), ("train", TRAIN), ("clip", CLIP)):
        Path("plans", f"{name}.yaml").write_text(text, encoding="utf-8")


def _timm() -> None:
    import timm

    Path("timm").mkdir()
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    save_file(model.state_dict(), "timm/model.safetensors", {"format": "pt"})
    shown = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    shown |= {"crop_pct": 0.9, "pool_size": None, "num_classes": 3, "first_conv": "patch_embed.proj"}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "num_features": 24}
    config |= {"pretrained_cfg": {**shown, "classifier": "head"}, "model_args": sizes}
    Path("timm", "config.json").write_text(json.dumps(config), encoding="utf-8")


def _open_clip() -> None:
    import open_clip

    Path("open_clip").mkdir()
    torch.manual_seed(0)
    module = open_clip.CLIP(**OPEN_CLIP_SIZES)
    save_file(module.state_dict(), "open_clip/open_clip_model.safetensors")
    shown = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": OPEN_CLIP_SIZES, "preprocess_cfg": shown}
    Path("open_clip", "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")


def _language(kind: str) -> Callable[[], None]:
    return lambda: _of_hub(save_language_model(Path(kind), kind))


def _sharded() -> None:
    """The weights of `gpt2` in several files, with an index."""
    import transformers

    shutil.copytree("gpt2", "sharded")
    Path("sharded", "model.safetensors").unlink()
    transformers.GPT2LMHeadModel.from_pretrained("gpt2").save_pretrained("sharded", max_shard_size="40KB")
    _of_hub(Path("sharded"))


def _vision(kind: str) -> Callable[[], None]:
    return lambda: _of_hub(save_vision_model(Path(kind), kind))


def _of_hub(folder: Path) -> None:
    """Times of files tell nothing: two stocks have the same ones."""
    for file in folder.iterdir():
        os.utime(file, (1, 1))


def _weights() -> None:
    import timm

    Path("weights").mkdir()
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    state = timm.create_model("vit_tiny_patch16_224", **sizes).state_dict()
    save_file(state, "weights/own.safetensors")
    torch.save(state, "weights/plain.pt")
    torch.save(
        {"epoch": 1, "state_dict": {f"module.{name}": value for name, value in state.items()}},
        "weights/own.pt",
    )


OWN = ("-m", "timm:vit_tiny_patch16_224")
SIZES = tuple(
    word
    for size in ("img_size=32", "patch_size=16", "embed_dim=24", "depth=2", "num_heads=3", "num_classes=0")
    for word in ("--model-arg", size)
)
"""The model that `weights/` holds."""


def _demo_lm() -> None:
    shutil.copytree(EMBEDDED / "lm", "demo_lm")


SEE, READ = ("--images", "images"), ("--texts", "texts", "--seq-len", "12")
LOOK = ("--image", "images/b.png", "--layer", "1", "--patch", "1,1", "-q")
CHANGE = ("--images", "labelled", "--labelled", "--limit", "2", "--scope", "one", "--layers", "0,1", "-q")

PARTS: dict[str, tuple[tuple[str, ...], Callable[[], None]]] = {
    "images": ((), _images),
    "texts": ((), _texts),
    "labelled": (("images",), _labelled),
    "tars": (("images",), _tar),
    "plans": ((), _plans),
    "run": (("images",), lambda: _run("probe", *VIT, "--tokens", "patch,cls", "-o", "run")),
    "other": (("images",), lambda: _run("probe", "-m", "demo:vit-p8", *VIT[2:], "-o", "other")),
    "moments": (("images",), lambda: _run("probe", *FEW, "-o", "moments")),
    "unfinished": (("images",), _unfinished),
    "rest": (("unfinished",), lambda: None),
    "attend": (("images",), _attend),
    "intervene": (("labelled",), lambda: _run("intervene", "-m", "demo:vit-p16", *CHANGE, "-o", "intervene")),
    "comparison": (("run", "other"), lambda: _run("compare", "run", "other", "-q", "-o", "comparison")),
    "training": (
        ("plans",),
        lambda: _run("train", "plans/train.yaml", "--device", "cpu", "-q", "-o", "training"),
    ),
    "runs": (("plans", "images"), lambda: _run("figures", "plans/figures.yaml", "-q", "-o", "drawn")),
    "drawn": (("runs",), lambda: None),
    "timm": ((), _timm),
    "gpt2": ((), _language("gpt2")),
    "sharded": (("gpt2",), _sharded),
    "bert": ((), _language("bert")),
    "vit": ((), _vision("vit")),
    "clip": ((), _vision("clip")),
    "open_clip": ((), _open_clip),
    "demo_lm": ((), _demo_lm),
    "weights": ((), _weights),
    "spoken": (("texts",), lambda: _run("probe", "-m", "demo:lm", *READ, "-q", "-o", "spoken")),
    "clip-training": (("plans",), lambda: _run("train-clip", "--config", "plans/clip.yaml", "--", code=2)),
    **{
        f"probed-{name}": ((name, "images", "texts"), partial(_probed, name, given))
        for name, given in {
            "timm": ("-m", "./timm", *SEE),
            "gpt2": ("-m", "./gpt2", *READ),
            "sharded": ("-m", "./sharded", *READ),
            "bert": ("-m", "./bert", *READ),
            "vit": ("-m", "./vit", *SEE),
            "clip": ("-m", "./clip", *SEE, *READ),
            "open_clip": ("-m", "open_clip:local-dir:./open_clip", *SEE),
            "demo_lm": ("-m", "./demo_lm", *READ),
            "weights": (*OWN, *SIZES, *SEE, "--checkpoint", "weights/own.pt"),
        }.items()
    },
}
"""name → what it stands on, and what makes it in the current folder."""

PROVED = {"images": "run", "texts": "spoken", "labelled": "intervene", "plans": "clip-training"}
PROVED |= {name.removeprefix("probed-"): name for name in PARTS if name.startswith("probed-")}
"""Part → the one that only comes about if it is good."""
