"""CLIP training with changed attention: a launcher around `open_clip_train.main`, in one process or many.

    from diag.studies.train.clip import train_clip
    train_clip(["--model", "ViT-B-16", "--train-data", SHARDS, …], attention="xsa")

The training loop, data and evaluation are open_clip's own. One thing is wrapped: the function that creates
the model, so that attention is changed before the optimiser, DDP or torch.compile see it. What
open_clip_train refuses with exit code 0, or goes on with (a loss of NaN), becomes an error. Under torchrun
every process runs `train_clip` with the same arguments.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from diag.errors import UserError
from diag.models.checkpoint import read_variants
from diag.studies.train.clip_arguments import open_clip_train, read_arguments
from diag.studies.train.clip_log import watched
from diag.variants import BASELINE, Variant, apply, parse, variants_in

REFUSED = -1
"""What `open_clip_train.main.main` returns where it refuses to run, after it has printed why."""


def train_clip(
    arguments: Sequence[str],
    *,
    attention: str = BASELINE,
    text_attention: str = BASELINE,
    config: Path | None = None,
) -> None:
    """Trains, or only evaluates, a CLIP model with open_clip_train and changed attention.

    arguments: open_clip_train's own, which go over those of `config` (a YAML file, see `clip_arguments`).
    attention, text_attention: variants of the two towers (`diag.variants.parse`); the second model of a
        distillation, its teacher, is left as it is.
    Raises UserError where open_clip_train would refuse, would wait for shards that are not there, or a
    checkpoint was trained with other attention; DivergedError where the loss is no number any more.
    """
    towers = {"visual": parse(attention), "text": parse(text_attention)}
    train = open_clip_train()
    kinds = [variant for variant in (attention, text_attention) if variant != BASELINE]
    argv, given = read_arguments(arguments, config, "-".join(kinds) or BASELINE)
    create = train.create_model_and_transforms
    with watched() as watch:
        try:
            train.create_model_and_transforms = _changing(create, towers, _continued(train, given))
            ended = train.main(argv)
        finally:
            train.create_model_and_transforms = create
        if ended == REFUSED:
            raise UserError("open_clip_train refused to run", "it printed why, above")
        watch.finish()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _changing(
    create: Callable[..., tuple[Any, Any, Any]],
    towers: dict[str, Variant],
    continued: Sequence[tuple[Path, bool]],
) -> Callable[..., tuple[Any, Any, Any]]:
    """open_clip's function that creates a model; the first one comes with changed attention."""
    used = False

    def created(*arguments: Any, **settings: Any) -> tuple[Any, Any, Any]:
        nonlocal used
        model, *transforms = create(*arguments, **settings)
        if not used:
            used = True
            for name, variant in towers.items():
                changed = apply(_tower(model, name), variant)
                logging.info(f"attnbias: {name} attention is {variant.name}, {len(changed)} modules changed")
            for checkpoint, exact in continued:
                _refuse_other_attention(checkpoint, exact, variants_in(model))
        return model, *transforms

    return created


def _tower(model: Any, name: str) -> Any:
    """A tower of an open_clip model; a plain CLIP holds its text tower's layers itself."""
    if name == "text" and getattr(model, "text", None) is None:
        return model.transformer
    return getattr(model, name)


def _continued(train: Any, given: Any) -> list[tuple[Path, bool]]:
    """The local checkpoints that a run goes on from: `--resume`, and `--pretrained` where it is a file.

    The first has the attention of the run, whatever it is: True.
    """
    resume = given.resume
    if resume == "latest" and given.name is not None:
        folder = Path(given.logs) / given.name / "checkpoints"
        newest = train.get_latest_checkpoint(str(folder), remote=False)
        resume = folder / train.LATEST_CHECKPOINT_NAME if given.save_most_recent else newest
    named = ((resume, True), (given.pretrained, False))
    return [(Path(file), exact) for file, exact in named if file and Path(file).is_file()]


def _refuse_other_attention(checkpoint: Path, exact: bool, kinds: dict[str, str]) -> None:
    """Raises UserError where a checkpoint was trained with other attention than the model has.

    A checkpoint that may be retrofitted (not `exact`) can have plain attention.
    """
    trained = read_variants(checkpoint)
    if trained == kinds or not (trained or exact):
        return
    theirs, ours = _in_words(trained), _in_words(kinds)
    raise UserError(
        f"'{checkpoint}' was trained with {theirs}, this run has "
        + (ours if ours != theirs else "other modules changed"),
        "give --attention and --text-attention as for that run, or start another with --name",
    )


def _in_words(kinds: dict[str, str]) -> str:
    counts = sorted(Counter(kinds.values()).items())
    return ", ".join(f"{kind} in {count} modules" for kind, count in counts) or f"{BASELINE} attention"
