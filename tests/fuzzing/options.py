"""Words on the command line: every option of every verb, with words that nobody expects."""

from __future__ import annotations

import itertools
from functools import cache
from random import Random
from typing import Any

from fuzzing.odd import OUTPUTS, WORDS

GOOD: dict[str, tuple[str, ...]] = {
    "probe": ("-m", "demo:vit-p16", "--images", "images", "--limit", "2"),
    "compare": ("run", "other"),
    "attend": ("-m", "demo:vit-p16", "--image", "images/b.png", "--layer", "1", "--patch", "1,1"),
    "audit": ("-m", "demo:vit-p16", "--images", "images"),
    "intervene": (
        "-m",
        "demo:vit-p16",
        "--images",
        "images",
        "--limit",
        "2",
        "--scope",
        "one",
        "--layers",
        "0",
    ),
    "figures": ("plans/figures.yaml", "--dry-run"),
    "report": ("run",),
    "merge": ("run",),
    "train": ("plans/train.yaml", "--dry-run"),
    "train-clip": (),
    "models": (),
}
"""Words that each verb takes as they are."""

MODELS = (
    *(
        "demo:",
        "demo:vit-p16@x",
        "demo:vit-p16,",
        "demo:vit-p16,a",
        "demo:vit-p16,a=b",
        "demo:vit-p16,img_size=0",
    ),
    *(
        "demo:vit-p16,img_size=-64",
        "demo:vit-p16,img_size=99999999",
        "demo:lm,img_size=64",
        ":",
        "x:y",
        "hf:",
        "timm:",
    ),
    *(
        "hf:a/b/c",
        "hf:a b",
        "hf:../up",
        "hf:nobody/nothing",
        "timm:hf-hub:",
        "timm:nothing",
        "open_clip:",
        "tl:x",
    ),
    *(
        "open_clip:ViT-B-32",
        "open_clip:ViT-B-32/no-tag",
        "open_clip:local-dir:nowhere",
        "hf:.",
        ".",
        "..",
        "/",
        "./images",
    ),
    *(
        "timm:vit_tiny_patch16_224,depth=-1",
        "timm:vit_tiny_patch16_224,depth=x",
        "timm:vit_tiny_patch16_224,embed_dim=7",
    ),
    *(
        "timm:vit_tiny_patch16_224,patch_size=0",
        "timm:vit_tiny_patch16_224,img_size=7",
        "timm:resnet18",
        "GPT2",
        "llama",
    ),
    *(
        "timm:vit_tiny_patch16_224,num_heads=0",
        "timm:vit_tiny_patch16_224,img_size=1e9",
        "timm:vit_tiny_patch16_224,x=1",
    ),
    *(
        "checkpoint=x",
        "demo:vit-p16,checkpoint=images/b.png",
        "timm:vit_tiny_patch16_224,checkpoint=texts/notes.txt",
    ),
)
PARTLY = {
    "--intervene": (
        "xsa",
        "xsa=",
        "xsa=nan",
        "xsa=1e400",
        "xsa:99",
        "xsa:0/99",
        "xsa:0-99999999999",
        "xsa=-1:0/0",
        "xsa/0",
    ),
    "--metrics": ("default", "all", "entropy,entropy", "cos-y-vself", "stream", "shape", "divergence"),
    "--tokens": ("all", "cls", "registers", "patch,patch", "text", "last", "image"),
    "--device": ("meta", "cpu:7", "cuda", "cuda:-1", "cuda:99999999999", "mps", "spread", "xla", "auto"),
    "--dtype": ("float64", "int8", "bfloat16", "float16", "FLOAT32", "torch.float32"),
    "--series": ("demo", "gpt2", "nothing"),
    "--model-arg": ("img_size=64", "img_size=0", "img_size=[1,2]", "a=b", "patch_size=99", "x", "depth=1e9"),
    "--batch-size": ("auto", "1", "99999999999999999999"),
    "--shard": ("0/0", "1/2", "2/1", "1/99999999999", "-1/2", "1/1", "x/y"),
    "--attention": ("xsa", "xsa:99", "xsa:0-99999999999", "gated_xsa=x", "xsa=", "sa=1"),
    "--scope": ("one", "all", "one,one", "first,last", "heads"),
    "--patch": ("0,0", "99,99", "-1,-1", "99999999999,1", "1"),
    "--pixel": ("0,0", "999,999", "-1,-1", "99999999999,1"),
    "--growth": ("0,2", "0,99", "5,5", "99999999999,1"),
}
"""Words that come near to what an option takes."""

LEFT = {"--help", "--debug", "--workers", "-h"}
"""Not drawn: `--workers` starts as many processes as it is told."""


@cache
def options_of(verb: str) -> dict[str, Any]:
    """Flag → click's parameter, of a verb."""
    import typer

    from diag.cli import app

    command: Any = typer.main.get_command(app).commands[verb]
    found = {flag: each for each in command.params for flag in each.opts if flag.startswith("--")}
    return {flag: each for flag, each in sorted(found.items()) if flag not in LEFT}


def typed(draw: Random, verb: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Good words with one to three options more, and what the command may write."""
    words, out = list(GOOD[verb]), "out"
    flags = options_of(verb)
    end = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        flag = draw.choice([*flags, ""])
        if not flag:
            words.insert(draw.randrange(len(words) + 1), draw.choice(WORDS))
        elif flags[flag].is_flag:
            words.append(flag)
        elif flag == "--output-path":
            out = draw.choice(OUTPUTS)
        elif flag == "--runs":
            words += [flag, draw.choice(("nowhere", "images", "images/b.png", "run", "runs"))]
        else:
            if flag in words and draw.random() < 0.5:
                place = words.index(flag)
                del words[place : place + 2]
            near = MODELS if flag == "--model" else PARTLY.get(flag, WORDS)
            words += [flag, draw.choice(near) if draw.random() < 0.5 else draw.choice(WORDS)]
    if verb in ("figures", "train") and draw.random() < 0.2:
        words = [word for word in words if word != "--dry-run"]
    if verb == "train-clip":
        end = [
            "--",
            "--model",
            "ViT-B-32",
            "--train-data",
            draw.choice(WORDS),
            draw.choice(("", "--lr", "--x")),
        ]
    quiet = ["-q"] if "--quiet" in flags and "--quiet" not in words else []
    written = ["-o", out] if "--output-path" in flags else []
    runs = [word for flag, word in itertools.pairwise(words) if flag == "--runs"]
    owns = (*(place.split("/")[0] for place in (out, *runs) if place), "runs")
    return (verb, *words, *quiet, *written, *end), owns
