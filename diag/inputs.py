"""What a model is shown: images and documents, as ordered, re-readable lists of items with an id.

Nothing here knows a model: an image is an RGB PIL image, a document is a string.
Items are opened lazily, so that 100,000 images cost no memory, and an unreadable file is
reported where it is read, with its name.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from diag import tars
from diag.errors import UnreadableInput, UserError, one_of

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

NO_IMAGE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for bytes that are no image, or too much of one."""

PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "hubble_deep_field": "hubble_deep_field.jpg",
    "immunohistochemistry": "ihc.png",
    "moon": "moon.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "stereo_motorcycle": "motorcycle_left.png",
}
"""The photographs and textures that ship inside scikit-image's wheel: name -> file."""


@dataclass(frozen=True)
class Item:
    """One image or document: an id for the tables, and how to read it.

    read: gives an RGB image or a string. Raises UnreadableInput.
    """

    id: str
    read: Callable[[], Image.Image | str]


@dataclass(frozen=True)
class Listing(Sequence[Item]):
    """Items that come into being when they are asked for: 100,000 cost their ids.

    read: what reads the image at a place.
    """

    ids: Sequence[str]
    read: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: Any) -> Any:  # an item, or a list of them for a slice
        if isinstance(place, slice):
            return [self[one] for one in range(len(self))[place]]
        return Item(self.ids[place], partial(self.read, range(len(self))[place]))


@dataclass(frozen=True)
class Inputs:
    """A finite, ordered collection of items of one kind.

    kind: "images" or "texts". source: what the user typed.
    digest: identifies the content, so that a run folder can say what it measured: names and sizes
        for image files, the text itself for texts.
    """

    kind: str
    source: str
    items: Sequence[Item]
    digest: str

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    @property
    def tower(self) -> str:
        """The tower that takes them: "vision" or "text"."""
        return "vision" if self.kind == "images" else "text"


def images(source: str | Path) -> Inputs:
    """`demo`, an image, a folder of images (with subfolders), tars, or `hf:NAME[,split=…][,column=…]`.

    Tars are one `FILE.tar`, a range `DIR/{00000..00099}.tar`, or a folder with tars and without loose images;
    their images have ids `tar/member`.
    Raises UserError if there is no image.
    """
    if str(source) == "demo":
        return demo_images()
    if str(source).startswith("hf:"):
        return _hub_images(str(source))
    if named := tars.named_tars(str(source)):
        return _tar_images(str(source), named, tars.common_root(named))
    path = _existing(source, "--images takes a folder, an image or .tar file, hf:NAME or 'demo'")
    if path.is_file():
        found, root = [(path.name, path.stat().st_size)], path.parent
    else:
        found, root = sorted(_image_files(path), key=lambda file: file[0].split(os.sep)), path
    if not found:
        if packed := sorted(path.rglob(f"*{tars.SUFFIX}")):
            return _tar_images(str(source), packed, path)
        raise UserError(f"no image in '{path}'", f"image files end in {one_of((*IMAGE_SUFFIXES, '.tar'))}")
    ids = [name for name, _ in found]
    sizes = "".join(f"{name}\0{size}\n" for name, size in found)
    return Inputs(
        "images", str(source), Listing(ids, lambda place: open_image(root / ids[place])), _sha256(sizes)
    )


def texts(source: str | Path) -> Inputs:
    """`demo`, a UTF-8 text file, a folder of .txt files, or `hf:NAME[,config=…][,split=…][,column=…]`.

    A file is one document; the rows of a data set are joined by blank lines into one.
    Raises UserError if there is no text, or it is not UTF-8.
    """
    if str(source) == "demo":
        return _documents("demo", {"python-help": demo_text()})
    if str(source).startswith("hf:"):
        return _hub_texts(str(source))
    path = _existing(source, "--texts takes a text file, a folder of .txt files, hf:NAME or 'demo'")
    files = [path] if path.is_file() else sorted(path.rglob("*.txt"))
    if not files:
        raise UserError(f"no text file in '{path}'", "text files end in '.txt'")
    root = path.parent if path.is_file() else path
    return _documents(str(source), {str(file.relative_to(root)): read_text(file) for file in files})


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
        return _documents("python", {str(i): x for i, x in enumerate(listed)})
    raise UserError(
        "inputs are neither all PIL images nor all strings", "pass a folder, 'demo', or a list of either"
    )


def open_image(file: Path) -> Image.Image:
    """An image file as RGB, turned as its EXIF says. Raises UnreadableInput."""
    return _decoded(file, file.name)


def _decoded(source: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(source) as image:
            return rgb(ImageOps.exif_transpose(image))
    except NO_IMAGE as error:
        raise UnreadableInput(f"cannot read image '{name}': {error}") from error


def rgb(image: Image.Image) -> Image.Image:
    """An RGB image of any PIL mode. 16-bit grey is scaled to 8 bits, transparency is laid over black.

    Pillow clips 16-bit grey to white and keeps whatever colour hides under transparency.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        highest = 65535.0 if values.max(initial=0) > 255 else 255.0
        image = Image.fromarray((values.clip(0, highest) / highest * 255).round().astype(np.uint8))
    elif "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB")


def read_text(file: Path) -> str:
    """A UTF-8 file. Raises UserError where it is empty or not UTF-8."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"'{file}' is not UTF-8 (byte {error.start})", "convert it first: iconv -t utf-8 FILE > NEW"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read '{file}': {error.strerror}") from error
    if not text.strip():
        raise UserError(f"'{file}' holds no text", "give a file with text")
    return text


def demo_images() -> Inputs:
    """The photographs and textures inside scikit-image's wheel, in alphabetical order."""
    from importlib.resources import files

    folder = Path(str(files("skimage.data")))
    items = [Item(name, partial(open_image, folder / file)) for name, file in PHOTOGRAPHS.items()]
    return Inputs("images", "demo", items, _sha256("".join(PHOTOGRAPHS)))


def demo_text() -> str:
    """The help topics of Python's standard library, in alphabetical order, as one text."""
    import pydoc_data.topics

    return "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


def _tar_images(source: str, named: Sequence[Path], root: Path) -> Inputs:
    index = tars.listed(named, root, IMAGE_SUFFIXES)
    if len(index.unreadable) == len(index.ids):
        problem = next(iter(index.unreadable.values()), f"members must end in {one_of(IMAGE_SUFFIXES)}")
        raise UserError(f"no image in '{source}'", problem)

    def read(place: int) -> Image.Image:
        return _decoded(io.BytesIO(index.read(place)), index.ids[place].rpartition("/")[2])

    sizes = "".join(f"{name}\0{size}\n" for name, size in zip(index.ids, index.sizes, strict=True))
    return Inputs("images", source, Listing(index.ids, read), _sha256(sizes))


def _documents(source: str, documents: dict[str, str]) -> Inputs:
    items = [Item(name, partial(str, text)) for name, text in documents.items()]
    return Inputs("texts", source, items, _sha256("\0".join(documents.values())))


def _hub_images(source: str) -> Inputs:
    rows, column = _data_set(source, ("image", "jpg", "png", "img", "webp"))

    def read(index: int) -> Image.Image:
        try:
            image = rows[index][column]  # decodes it
        except NO_IMAGE as error:
            raise UnreadableInput(f"cannot read the image in row {index}: {error}") from error
        if not isinstance(image, Image.Image):
            raise UnreadableInput(f"row {index}: column '{column}' holds no image")
        return rgb(image)

    items = Listing([f"{index:06d}" for index in range(len(rows))], read)
    return Inputs("images", source, items, _sha256(str(getattr(rows, "_fingerprint", source))))


def _hub_texts(source: str) -> Inputs:
    rows, column = _data_set(source, ("text", "content", "document"))
    text = "\n\n".join(row for row in rows[column] if row and row.strip())
    if not text:
        raise UserError(f"'{source}' holds no text in column '{column}'", "give another with column=NAME")
    return _documents(source, {source.removeprefix("hf:").split(",")[0]: text})


def _data_set(source: str, columns: tuple[str, ...]) -> tuple[Any, str]:
    """The rows of a Hugging Face data set, and the column that holds what is wanted."""
    import datasets

    name, *options = source.removeprefix("hf:").split(",")
    chosen = dict(option.partition("=")[::2] for option in options)
    for key in chosen:
        if key not in ("config", "split", "column"):
            raise UserError(f"unknown option '{key}' in '{source}'", "hf:NAME,config=…,split=…,column=…")
    split = chosen.get("split", "test")
    try:
        rows = datasets.load_dataset(name, chosen.get("config"), split=split)
    except Exception as error:  # the library raises many kinds, among them bare OSError and ValueError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot load data set '{name}' ({reason})",
            f"hf download --repo-type dataset {name}   # or give split=, config=: hf:{name},split=train",
        ) from error
    wanted = [chosen["column"]] if "column" in chosen else columns
    for column in wanted:
        if column in rows.column_names:
            return rows, column
    raise UserError(
        f"data set '{name}' has no column {one_of(wanted)}", f"choose from {one_of(rows.column_names)}"
    )


def _image_files(folder: Path, before: str = "") -> Iterator[tuple[str, int]]:
    """Image files below a folder as (path from it, bytes): one look at each, none through linked folders."""
    try:
        entries = list(os.scandir(folder))
    except PermissionError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _image_files(folder / entry.name, f"{before}{entry.name}{os.sep}")
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and entry.is_file():
            yield before + entry.name, entry.stat().st_size


def _existing(source: str | Path, tip: str) -> Path:
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"'{source}' does not exist", tip)
    return path


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
