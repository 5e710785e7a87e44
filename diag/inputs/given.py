"""What Python users pass as inputs, as `Inputs`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from PIL import Image

from diag.errors import UnreadableInput, UserError
from diag.inputs.images import images, listed_images, rgb
from diag.inputs.items import Inputs, Item
from diag.inputs.outside import HALVES, reason
from diag.inputs.texts import documents, texts


def as_inputs(given: object, tower: str) -> Inputs:
    """What Python users pass: `Inputs`, a source as on the command line, or a list of images or texts.

    given: images are PIL images or paths (`pathlib`), texts are strings; a clip is a list of PIL images. An
        image of floats (mode F) is 0 for black to 1 for white.
    """
    if isinstance(given, Inputs):
        return given
    if isinstance(given, str | Path):
        return images(given) if tower == "vision" else texts(given)
    listed = list(given) if isinstance(given, Iterable) and not isinstance(given, Mapping) else []
    if listed and all(isinstance(x, Path) for x in listed):
        return listed_images(listed)
    if listed and all(isinstance(x, Image.Image) for x in listed):
        return _opened({str(place): image for place, image in enumerate(listed)})
    if listed and all(_is_clip(x) for x in listed):
        places = ((clip, place) for clip, frames in enumerate(listed) for place in range(len(frames)))
        return _opened({f"{clip}/{place}": listed[clip][place] for clip, place in places})
    if listed and all(isinstance(x, str) for x in listed):
        for i, x in enumerate(listed):
            if HALVES.search(x):
                raise UserError(f"text {i} holds half a character, which no UTF-8 has", "decode it as UTF-8")
        return documents("python", {str(i): x for i, x in enumerate(listed)})
    raise UserError(
        "inputs are neither all PIL images nor all strings",
        "pass a folder, 'demo', or a list of either, [image] for one; files as pathlib.Path, an array as "
        "PIL.Image.fromarray(array)",
    )


def _is_clip(given: object) -> bool:
    return isinstance(given, list | tuple) and bool(given) and all(isinstance(x, Image.Image) for x in given)


def _opened(given: Mapping[str, Image.Image]) -> Inputs:
    """Images that are open, by their names. One that cannot be read is told where it is read.

    Raises UserError for one whose numbers are on no scale that is known.
    """
    content, items = hashlib.sha256(), list[Item]()
    for name, image in given.items():
        found: Image.Image | str = image
        try:
            pixels = rgb(image)
            content.update(f"{pixels.size}".encode() + pixels.tobytes())
        except UserError as error:  # of all that were made in the same way, not of this one
            raise UserError(f"image {name}: {error}", error.tip) from error
        except Exception as error:  # somebody else may have opened a damaged file: Pillow raises what breaks
            # it is not asked again: the second time it may hand out what was read till then
            found = f"cannot read image {name}: {reason(error)}"
        items.append(Item(name, partial(_image, found)))
    return Inputs("images", "python", items, content.hexdigest())


def _image(given: Image.Image | str) -> Image.Image:
    if isinstance(given, str):
        raise UnreadableInput(given)
    return rgb(given)
