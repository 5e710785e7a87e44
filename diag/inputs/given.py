"""What Python users pass as inputs, as `Inputs`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from PIL import Image

from diag.errors import UnreadableInput, UserError
from diag.inputs.images import images, rgb
from diag.inputs.items import Inputs, Item
from diag.inputs.outside import HALVES, reason
from diag.inputs.texts import documents, texts


def as_inputs(given: object, tower: str) -> Inputs:
    """What Python users pass: `Inputs`, a source as on the command line, or a list of images or strings."""
    if isinstance(given, Inputs):
        return given
    if isinstance(given, str | Path):
        return images(given) if tower == "vision" else texts(given)
    listed = list(given) if isinstance(given, Iterable) and not isinstance(given, Mapping) else []
    if listed and all(isinstance(x, Image.Image) for x in listed):
        read = [_pixels(x, f"image {i}") for i, x in enumerate(listed)]
        pixels = hashlib.sha256(b"".join(x for x in read if isinstance(x, bytes))).hexdigest()
        # one that failed once is not asked again: the second time it may hand out what was read till then
        opened = [x if isinstance(found, bytes) else found for x, found in zip(listed, read, strict=True)]
        items = [Item(str(i), partial(_image, x)) for i, x in enumerate(opened)]
        return Inputs("images", "python", items, pixels)
    if listed and all(isinstance(x, str) for x in listed):
        for i, x in enumerate(listed):
            if HALVES.search(x):
                raise UserError(f"text {i} holds half a character, which no UTF-8 has", "decode it as UTF-8")
        return documents("python", {str(i): x for i, x in enumerate(listed)})
    raise UserError(
        "inputs are neither all PIL images nor all strings", "pass a folder, 'demo', or a list of either"
    )


def _pixels(image: Image.Image, what: str) -> bytes | str:
    """What identifies an image, or why it cannot be read: somebody else may have opened a damaged file."""
    try:
        return image.convert("RGB").tobytes()
    except Exception as error:  # of damaged bytes Pillow raises whatever breaks first
        return f"cannot read {what}: {reason(error)}"


def _image(given: Image.Image | str) -> Image.Image:
    if isinstance(given, str):
        raise UnreadableInput(given)
    return rgb(given)
