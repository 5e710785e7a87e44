"""Images of every kind as RGB, texts as they are, and what is told where neither can be read."""

from __future__ import annotations

import hashlib
import os
import re
import struct
import tarfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from diag.errors import UnreadableInput, UserError
from diag.inputs import images as inputs
from diag.inputs.given import as_inputs
from diag.inputs.images import images, open_image, rgb
from diag.inputs.items import Inputs
from diag.inputs.texts import texts

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
COLOUR = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
ALPHA = np.where(np.arange(48).reshape(6, 8) < 24, 255, 0).astype(np.uint8)


def saved(folder: Path, image: Image.Image, name: str = "image.png", **options: Any) -> Path:
    file = folder / name
    image.save(file, **options)
    return file


def pixels(file: Path) -> np.ndarray:
    image = open_image(file)
    assert image.mode == "RGB"
    return np.asarray(image)


def turned(orientation: int) -> Image.Exif:
    """What a camera writes beside pixels that do not stand upright."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png_of_16_bits(file: Path, kind: int, pixels: np.ndarray, clear: list[int]) -> Path:
    """A PNG in which the colour `clear` is transparent. kind: 0 for grey, 2 for colour."""

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
        + chunk(b"tRNS", np.array(clear, ">u2").tobytes())
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    return file


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


# --- one image


def test_colour_is_kept(tmp_path: Path) -> None:
    np.testing.assert_array_equal(pixels(saved(tmp_path, Image.fromarray(COLOUR))), COLOUR)


def test_greyscale_becomes_three_equal_channels(tmp_path: Path) -> None:
    np.testing.assert_array_equal(pixels(saved(tmp_path, Image.fromarray(GREY))), three(GREY))


def test_a_bitmap_becomes_black_and_white(tmp_path: Path) -> None:
    bits = GREY > 100
    np.testing.assert_array_equal(pixels(saved(tmp_path, Image.fromarray(bits))), three(bits * np.uint8(255)))


def test_a_palette_becomes_its_colours(tmp_path: Path) -> None:
    few = Image.fromarray(COLOUR).quantize(8)
    got = pixels(saved(tmp_path, few))
    np.testing.assert_array_equal(got, np.asarray(few.convert("RGB")))


@pytest.mark.parametrize(
    ("mode", "bands"), [("RGBA", np.dstack([COLOUR, ALPHA])), ("LA", np.dstack([GREY, ALPHA]))]
)
def test_transparency_is_black_whatever_colour_hides_under_it(
    tmp_path: Path, mode: str, bands: np.ndarray
) -> None:
    image = Image.fromarray(bands)
    assert image.mode == mode
    opaque = COLOUR if mode == "RGBA" else three(GREY)
    np.testing.assert_array_equal(pixels(saved(tmp_path, image)), np.where(ALPHA[..., None] > 0, opaque, 0))


def test_a_transparent_palette_entry_is_black(tmp_path: Path) -> None:
    image = Image.fromarray(np.eye(4, dtype=np.uint8))
    image = image.convert("P")
    image.putpalette([200, 0, 0, 0, 200, 0])
    got = pixels(saved(tmp_path, image, transparency=0))
    np.testing.assert_array_equal(got, np.where(np.eye(4)[..., None] > 0, [0, 200, 0], 0))


def test_deep_greyscale_is_not_clipped(tmp_path: Path) -> None:
    deep = (GREY.astype(np.uint16) + 3) * 200
    file = saved(tmp_path, Image.fromarray(deep))
    with Image.open(file) as image:
        assert image.mode.startswith("I")
    expected = np.round(deep / 65535 * 255).astype(np.uint8)  # its range, not each image's own contrast
    np.testing.assert_array_equal(pixels(file), three(expected))


def test_flat_deep_greyscale_is_an_image_too(tmp_path: Path) -> None:
    assert pixels(saved(tmp_path, Image.fromarray(np.full((2, 2), 40_000, np.uint16)))).shape == (2, 2, 3)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_only_formats_that_are_promised_are_decoded(tmp_path: Path, kind: str) -> None:
    """Whatever a file is called: other decoders are not started, and one of them starts a program."""
    file = tmp_path / "image.jpg"
    Image.new("RGB", (8, 8)).save(file, kind)
    with pytest.raises(UnreadableInput, match=r"cannot read image 'image\.jpg'"):
        open_image(file)


def test_pictures_of_two_lenses_are_jpeg(tmp_path: Path) -> None:
    """Pillow's MPO, which some cameras write: the first picture counts."""
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    first.save(tmp_path / "image.jpg", "MPO", save_all=True, append_images=[second])
    assert pixels(tmp_path / "image.jpg").mean((0, 1))[0] > 200


def test_cmyk_becomes_colour(tmp_path: Path) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = pixels(saved(tmp_path, image, "image.jpg", quality=95)).mean((0, 1))
    assert red[0] > 200 > 100 > red[1:].max()


@pytest.mark.parametrize(("orientation", "turn"), [(6, 3), (8, 1), (3, 2)])
def test_photographs_are_turned_as_the_camera_says(tmp_path: Path, orientation: int, turn: int) -> None:
    file = saved(tmp_path, Image.fromarray(COLOUR), exif=turned(orientation))
    np.testing.assert_array_equal(pixels(file), np.rot90(COLOUR, turn))


def test_webp_and_a_single_pixel(tmp_path: Path) -> None:
    image = Image.fromarray(COLOUR)
    np.testing.assert_array_equal(pixels(saved(tmp_path, image, "a.webp", lossless=True)), COLOUR)
    assert pixels(saved(tmp_path, image.crop((0, 0, 1, 1)))).shape == (1, 1, 3)


def test_an_animation_is_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    file = saved(tmp_path, frames[0], "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(pixels(file), COLOUR)


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "no pixels", "bomb"])
def test_what_cannot_be_read_is_named(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(tmp_path, Image.fromarray(np.tile(COLOUR, (20, 20, 1))))
    whole = file.read_bytes()
    if damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    broken = {"empty": b"", "truncated": whole[: len(whole) // 2], "text": b"hello", "no pixels": whole[:33]}
    file.write_bytes(broken.get(damage, whole))
    with pytest.raises(UnreadableInput, match=r"cannot read image 'image.png'"):
        open_image(file)


def test_damaged_bytes_never_escape_as_another_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    read = 0
    for suffix in (".png", ".jpg", ".webp"):
        file = saved(tmp_path, Image.fromarray(COLOUR), f"image{suffix}")
        whole = np.frombuffer(file.read_bytes(), np.uint8)
        for _ in range(60):
            bytes_ = whole.copy()
            bytes_[rng.integers(0, len(whole), 5)] = rng.integers(0, 256, 5)
            file.write_bytes(bytes_.tobytes())
            try:
                read += open_image(file).mode == "RGB"
            except UnreadableInput:
                continue
    assert 0 < read < 180


BREAKS = (
    struct.error("unpack"),
    KeyError("WEBP"),
    TypeError(),
    AttributeError("x"),
    RecursionError(),
    MemoryError(),
)


@pytest.mark.parametrize("error", BREAKS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["open", "exif_transpose"])
def test_whatever_breaks_in_a_decoder_is_told_of_its_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    """As with damaged EXIF, or with a format whose decoder is not there."""
    file = saved(tmp_path, Image.fromarray(COLOUR), exif=turned(6))

    def breaks(*given: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(*((Image, "open") if where == "open" else (inputs.ImageOps, where)), breaks)
    said = str(error) or type(error).__name__
    with pytest.raises(UnreadableInput, match=re.escape(f"cannot read image 'image.png': {said}")):
        open_image(file)


def test_large_images_are_read_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to twice Pillow's limit; it warns of what it reads all the same."""
    file = saved(tmp_path, Image.fromarray(COLOUR))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", COLOUR.shape[0] * COLOUR.shape[1] - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(pixels(file), COLOUR)


def test_files_too_large_for_an_image_are_not_opened(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MOST_BYTES", (album / "a.png").stat().st_size - 1)
    with pytest.raises(UnreadableInput, match=r"^0 MB, where 0 are the most$"):
        images(album / "a.png").items[0].read()


def test_metadata_too_large_to_be_true_is_unreadable(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    file = saved(tmp_path, Image.fromarray(COLOUR), pnginfo=info)
    with pytest.raises(UnreadableInput):
        open_image(file)


# --- folders of images


@pytest.fixture
def album(tmp_path: Path) -> Path:
    image = Image.fromarray(COLOUR)
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    for name in ("z.JPG", "a.png", "b/c.WebP", "b/deep/d.jpeg"):
        saved(tmp_path, image, name)
    return tmp_path


def test_folders_are_read_with_their_subfolders_in_order(album: Path) -> None:
    found = images(album)
    assert [item.id for item in found] == ["a.png", "b/c.WebP", "b/deep/d.jpeg", "z.JPG"]
    assert (found.kind, found.tower, len(found), found.source) == ("images", "vision", 4, str(album))
    assert all(item.read().size == (8, 6) for item in found)  # type: ignore[union-attr]


def test_one_file_is_a_folder_of_one(album: Path) -> None:
    found = images(album / "a.png")
    assert [item.id for item in found] == ["a.png"]


def test_the_digest_follows_names_and_sizes(album: Path) -> None:
    before = images(album).digest
    assert images(album).digest == before
    (album / "notes.txt").write_text("more")
    assert images(album).digest == before
    with (album / "a.png").open("ab") as file:
        file.write(b"x")
    longer = images(album).digest
    assert longer != before
    (album / "a.png").rename(album / "aa.png")
    assert images(album).digest not in (before, longer)


def test_images_are_opened_late(album: Path) -> None:
    (album / "a.png").write_bytes(b"broken")
    first, second, *_ = images(album)
    with pytest.raises(UnreadableInput):
        first.read()
    assert second.read()


@pytest.mark.parametrize("read", [images, texts])
def test_a_source_that_is_not_there(tmp_path: Path, read: Any) -> None:
    with pytest.raises(UserError, match="does not exist") as caught:
        read(tmp_path / "nowhere")
    assert "'demo'" in str(caught.value.tip)
    assert "hf:NAME" in str(caught.value.tip)


@pytest.mark.parametrize("read", [images, texts])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a" * 5000, "File name too long"),
        ("/".join(["a" * 200] * 30), "File name too long"),
        ("a\0b", "null"),
        ("~nobody-of-that-name/x", "home folder of nobody here"),
        ("/dev/zero", "no plain file"),
    ],
)
def test_a_source_that_no_file_can_be(read: Any, source: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(source)
    assert caught.value.tip


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match="no image in") as caught:
        images(tmp_path)
    assert "'.webp'" in str(caught.value.tip)


def test_the_demo_photographs_are_all_there() -> None:
    found = images("demo")
    assert len(found) == 14
    assert [item.id for item in found] == sorted(item.id for item in found)
    for item in found:
        image = item.read()
        assert isinstance(image, Image.Image)
        assert image.mode == "RGB"
        assert min(image.size) >= 64


# --- texts


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "poem.md"
    file.write_bytes("Ünïcödé\r\nline\n".encode())
    found = texts(file)
    assert [(item.id, item.read()) for item in found] == [("poem.md", "Ünïcödé\nline\n")]
    assert (found.kind, found.tower) == ("texts", "text")


def test_files_of_one_name_in_two_folders_are_two_documents(tmp_path: Path) -> None:
    for number, name in enumerate(("a/x.txt", "b/x.txt", "c.html")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text {number}")
    found = texts(tmp_path)
    assert [(item.id, item.read()) for item in found] == [("a/x.txt", "text 0"), ("b/x.txt", "text 1")]


def test_the_stamp_follows_times_and_what_was_replaced_meanwhile_is_told(album: Path) -> None:
    before = images(album)
    first = album / before.items[0].id
    written = first.stat()
    files = before.files
    assert files is not None
    assert files.sha256(0) == hashlib.sha256(first.read_bytes()).hexdigest()
    files.check(0)
    content = first.read_bytes()
    first.write_bytes(content[:16] + content[:15:-1])  # a file that begins as an image does
    os.utime(first, ns=(written.st_atime_ns, written.st_mtime_ns + 1))
    after = images(album)
    assert after.digest == before.digest
    assert after.stamp != before.stamp
    assert images(first).stamp != before.stamp
    with pytest.raises(UserError, match="was replaced while it was measured") as caught:
        files.check(0)
    assert "--overwrite" in str(caught.value.tip)
    first.unlink()
    assert files.sha256(0) == ""
    files.check(0)  # what is gone cannot have been mixed in


def test_texts_of_other_names_have_another_stamp(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("the same words")
    one, other = (texts(tmp_path / name) for name in ("a.txt", "b.txt"))
    assert one.digest == other.digest
    assert one.stamp != other.stamp


def test_the_digest_follows_the_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("abc")
    before = texts(file).digest
    file.rename(tmp_path / "b.txt")
    assert texts(tmp_path / "b.txt").digest == before
    (tmp_path / "b.txt").write_text("abd")
    assert texts(tmp_path / "b.txt").digest != before


def test_the_mark_of_an_encoding_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert [item.read() for item in texts(tmp_path / "a.txt")] == ["abc"]


def test_an_empty_text_of_a_folder_is_left_out(tmp_path: Path) -> None:
    for name, text in {"a.txt": "", "b.txt": "abc", "c.txt": " \n"}.items():
        (tmp_path / name).write_text(text)
    assert [item.id for item in texts(tmp_path)] == ["b.txt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((content, "holds no text") for content in (b"", b" \n\t", b"\xef\xbb\xbf")),
        (b"ab\xffcd", r"is not UTF-8 \(byte 2\)"),
        (b"\0" * 3000, "holds null characters: it is no text, or UTF-16"),
        ("abc".encode("utf-16"), r"is not UTF-8 \(byte 0\)"),
    ],
)
def test_texts_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    for source in (file, tmp_path):
        with pytest.raises(UserError, match=message) as caught:
            texts(source)
        assert caught.value.tip


@pytest.mark.parametrize(
    ("name", "content", "message", "tip"),
    [
        ("a.JSON", b"[]", "JSON", "FILE,column=NAME"),
        ("a.xlsx", b"", "a table", "FILE,column=NAME"),
        ("a", b"PAR1\x15", "a Parquet file", "FILE,column=NAME"),
        ("a.html", b"<html>", "a web page", ".txt"),
        ("a.txt", b"%PDF-1.7", "a printed page", ".txt"),
        ("a.docx", b"", "a document of a word processor", ".txt"),
        ("a.txt", b"PK\x03\x04", "an archive", ".txt"),
        ("a.txt.gz", b"", "an archive", ".txt"),
        ("a.txt", b"\x89PNG", "an image", ".txt"),
    ],
)
def test_what_is_no_prose_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str, tip: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"'{tmp_path / name}' is {message}, not a text") as caught:
        texts(tmp_path / name)
    assert tip in str(caught.value.tip)


@pytest.mark.parametrize(
    ("name", "content", "message", "tip"),
    [
        ("a.txt", b"some words", "is a text, not an image", "--texts"),
        ("a.pdf", b"%PDF-1.7", "is a printed page, not an image", "JPEG, PNG or WebP"),
        ("a.png", b"%PDF-1.7", "is a printed page, not an image", "JPEG, PNG or WebP"),
        ("a.csv", b"text\na", "is a table, not an image", "--texts"),
        ("a.mp4", b"\0\0\0 ftyp", "is a video, not an image", "a folder of them"),
        ("a.gif", b"GIF89a", "is an image, but no JPEG, PNG or WebP", "convert it"),
        ("a.jpg", b"GIF89a", "is an image, but no JPEG, PNG or WebP", "convert it"),
        ("a.png", b"", "is no JPEG, PNG or WebP image", "a folder of them"),
        ("a", b"words", "is no JPEG, PNG or WebP image", "a folder of them"),
    ],
)
def test_a_file_that_is_no_image_is_told_what_it_is(
    name: str, content: bytes, message: str, tip: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        images(tmp_path / name)
    assert str(caught.value) == f"'{tmp_path / name}' {message}"
    assert tip in str(caught.value.tip)


def test_an_image_is_one_whatever_it_is_called(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.txt", format="png")
    (item,) = images(tmp_path / "a.txt")
    assert isinstance(item.read(), Image.Image)


def test_a_folder_without_images_tells_what_lies_there(tmp_path: Path) -> None:
    for name in ("a.txt", "b.pdf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        UserError, match=r"no image in '.*', only '.pdf' \(a printed page\) and '.txt' \(texts\)"
    ):
        images(tmp_path)


@pytest.mark.parametrize("name", ["a.md", "a.rst", "a.py", "a.tex", "README", "a.txt"])
def test_prose_and_code_are_texts(tmp_path: Path, name: str) -> None:
    """JSON too, in a file that is called a text."""
    (tmp_path / name).write_text('{"text": "a"}')
    assert [item.read() for item in texts(tmp_path / name)] == ['{"text": "a"}']


def test_texts_have_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diag.inputs.texts.MOST_TEXT", 9)
    (tmp_path / "a.txt").write_text("123456789")
    assert len(texts(tmp_path)) == 1
    (tmp_path / "b.txt").write_text("0")
    with pytest.raises(UserError, match=r"the texts in '.*': 0 MB of text, where 0 are the most") as caught:
        texts(tmp_path)
    assert "head -c" in str(caught.value.tip)
    (tmp_path / "a.txt").write_text("1234567890")
    with pytest.raises(UserError, match=r"'.*a\.txt': 0 MB of text"):
        texts(tmp_path / "a.txt")


def test_a_folder_of_other_texts_says_what_is_there(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.csv", "README"):
        (tmp_path / name).write_text("text")
    with pytest.raises(UserError, match=r"no text file in '.*', only '\.csv' \(a table\) and '\.jsonl'"):
        texts(tmp_path)


def test_a_folder_without_texts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text file in"):
        texts(tmp_path)


def test_the_demo_text_is_long_enough_for_real_windows() -> None:
    found = texts("demo")
    (item,) = found
    assert len(str(item.read())) > 400_000
    assert texts("demo").digest == found.digest


# --- from Python


def test_python_lists_are_inputs() -> None:
    pictures = [Image.fromarray(COLOUR), Image.fromarray(GREY)]
    found = as_inputs(pictures, "vision")
    assert [item.id for item in found] == ["0", "1"]
    assert all(item.read().mode == "RGB" for item in found)  # type: ignore[union-attr]
    assert as_inputs(pictures[:1], "vision").digest != found.digest
    words = as_inputs((text for text in ("one", "two")), "text")
    assert [(item.id, item.read()) for item in words] == [("0", "one"), ("1", "two")]
    assert as_inputs(words, "vision") is words
    assert as_inputs("demo", "text").kind == "texts"
    assert as_inputs("demo", "vision").kind == "images"


@pytest.mark.parametrize("given", [[], [1], ["text", Image.new("L", (2, 2))], 3])
def test_what_is_no_input(given: object) -> None:
    with pytest.raises(UserError, match="neither all PIL images nor all strings"):
        as_inputs(given, "vision")


def test_a_mapping_is_no_list_of_texts() -> None:
    with pytest.raises(UserError, match="neither all PIL images nor all strings"):
        as_inputs({"a": "text"}, "text")


def test_half_a_character_is_told() -> None:
    with pytest.raises(UserError, match="text 1 holds half a character") as caught:
        as_inputs(["whole", "half \udcff"], "text")
    assert caught.value.tip


def test_floats_are_black_at_0_and_white_at_1() -> None:
    fractions = (COLOUR[..., 0] / 255).astype(np.float32)
    (item,) = as_inputs([Image.fromarray(fractions)], "vision")
    np.testing.assert_array_equal(np.asarray(item.read()), np.dstack([COLOUR[..., 0]] * 3))


@pytest.mark.parametrize(
    ("values", "held"),
    [
        ([[0.0, 255.0]], "0 to 255"),
        ([[-0.5, 1.0]], "-0.5 to 1"),
        ([[0.5, float("nan")]], "nan to nan"),
        ([[0.0, float("inf")]], "0 to inf"),
    ],
)
def test_floats_on_another_scale_are_refused(values: list[list[float]], held: str) -> None:
    given = [Image.fromarray(COLOUR), Image.fromarray(np.array(values, dtype=np.float32))]
    with pytest.raises(UserError) as told:
        as_inputs(given, "vision")
    assert str(told.value) == (
        f"image 1: an image of floats (mode F) holds {held}, where 0 is black and 1 is white"
    )
    assert told.value.tip is not None
    assert "astype('uint8')" in told.value.tip


def test_one_broken_image_of_a_list_is_its_own(tmp_path: Path) -> None:
    """Opened by somebody else, it is read only now."""
    file = saved(tmp_path, Image.fromarray(np.tile(COLOUR, (20, 20, 1))))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with Image.open(file) as broken:
        found = as_inputs([Image.fromarray(COLOUR), broken], "vision")
        assert found.items[0].read()
        with pytest.raises(UnreadableInput, match="cannot read image 1: "):
            found.items[1].read()


SIMPLE = (COLOUR > 127) * np.uint8(255)
DEEP = GREY.astype(np.uint16) * 257
MADE: dict[str, tuple[Any, np.ndarray]] = {
    "colour": (lambda f: saved(f, Image.fromarray(COLOUR)), COLOUR),
    "grey": (lambda f: saved(f, Image.fromarray(GREY)), three(GREY)),
    "a transparent colour": (
        lambda f: saved(f, Image.fromarray(SIMPLE), transparency=(255, 0, 255)),
        np.where((SIMPLE == [255, 0, 255]).all(-1, keepdims=True), 0, SIMPLE),
    ),
    "a transparent grey": (
        lambda f: saved(f, Image.fromarray(GREY), transparency=100),
        three(np.where(GREY == 100, 0, GREY)),
    ),
    "a transparent bit": (
        lambda f: saved(f, Image.fromarray(GREY > 99), transparency=1),
        np.zeros((6, 8, 3)),
    ),
    "a palette": (
        lambda f: saved(f, Image.fromarray(SIMPLE).quantize(8), transparency=bytes(8)),
        np.zeros((6, 8, 3)),
    ),
    "grey and alpha": (
        lambda f: saved(f, Image.fromarray(np.dstack([GREY, ALPHA]))),
        three(GREY * (ALPHA > 0)),
    ),
    "colour and alpha": (
        lambda f: saved(f, Image.fromarray(np.dstack([COLOUR, ALPHA])), "image.webp", lossless=True),
        COLOUR * (ALPHA > 0)[..., None],
    ),
    "16 bits": (lambda f: saved(f, Image.fromarray(DEEP)), three(GREY)),
    "16 bits, a transparent grey": (
        lambda f: png_of_16_bits(f / "image.png", 0, DEEP, [100 * 257]),
        three(np.where(GREY == 100, 0, GREY)),
    ),
    "16 bits, a transparent colour": (
        lambda f: png_of_16_bits(f / "image.png", 2, SIMPLE.astype(np.uint16) * 257, [65535, 0, 65535]),
        np.where((SIMPLE == [255, 0, 255]).all(-1, keepdims=True), 0, SIMPLE),
    ),
    "ink": (
        lambda f: saved(f, Image.new("CMYK", (8, 6), (255, 255, 255, 255)), "image.jpg", quality=95),
        np.zeros((6, 8, 3)),
    ),
    "turned": (lambda f: saved(f, Image.fromarray(COLOUR), exif=turned(6)), np.rot90(COLOUR, 3)),
    "turned and transparent": (
        lambda f: saved(f, Image.fromarray(np.dstack([COLOUR, ALPHA])), exif=turned(8)),
        np.rot90(COLOUR * (ALPHA > 0)[..., None]),
    ),
}
"""Kinds of image files, and their pixels as they are looked at, worked out from the arrays."""


@pytest.mark.parametrize("kind", MADE)
def test_an_image_is_the_same_whichever_way_it_comes_in(tmp_path: Path, kind: str) -> None:
    """By its path, in a folder, in a tar, in a list of paths; opened, and opened and read before."""
    make, expected = MADE[kind]
    (tmp_path / "album").mkdir()
    file = make(tmp_path / "album")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(file, f"./{file.name}")
    with Image.open(file) as opened, Image.open(file) as read:
        read.load()
        before = read.tobytes()
        given = [file, file.parent, tmp_path / "a.tar", [file], [opened], [read], [read.copy()]]
        found = [as_inputs(one, "vision").items[0].read() for one in given]
        assert read.tobytes() == before  # it is the user's
    for image in found:
        assert isinstance(image, Image.Image)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), expected)
        np.testing.assert_array_equal(np.asarray(rgb(image)), expected)


def test_paths_are_images_in_the_order_given(tmp_path: Path) -> None:
    files = [saved(tmp_path, Image.fromarray(COLOUR), name) for name in ("b.png", "a.png")]
    found = as_inputs(files, "vision")
    assert [item.id for item in found] == [str(file) for file in files]
    files[0].touch()
    assert as_inputs(files, "vision").stamp != found.stamp
    with pytest.raises(UserError, match="does not exist"):
        as_inputs([*files, tmp_path / "c.png"], "vision")


def test_a_photograph_that_was_removed_after_it_was_opened(tmp_path: Path) -> None:
    """It is read through what is open; where nothing is any more, it is told."""
    file = saved(tmp_path, Image.fromarray(COLOUR))
    opened, closed = Image.open(file), Image.open(file)
    closed.close()
    file.unlink()
    found = as_inputs([opened, closed], "vision")
    np.testing.assert_array_equal(np.asarray(found.items[0].read()), COLOUR)
    with pytest.raises(UnreadableInput, match="cannot read image 1: "):
        found.items[1].read()
    opened.close()


def test_what_was_painted_into_an_opened_image_counts(tmp_path: Path) -> None:
    with Image.open(saved(tmp_path, Image.fromarray(COLOUR))) as image:
        before = as_inputs([image], "vision")
        image.putpixel((0, 0), (1, 2, 3))
        after = as_inputs([image], "vision")
    assert after.digest != before.digest
    read = after.items[0].read()
    assert isinstance(read, Image.Image)
    assert read.getpixel((0, 0)) == (1, 2, 3)
    wide, tall = (as_inputs([Image.new("RGB", size)], "vision") for size in ((6, 4), (4, 6)))
    assert wide.digest != tall.digest


def test_a_text_is_the_same_whichever_way_it_comes_in(tmp_path: Path, cached: Path) -> None:
    """With the mark of an encoding and line ends of other systems, in a file, a string or a data set."""
    text = "\ufeffone\r\ntwo\rthree\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    rows(cached, text=[text])
    for source in (tmp_path / "a.txt", [text], f"hf:{cached},split=train"):
        assert [item.read() for item in as_inputs(source, "text")] == ["one\ntwo\nthree\n"]


# --- Hugging Face data sets, by the name of a folder


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for a data set; what the library makes of it stays out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def rows(folder: Path, **columns: list[Any]) -> None:
    datasets.Dataset.from_dict(columns).to_parquet(folder / "train.parquet")


def test_a_data_set_of_texts_is_one_document(cached: Path) -> None:
    rows(cached, text=["one", "", " ", "two"], label=[0, 0, 1, 1])
    found = texts(f"hf:{cached},split=train")
    assert [item.read() for item in found] == ["one\n\ntwo"]
    assert found.digest == texts(f"hf:{cached},split=train").digest
    assert found.kind == "texts"


def test_a_column_can_be_chosen(cached: Path) -> None:
    rows(cached, text=["one"], other=["another"])
    found = texts(f"hf:{cached},split=train,column=other")
    assert [item.read() for item in found] == ["another"]


def test_a_data_set_of_images(cached: Path) -> None:
    for number, label in enumerate(("cat", "dog", "dog")):
        (cached / label).mkdir(exist_ok=True)
        saved(cached / label, Image.fromarray(COLOUR if number else GREY), f"{number}.png")
    source = f"hf:{cached},split=train"
    found = images(source)
    assert [item.id for item in found] == ["000000", "000001", "000002"]
    read = [np.asarray(item.read()) for item in found]
    np.testing.assert_array_equal(read[0], three(GREY))
    np.testing.assert_array_equal(read[2], COLOUR)
    assert found.digest == images(source).digest


def test_the_stamp_of_a_data_set_in_a_folder_follows_its_files(cached: Path) -> None:
    """Sizes too: the library looks at times, and only at those."""
    file = saved(cached, Image.fromarray(COLOUR), "0.png")
    written, source = file.stat(), f"hf:{cached},split=train"
    before = images(source)
    assert images(source).stamp == before.stamp
    saved(cached, Image.fromarray(GREY), "0.png")
    assert file.stat().st_size != written.st_size
    os.utime(file, ns=(written.st_atime_ns, written.st_mtime_ns))
    after = images(source)
    assert (after.digest, after.stamp == before.stamp) == (before.digest, False)


def test_a_damaged_image_in_a_data_set_is_told_by_its_row(cached: Path) -> None:
    saved(cached, Image.fromarray(COLOUR), "0.png")
    (cached / "1.png").write_bytes(b"no image")
    first, second = images(f"hf:{cached},split=train")
    assert first.read()
    with pytest.raises(UnreadableInput, match="cannot read the image in row 1"):
        second.read()


def test_a_data_set_starts_no_decoder_of_its_own(cached: Path, tmp_path: Path) -> None:
    """It would take every format that Pillow knows, stored in the table or in a file beside it."""
    saved(tmp_path, Image.fromarray(COLOUR), "a.gif")
    (tmp_path / "a.gif").rename(cached / "0.png")
    saved(cached, Image.fromarray(COLOUR), "1.png")
    content = [(cached / "0.png").read_bytes(), (cached / "1.png").read_bytes(), b"", None]
    inside = tmp_path / "inside"
    inside.mkdir()
    kind = datasets.Features({"image": datasets.Image()})
    stored = [x if x is None else {"bytes": x, "path": None} for x in content]
    table = datasets.Dataset.from_dict({"image": stored}, kind)
    table.to_parquet(inside / "train.parquet")
    (tmp_path / "bytes").mkdir()
    rows(tmp_path / "bytes", jpg=content)
    for folder in (cached, inside, tmp_path / "bytes"):
        found = images(f"hf:{folder},split=train")
        with pytest.raises(UnreadableInput, match="the image in row 0: it is no JPEG, PNG or WebP"):
            found.items[0].read()
        np.testing.assert_array_equal(np.asarray(found.items[1].read()), COLOUR)
    for place in (2, 3):
        with pytest.raises(UnreadableInput, match=f"row {place}"):
            images(f"hf:{inside},split=train").items[place].read()


def test_what_lies_beside_the_column_is_not_decoded(cached: Path, tmp_path: Path) -> None:
    """Other columns of its rows, or images where texts are asked for: they may need decoders of their own."""
    kinds = {"image": datasets.Image(), "video": datasets.Image(), "text": datasets.Value("string")}
    picture = saved(tmp_path, Image.fromarray(COLOUR)).read_bytes()
    cells = {
        "image": [{"bytes": picture, "path": None}],
        "video": [{"bytes": b"none", "path": None}],
        "text": ["a"],
    }
    datasets.Dataset.from_dict(cells, datasets.Features(kinds)).to_parquet(cached / "train.parquet")
    (item,) = images(f"hf:{cached},split=train")
    np.testing.assert_array_equal(np.asarray(item.read()), COLOUR)
    assert [item.read() for item in texts(f"hf:{cached},split=train")] == ["a"]
    with pytest.raises(UserError, match=r"column 'video' holds no text \(row 0: dict\)"):
        texts(f"hf:{cached},split=train,column=video")


def test_an_image_of_a_data_set_that_is_gone(cached: Path) -> None:
    for name in ("0.png", "1.png"):
        saved(cached, Image.fromarray(COLOUR), name)
    found = images(f"hf:{cached},split=train")
    (cached / "1.png").unlink()
    assert found.items[0].read()
    with pytest.raises(UnreadableInput, match=r"cannot read the image in row 1 '.*1\.png': No such file"):
        found.items[1].read()


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ([["a", "b"]], "list"),
        ([1], "int"),
        ([1.5], "float"),
        ([{"a": "b"}], "dict"),
        ([None, b"a"], "bytes"),
        ([True], "bool"),
    ],
)
def test_a_column_that_holds_no_text(monkeypatch: pytest.MonkeyPatch, column: list[Any], kind: str) -> None:
    table = datasets.Dataset.from_dict({"text": column})
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: table)
    with pytest.raises(UserError, match=rf"column 'text' holds no text \(row \d: {kind}\)") as caught:
        texts("hf:made/up")
    assert caught.value.tip == "give another with column=NAME"
    with pytest.raises(UnreadableInput, match="row 0"):
        images("hf:made/up,column=text").items[0].read()


def test_errors_of_the_library_are_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        column_names = ("text", "image")

        def __len__(self) -> int:
            return 1

        def select_columns(self, names: list[str]) -> Any:
            return self

        def with_format(self, kind: str) -> Any:
            return self

        def iter(self, rows: int) -> Any:
            raise ModuleNotFoundError("no decoder\nfor audio")

        def __getitem__(self, what: Any) -> Any:
            raise ModuleNotFoundError("no decoder\nfor audio")

    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: Broken())
    with pytest.raises(UserError, match=r"(?m)cannot read column 'text' of 'hf:a' \(no decoder\)$"):
        texts("hf:a")
    with pytest.raises(UnreadableInput, match=r"cannot read the image in row 0: no decoder$"):
        images("hf:a").items[0].read()


def test_a_data_set_has_a_largest_size(monkeypatch: pytest.MonkeyPatch, cached: Path) -> None:
    rows(cached, text=["12345", "67890"])
    monkeypatch.setattr("diag.inputs.texts.MOST_TEXT", 9)
    with pytest.raises(UserError, match="more than 0 MB of text") as caught:
        texts(f"hf:{cached},split=train")
    assert "split=train[:1000]" in str(caught.value.tip)


def test_a_column_without_images_is_told_row_by_row(cached: Path) -> None:
    rows(cached, image=["no", "image"])
    found = images(f"hf:{cached},split=train")
    with pytest.raises(UnreadableInput, match="row 0: column 'image' holds no image"):
        found.items[0].read()


@pytest.mark.parametrize(
    ("options", "message", "tip"),
    [
        ("", "cannot load data set", "split="),
        (",split=train,column=no", "has no column 'no'", "'text'"),
        (",split=train,colour=red", "unknown option 'colour'", "column="),
    ],
)
def test_data_sets_that_do_not_fit(cached: Path, options: str, message: str, tip: str) -> None:
    rows(cached, text=["one"])
    with pytest.raises(UserError, match=message) as caught:
        texts(f"hf:{cached}{options}")
    assert tip in str(caught.value.tip)


def test_a_data_set_that_is_not_on_this_machine() -> None:
    with pytest.raises(UserError, match="cannot load data set 'nobody/nothing'") as caught:
        images("hf:nobody/nothing")
    assert "hf download --repo-type dataset nobody/nothing" in str(caught.value.tip)


def test_a_data_set_of_empty_texts(cached: Path) -> None:
    rows(cached, text=["", " "])
    with pytest.raises(UserError, match="holds no text in column 'text'") as caught:
        texts(f"hf:{cached},split=train")
    assert caught.value.tip


def test_inputs_are_counted_and_walked() -> None:
    found = Inputs("texts", "x", [inputs.Item("a", lambda: "b")], "0")
    assert len(found) == 1
    assert [item.id for item in found] == ["a"]
