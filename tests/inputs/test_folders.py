"""What is found below a folder: through links, each circle once, and with a word for all that is left out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import Ended
from PIL import Image

from diag.errors import UnreadableInput, UserError
from diag.inputs.folders import files_below
from diag.inputs.images import images
from diag.inputs.labels import class_names
from diag.inputs.texts import texts


def names(folder: Path) -> list[str]:
    return [name for name, *_ in files_below(folder, lambda name: name.endswith(".png"))[0]]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two folders of one image each, outside of the folder that is listed."""
    for kind in ("cats", "dogs"):
        (tmp_path / "store" / kind / "deep").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "store" / kind / "deep" / f"{kind}.png")
    (tmp_path / "set").mkdir()
    return tmp_path / "store"


@pytest.fixture
def album(store: Path) -> Path:
    return store.parent / "set"


def test_linked_class_folders_are_entered(store: Path, album: Path) -> None:
    (album / "cat").symlink_to(store / "cats")
    (album / "dog").symlink_to("../store/dogs")
    (album / "dog.png").symlink_to(store / "dogs" / "deep" / "dogs.png")
    found = images(album)
    assert [item.id for item in found] == ["cat/deep/cats.png", "dog/deep/dogs.png", "dog.png"]
    assert all(item.read() for item in found)
    assert class_names([item.id for item in found][:2]) == ["cat", "dog"]


def test_one_folder_under_two_names_is_two_classes(store: Path, album: Path) -> None:
    for name in ("cat", "tiger"):
        (album / name).symlink_to(store / "cats")
    assert names(album) == ["cat/deep/cats.png", "tiger/deep/cats.png"]


def test_links_in_circles_end(store: Path, album: Path) -> None:
    (album / "own").mkdir()
    (album / "own" / "up").symlink_to("..")
    (album / "own" / "here").symlink_to(".")
    (store / "cats" / "others").symlink_to("../dogs")
    (store / "dogs" / "others").symlink_to("../cats")
    (album / "cat").symlink_to(store / "cats")
    assert names(album) == ["cat/deep/cats.png", "cat/others/deep/dogs.png"]


def test_many_links_to_each_other_are_no_explosion(album: Path) -> None:
    """Twelve folders, each with links to all: some 10^9 paths without a circle."""
    kinds = [f"{number:02d}" for number in range(12)]
    for kind in kinds:
        (album / kind).mkdir()
        (album / kind / "a.png").touch()
        for other in kinds:
            (album / kind / f"to-{other}").symlink_to(f"../{other}")
    assert 12 < len(names(album)) <= 12 + 12 * 12 * 12


def test_folders_as_deep_as_paths_go(album: Path) -> None:
    here = album
    for _ in range(1100):
        here = here / "d"
        here.mkdir()
    (here / "a.png").touch()
    (found,) = names(album)
    (here / "a.png").unlink()
    os.removedirs(here)  # what cleans up after tests goes less deep
    assert found.count("d/") == 1100


def test_what_cannot_be_read_is_told(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by its name; what nobody would take for an image is passed over."""
    Image.new("RGB", (8, 8)).save(album / "a.png")
    os.mkfifo(album / "pipe.png")
    os.mkfifo(album / "pipe")
    (album / "gone.png").symlink_to("nowhere.png")
    (album / "class").symlink_to("nowhere")
    (album / "notes.txt").symlink_to("nowhere")
    (album / "itself").symlink_to("itself")
    (album / "closed").mkdir()
    scan = os.scandir

    def guarded(folder: Path) -> object:
        if folder == album / "closed":
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    monkeypatch.setattr(os, "scandir", guarded)
    expected = {
        "class/": "a link to nothing",
        "closed/": "cannot list the folder: Permission denied",
        "gone.png": "a link to nothing",
        "itself/": "Too many levels of symbolic links",
        "pipe.png": "no plain file",
    }
    found, unreadable = files_below(album, lambda name: name.endswith(".png"))
    assert unreadable == expected
    assert [name for name, *_ in found] == sorted(["a.png", *expected])
    told = {}
    for item in images(album):
        try:
            item.read()
        except UnreadableInput as error:
            told[item.id] = str(error)
    assert told == expected


def test_a_folder_that_cannot_be_listed(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(folder: Path) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refused)
    for read in (images, texts):
        with pytest.raises(UserError, match=r"cannot list '.*': Permission denied"):
            read(album)


def test_nothing_but_what_cannot_be_read_is_no_input(album: Path) -> None:
    (album / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"no image in '.*': 'gone\.png' is a link to nothing"):
        images(album)
    (album / "gone.txt").symlink_to("nowhere.txt")
    with pytest.raises(UserError, match=r"cannot read '.*gone\.txt': a link to nothing"):
        texts(album)


def test_texts_in_linked_folders(album: Path, store: Path) -> None:
    (store / "cats" / "deep" / "A.TXT").write_text("one")
    (album / "b.txt").write_text("two")
    (album / "a").symlink_to(store / "cats")
    assert [(item.id, item.read()) for item in texts(album)] == [("a/deep/A.TXT", "one"), ("b.txt", "two")]


ODD = {os.fsdecode(b"i\xfe.png"): "i\\udcfe.png", "j\x1b[2Jk\n.png": "j\\u001b[2Jk\\u000a.png"}


def test_names_that_no_terminal_shows(attnbias: Callable[..., Ended], tmp_path: Path, album: Path) -> None:
    """They are read under their own name, and told and written under one that everything can hold."""
    for name in ODD:
        Image.new("RGB", (64, 64)).save(album / "good.png")
        os.rename(album / "good.png", album / name)
    (album / os.fsdecode(b"bad\xfd.png")).write_bytes(b"no image")
    found = images(album)
    assert [item.id for item in found] == ["bad\\udcfd.png", *sorted(ODD.values())]
    assert found.items[1].read().size == (64, 64)  # type: ignore[union-attr]
    given = (
        "probe",
        "-m",
        "demo:vit-p16",
        "--images",
        album,
        "--metrics",
        "cos_y_vself",
        "--keep-samples",
        1,
    )
    ended = attnbias(*given, "-o", "run")
    assert ended.code == 3
    assert (
        "  bad\\udcfd.png: cannot read image 'bad\\udcfd.png': it is no JPEG, PNG or WebP image"
        in ended.lines
    )


def test_a_source_whose_name_is_not_utf_8(attnbias: Callable[..., Ended], album: Path) -> None:
    for ending in ("", ".tar", ".png"):
        source = os.fsdecode(b"bad\xff") + ending
        ended = attnbias("probe", "-m", "demo:vit-p16", "--images", source, "-o", "run")
        assert ended.code == 2
        assert ended.lines[0] == f"error: the name 'bad\\udcff{ending}' is not UTF-8"
        assert len(ended.lines) == 2


def test_what_is_hidden_or_the_systems_is_passed_over(store: Path) -> None:
    """Copies of editors and thumbnails would count twice, and what macOS adds is no image at all."""
    shown = store / "cats"
    for name in (".git/x", ".ipynb_checkpoints/x", "@eaDir/x", "__MACOSX/deep/x", "deep/._cats"):
        (shown / name).parent.mkdir(parents=True, exist_ok=True)
        (shown / f"{name}.png").write_bytes(b"no image")
        (shown / f"{name}.txt").write_text("no text")
    (shown / "a.txt").write_text("a text")
    assert names(shown) == ["deep/cats.png"]
    assert [item.id for item in texts(shown)] == ["a.txt"]
    assert [item.id for item in images(shown)] == ["deep/cats.png"]


def test_folders_are_told_apart_where_entries_of_a_listing_have_no_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows `DirEntry.stat` says 0 for the device and the file."""

    class Entry:
        def __init__(self, entry: os.DirEntry[str]) -> None:
            self.of, self.name = entry, entry.name

        def __getattr__(self, name: str) -> object:
            return getattr(self.of, name)

        def stat(self) -> os.stat_result:
            mode, _, _, *rest = self.of.stat()
            return os.stat_result((mode, 0, 0, *rest))

    @contextmanager
    def scandir(folder: Path) -> Iterator[list[Entry]]:
        with listed(folder) as entries:
            yield [Entry(entry) for entry in entries]

    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "x.txt").write_text("x")
    (deep / "back").symlink_to(tmp_path)
    listed = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    found, unreadable = files_below(tmp_path, lambda name: name.endswith(".txt"))
    assert ([name for name, *_ in found], unreadable) == (["a/b/c/x.txt"], {})
