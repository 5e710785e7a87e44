"""Tars of images: what is listed without reading it, where each image lies, and what damage costs."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from commands import Ended
from PIL import Image

from diag.errors import UnreadableInput, UserError
from diag.inputs import tars
from diag.inputs.images import images

RNG = np.random.default_rng(0)


def picture(number: int, suffix: str = "png") -> bytes:
    """An image whose first pixel is its number."""
    noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    noise[0, 0] = number
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG" if suffix == "jpg" else "PNG")
    return file.getvalue()


def pack(file: Path, members: Mapping[str, bytes], *, style: int = tarfile.PAX_FORMAT) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=style) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


def number_of(image: object) -> int:
    assert isinstance(image, Image.Image)
    return int(np.asarray(image)[0, 0, 0])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three tars of three samples each, as WebDataset has them: an image, its class, its description."""
    for shard in range(3):
        members: dict[str, bytes] = {}
        for number in range(3 * shard, 3 * shard + 3):
            members[f"{number:06d}.cls"] = b"1"
            members[f"{number:06d}.png"] = picture(number)
            members[f"{number:06d}.json"] = b"{}"
        pack(tmp_path / f"{shard:05d}.tar", members)
    return tmp_path


IDS = [f"{number // 3:05d}.tar/{number:06d}.png" for number in range(9)]


def test_a_range_of_tars_is_its_images_in_order(shards: Path) -> None:
    found = images(f"{shards}/{{00000..00002}}.tar")
    assert [item.id for item in found] == IDS
    assert [number_of(item.read()) for item in found] == list(range(9))
    assert (found.kind, found.tower, len(found)) == ("images", "vision", 9)


def test_a_folder_of_tars_and_one_tar(shards: Path) -> None:
    assert [item.id for item in images(shards)] == IDS
    assert images(shards).digest == images(f"{shards}/{{00000..00002}}.tar").digest
    assert [item.id for item in images(shards / "00001.tar")] == IDS[3:6]
    assert [item.id for item in images(f"{shards}/{{00002,00000}}.tar")] == IDS[6:] + IDS[:3]


def test_loose_images_of_a_folder_come_first(shards: Path) -> None:
    (shards / "a.png").write_bytes(picture(7))
    assert [item.id for item in images(shards)] == ["a.png"]


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_nested_long_and_foreign_names(tmp_path: Path, style: int) -> None:
    deep = "/".join(["folder" * 3] * 6) + "/image.with.dots.PNG"
    names = ["./train/n01/x.png", "b/ünï.png", deep]
    file = pack(tmp_path / "a.tar", {name: picture(i) for i, name in enumerate(names)}, style=style)
    found = images(file)
    assert [item.id for item in found] == ["a.tar/train/n01/x.png", "a.tar/b/ünï.png", f"a.tar/{deep}"]
    assert [number_of(item.read()) for item in found] == [0, 1, 2]


def test_tars_of_two_folders_are_told_apart(tmp_path: Path) -> None:
    for part in ("train", "val"):
        pack(tmp_path / part / "0.tar", {"a.png": picture(1)})
    for source in (tmp_path, f"{tmp_path}/{{train,val}}/0.tar"):
        assert [item.id for item in images(source)] == ["train/0.tar/a.png", "val/0.tar/a.png"]


def test_the_stamp_follows_the_times_of_tars(shards: Path) -> None:
    before = images(shards)
    tar = sorted(shards.glob("*.tar"))[0]
    assert before.files is not None
    before.files.check(0)
    assert before.files.sha256(0) == hashlib.sha256(picture(0)).hexdigest()
    os.utime(tar, ns=(0, 0))
    assert images(shards).digest == before.digest
    assert images(shards).stamp != before.stamp
    with pytest.raises(UserError, match="was replaced while it was measured"):
        before.files.check(0)


def test_the_digest_follows_names_and_sizes(shards: Path) -> None:
    before = images(shards).digest
    assert images(shards).digest == before
    members = {f"{number:06d}.png": picture(number) for number in range(3, 6)}
    pack(shards / "00001.tar", members)
    assert images(shards).digest == before  # classes and descriptions are not looked at
    pack(shards / "00001.tar", members | {"000004.png": picture(4) + b"more"})
    longer = images(shards).digest
    assert longer != before
    (shards / "00001.tar").rename(shards / "00003.tar")
    assert images(shards).digest not in (before, longer)


def test_listing_reads_no_image(tmp_path: Path) -> None:
    """A tar of 64 GiB, most of it a hole: whoever reads it does not come back."""
    first, last = tarfile.TarInfo("huge.png"), tarfile.TarInfo("last.png")
    first.size, last.size = 2**36, len(picture(3))
    file = tmp_path / "a.tar"
    with file.open("wb") as out:
        out.write(first.tobuf())
        out.seek(2**36, 1)
        out.write(last.tobuf() + picture(3))
        out.write(bytes(-len(picture(3)) % 512 + 1024))
    found = images(file)
    assert [item.id for item in found] == ["a.tar/huge.png", "a.tar/last.png"]
    assert number_of(found.items[1].read()) == 3


def test_the_later_of_two_members_with_one_name_counts(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.tar", {"a.png": picture(1), "b.png": picture(2)})
    with tarfile.open(file, "a") as tar:
        member = tarfile.TarInfo("a.png")
        member.size = len(picture(9))
        tar.addfile(member, io.BytesIO(picture(9)))
    assert [(item.id, number_of(item.read())) for item in images(file)] == [
        ("a.tar/a.png", 9),
        ("a.tar/b.png", 2),
    ]


# --- damage


def failures(source: object) -> dict[str, str]:
    told = {}
    for item in images(str(source)):
        try:
            item.read()
        except UnreadableInput as error:
            told[item.id] = str(error)
    return told


def test_a_broken_image_is_that_images_only(tmp_path: Path) -> None:
    whole = picture(1)
    pack(tmp_path / "a.tar", {"a.png": whole, "b.png": b"no image", "c.png": whole[:50], "d.png": whole})
    told = failures(tmp_path / "a.tar")
    assert list(told) == ["a.tar/b.png", "a.tar/c.png"]
    assert told["a.tar/b.png"].startswith("cannot read image 'b.png'")


def test_links_are_told(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.tar", {"a.png": picture(1)})
    with tarfile.open(file, "a") as tar:
        for name, kind in (("b.png", tarfile.SYMTYPE), ("c.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.png"
            tar.addfile(member)
    assert failures(file) == dict.fromkeys(
        ["a.tar/b.png", "a.tar/c.png"], "a link to 'a.png': pack files, not links"
    )


@pytest.mark.parametrize("cut", ["in a member", "in a header", "between members", "in the end mark"])
def test_a_tar_that_breaks_off_keeps_what_it_has(shards: Path, cut: str) -> None:
    file = shards / "00001.tar"
    whole = file.read_bytes()
    with tarfile.open(file) as tar:
        third = tar.getmember("000005.png")
        end = tar.getmember("000005.json").offset_data + 512
    place = {
        "in a member": third.offset_data + 20,
        "in a header": third.offset + 100,
        "between members": third.offset,
        "in the end mark": end + 100,
    }[cut]
    file.write_bytes(whole[:place])
    told = failures(shards)
    readable = [item.id for item in images(shards) if item.id not in told]
    lost = [] if cut == "in the end mark" else ["00001.tar/000005.png"]
    assert readable == [name for name in IDS if name not in lost]
    assert "tar '00001.tar' is damaged after" in told["00001.tar"]
    assert set(told) <= {"00001.tar", *lost}


def test_a_file_that_is_no_tar_is_told_among_others(shards: Path) -> None:
    (shards / "00001.tar").write_bytes(RNG.bytes(4096))
    told = failures(shards)
    assert list(told) == ["00001.tar"]
    assert "damaged after 0 images" in told["00001.tar"]
    assert len(images(shards)) == 7


def with_size(file: Path, size: int) -> Path:
    """Three members, of which the second says that it has another size than it has."""
    with file.open("wb") as out:
        for name in ("a.png", "b.png", "c.png"):
            member = tarfile.TarInfo(name)
            member.size = size if name == "b.png" else len(picture(1))
            out.write(member.tobuf(format=tarfile.GNU_FORMAT))
            out.write(picture(1) + bytes(-len(picture(1)) % 512))
        out.write(bytes(1024))
    return file


IMPOSSIBLE = {
    -1: ["00001.tar/b.png", "00001.tar"],
    -512: ["00001.tar"],
    -(2**40): ["00001.tar"],
    2**40: ["00001.tar/b.png", "00001.tar"],
    2**80: ["00001.tar/b.png", "00001.tar"],
}


@pytest.mark.parametrize(("size", "lost"), IMPOSSIBLE.items())
def test_sizes_that_cannot_be_are_of_one_tar_only(shards: Path, size: int, lost: list[str]) -> None:
    with_size(shards / "00001.tar", size)
    told = failures(shards)
    assert list(told) == lost
    assert [item.id for item in images(shards) if item.id not in told] == [
        *IDS[:3],
        "00001.tar/a.png",
        *IDS[6:],
    ]


def test_an_error_of_the_library_is_of_one_tar_only(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    following = tarfile.TarFile.next

    def breaks(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
        if str(tar.name).endswith("00001.tar"):
            raise RecursionError("too many headers of headers")
        return following(tar)

    monkeypatch.setattr(tarfile.TarFile, "next", breaks)
    assert failures(shards) == {
        "00001.tar": "tar '00001.tar' is damaged after 0 images: too many headers of headers"
    }


def test_nothing_but_plain_files_is_opened_as_a_tar(shards: Path) -> None:
    os.mkfifo(shards / "00003.tar")
    (shards / "00004.tar").symlink_to("nowhere")
    told = failures(shards)
    assert list(told) == ["00003.tar", "00004.tar"]
    assert "it is no plain file" in told["00003.tar"]
    with pytest.raises(UserError, match=r"00003\.tar': it is no plain file"):
        images(shards / "00003.tar")


def test_tars_behind_a_link(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train").symlink_to(shards)
    assert [item.id for item in images(tmp_path / "set")][:9] == [f"train/{name}" for name in IDS]


def test_odd_names_of_members(tmp_path: Path) -> None:
    """They name nothing on the disk."""
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("../../up.png", "/root.png", "\xe9.png", "a\x1b[2J.png"):
            member = tarfile.TarInfo(name)
            member.size = len(picture(1))
            tar.addfile(member, io.BytesIO(picture(1)))
    found = images(file)
    names = ["../../up.png", "root.png", "\\udce9.png", "a\\u001b[2J.png"]
    assert [item.id for item in found] == [f"a.tar/{name}" for name in names]
    assert all(number_of(item.read()) == 1 for item in found)


def test_a_tar_that_vanishes_is_told_image_by_image(shards: Path) -> None:
    found = images(shards)
    (shards / "00000.tar").unlink()
    with pytest.raises(UnreadableInput, match="No such file"):
        found.items[0].read()
    assert number_of(found.items[3].read()) == 3
    (shards / "00001.tar").write_bytes((shards / "00001.tar").read_bytes()[:1600])
    with pytest.raises(UnreadableInput, match=r"'00001.tar' breaks off after \d+ of \d+ bytes"):
        found.items[3].read()


# --- what is told in two lines


@pytest.mark.parametrize(
    ("content", "tip"),
    [
        ({}, "members must end in '.jpg'"),
        ({"a.txt": b"no image"}, "members must end in '.jpg'"),
        (b"", "damaged after 0 images"),
        (b"no tar" * 200, "damaged after 0 images"),
    ],
)
def test_a_tar_without_images(tmp_path: Path, content: dict[str, bytes] | bytes, tip: str) -> None:
    file = tmp_path / "a.tar"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        pack(file, content)
    for source in (file, tmp_path):
        with pytest.raises(UserError, match="no image in") as caught:
            images(source)
        assert tip in str(caught.value.tip)
        assert "\n" not in f"{caught.value}{caught.value.tip}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{00000..00004}.tar", r"00003.tar' does not exist \(2 of 5 tars are missing\)"),
        ("x.tar", r"(?m)x.tar' does not exist$"),
        ("{3..1}.tar", "is an empty range"),
        ("{0..9999999999}.tar", "stands for more than 1,000,000 tars"),
        ("{0..%s}.tar" % ("9" * 5000), "stands for more than 1,000,000 tars"),
        ("{0..9999}-{0..9999}.tar", "stands for more than 1,000,000 tars"),
        ("{a,b}" * 64 + ".tar", "stands for more than 1,000,000 tars"),
        ("a.tar.gz", "is compressed"),
    ],
)
def test_tars_that_are_not_there(shards: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        images(f"{shards}/{name}")
    assert caught.value.tip


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("{8..10}", ["8", "9", "10"]),
        ("{08..10}", ["08", "09", "10"]),
        ("a{1..2}b{x,y}", ["a1bx", "a1by", "a2bx", "a2by"]),
        ("{x}", ["{x}"]),
        ("plain", ["plain"]),
    ],
)
def test_braces(source: str, names: list[str]) -> None:
    assert list(tars._expanded(source)) == names


# --- on the command line


def test_a_run_over_tars_tells_what_it_could_not_read(
    attnbias: Callable[..., Ended], shards: Path, tmp_path: Path
) -> None:
    pack(shards / "00001.tar", {"b.png": b"no image", "c.png": picture(4)})
    models = ("-m", "demo:vit-p16", "-m", "demo:vit-p8")
    given = (*models, "--metrics", "cos_y_vself", "--workers", "2")
    ended = attnbias("probe", *given, "--images", f"{shards}/{{00000..00002}}.tar", "-o", tmp_path / "run")
    assert ended.code == 3
    assert "1 failed:" in ended.lines  # not once for each model
    assert ended.err.count("00001.tar/b.png: cannot read image 'b.png'") == 1
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert list(manifest["failed_inputs"]) == ["00001.tar/b.png"]
    assert manifest["inputs"]["vision"]["count"] == 8
    assert manifest["plan"]["workers"] == 2


def test_an_empty_tar_is_two_lines(attnbias: Callable[..., Ended], tmp_path: Path) -> None:
    file = pack(tmp_path / "a.tar", {})
    ended = attnbias("probe", "-m", "demo:vit-p16", "--images", file)
    assert ended.code == 2
    assert ended.err.splitlines() == [
        f"error: no image in '{file}'",
        "tip: members must end in '.jpg', '.jpeg', '.png' or '.webp'",
    ]


def test_the_only_image_is_told_once(attnbias: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG no image")
    ended = attnbias("probe", "-m", "demo:vit-p16", "--images", tmp_path / "a.png", "-o", "run")
    assert ended.code == 2
    assert ended.err.count("cannot read image 'a.png'") == 1
    assert ended.lines[-1] == "tip: give images in JPEG, PNG or WebP"


def test_what_is_hidden_in_a_tar_is_passed_over(tmp_path: Path) -> None:
    """macOS packs a file of its own beside every image."""
    names = ("./a.png", "./._a.png", "__MACOSX/b.png", ".git/c.png", "../d.png")
    tar = pack(tmp_path / "x.tar", {name: picture(number) for number, name in enumerate(names)})
    assert [item.id for item in images(tar)] == ["x.tar/a.png", "x.tar/../d.png"]
