"""Makes the small models that travel inside the package, from data that travel with its dependencies.

    python -m tools.embedded_models vit --patch-size 8 -o DIR     one of the three well-trained ViTs
    python -m tools.embedded_models lm -o DIR                     the language model
    python -m tools.embedded_models grid RUN -o DIR               seed 0 of a finished `attnbias train`

Tasks, loss and loop are those of `attnbias train`. Vision: name the photograph that a random crop comes from;
patch sizes share seed, recipe and data order. Language: next-byte-pair prediction on the help topics of
Python's standard library, of which the last tenth is held out. Weights are stored in float16 (under 2 MB a
model); the accuracy or loss in the card is that of the stored weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from diag.inputs.images import PHOTOGRAPHS
from diag.inputs.texts import demo_text
from diag.models.checkpoint import read_checkpoint
from diag.models.families.demo import LM_CONFIG, VIT_CONFIG, build_lm, build_vit
from diag.models.weights import fit
from diag.results.writing import write_json
from diag.studies.train.cells import card_of, cells_of
from diag.studies.train.crops import CropsTask
from diag.studies.train.fit import Training
from diag.studies.train.image_task import classified
from diag.studies.train.language import LanguageTask
from diag.studies.train.plan import Recipe, TrainPlan
from diag.studies.train.tasks import Task
from diag.variants import BASELINE, METADATA, restore, variants_in

SEED = 0
VIT_RECIPE = Recipe(steps=1500, batch_size=64, learning_rate=1e-3, warmup=100)
LM_RECIPE = Recipe(steps=1500, batch_size=16, learning_rate=2e-3, warmup=100)
VALIDATION_CROPS = 1400
ALONE: dict[str, Any] = {"title": "embedded", "variants": (BASELINE,), "seeds": (SEED,)}
"""A plan of one cell."""
SHIPPED = ("sa", "xsa")
"""Variants of a grid whose weights are shipped."""

LICENCE = "weights: the licence of this package; "
PHOTOGRAPHS_LICENCE = LICENCE + "photographs: see scikit-image's data/README.txt"
CPU = torch.device("cpu")


def train_vit(patch_size: int, recipe: Recipe, out: Path) -> dict[str, Any]:
    """Trains one ViT, writes `vit-p{patch_size}.safetensors` and its card, returns the card."""
    task = CropsTask(
        TrainPlan(task="crops", patch_sizes=(patch_size,), model=VIT_CONFIG, recipe=recipe, **ALONE)
    )
    torch.manual_seed(SEED)
    model = build_vit(patch_size)
    name = f"vit-p{patch_size}"
    _train(model, task, recipe, out / f"{name}.checkpoint.pt", name)
    held_out = task.testing.batches(VALIDATION_CROPS, np.random.default_rng(SEED + 1))
    with torch.inference_mode():
        outcome = classified(model, held_out, CPU)
    card = {
        "name": name,
        **_vit_facts(patch_size),
        "recipe": recipe.model_dump(mode="json") | {"seed": SEED},
        "validation_accuracy": outcome["accuracy"],
        "validation_crops": VALIDATION_CROPS,
        "licence": PHOTOGRAPHS_LICENCE,
    }
    return _store(model, card, f"vit --patch-size {patch_size}", out / f"{name}.safetensors")


def ship_grid(run: Path, out: Path) -> list[dict[str, Any]]:
    """Stores seed 0 of `sa` and `xsa` of every patch size of a finished grid on the crops, returns the cards.

    The files are `grid-p{patch_size}-{variant}.safetensors` and `.json`.
    """
    plan = TrainPlan(**json.loads((run / "plan.json").read_text(encoding="utf-8"))["plan"])
    task = CropsTask(plan)
    cards = []
    for cell in cells_of(plan):
        if cell.seed != plan.seeds[0] or cell.variant not in SHIPPED or cell.patch_size is None:
            continue
        folder = run / "cells" / cell.name
        weights = folder / "model" / "model.safetensors"
        model = build_vit(cell.patch_size)
        found = read_checkpoint(weights, model)
        restore(model, found.variants)
        fit(model, found.tensors, f"'{weights}'")
        model.half().float().eval()
        with torch.inference_mode():
            outcome = task.evaluate(model, CPU)
        trained = card_of(folder)
        card = {
            "name": f"grid-p{cell.patch_size}-{cell.variant}",
            **_vit_facts(cell.patch_size),
            "variant": cell.variant,
            "recipe": trained["recipe"] | {"seed": cell.seed},
            "initial_sha256": trained["initial_sha256"],
            "validation_accuracy": outcome["accuracy"],
            "validation_loss": outcome["loss"],
            "validation_crops": int(outcome["held_out"]),
            "licence": PHOTOGRAPHS_LICENCE,
        }
        cards.append(_store(model, card, "grid RUN", out / f"{card['name']}.safetensors"))
    return cards


def train_lm(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Trains the language model, writes the Hugging Face folder `lm/` and its card, returns the card."""
    task = LanguageTask(TrainPlan(task="language", model=LM_CONFIG, recipe=recipe, **ALONE))
    folder = out / "lm"
    task.tokenizer.save_pretrained(folder)
    torch.manual_seed(SEED)
    model = build_lm()
    _train(model, task, recipe, folder / "checkpoint.pt", "lm")
    with torch.inference_mode():
        outcome = task.evaluate(model, CPU)
    text = demo_text()
    card = {
        "name": "lm",
        "architecture": "transformers GPT2LMHeadModel",
        "config": LM_CONFIG,
        "task": "next token on pydoc_data.topics, byte-level BPE",
        "data": f"pydoc_data.topics, {len(text)} characters; first 90 % trains, last 10 % is held out",
        "data_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "recipe": recipe.model_dump(mode="json") | {"seed": SEED},
        "validation_loss_nats_per_token": outcome["loss"],
        "validation_windows": outcome["held_out"],
        "validation_characters_per_token": len(task.held_out_text) / len(task.held_out),
        "licence": LICENCE + "text: the licence of Python",
    }
    model.config.save_pretrained(folder)
    return _store(model, card, "lm", folder / "model.safetensors")


def _vit_facts(patch_size: int) -> dict[str, Any]:
    return {
        "architecture": "timm VisionTransformer",
        "config": VIT_CONFIG | {"patch_size": patch_size, "num_classes": len(PHOTOGRAPHS)},
        "classes": list(PHOTOGRAPHS),
        "task": "name the photograph that a crop comes from",
        "data": "14 photographs and textures in scikit-image's wheel; left 60 % trains, right 35 % validates",
    }


def _train(model: nn.Module, task: Task, recipe: Recipe, checkpoint: Path, name: str) -> None:
    """Runs the recipe in one go and rounds the weights to what is stored.

    One generator draws all batches, so that the checkpoint alone could not go on.
    """
    training = Training(model, recipe, CPU)
    generator = np.random.default_rng(SEED)

    def advance(steps: int) -> None:
        if training.step % 100 == 0 or training.step == recipe.steps:
            print(f"{name} step {training.step} loss {training.log[-1]['loss']:.4f}", flush=True)

    batches = (task.batch(generator) for _ in range(recipe.steps))
    training.run(batches, task.loss, checkpoint=checkpoint, advance=advance)
    checkpoint.unlink()
    model.half().float()


def _store(model: nn.Module, card: dict[str, Any], arguments: str, weights: Path) -> dict[str, Any]:
    """Writes a model and its card: `card.json` in a folder of its own, else named as the weights are."""
    weights.parent.mkdir(parents=True, exist_ok=True)
    # tied weights are stored once, as Hugging Face does
    tied = {"lm_head.weight"} if "transformer.wte.weight" in model.state_dict() else set()
    tensors = {k: v.half().contiguous() for k, v in model.state_dict().items() if k not in tied}
    changed = variants_in(model)
    header = {METADATA: json.dumps(changed)} if changed else {}
    save_file(tensors, weights, metadata={"format": "pt"} | header)
    card |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": "float16",
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "command": f"python -m tools.embedded_models {arguments} --out DIR",
        "torch": torch.__version__,
    }
    own = weights.name == "model.safetensors"
    write_json(card, weights.with_name("card.json") if own else weights.with_suffix(".json"))
    print(json.dumps(card, indent=2))
    return card


def main() -> None:
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["vit", "lm", "grid"])
    parser.add_argument("run", type=Path, nargs="?", help="of grid: the folder of attnbias train")
    parser.add_argument("--patch-size", type=int, choices=[4, 8, 16], default=8)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=1, help="threads change the last bits of the result")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "grid":
        ship_grid(args.run, args.out)
        return
    recipe = VIT_RECIPE if args.what == "vit" else LM_RECIPE
    if args.steps:
        recipe = recipe.model_copy(update={"steps": args.steps})
    if args.what == "vit":
        train_vit(args.patch_size, recipe, args.out)
    else:
        train_lm(recipe, args.out)


if __name__ == "__main__":
    main()
