"""Where the language model of a vision-language model looks, asked one thing and asked in general.

Of each layer only the rows of the tokens behind the image are computed, and of these what they give to the
image: no token × token matrix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from PIL import Image
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.attention.pattern import pattern_rows
from diag.errors import MeasurementError, UserError
from diag.measure.loop import told_if_the_model_fails
from diag.measure.meaning import understood
from diag.models.base import Batch, Model, Sample, Tower
from diag.results.gaze import contrast_of, gaze_shift_of

LANGUAGE = "language"
PICTURE_SIDE = 448
"""Pixels of the longer side of a picture that is shown as it was given."""


def questioned(model: Model, question: str) -> Tower:
    """The language model's tower with a question beside the image. Raises UserError where there is none."""
    tower = model.towers.get(LANGUAGE)
    if tower is None or tower.asking is None:
        raise UserError(
            f"model '{model.name}' reads no question beside an image",
            "--question takes a vision-language model with its processor, such as LLaVA or Qwen2.5-VL",
        )
    return tower.asking(question)


def maps_of(
    model: Model, tower: Tower, batch: Batch, sample: Sample, general: str, head: int | None
) -> pd.DataFrame:
    """Columns layer, token, and the maps of `diag.results.gaze`, for every layer that can be read.

    tower, batch: under the question, understood. head: one query head; the mean over heads if None.
    Raises UserError where no token of the question stands behind the image, or the general prompt makes other
    tokens of it.
    """
    assert tower.asking is not None
    other = understood(model, tower.asking(general), [sample])
    asked = _looks(tower, batch, head)
    plain = _looks(other, other.encode([sample]), head)
    made = list[pd.DataFrame]()
    for layer, rows in asked.items():
        task, generally = rows[-1], plain[layer][-1]
        if task.shape != generally.shape:
            raise UserError(
                f"the image is {len(task)} tokens beside the question and {len(generally)} in general",
                "give a --general that stands beside the image as the question does",
            )
        made.append(
            pd.DataFrame(
                {
                    "layer": layer,
                    "token": np.arange(len(task)),
                    "task": task,
                    "general": generally,
                    "contrast": contrast_of(task, generally),
                    "gaze_shift": gaze_shift_of(rows),
                }
            )
        )
    return pd.concat(made, ignore_index=True)


def _looks(tower: Tower, batch: Batch, head: int | None) -> dict[int, Float64[np.ndarray, "query image"]]:
    """What the tokens behind the image give to its tokens, by layer of one softmax over the sequence."""
    image = batch.sets["image"][0].cpu()
    behind = torch.arange(int(image.nonzero().max()) + 1, len(image))
    if not len(behind):
        raise UserError(
            "no token of the question stands behind the image: none of them sees it",
            "give a model whose prompt puts the image first",
        )
    found, several = dict[int, np.ndarray](), set[int]()

    def on_call(call: AttentionCall) -> None:
        if call.layer in found or call.batch != 1 or call.tokens != len(image) or not call.own_keys:
            several.add(call.layer)
        elif call.has_pattern:
            found[call.layer] = rows_over(call, behind, image, head).numpy()

    # call by call: those of all layers together may not fit into memory
    watched = tower.capture(batch.layers(tower.layers), on_call)
    with torch.inference_mode(), told_if_the_model_fails(tower, batch), watched:
        tower.forward(batch)
    found = {layer: rows for layer, rows in found.items() if layer not in several}
    if not found:
        raise MeasurementError(
            f"no layer of the {tower.name} tower attends over image and question together",
            "give a model that reads both in one sequence",
        )
    return found


def rows_over(
    call: AttentionCall, rows: Tensor, image: Tensor, head: int | None
) -> Float64[Tensor, "row image"]:
    """Weights of some rows on the image's tokens; the mean over heads where none is named."""
    weights = pattern_rows(call, rows.to(call.output.device))[0].double().cpu()[..., image]
    return weights.mean(0) if head is None else weights[head]


def grid_of(tower: Tower, batch: Batch) -> tuple[int, int] | None:
    """Rows and columns of the image's tokens, in reading order; None where nothing tells them."""
    tokens = int(batch.sets["image"].sum())
    given: Any = batch.data.get("image_grid_thw")
    if given is not None and len(given) == 1 and int(given[0, 0]) == 1:
        height, width = (int(x) for x in given[0, 1:])
        merged = round((height * width / tokens) ** 0.5)
        height, width = height // merged, width // merged
    else:
        pixels, side = batch.data.get("pixel_values"), tower.facts.get("patch_size")
        if (
            not isinstance(pixels, Tensor)
            or pixels.ndim != 4
            or len(pixels) != 1
            or not isinstance(side, int)
        ):
            return None
        height, width = pixels.shape[-2] // side, pixels.shape[-1] // side
    return (height, width) if height * width == tokens else None


def shown(image: Image.Image) -> np.ndarray:
    """The image as it was given, small, where what the model sees is no picture."""
    small = image.convert("RGB")
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return np.asarray(small)
