"""Images from files, folders, tars and data sets, each as an RGB PIL image.

They are opened lazily, so that 100,000 cost no memory, and an unreadable one is reported where it is read,
with its name.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, ImageStat

from diag.errors import UnreadableInput, UserError, one_of
from diag.inputs import tars
from diag.inputs.items import Files, Inputs, Item, Listing, data_set, existing, sha256

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")
"""What is decoded, whatever a file is called: one of Pillow's other decoders starts a program."""

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
    path = existing(source, "--images takes a folder, an image or .tar file, hf:NAME or 'demo'")
    if path.is_file():
        found, root = [(path.name, *_stamp(path.stat()))], path.parent
    else:
        found, root = sorted(_image_files(path), key=lambda file: file[0].split(os.sep)), path
    if not found:
        if packed := sorted(path.rglob(f"*{tars.SUFFIX}")):
            return _tar_images(str(source), packed, path)
        raise UserError(f"no image in '{path}'", f"image files end in {one_of((*IMAGE_SUFFIXES, '.tar'))}")
    ids = [name for name, *_ in found]

    def file(place: int) -> Path:
        return root / ids[place]

    digest = sha256("".join(f"{name}\0{size}\n" for name, size, _ in found))
    stamp = sha256(digest + "".join(f"{time}\n" for *_, time in found))
    files = Files(file, lambda place: found[place][1:], lambda place: file(place).read_bytes())
    items = Listing(ids, lambda place: open_image(file(place)))
    return Inputs("images", str(source), items, digest, stamp, files)


def open_image(file: Path) -> Image.Image:
    """An image file as RGB, turned as its EXIF says. Raises UnreadableInput."""
    return _decoded(file, file.name)


def _decoded(source: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(source, formats=FORMATS) as image:
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


def demo_images() -> Inputs:
    """The photographs and textures inside scikit-image's wheel, in alphabetical order."""
    from importlib.resources import files

    folder = Path(str(files("skimage.data")))
    items = [Item(name, partial(open_image, folder / file)) for name, file in PHOTOGRAPHS.items()]
    names = sha256("".join(PHOTOGRAPHS))
    # times would tell machines apart, not versions of the wheel
    return Inputs("images", "demo", items, names, sha256(names + version("scikit-image")))


def _tar_images(source: str, named: Sequence[Path], root: Path) -> Inputs:
    index = tars.listed(named, root, IMAGE_SUFFIXES)
    if len(index.unreadable) == len(index.ids):
        problem = next(iter(index.unreadable.values()), f"members must end in {one_of(IMAGE_SUFFIXES)}")
        raise UserError(f"no image in '{source}'", problem)

    def read(place: int) -> Image.Image:
        return _decoded(io.BytesIO(index.read(place)), index.ids[place].rpartition("/")[2])

    told = [_stamp(tar.stat()) for tar in named]
    owners = index.owners
    files = Files(lambda place: named[owners[place]], lambda place: told[owners[place]], index.read)
    digest = sha256("".join(f"{name}\0{size}\n" for name, size in zip(index.ids, index.sizes, strict=True)))
    stamp = sha256(digest + "".join(f"{size}\0{time}\n" for size, time in told))
    return Inputs("images", source, Listing(index.ids, read), digest, stamp, files)


def _hub_images(source: str) -> Inputs:
    rows, column = data_set(source, ("image", "jpg", "png", "img", "webp"))

    def read(index: int) -> Image.Image:
        try:
            image = rows[index][column]  # decodes it
        except NO_IMAGE as error:
            raise UnreadableInput(f"cannot read the image in row {index}: {error}") from error
        if not isinstance(image, Image.Image):
            raise UnreadableInput(f"row {index}: column '{column}' holds no image")
        return rgb(image)

    items = Listing([f"{index:06d}" for index in range(len(rows))], read)
    return Inputs("images", source, items, sha256(str(getattr(rows, "_fingerprint", source))))


def _stamp(status: os.stat_result) -> tuple[int, int]:
    """What tells whether a file was replaced: its bytes and when it was last written, in nanoseconds."""
    return status.st_size, status.st_mtime_ns


def _image_files(folder: Path, before: str = "") -> Iterator[tuple[str, int, int]]:
    """Image files below a folder as (path from it, bytes, time): one look at each, none through linked
    folders."""
    try:
        entries = list(os.scandir(folder))
    except PermissionError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _image_files(folder / entry.name, f"{before}{entry.name}{os.sep}")
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and entry.is_file():
            yield before + entry.name, *_stamp(entry.stat())


def neutral_image(image: Image.Image) -> Image.Image:
    """An image of the same size that is everywhere its mean colour (in RGB values, as they are stored)."""
    red, green, blue = (round(mean) for mean in ImageStat.Stat(rgb(image)).mean)
    return Image.new("RGB", image.size, (red, green, blue))
