"""What Python users pass: one or several, paths as strings, and what is neither."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from diag.errors import UserError
from diag.inputs.given import as_inputs, kind_of, listed

SENTENCE = "the cat sat on the mat and looked at a photo"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two images and a text."""
    for name, grey in (("a.png", 0), ("b.JPG", 255)):
        Image.new("RGB", (4, 4), (grey, grey, grey)).save(tmp_path / name)
    (tmp_path / "c.txt").write_text("what stands in a file")
    return [tmp_path / name for name in ("a.png", "b.JPG", "c.txt")]


def test_paths_of_images_may_be_strings(files: list[Path]) -> None:
    of_paths = as_inputs(files[:2], "vision")
    of_words = as_inputs([str(file) for file in files[:2]], "vision")
    assert kind_of([str(file) for file in files[:2]]) == kind_of(files[:2]) == "vision"
    assert [item.id for item in of_words] == [item.id for item in of_paths] == [*map(str, files[:2])]
    assert of_words.digest == of_paths.digest
    with pytest.raises(UserError, match=r"'nowhere\.png' does not exist"):
        as_inputs(["nowhere.png"], "vision")


def test_paths_of_texts_are_read(files: list[Path]) -> None:
    for given in ([files[2]], [str(files[2])]):
        assert kind_of(given) == "text"
        (item,) = as_inputs(given, "text")
        assert item.read() == "what stands in a file"
    assert [item.read() for item in as_inputs(["see notes.txt"], "text")] == ["see notes.txt"]


def test_one_is_a_list_of_one(files: list[Path]) -> None:
    picture = Image.open(files[0])
    assert listed(picture) == [picture]
    assert as_inputs(picture, "vision").digest == as_inputs([picture], "vision").digest
    (item,) = as_inputs(SENTENCE, "text")
    assert item.read() == SENTENCE


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("demo", None),
        (SENTENCE, None),
        ([SENTENCE, "b"], "text"),
        (["a\nb.png"], "text"),
        ([f"{SENTENCE}.jpg"], "text"),
        (["photo.jpg", "mat"], "text"),
        ([], None),
        ([[Image.new("RGB", (2, 2))]], "vision"),
        ({"a": 1}, None),
        (3, None),
    ],
)
def test_what_something_is_meant_for(given: object, kind: str | None) -> None:
    assert kind_of(given) == kind
