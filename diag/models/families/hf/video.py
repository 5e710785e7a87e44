"""The towers of models that see clips: several frames of a video as one input (VideoMAE, TimeSformer).

Frames are images; which of them are a clip is told by their folder (`diag/inputs/clips.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.errors import UnreadableInput, UserError
from diag.inputs.clips import clips
from diag.inputs.images import rgb
from diag.inputs.items import Inputs
from diag.models.base import Sample, Tower, device_of_module
from diag.models.encoding import image_encoder
from diag.models.families.hf.vision import FLAG, PROCESSOR_TIP, TRIALS, config_around, preprocessing_of
from diag.models.first_layer import MODEL_TIP, placed
from diag.models.hooks.layers import Layer
from diag.models.loading import first_line, theirs
from diag.models.names.spec import ModelSpec
from diag.models.sizes import IMAGE, NATIVE, sides

FRAMES = ("num_frames", "frames_per_clip")
"""What configurations call the number of frames that a tower of videos takes."""

PIXELS = ("pixel_values_videos", "pixel_values")


def frames_of(config: Any) -> int | None:
    """How many frames one input of a tower has; None for a tower of single images."""
    counts = (getattr(config, name, None) for name in FRAMES)
    return next((count for count in counts if isinstance(count, int)), None)


def clip_tower(
    spec: ModelSpec, whole: Any, part: Any, layers: tuple[Layer, ...], processor: Any, dtype: torch.dtype
) -> Tower:
    """The tower of a model that takes clips `[batch, frame, 3, height, width]`.

    whole: the model. part: its tower of videos, which is all of it where it has no other.
    Raises UserError for an image size, and where the processor makes no clip of frames.
    """
    if IMAGE in spec.model_args:
        raise UserError(f"'{spec.base}' does not take {IMAGE}: it takes clips", f"leave {IMAGE} out")
    config = config_around(part, whole)
    count = frames_of(config)
    assert count is not None
    call = part.forward if part is whole else getattr(whole, "get_video_features", part.forward)
    takes = inspect.signature(call).parameters
    named = next((name for name in PIXELS if name in takes), next(iter(takes)))

    def transform(frames: Sequence[Image.Image]) -> Tensor:
        made = processor(list(frames), return_tensors="pt", **_as_they_are(processor))
        pixels: Tensor = next(made[name] for name in PIXELS if name in made)
        return pixels[0] if pixels.ndim == 5 else pixels  # an image processor has no axis of clips

    def prepare(content: Any) -> Any:
        if isinstance(content, Image.Image):
            content = [content] * count  # a still, by which a tower is tried
        if not isinstance(content, list):
            return content  # prepared already
        try:
            return transform([rgb(frame) for frame in content]).to(dtype)
        except Exception as error:  # libraries refuse odd images with whatever breaks first
            raise UnreadableInput(f"cannot preprocess the clip: {first_line(error)}") from error

    with theirs(f"the image processor of '{spec.name}' cannot be used", PROCESSOR_TIP):
        shapes = {tuple(transform([Image.new("RGB", size)] * count).shape) for size in TRIALS}
        preprocessing = preprocessing_of(processor, {})
    shape = next(iter(shapes))
    if len(shape) != 4 or shape[0] != count:
        what = f"the image processor of '{spec.name}' makes no clip of {count} frames"
        raise UserError(what, PROCESSOR_TIP)

    def samples(inputs: Inputs, seq_len: int | None) -> Iterator[Sample]:
        found = list(clips(inputs, f"'{spec.resolved}'"))
        longest = max((len(clip.frames) for clip in found), default=0)
        if longest < count:
            there = f"no clip of '{inputs.source}' has more than {longest}"
            raise UserError(
                f"'{spec.resolved}' takes {count} frames, and {there}",
                "give a folder of more frames for each clip",
            )
        for clip in found:
            yield Sample(clip.id, partial(clip.read, count))

    flags = {"skip_predictor": True} if "skip_predictor" in takes else {}
    resized = FLAG in takes and sides(getattr(config, "image_size", None)) != shape[-2:]
    flags |= {FLAG: True} if resized else {}
    tower = Tower(
        name="vision",
        layers=layers,
        samples=samples,
        prepare=prepare,
        encode=image_encoder(prepare, device_of_module(part)),
        forward=lambda batch: call(**{named: batch.data}, **flags),
        max_batch=None if len(shapes) == 1 else 1,
        frames=count,
        facts={
            # of a clip: tokens lie in time as well, and no distance in the image is known of them
            "image_size": f"{count}×{shape[-2]}×{shape[-1]}" if len(shapes) == 1 else "native",
            **NATIVE.facts,
            **({"positions": "interpolated"} if resized else {}),
            "frames": count,
            "preprocessing": preprocessing,
        },
    )
    tower = placed(tower, part, getattr(config, "patch_size", None))
    if not _joint(tower):
        # what is no patch stands in some of its layers only: their sets of tokens are not told apart
        return replace(tower, prefix=(), suffix=(), patches=False)
    return tower


def _joint(tower: Tower) -> bool:
    """Whether all tokens of a clip attend together, rather than those of a frame, and of a place, alone."""
    calls = list[AttentionCall]()
    still = Sample.holding("still", Image.new("RGB", (64, 64)))
    batch = tower.encode([still])
    fails = theirs(f"the model's {tower.name} tower fails on its own input", MODEL_TIP)
    with torch.inference_mode(), tower.capture(tower.layers, calls.append), fails:
        tower.forward(batch)
    return len({(call.batch, call.tokens) for call in calls}) < 2


def _as_they_are(processor: Any) -> dict[str, bool]:
    """What tells a video processor that frames were chosen already; an image processor chooses none."""
    return {"do_sample_frames": False} if hasattr(processor, "do_sample_frames") else {}
