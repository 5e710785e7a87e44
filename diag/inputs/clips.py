"""Clips for models of videos: the frames of each lie in a folder of their own, as images.

Frames are in the order of the numbers in their names, and a clip is the frames that a model takes, evenly
spaced over all that are there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from diag.errors import UnreadableInput, UserError
from diag.inputs.items import Inputs, Item

TIP = "--images takes a folder of frames, or a folder with one of frames for each clip"


@dataclass(frozen=True)
class Clip:
    """The frames of one clip, in order, which are opened when they are read."""

    id: str
    frames: Sequence[Item]

    def read(self, count: int) -> list[Image.Image]:
        """So many frames, evenly spaced from the first to the last.

        Raises UnreadableInput for a clip of fewer frames, and for a frame that cannot be read.
        """
        if len(self.frames) < count:
            raise UnreadableInput(f"its frames are too few: {len(self.frames)} of {count}")
        places = np.linspace(0, len(self.frames) - 1, count).round().astype(int)
        read = [self.frames[place].read() for place in places]
        return [frame for frame in read if isinstance(frame, Image.Image)]


def clips(inputs: Inputs, taker: str) -> Iterator[Clip]:
    """The clips among images: one per folder or tar, or all of a folder that holds no other.

    taker: what takes clips, in words.
    Raises UserError for images that are no frames of anything.
    """
    found: dict[str, list[Item]] = {}
    for item in inputs:
        found.setdefault(item.id.rpartition("/")[0], []).append(item)
    source = Path(inputs.source)
    if "" in found and (inputs.source == "demo" or not source.is_dir()):
        raise UserError(f"{taker} takes clips, and '{inputs.source}' gives single images", TIP)
    alone = source.resolve().name if len(found) == 1 else "."
    for name, frames in found.items():
        yield Clip(name or alone, sorted(frames, key=lambda item: _in_order(item.id)))


def _in_order(name: str) -> list[tuple[int, str]]:
    """A name's place: `frame-10` stands behind `frame-9`."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]
