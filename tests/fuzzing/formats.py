"""Images, tars, texts and weights that are spoilt in the way of their own format."""

from __future__ import annotations

import io
import json
import tarfile
import warnings
import zlib
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fuzzing.odd import ODD

OTHER_FORMATS = ("BMP", "GIF", "TIFF", "PPM", "ICO", "EPS", "PDF", "TGA")
MODES = ("1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F")
SAVES = {
    ".jpg": ("L", "CMYK", "RGB", "1"),
    ".webp": ("RGBA", "RGB", "L"),
    ".png": ("1", "L", "LA", "P", "I;16", "I"),
}


def image(draw: Random, file: Path) -> str:
    """Another mode, size, format, number of frames, header or EXIF block."""
    way = draw.choice(("mode", "size", "format", "frames", "exif", "header", "png"))
    picture = Image.new("RGB", (24, 20), (200, 30, 90))
    made = io.BytesIO()
    kind = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}[file.suffix]
    said = way
    if way == "mode":
        mode = draw.choice(SAVES[file.suffix])
        turned = Image.new(mode, (24, 20)) if mode == "I;16" else picture.convert("L").convert(mode)
        turned.save(made, kind)
        said = f"mode {mode}"
    elif way == "size":
        size = draw.choice(((1, 1), (1, 3000), (3000, 1), (2, 2), (5000, 5000)))
        Image.new("L", size).save(made, kind)
        said = f"size {size}"
    elif way == "format":
        other = draw.choice(OTHER_FORMATS)
        picture.save(made, other)
        said = f"{other} by another name"
    elif way == "frames":
        picture.save(
            made, "GIF" if kind == "JPEG" else kind, save_all=True, append_images=[picture.rotate(90)] * 3
        )
    elif way == "exif":
        exif = Image.Exif()
        exif[0x0112] = draw.choice((0, 9, 65535, 8))
        block = bytearray(exif.tobytes())
        for _ in range(draw.choice((0, 1, 5))):
            block[draw.randrange(len(block))] = draw.randrange(256)
        picture.save(made, kind, exif=bytes(block))
        said = f"EXIF {bytes(block).hex()}"
    elif way == "header":
        picture.save(made, kind)
        content = bytearray(made.getvalue())
        for _ in range(draw.choice((1, 2, 5))):
            content[draw.randrange(min(64, len(content)))] = draw.choice((0, 255, draw.randrange(256)))
        made = io.BytesIO(bytes(content))
    else:
        picture.save(made, "PNG")
        width, height = (draw.choice((0, 1, 2**16, 2**31 - 1)) for _ in "wh")
        made, said = (
            io.BytesIO(_png_of_size(made.getvalue(), width, height)),
            f"PNG that says {width} × {height}",
        )
    file.unlink()
    file.write_bytes(made.getvalue())
    return said


def _png_of_size(content: bytes, width: int, height: int) -> bytes:
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + content[24:29]
    return content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:]


def text(draw: Random, file: Path) -> str:
    """Texts that no reader expects."""
    good = file.read_text(encoding="utf-8")
    edits = {
        "blank": " \n\t\n",
        "null characters": good.replace(" ", "\0"),
        "one character": "a",
        "one long word": "a" * 200_000,
        "one character, often": "é" * 100_000,
        "control characters": "".join(map(chr, range(1, 32))) * 50,
        "a byte order mark": "\ufeff" + good,
        "signs beyond the plane": "\U0001f469\u200d\U0001f680" * 500,
        "combining signs": "a" + "\u0301" * 20_000,
        "right to left": "\u202eabc " * 500,
        "special tokens": "<s></s><|endoftext|><unk><image> " * 100,
        "JSON lines": '{"text": "words"}\n' * 100,
        "CSV": "a,b\n1,2\n" * 100,
        "HTML": "<script>alert(1)</script>" * 100,
        "unpaired surrogate": "\ud800" * 100,
    }
    said = draw.choice(list(edits))
    file.unlink()
    file.write_bytes(edits[said].encode("utf-8", "surrogatepass"))
    return said


def tar(draw: Random, file: Path) -> str:
    """Names, kinds and sizes of members, whose checksums are right, and what a member holds."""
    with tarfile.open(file) as opened:
        members = [(member, opened.extractfile(member).read()) for member in opened if member.isfile()]
    place = draw.randrange(len(members))
    member, content = members[place]
    way = draw.choice(("name", "kind", "size", "content", "pax", "again", "format"))
    said, form = way, tarfile.GNU_FORMAT
    if way == "name":
        names = (
            "",
            "/",
            "../up.png",
            "/abs.png",
            "a\nb.png",
            "\x1b[31m.png",
            "a" * 300 + ".png",
            "./a.png",
            ".png",
        )
        member.name = draw.choice(
            (*names, "a/b/../c.png", "é.png", "\udcff.png", "x" * 90 + "/" + "y" * 90 + ".png")
        )
        said = f"name {ascii(member.name)[:50]}"
    elif way == "kind":
        member.type = draw.choice(
            (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"S", b"Z", b"x")
        )
        member.linkname = draw.choice(("nowhere", member.name, "../../etc/hostname"))
        said = f"kind {member.type!r}"
    elif way == "content":
        content = draw.choice((b"", b"words", b"\xff\xd8\xff", content[: len(content) // 2], content * 3))
        member.size = len(content)
    elif way == "pax":
        form = tarfile.PAX_FORMAT
        keys = ("size", "path", "GNU.sparse.size", "GNU.sparse.map", "hdrcharset", "mtime", "uid", "comment")
        value = draw.choice(("-1", "9" * 30, "words", "", "a" * 2000, "1,2,3"))
        member.pax_headers = {draw.choice(keys): value}
        said = f"pax {ascii(member.pax_headers)[:60]}"
    elif way == "again":
        members.append((member, content))
    elif way == "format":
        form = draw.choice((tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT))
    made = io.BytesIO()
    for number, (one, held) in enumerate(members):
        block = one.tobuf(form, errors="surrogateescape")
        if way == "size" and number == place:
            size = draw.choice((-1, -512, 2**40, 2**62, len(content) + 600, 1))
            block, said = _tar_of_size(block, size), f"size {size}"
        made.write(block + held + bytes(-len(held) % 512))
    made.write(bytes(draw.choice((0, 512, 1024, 10240))))
    file.unlink()
    file.write_bytes(made.getvalue())
    return said


def _tar_of_size(block: bytes, size: int) -> bytes:
    """A header with another size, in the GNU way where octal digits do not suffice, and its checksum."""
    plain = 0 <= size < 8**11
    field = (
        b"%011o\0" % size
        if plain
        else bytes([0xFF if size < 0 else 0x80]) + (size % 2**88).to_bytes(11, "big")
    )
    head = bytearray(block[:512])
    head[124:136], head[148:156] = field, b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + block[512:]


def safetensors(draw: Random, file: Path) -> str:
    """The header's text, its length, or the tensors themselves."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    way = draw.choice(("length", "field", "header", "tensors", "tensors"))
    if way == "length":
        new = draw.choice((0, 1, length - 1, length + 1, 2**40, 2**63))
        file.unlink()
        file.write_bytes(new.to_bytes(8, "little") + content[8:])
        return f"header of {new} bytes"
    if way == "tensors":
        tensors, said = _changed(draw, load_file(file))
        file.unlink()
        plain = {name: value.contiguous() for name, value in tensors.items() if not value.is_sparse}
        save_file(plain, file, {"format": draw.choice(("pt", "tf", "", "x"))})
        return said
    name = draw.choice([key for key in header if key != "__metadata__"])
    said = f"{name}: "
    if way == "field":
        key = draw.choice(("dtype", "shape", "data_offsets"))
        header[name][key] = new = draw.choice(
            (*ODD, [0], [-1, 2], [2**40, 2**40], [0, 0], "F8_E4M3", "BOOL", "I64")
        )
        said += f"{key} → {ascii(new)[:40]}"
    else:
        header[name] = new = draw.choice(ODD)
        said += ascii(new)[:40]
    words = json.dumps(header).encode("utf-8", "surrogatepass")
    file.unlink()
    file.write_bytes(len(words).to_bytes(8, "little") + words + data)
    return said


def torch_file(draw: Random, file: Path) -> str:
    """What a checkpoint holds: other tensors, other containers, other things."""
    state = torch.load(file, weights_only=True)
    tensors = state.get("state_dict", state)
    changed, said = _changed(draw, tensors)
    first = next(iter(tensors.values()))
    things: dict[str, Any] = {
        "a list": list(tensors.values()),
        "None": None,
        "a number": 7,
        "an empty mapping": {},
        "a tensor": first,
        "keys that are numbers": dict(enumerate(tensors.values())),
        "a mapping of words": {"a": "b"},
        "epochs only": {"epoch": 3, "optimizer": {}},
        "under ema": {"ema": tensors},
        "under model.state_dict": {"model": {"state_dict": tensors}},
        "two candidates": {"state_dict": tensors, "state_dict_ema": changed},
        "a prefix twice": {f"module.module.{name}": value for name, value in tensors.items()},
        "a prefix inside": {name.replace(".", "._orig_mod.", 1): value for name, value in tensors.items()},
        "a fraction": {"state_dict": tensors, "lr": Fraction(1, 3)},
        "a path": {"state_dict": tensors, "args": Path("a")},
        "a span of time": {"state_dict": tensors, "took": timedelta(1)},
        "nested": {"state_dict": {"state_dict": {"state_dict": tensors}}},
        "variants": {"state_dict": tensors, "attnbias_variant": draw.choice(ODD)},
        "settings": {"state_dict": tensors, "hyper_parameters": draw.choice(ODD), "args": draw.choice(ODD)},
        "state is odd": {"state_dict": draw.choice(ODD)},
    }
    if draw.random() < 0.05:
        file.unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
        return "a script"
    if draw.random() < 0.6:
        said = draw.choice(list(things))
        kept = things[said]
    else:
        kept = {**state, "state_dict": changed} if "state_dict" in state else changed
    file.unlink()
    torch.save(kept, file, _use_new_zipfile_serialization=draw.random() < 0.8)
    return said


def _changed(draw: Random, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str]:
    """Weights of which one is another, or all are."""
    name = draw.choice(list(tensors))
    value = tensors[name]
    ways = {
        "NaN": torch.full_like(value, torch.nan) if value.is_floating_point() else value,
        "infinity": torch.full_like(value, torch.inf) if value.is_floating_point() else value,
        "zeros": torch.zeros_like(value),
        "no elements": value.flatten()[:0],
        "flat": value.flatten(),
        "one number": torch.tensor(1.0),
        "a dimension more": value[None],
        "half": value[: len(value) // 2] if value.ndim else value,
        "float64": value.double(),
        "whole numbers": value.long() if value.isfinite().all() else value,
        "yes or no": value.bool(),
        "complex": value.to(torch.complex64),
        "float8": value.to(torch.float8_e4m3fn) if value.is_floating_point() else value,
        "sparse": value.to_sparse() if value.ndim else value,
        "a parameter": torch.nn.Parameter(value) if value.is_floating_point() else value,
    }
    whole = {
        "lost": {key: held for key, held in tensors.items() if key != name},
        "called otherwise": {f"{key}_" if key == name else key: held for key, held in tensors.items()},
        "one more": {**tensors, "more.weight": torch.zeros(2, 2)},
        "with a prefix": {f"model.{key}": held for key, held in tensors.items()},
        "none": {},
    }
    if draw.random() < 0.3:
        said = draw.choice(list(whole))
        return whole[said], f"{name}: {said}"
    said = draw.choice(list(ways))
    return {**tensors, name: ways[said]}, f"{name}: {said}"
