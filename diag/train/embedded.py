"""Trains the small models that travel inside the package, from data that travel with its dependencies.

    python -m diag.train.embedded vit --patch-size 8 -o DIR
    python -m diag.train.embedded lm -o DIR

Vision: name the photograph that a random crop comes from. Training crops come from the left
60 % of each photograph, validation crops from the right 35 %; the 5 % between them belongs to
neither, so no pixel is shared. Three patch sizes share seed, recipe and data order.
Language: next-byte-pair prediction on the help topics of Python's standard library, of which
the last tenth is held out.

Weights are stored in float16 (under 2 MB a model); the accuracy or loss in the card is that of
the stored weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from diag.inputs import PHOTOGRAPHS, demo_images, demo_text
from diag.models.demo import LM_CONFIG, VIT_CONFIG, build_lm, build_vit

IMAGE_SIZE = VIT_CONFIG["img_size"]
TRAIN_REGION = (0.0, 0.60)
VALIDATION_REGION = (0.65, 1.0)


@dataclass(frozen=True)
class Recipe:
    """One training run: AdamW, linear warm-up, cosine decay, gradient clipping at 1."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.05
    warmup: int = 100
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Learning rate at `step`, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


VIT_RECIPE = Recipe(steps=1500, batch_size=64, learning_rate=1e-3)
LM_RECIPE = Recipe(steps=1500, batch_size=16, learning_rate=2e-3)
VOCABULARY = LM_CONFIG["vocab_size"]
VALIDATION_CROPS = 1400


def photographs() -> list[Tensor]:
    """Every bundled photograph as a uint8 tensor `[3, height, width]`, in the order of the classes."""
    return [torch.from_numpy(np.asarray(item.read()).copy()).permute(2, 0, 1) for item in demo_images()]


class Crops:
    """Random square crops of one horizontal region of each photograph, with the photograph's number."""

    def __init__(self, region: tuple[float, float], seed: int, *, augment: bool) -> None:
        self.images = []
        for image in photographs():
            width = image.shape[2]
            self.images.append(image[:, :, round(region[0] * width) : round(region[1] * width)])
        self.generator = np.random.default_rng(seed)
        self.augment = augment

    def one(self, label: int) -> Tensor:
        """A crop `[3, 64, 64]` in [-1, 1]; its side is log-uniform between 48 pixels and the region's."""
        image = self.images[label]
        height, width = image.shape[1:]
        largest = min(height, width)
        side = round(math.exp(self.generator.uniform(math.log(48), math.log(largest))))
        top = self.generator.integers(0, height - side + 1)
        left = self.generator.integers(0, width - side + 1)
        crop = image[:, top : top + side, left : left + side].float()[None]
        crop = F.interpolate(crop, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)[0]
        if self.augment:
            if self.generator.random() < 0.5:
                crop = crop.flip(-1)
            crop = crop * self.generator.uniform(0.7, 1.3) + self.generator.uniform(-25, 25)
            if self.generator.random() < 0.3:
                crop = crop.mean(0, keepdim=True).expand(3, -1, -1)
        return crop.clamp(0, 255) / 127.5 - 1

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """`size` crops `[size, 3, 64, 64]` and their labels `[size]`."""
        labels = self.generator.integers(0, len(self.images), size)
        return torch.stack([self.one(int(label)) for label in labels]), torch.from_numpy(labels)


def fit(model: nn.Module, recipe: Recipe, loss_at: Callable[[], Tensor], *, name: str) -> None:
    """Runs the recipe in place; `loss_at()` draws the next batch and returns its loss."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": other, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
    )
    model.train()
    started = time.monotonic()
    for step in range(recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate_at(step)
        loss = loss_at()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0 or step == recipe.steps - 1:
            print(f"{name} step {step} loss {loss.item():.4f} {time.monotonic() - started:.0f}s", flush=True)
    model.eval()


def train_vit(patch_size: int, recipe: Recipe, out: Path) -> dict[str, Any]:
    """Trains one ViT, writes `vit-p{patch_size}.safetensors` and its card, returns the card."""
    torch.manual_seed(recipe.seed)
    model = build_vit(patch_size)
    crops = Crops(TRAIN_REGION, recipe.seed, augment=True)

    def loss_at() -> Tensor:
        images, labels = crops.batch(recipe.batch_size)
        return F.cross_entropy(model(images), labels, label_smoothing=0.1)

    fit(model, recipe, loss_at, name=f"vit-p{patch_size}")
    model.half().float()  # what is measured is what is stored
    held_out = Crops(VALIDATION_REGION, recipe.seed + 1, augment=False)
    correct = 0
    with torch.inference_mode():
        for _ in range(VALIDATION_CROPS // 100):
            images, labels = held_out.batch(100)
            correct += (model(images).argmax(-1) == labels).sum().item()
    card = {
        "name": f"vit-p{patch_size}",
        "architecture": "timm VisionTransformer",
        "config": VIT_CONFIG | {"patch_size": patch_size, "num_classes": len(PHOTOGRAPHS)},
        "classes": list(PHOTOGRAPHS),
        "task": "name the photograph that a crop comes from",
        "data": "14 photographs and textures in scikit-image's wheel; left 60 % trains, right 35 % validates",
        "recipe": asdict(recipe),
        "validation_accuracy": correct / VALIDATION_CROPS,
        "validation_crops": VALIDATION_CROPS,
        "licence": "weights: the licence of this package; photographs: see scikit-image's data/README.txt",
    }
    stem = out / f"vit-p{patch_size}"
    arguments = f"vit --patch-size {patch_size}"
    return _store(model, card, arguments, stem.with_suffix(".safetensors"), stem.with_suffix(".json"))


def train_lm(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Trains the language model, writes the Hugging Face folder `lm/` and its card, returns the card."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = demo_text()
    cut = int(len(text) * 0.9)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [text[:cut]],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    folder = out / "lm"
    folder.mkdir(parents=True, exist_ok=True)
    context = LM_CONFIG["n_positions"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        model_max_length=context,
    ).save_pretrained(folder)
    train = torch.tensor(tokenizer.encode(text[:cut]).ids)
    held_out = torch.tensor(tokenizer.encode(text[cut:]).ids)

    torch.manual_seed(recipe.seed)
    model = build_lm()
    generator = np.random.default_rng(recipe.seed)

    def loss_at() -> Tensor:
        starts = generator.integers(0, len(train) - context, recipe.batch_size)
        batch = torch.stack([train[s : s + context] for s in starts])
        return model(batch, labels=batch).loss

    fit(model, recipe, loss_at, name="lm")
    model.half().float()
    with torch.inference_mode():
        windows = held_out[: len(held_out) // context * context].view(-1, context)
        losses = [model(w[None], labels=w[None]).loss.item() for w in windows]
    card = {
        "name": "lm",
        "architecture": "transformers GPT2LMHeadModel",
        "config": LM_CONFIG,
        "task": "next token on pydoc_data.topics, byte-level BPE",
        "data": f"pydoc_data.topics, {len(text)} characters; first 90 % trains, last 10 % is held out",
        "data_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "recipe": asdict(recipe),
        "validation_loss_nats_per_token": sum(losses) / len(losses),
        "validation_windows": len(losses),
        "validation_characters_per_token": (len(text) - cut) / len(held_out),
        "licence": "weights: the licence of this package; text: the licence of Python",
    }
    model.config.save_pretrained(folder)
    return _store(model, card, "lm", folder / "model.safetensors", folder / "card.json")


def _store(
    model: nn.Module, card: dict[str, Any], arguments: str, weights: Path, card_file: Path
) -> dict[str, Any]:
    weights.parent.mkdir(parents=True, exist_ok=True)
    # tied weights are stored once, as Hugging Face does
    tied = {"lm_head.weight"} if "transformer.wte.weight" in model.state_dict() else set()
    tensors = {k: v.half().contiguous() for k, v in model.state_dict().items() if k not in tied}
    save_file(tensors, weights, metadata={"format": "pt"})
    card |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": "float16",
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "command": f"python -m diag.train.embedded {arguments} --out DIR",
        "torch": torch.__version__,
    }
    card_file.write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))
    return card


def main() -> None:
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["vit", "lm"])
    parser.add_argument("--patch-size", type=int, choices=[4, 8, 16], default=8)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=1, help="threads change the last bits of the result")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = VIT_RECIPE if args.what == "vit" else LM_RECIPE
    if args.steps:
        recipe = Recipe(**(asdict(recipe) | {"steps": args.steps}))
    if args.what == "vit":
        train_vit(args.patch_size, recipe, args.out)
    else:
        train_lm(recipe, args.out)


if __name__ == "__main__":
    main()
