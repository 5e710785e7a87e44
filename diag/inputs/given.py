"""What Python users pass as inputs, as `Inputs`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from diag.errors import UnreadableInput, UserError
from diag.inputs.images import IMAGE_SUFFIXES, images, listed_images, rgb
from diag.inputs.items import Inputs, Item
from diag.inputs.kinds import PROSE
from diag.inputs.outside import HALVES, reason
from diag.inputs.texts import documents, read_text, texts


def as_inputs(given: object, tower: str) -> Inputs:
    """What Python users pass: `Inputs`, a source as on the command line, or a list of images or texts.

    given: images are PIL images or paths, texts are strings; a clip is a list of PIL images. An image of
        floats (mode F) is 0 for black to 1 for white. Strings that end as images do are paths, and so are
        those of text files that are there.
    Raises UserError for what is neither, and for a path of a list that is not there.
    """
    if isinstance(given, Inputs):
        return given
    if isinstance(given, str | Path):
        return images(given) if tower == "vision" else texts(given)
    found = listed(given)
    found = found if isinstance(found, list) else []
    if _all_paths(found, PROSE):
        return documents("python", {str(path): read_text(Path(path)) for path in found})
    if found and (all(isinstance(x, Path) for x in found) or _all_paths(found, IMAGE_SUFFIXES)):
        return listed_images([Path(path) for path in found])
    if found and all(isinstance(x, Image.Image) for x in found):
        return _opened({str(place): image for place, image in enumerate(found)})
    if found and all(_is_clip(x) for x in found):
        places = ((clip, place) for clip, frames in enumerate(found) for place in range(len(frames)))
        return _opened({f"{clip}/{place}": found[clip][place] for clip, place in places})
    if found and all(isinstance(x, str) for x in found):
        for i, x in enumerate(found):
            if HALVES.search(x):
                raise UserError(f"text {i} holds half a character, which no UTF-8 has", "decode it as UTF-8")
        return documents("python", {str(i): x for i, x in enumerate(found)})
    raise UserError(
        "inputs are neither all PIL images nor all strings",
        "pass a folder, 'demo', or a list of either, or of paths of files; an array as "
        "PIL.Image.fromarray(array)",
    )


def listed(given: Any) -> Any:
    """One image, or what can be gone through, as a list; paths, texts, mappings and `Inputs` as they are."""
    if isinstance(given, Image.Image):
        return [given]
    whole = isinstance(given, str | Path | Mapping | Inputs) or not isinstance(given, Iterable)
    return given if whole else list(given)


def kind_of(given: object) -> str | None:
    """The tower that takes what was given, "vision" or "text"; None where that does not tell.

    given: as `listed` has it.
    """
    if isinstance(given, Inputs):
        return given.tower
    first = given[0] if isinstance(given, list) and given else None
    if isinstance(first, Image.Image) or _is_clip(first):
        return "vision"
    if isinstance(first, str | Path):
        assert isinstance(given, list)
        text = isinstance(first, str) or _all_paths(given, PROSE)
        return "text" if text and not _all_paths(given, IMAGE_SUFFIXES) else "vision"
    return None


def _all_paths(given: Sequence[object], endings: tuple[str, ...]) -> bool:
    """Whether they are paths of such files. A string is one where the file is there.

    One word that ends as an image does is one, too: it is told if it is not there.
    """

    def is_path(one: object) -> bool:
        text = str(one)
        if not isinstance(one, str | Path) or not text.lower().endswith(endings):
            return False
        word = endings is IMAGE_SUFFIXES and len(text.split()) == 1
        return isinstance(one, Path) or word or os.path.isfile(text)

    return bool(given) and all(map(is_path, given))


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
