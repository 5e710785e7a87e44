"""`attnbias train-clip`: open_clip's own training with changed attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from diag.cli.app import app
from diag.cli.interrupts import interruptible
from diag.cli.plans import plans_for


@app.command(name="train-clip")
def train_clip(
    arguments: Annotated[
        list[str] | None, Argument(metavar="-- ARGUMENTS", help="open_clip_train's own arguments.")
    ] = None,
    attention: Annotated[
        str, Option(help="Vision tower: NAME[=FORM][:LAYERS], such as xsa or gated_xsa:0-5; sa: unchanged.")
    ] = "sa",
    text_attention: Annotated[str, Option(help="Text tower, in the same way.")] = "sa",
    config: Annotated[
        Path | None, Option(help="YAML file of arguments, or clip-cc12m-b16; those after '--' go over them.")
    ] = None,
) -> None:
    """Train a CLIP model with open_clip_train, its attention changed. Runs under torchrun.

    torchrun --nproc-per-node 8 -m diag train-clip --attention xsa --config configs/clip-cc12m-b16.yaml --
    --train-data 'DIR/cc12m-train-{0000..2175}.tar' --imagenet-val DIR
    """
    from diag.studies.train.clip import train_clip as run

    if config is not None:
        (config,) = plans_for("train-clip", [config])
    last_words = "stopped; the same command with '--resume latest' goes on from the last checkpoint"
    with interruptible(lambda: last_words):
        run(arguments or [], attention=attention, text_attention=text_attention, config=config)
