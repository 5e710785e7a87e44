"""Images from files, folders, tars and data sets, each as an RGB PIL image.

They are opened lazily, so that 100,000 cost no memory, and an unreadable one is reported where it is read,
with its name.
"""

from __future__ import annotations

import glob
import io
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, ImageStat

from diag.errors import UnreadableInput, UserError, need, one_of, visible
from diag.inputs import tars
from diag.inputs.folders import File, files_below
from diag.inputs.items import Files, Inputs, Item, Listing, data_set, existing, sha256, stored
from diag.inputs.kinds import IMAGES, PROSE, kind_of, others
from diag.inputs.outside import MEGABYTE, reason, regular, too_large

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")
"""What is decoded, whatever a file is called: one of Pillow's other decoders starts a program."""

MOST_BYTES = 1_000 * MEGABYTE
"""Of one image as it lies on the disk."""

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

CROPS, SMALLEST_CROP = 16, 48
"""Crops of each photograph in `demo-crops`, and the side of the smallest in pixels."""


def images(source: str | Path) -> Inputs:
    """`demo`, `demo-crops`, an image, a folder of images (with subfolders), tars, or `hf:NAME[,split=…]`.

    A pattern `DIR/*.jpg` is the images that match it.
    Tars are one `FILE.tar`, a range `DIR/{00000..00099}.tar`, or a folder with tars and without loose images;
    their images have ids `tar/member`.
    Raises UserError if there is no image.
    """
    if str(source) == "demo":
        return demo_images()
    if str(source) == "demo-crops":
        return demo_crops()
    if str(source).startswith("hf:"):
        return _hub_images(str(source))
    if named := tars.named_tars(str(source)):
        return _tar_images(str(source), named, tars.common_root(named))
    tip = "--images takes a folder, an image or .tar file, hf:NAME or 'demo'"
    if glob.has_magic(str(source)) and not os.path.lexists(source):
        return _matching(str(source))
    path = existing(source, tip)
    unreadable: dict[str, str] = {}
    if path.is_dir():
        found, unreadable = files_below(path, lambda name: name.lower().endswith(IMAGE_SUFFIXES))
        root = path
    else:
        regular(path, "image", tip)
        _refuse_other(path)
        status, root = path.stat(), path.parent
        found = [(path.name, status.st_size, status.st_mtime_ns)]
    if len(unreadable) == len(found):
        if packed := tars.tars_below(path):
            return _tar_images(str(source), packed, path)
        why = "".join(f": '{visible(name)}' is {problem}" for name, problem in [*unreadable.items()][:1])
        raise UserError(
            f"no image in '{path}'{why or others(path)}",
            f"image files end in {one_of((*IMAGE_SUFFIXES, '.tar'))}",
        )
    return _in_files(str(source), root, found, unreadable)


def _refuse_other(file: Path) -> None:
    """Raises UserError for a file that is no image, so that it is told before a model is loaded.

    One that cannot be opened is told where it is read.
    """
    try:
        with open(file, "rb") as stream:
            start = stream.read(16)
    except OSError:
        return
    if any(start.startswith(image) for image in IMAGES):
        return
    ending = file.suffix.lower()
    kind = "a text" if ending in PROSE else kind_of(Path() if ending in IMAGE_SUFFIXES else file, start)
    if kind == "an image":
        raise UserError(f"'{file}' is an image, but no JPEG, PNG or WebP", "convert it, for example to PNG")
    what = f"'{file}' is {kind}, not an image" if kind else f"'{file}' is no JPEG, PNG or WebP image"
    as_text = kind in ("a text", "lines of JSON", "a table", "a Parquet file")
    raise UserError(
        what, f"--texts {file}" if as_text else "give an image in JPEG, PNG or WebP, or a folder of them"
    )


def _matching(pattern: str) -> Inputs:
    """The images of a pattern such as `DIR/*.jpg`, or `DIR/**/*.jpg` with folders below; paths are ids."""
    paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    found = [path for path in paths if path.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(path)]
    if not found:
        why = f": none of {len(paths)} matches is one" if paths else ""
        raise UserError(f"no image matches '{pattern}'{why}", f"image files end in {one_of(IMAGE_SUFFIXES)}")
    return _in_files(pattern, Path(), [(path, *_stamp(Path(path))) for path in found], {})


def listed_images(files: Sequence[Path]) -> Inputs:
    """Image files in the order given; their ids are the paths. Raises UserError for one that is no file."""
    tip, found = "give image files, each as a path", list[File]()
    for given in files:
        path = existing(given, tip)
        regular(path, "image", tip)
        found.append((str(path), *_stamp(path)))
    return _in_files("python", Path(), found, {})


def _in_files(source: str, root: Path, found: Sequence[File], unreadable: Mapping[str, str]) -> Inputs:
    """Images in files below `root`. unreadable: name → why it is known not to be one."""
    unreadable = {
        **unreadable,
        **{name: too_large(size, MOST_BYTES) for name, size, _ in found if size > MOST_BYTES},
    }
    ids = [visible(name) for name, *_ in found]

    def readable(place: int) -> Path:
        name = found[place][0]
        if name in unreadable:  # a pipe would never end
            raise UnreadableInput(unreadable[name])
        return root / name

    digest = sha256("".join(f"{name}\0{size}\n" for name, size, _ in found))
    stamp = sha256(digest + "".join(f"{time}\n" for *_, time in found))
    files = Files(
        lambda place: root / found[place][0],
        lambda place: found[place][1:],
        lambda place: readable(place).read_bytes(),
    )
    items = Listing(ids, lambda place: open_image(readable(place)))
    return Inputs("images", source, items, digest, stamp, files)


def open_image(file: Path) -> Image.Image:
    """An image file as RGB, turned as its EXIF says. Raises UnreadableInput."""
    return _decoded(file, f"image '{visible(file.name)}'")


def image_in(content: bytes, name: str) -> Image.Image:
    """An image of the bytes of a file, as `open_image`. name: the file's, for what is told."""
    return _decoded(io.BytesIO(content), f"image '{visible(name)}'")


def _decoded(source: Path | io.BytesIO, what: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what it reads all the same
            with Image.open(source, formats=FORMATS) as image:
                return rgb(image)
    except Image.UnidentifiedImageError as error:  # it says so with a path, or an address in memory
        raise UnreadableInput(f"cannot read {what}: it is no JPEG, PNG or WebP image") from error
    except Exception as error:  # of damaged bytes Pillow raises whatever breaks first, also KeyError
        raise UnreadableInput(f"cannot read {what}: {reason(error)}") from error


TURNED = range(2, 9)
"""What EXIF says of pixels that do not stand upright."""


FRACTION_ROUNDING = 1e-6
"""How far beyond 0 and 1 float32 may come."""


def rgb(image: Image.Image) -> Image.Image:
    """An upright RGB image of any PIL mode: the one way in which pixels are read, wherever they come from.

    It is turned as its EXIF says, if it still says so: whoever has turned pixels takes that off, as
    `ImageOps.exif_transpose` does. 16-bit grey is scaled to 8 bits; numbers with a point are 0 for black to 1
    for white; transparency (an alpha channel, a palette entry, a colour) is laid over black. An image that is
    so already comes back as it is.

    Pillow clips 16-bit grey to white and keeps whatever colour hides under transparency.
    Raises UserError where numbers with a point are beyond 0 to 1.
    """
    image.load()  # PNG may say behind the pixels how they are turned
    if image.getexif().get(ExifTags.Base.Orientation) in TURNED:
        image = ImageOps.exif_transpose(image)
    clear = image.info.get("transparency")
    if image.mode == "RGB" and clear is None:
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        if image.mode == "F":
            _check_fractions(values)
            highest = 1.0
        else:
            highest = 65535.0 if values.max(initial=0) > 255 else 255.0
        values = np.where(values == clear, 0.0, values)
        image = Image.fromarray((values.clip(0, highest) / highest * 255).round().astype(np.uint8))
    elif {"A", "a"} & {*image.getbands()} or clear is not None:
        if (
            image.mode == "RGB" and clear is not None and max(clear) > 255
        ):  # of 16 bits, of which Pillow keeps the upper eight
            image = image.copy()
            image.info["transparency"] = tuple(part >> 8 for part in clear)
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB")


def _check_fractions(values: np.ndarray) -> None:
    """Raises UserError where a grey image of floats is on another scale than 0 to 1, up to rounding."""
    low, high = values.min(initial=0), values.max(initial=1)
    if not (low >= -FRACTION_ROUNDING and high <= 1 + FRACTION_ROUNDING):
        raise UserError(
            f"an image of floats (mode F) holds {low:g} to {high:g}, where 0 is black and 1 is white",
            "give whole numbers: Image.fromarray(values.round().astype('uint8')), or divide by the largest",
        )


def photograph(name: str) -> Path:
    """The file of one of the `PHOTOGRAPHS`. Raises UserError where scikit-image is not installed."""
    need("a bundled photograph", "skimage")
    from importlib.resources import files

    return Path(str(files("skimage.data"))) / PHOTOGRAPHS[name]


def demo_images() -> Inputs:
    """The photographs and textures inside scikit-image's wheel, in alphabetical order."""
    items = [Item(name, partial(open_image, photograph(name))) for name in PHOTOGRAPHS]
    names = sha256("".join(PHOTOGRAPHS))
    # times would tell machines apart, not versions of the wheel
    return Inputs("images", "demo", items, names, sha256(names + version("scikit-image")))


def demo_crops() -> Inputs:
    """Square crops of the photographs, which are their classes: `astronaut/00.png` …"""
    files = {name: photograph(name) for name in PHOTOGRAPHS}
    items = [
        Item(f"{name}/{number:02d}.png", partial(_crop, file, name, number))
        for name, file in files.items()
        for number in range(CROPS)
    ]
    names = sha256("".join(item.id for item in items))
    return Inputs("images", "demo-crops", items, names, sha256(names + version("scikit-image")))


def _crop(file: Path, name: str, number: int) -> Image.Image:
    """The same every time; its side is log-uniform from `SMALLEST_CROP` to the photograph's smaller side."""
    image = open_image(file)
    generator = np.random.default_rng([number, *name.encode()])
    side = round(math.exp(generator.uniform(math.log(SMALLEST_CROP), math.log(min(image.size)))))
    left, top = (int(generator.integers(0, size - side + 1)) for size in image.size)
    return image.crop((left, top, left + side, top + side))


def _tar_images(source: str, named: Sequence[Path], root: Path) -> Inputs:
    index = tars.listed(named, root, IMAGE_SUFFIXES, most=MOST_BYTES)
    if len(index.unreadable) == len(index.ids):
        problem = next(iter(index.unreadable.values()), f"members must end in {one_of(IMAGE_SUFFIXES)}")
        raise UserError(f"no image in '{source}'", problem)

    def read(place: int) -> Image.Image:
        return image_in(index.read(place), index.ids[place].rpartition("/")[2])

    told = [_stamp(tar) for tar in named]
    owners = index.owners
    files = Files(lambda place: named[owners[place]], lambda place: told[owners[place]], index.read)
    digest = sha256("".join(f"{name}\0{size}\n" for name, size in zip(index.ids, index.sizes, strict=True)))
    stamp = sha256(digest + "".join(f"{size}\0{time}\n" for size, time in told))
    return Inputs("images", source, Listing(index.ids, read), digest, stamp, files)


def _hub_images(source: str) -> Inputs:
    rows, column = data_set(source, ("image", "jpg", "png", "img", "webp"))
    cells = stored(rows, column)

    def read(index: int) -> Image.Image:
        what = f"the image in row {index}"
        try:
            cell = cells[index][column][0].as_py()
        except Exception as error:  # of the library, or of what it reads from
            raise UnreadableInput(f"cannot read {what}: {reason(error)}") from error
        if isinstance(cell, dict) and cell.keys() == {"bytes", "path"}:
            cell = Path(cell["path"]) if cell["bytes"] is None and cell["path"] else cell["bytes"]
        if isinstance(cell, bytes):
            return _decoded(io.BytesIO(cell), what)
        if isinstance(cell, Path):
            try:
                regular(cell, what, "")
            except UserError as error:
                raise UnreadableInput(str(error)) from error
            return _decoded(cell, what)
        raise UnreadableInput(f"row {index}: column '{column}' holds no image")

    items = Listing([f"{index:06d}" for index in range(len(rows))], read)
    digest, folder = sha256(str(getattr(rows, "_fingerprint", source))), Path(source[3:].split(",")[0])
    # the library knows a file by its time alone
    below = files_below(folder, lambda name: True)[0] if folder.is_dir() else ()
    return Inputs("images", source, items, digest, sha256(f"{digest}{below}") if below else "")


def _stamp(file: Path) -> tuple[int, int]:
    """What tells whether a file was replaced: its bytes and when it was last written, in nanoseconds."""
    try:
        status = file.stat()
    except OSError:  # such as a link to nothing, which is told where it is read
        return 0, 0
    return status.st_size, status.st_mtime_ns


def neutral_image(image: Image.Image) -> Image.Image:
    """An image of the same size that is everywhere its mean colour (in RGB values, as they are stored)."""
    red, green, blue = (round(mean) for mean in ImageStat.Stat(rgb(image)).mean)
    return Image.new("RGB", image.size, (red, green, blue))
