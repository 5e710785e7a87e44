"""What Python users pass as inputs, as `Inputs`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from PIL import Image

from diag.errors import UserError
from diag.inputs.images import images, rgb
from diag.inputs.items import Inputs, Item
from diag.inputs.texts import documents, texts


def as_inputs(given: object, tower: str) -> Inputs:
    """What Python users pass: `Inputs`, a source as on the command line, or a list of images or strings."""
    if isinstance(given, Inputs):
        return given
    if isinstance(given, str | Path):
        return images(given) if tower == "vision" else texts(given)
    listed = list(given) if isinstance(given, Iterable) else []
    if listed and all(isinstance(x, Image.Image) for x in listed):
        pixels = hashlib.sha256(b"".join(x.convert("RGB").tobytes() for x in listed)).hexdigest()
        items = [Item(str(i), partial(rgb, x)) for i, x in enumerate(listed)]
        return Inputs("images", "python", items, pixels)
    if listed and all(isinstance(x, str) for x in listed):
        return documents("python", {str(i): x for i, x in enumerate(listed)})
    raise UserError(
        "inputs are neither all PIL images nor all strings", "pass a folder, 'demo', or a list of either"
    )
