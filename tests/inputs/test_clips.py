"""Which images are frames of one clip, in which order, and which of them a model gets."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from diag.errors import UnreadableInput, UserError
from diag.inputs.clips import clips
from diag.inputs.given import as_inputs
from diag.inputs.images import images


def save(folder: Path, names: list[str]) -> Path:
    """Frames whose red is their place in `names`."""
    folder.mkdir(parents=True, exist_ok=True)
    for red, name in enumerate(names):
        Image.new("RGB", (8, 8), (red, 0, 0)).save(folder / f"{name}.png")
    return folder


def reds(frames: list[Image.Image]) -> list[int]:
    return [frame.getpixel((0, 0))[0] for frame in frames]  # type: ignore[index]


def test_a_folder_for_each_clip_and_frames_by_their_numbers(tmp_path: Path) -> None:
    save(tmp_path / "run", [f"f{number}" for number in range(12)])
    save(tmp_path / "run" / "inner", ["x"])  # listed between f1 and z of the folder around it
    save(tmp_path / "walk", ["1", "2"])
    found = {clip.id: clip for clip in clips(images(tmp_path), "it")}
    assert list(found) == ["run", "run/inner", "walk"]
    assert [frame.id for frame in found["run"].frames] == [f"run/f{number}.png" for number in range(12)]
    assert reds(found["run"].read(12)) == list(range(12))


@pytest.mark.parametrize(
    ("count", "chosen"), [(1, [0]), (2, [0, 8]), (3, [0, 4, 8]), (5, [0, 2, 4, 6, 8]), (9, list(range(9)))]
)
def test_frames_are_evenly_spaced_from_first_to_last(tmp_path: Path, count: int, chosen: list[int]) -> None:
    folder = save(tmp_path / "a", [f"{number:02d}" for number in range(9)])
    (clip,) = clips(images(folder), "it")
    assert reds(clip.read(count)) == chosen
    with pytest.raises(UnreadableInput, match="its frames are too few: 9 of 10"):
        clip.read(10)


def test_one_folder_of_frames_is_one_clip(tmp_path: Path) -> None:
    folder = save(tmp_path / "jump", ["0", "1"])
    assert [clip.id for clip in clips(images(folder), "it")] == ["jump"]
    save(folder / "other", ["0"])  # beside another one it is not called as that might be
    assert [clip.id for clip in clips(images(folder), "it")] == [".", "other"]


def test_python_users_give_lists_of_frames() -> None:
    still = Image.new("RGB", (8, 8))
    found = list(clips(as_inputs([[still] * 3, (still,) * 2], "vision"), "it"))
    assert [(clip.id, len(clip.frames)) for clip in found] == [("0", 3), ("1", 2)]


def test_single_images_are_no_clips(tmp_path: Path) -> None:
    file = save(tmp_path, ["0"]) / "0.png"
    for given in ("demo", str(file), [Image.new("RGB", (8, 8))]):
        with pytest.raises(UserError, match=r"'M' takes clips, and .* gives single images") as error:
            list(clips(as_inputs(given, "vision"), "'M'"))
        assert (
            error.value.tip
            == "--images takes a folder of frames, or a folder with one of frames for each clip"
        )
